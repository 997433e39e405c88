"""A tap is an identity on activations that sends something out through the backward pass.

`tap(path, op, x, y, layer) -> y` stands at every place where a parameter is used: `x` goes in, `y`
comes out, `op` says how. From what passes there and its cotangent follows every per-example
gradient; none of the gradients themselves is formed:

| op      | parameter         | per-example gradient from factors (A, B)             |
|---------|-------------------|------------------------------------------------------|
| dense   | kernel [I, O]     | sum_t A[t, :, None] * B[t, None, :]                  |
| head    | embedding [V, D]  | the transpose of dense                               |
| bias    | bias [O]          | sum_t B[t]                                           |
| scale   | scale [D]         | sum_t A[t] * B[t], A the normalised activation       |
| embed   | embedding [V, D]  | scatter-add of B[t] at row A[t]                      |

A head and its bias that give some tokens alone have the keyword `rows`, ids [W] of those; B then
has W columns, which belong to these rows of the parameter.

`factors` returns A and B of all uses. `reduce` calls a function on A and B of one layer after
another during the backward pass, and keeps only what that returns.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from jaxlm.core.tapped import Key, Use, carrier, uses

Op = Literal["dense", "head", "bias", "scale", "embed"]


@runtime_checkable
class Tap(Protocol):
    """What a tap is; the leading axis of `layers`, a pytree, is scanned with the layers.

    A tap that is to see restricted heads takes a keyword `rows=None`.
    """

    layers: Any

    def __call__(self, path: str, op: Op, x: Array, y: Array, layer: Array | None) -> Array: ...


def apply(
    tap: Any, path: str, op: Op, x: Array, y: Array, layer: Array | None, *, rows: Any = None
) -> Array:
    """Returns `y`, through the tap if there is one."""
    if tap is None:
        return y
    return tap(path, op, x, y, layer) if rows is None else tap(path, op, x, y, layer, rows=rows)


class Factors(NamedTuple):
    """What determines the gradient of a use, with the layer axis in front where it is in a layer.

    Attributes:
      a: [N, ...], what went in; ids of an embedding as exact integers in float32.
      b: [N, ...], the cotangent of what came out; behind an axis of cotangents where there are
        several.
      rows: ids [W] in float32 that the last axis of `b` stands for, or None for all.
    """

    a: Array
    b: Array
    rows: Array | None = None


@jax.custom_vjp
def _send(y, x, rows, probe):
    del x, rows, probe
    return y


def _send_forward(y, x, rows, probe):
    del probe
    return y, (x, rows)


def _send_backward(kept, cotangent):
    x, rows = kept
    ids = None if rows is None else rows.astype(jnp.float32)
    return cotangent, None, None, Factors(x.astype(carrier(x)), cotangent, ids)


_send.defvjp(_send_forward, _send_backward)


def _send_reduced(rule, key, y, x, layer, extra, probe):
    """`y`, whose backward pass gives `rule`'s value as the cotangent of `probe`."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), probe)

    @custom_vmap
    def reduced(x, cotangent, layer, extra):
        del x, cotangent, layer, extra
        return _zeros(shapes)

    @reduced.def_vmap
    def _all(size, batched, x, cotangents, layer, extra):
        assert not any(jax.tree.leaves((batched[0], *batched[2:])))
        if not batched[1]:
            cotangents = jnp.broadcast_to(cotangents[None], (size, *cotangents.shape))
        out = rule(key, x, cotangents, layer, extra)
        return out, jax.tree.map(lambda _: False, out)

    @jax.custom_vjp
    def send(y, x, layer, extra, probe):
        del x, layer, extra, probe
        return y

    def forward(y, x, layer, extra, probe):
        del probe
        return y, (x, layer, extra)

    def backward(kept, cotangent):
        x, layer, extra = kept
        return cotangent, None, None, None, reduced(x, cotangent, layer, extra)

    send.defvjp(forward, backward)
    return send(y, x, layer, extra, probe)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sender:
    """Sends factors, or in layers what `rule` makes of them.

    Attributes:
      layers: for each key a probe, behind the axis of layers; with a rule (extra, probe).
      rest: probes outside layers.
      total: probe of the sum over layers.
      rule: or None.
    """

    layers: dict[Key, Any]
    rest: dict[Key, Any]
    total: Any = None
    rule: Any = dataclasses.field(default=None, metadata={"static": True})

    def __call__(self, path, op, x, y, layer, *, rows=None):
        key = (path, op)
        probes = self.rest if layer is None else self.layers
        if key not in probes:
            return y
        x = lax.stop_gradient(x)
        if layer is None or self.rule is None:
            return _send(y, x, rows, probes[key])
        extra, probe = probes[key]
        probe = (self.total, probe)
        return _send_reduced(self.rule, key, y, x, layer, lax.stop_gradient(extra), probe)


def _zeros(shapes, lead=()):
    return jax.tree.map(lambda s: jnp.zeros((*lead, *s.shape), s.dtype), shapes)


def _probes(found: Mapping[Key, Use], stacked: bool) -> dict[Key, Factors]:
    return {
        key: _zeros(Factors(use.x, use.y, use.rows), (use.count,) if stacked else ())
        for key, use in found.items()
        if use.stacked == stacked
    }


def factors(
    f: Callable[..., Array],
    params: Any,
    x: Any,
    *,
    cotangents: Array | None = None,
    keep: Mapping[Key, Use] | None = None,
) -> dict[Key, Factors]:
    """Returns the two factors of every per-example gradient of `f`.

    Args:
      f: `f(params, x, *, tap) -> [N, ...]`, example n depending on row n of `x` alone.
      params: the parameters.
      x: a batch, any pytree.
      cotangents: [K, *shape of f's value], for K backward passes at once; None for one pass, with
        ones.
      keep: the uses of which to return factors; all of `uses(f, params, x)` if None.

    Returns:
      `{(path, op): Factors}`. With `cotangents` each `b` has an axis K in front; `a` has not, since
      it is the same for all.
    """
    found = uses(f, params, x) if keep is None else keep
    probes = (_probes(found, True), _probes(found, False))
    value, pull = jax.vjp(lambda probes: f(params, x, tap=_Sender(*probes)), probes)
    if cotangents is None:
        layers, rest = pull(jnp.ones_like(value))[0]
    else:
        layers, rest = jax.vmap(pull, out_axes=(_axes(probes),))(cotangents)[0]
    return {**layers, **rest}


def _axes(probes):
    """Where the axis of cotangents is: only in `b`."""

    def at(part):
        return {key: Factors(None, 0, None) for key in part}

    return tuple(at(part) for part in probes)


def reduce(
    f: Callable[..., Array],
    params: Any,
    x: Any,
    rule: Callable[..., tuple[Any, Any]],
    *,
    cotangents: Array,
    extras: Mapping[Key, Any] | None = None,
    keep: Mapping[Key, Use] | None = None,
) -> tuple[Any, dict[Key, Any], dict[Key, Factors]]:
    """Runs the backward pass of `f` and calls `rule` at every use in a layer, one layer alive.

    Args:
      f, params, x, keep: of `factors`.
      rule: `rule(key, a, b, layer, extra) -> (total, own)` with b [K, N, ...] for all cotangents
        and pytrees of arrays as values; `total` has the same shapes at every use.
      cotangents: [K, *shape of f's value].
      extras: for some keys a pytree of arrays with a leading axis of layers, of which `rule` gets
        the layer's part.

    Returns:
      The sum of all `total` (None if nothing is used in a layer); for every key in layers its
      `own`, behind the axis of layers; and the factors of the uses outside layers.
    """
    found = uses(f, params, x) if keep is None else keep
    extras = extras or {}
    count = cotangents.shape[0]
    total, own = None, {}
    for key, use in found.items():
        if use.stacked:
            b = jax.ShapeDtypeStruct((count, *use.y.shape), use.y.dtype)
            extra = jax.tree.map(lambda e: e[0], extras.get(key))
            layer = jnp.zeros((), jnp.int32)
            total, one = jax.eval_shape(lambda *a, key=key: rule(key, *a), use.x, b, layer, extra)
            own[key] = _zeros(one, (use.count,))

    def run(probes):
        total, own, rest = probes
        layers = {key: (extras.get(key), probe) for key, probe in own.items()}
        return f(params, x, tap=_Sender(layers, rest, total, rule))

    probes = (_zeros(total), own, _probes(found, False))
    _, pull = jax.vjp(run, probes)
    out_axes = ((None, None, _axes(probes[2:])[0]),)
    return jax.vmap(pull, out_axes=out_axes)(cotangents)[0]
