"""A tap is an identity on activations that sends something out through the backward pass.

`tap(path, op, x, y, layer) -> y` stands at every use of a parameter: `op` is the operation, `x` its
input and `y` its output. Every per-example gradient follows from two factors, A made of `x` and B,
the cotangent of `y`, without being formed itself:

| op      | parameter         | per-example gradient from factors (A, B)             |
|---------|-------------------|------------------------------------------------------|
| dense   | kernel [I, O]     | sum_t A[t, :, None] * B[t, None, :]                  |
| head    | embedding [V, D]  | the transpose of dense                               |
| bias    | bias [O]          | sum_t B[t]                                           |
| scale   | scale [D]         | sum_t A[t] * B[t], A the normalised activation       |
| embed   | embedding [V, D]  | scatter-add of B[t] at row A[t]                      |

A head (or its bias) that computes only the logits of some tokens passes their ids [W] as keyword
`rows`. B then has W columns, one for each of these rows of the parameter.

`uses` lists which parameters pass a tap, how often and with which shapes. `factors` returns A and B
of all uses. `reduce` calls a function on A and B of one layer after another during the backward
pass, and keeps only its results.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.interpreters import partial_eval
from jaxtyping import Array

from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.core.programs import Program

Op = Literal["dense", "head", "bias", "scale", "embed"]

Key = tuple[str, str]
"""Path and op of a use. An embedding table that is tied to the head has two."""


def apply(
    tap: Any, path: str, op: Op, x: Array, y: Array, layer: Array | None, *, rows: Any = None
) -> Array:
    """Return `y`, through the tap if there is one."""
    if tap is None:
        return y
    return tap(path, op, x, y, layer) if rows is None else tap(path, op, x, y, layer, rows=rows)


class Use(NamedTuple):
    """How a function uses a parameter.

    Attributes:
      x, y: shapes and dtypes of input and output; ids are listed as float32.
      rows: shape of the ids of a restricted head, or None.
      stacked: whether the use is in a layer.
      times: number of uses, over all layers.
    """

    x: jax.ShapeDtypeStruct
    y: jax.ShapeDtypeStruct
    rows: jax.ShapeDtypeStruct | None
    stacked: bool
    times: int


_MARK = "tap "


class _Recorder:
    """A tap that records shapes, and names uses: one in a loop is seen once but runs often."""

    layers = None

    def __init__(self):
        self.seen: dict[Key, Use] = {}

    def __call__(self, path, op, x, y, layer, *, rows=None):
        ids = None if rows is None else jax.ShapeDtypeStruct(jnp.shape(rows), jnp.float32)
        shape = jax.ShapeDtypeStruct(x.shape, carrier(x))
        self.seen[path, op] = Use(
            shape, jax.ShapeDtypeStruct(y.shape, y.dtype), ids, layer is not None, 0
        )
        return checkpoint_name(y, f"{_MARK}{path} {op}")


def carrier(x: Any) -> Any:
    """Return the dtype of `x` in factors: float32 for ids, since integers have no cotangents."""
    return jnp.float32 if jnp.issubdtype(x.dtype, jnp.integer) else x.dtype


def uses(f: Callable[..., Array], params: Any, x: Any) -> dict[Key, Use]:
    """Return the uses of parameters that pass a tap of `f(params, x, *, tap)`."""
    recorder = _Recorder()
    traced = jax.make_jaxpr(lambda params, x: f(params, x, tap=recorder))(params, x)
    counts: Counter[str] = Counter()
    for name, times in _marks(traced.jaxpr, 1):
        counts[name] += times
    return {
        (path, op): use._replace(times=counts[f"{_MARK}{path} {op}"])
        for (path, op), use in recorder.seen.items()
    }


def read(f: Callable[..., Any], params: Any, x: Any) -> set[str]:
    """Return the paths of the parameters that the value of `f(params, x)` depends on."""
    jaxpr = jax.make_jaxpr(f)(params, x).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    pairs = zip(paths.flatten(params)[0], used, strict=False)
    return {leaf.path for leaf, is_used in pairs if is_used}


def check_ids(f: Callable[..., Any], params: Any, x: Any, name: str) -> None:
    """Raise UserError for ids that `f(params, x, *, tap)` looks up and a table does not have.

    JAX would silently clip them. Ids that are looked up in layers are not seen.
    """

    def run(params, x):
        seen: dict[str, Array] = {}

        def tap(path, op, x, y, layer, *, rows=None):
            del rows
            if op == "embed" and layer is None:
                seen[path] = x
            return y

        tap.layers = None  # type: ignore[attr-defined]
        f(params, x, tap=tap)
        return seen

    shapes = {leaf.path: jnp.shape(leaf.value) for leaf in paths.flatten(params)[0]}
    for path, ids in Program(run)(params, x).items():
        if path not in shapes or not ids.is_fully_addressable:  # no process has all of them
            continue
        size, ids = shapes[path][0], np.asarray(ids)
        wrong = np.argwhere((ids < 0) | (ids >= size))
        if len(wrong):
            at = tuple(wrong[0])
            raise UserError(
                f"{name}: ids of {path} must be from 0 to {size - 1} (got {ids[at]} in example "
                f"{at[0]}). Use the model's own tokenizer."
            )


def traces_in(equation: Any) -> Iterator[Any]:
    """Yield the traces inside an equation."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield inner


def _marks(jaxpr, times) -> Iterator[tuple[str, int]]:
    """Yield each name in a trace and how often it runs; a while loop counts as two rounds."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "name":
            yield equation.params["name"], times
        again = {"scan": equation.params.get("length"), "while": 2}.get(name, 1)
        for inner in traces_in(equation):
            yield from _marks(inner, times * again)


class Factors(NamedTuple):
    """The two factors of a use's gradient; a use in layers has the axis of layers in front.

    Attributes:
      a: [N, ...], the input; ids of an embedding are whole numbers in float32.
      b: [N, ...], the cotangent of the output, or [K, N, ...] for K cotangents.
      rows: ids [W] in float32 that the last axis of `b` stands for; None for all.
    """

    a: Any
    b: Any
    rows: Any = None


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
    """Return `y`, with a backward pass that gives the value of `rule` as cotangent of `probe`."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), probe)

    # `rule` needs all K cotangents at once, so it runs in the batching rule of the backward pass,
    # where `jax.vmap` over cotangents hands them over together.

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
    """The tap that sends out factors or, in layers and with a rule, the values of the rule.

    A probe is a zero array; its cotangent is what is sent. Probes in `layers` have the axis of
    layers in front; with a rule each is a pair (extra, probe).
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


def _probes(used: Mapping[Key, Use], stacked: bool) -> dict[Key, Factors]:
    return {
        key: _zeros(Factors(use.x, use.y, use.rows), (use.times,) if stacked else ())
        for key, use in used.items()
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
    """Return `{(path, op): Factors}` for every per-example gradient of `f`.

    Value n of `f(params, x, *, tap) -> [N, ...]` depends on row n of `x` alone. `cotangents`,
    [K, *shape of the value], stand for K backward passes at once: each `b` then has an axis K in
    front, `a` has none. None is one pass with ones. `keep` are the uses to return; None for all.
    """
    used = uses(f, params, x) if keep is None else keep
    probes = (_probes(used, True), _probes(used, False))
    value, pull = jax.vjp(lambda probes: f(params, x, tap=_Sender(*probes)), probes)
    if cotangents is None:
        layers, rest = pull(jnp.ones_like(value))[0]
    else:
        layers, rest = jax.vmap(pull, out_axes=(_axes(probes),))(cotangents)[0]
    return {**layers, **rest}


def _axes(probes):
    """Return the axes of cotangents for `vmap`: only `b` has one."""

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
    """Run the backward pass of `f` and call `rule` at every use in a layer.

    Only the factors of one layer are in memory at a time.

    Args:
      f, params, x, keep, cotangents: see `factors`.
      rule: `rule(key, a, b, layer, extra) -> (total, own)`, two pytrees of arrays, with b
        [K, N, ...]. `total` has the same shapes at every use.
      extras: for some keys a pytree of arrays with a leading axis of layers; `rule` gets the part
        of its layer.

    Returns:
      The sum of all `total` (None if no use is in a layer); `own` of every key in layers, with the
      axis of layers in front; the factors of the uses outside layers.
    """
    used = uses(f, params, x) if keep is None else keep
    extras = extras or {}
    count = cotangents.shape[0]
    total, own = None, {}
    for key, use in used.items():
        if use.stacked:
            b = jax.ShapeDtypeStruct((count, *use.y.shape), use.y.dtype)
            extra = jax.tree.map(lambda e: e[0], extras.get(key))
            layer = jnp.zeros((), jnp.int32)
            total, one = jax.eval_shape(lambda *a, key=key: rule(key, *a), use.x, b, layer, extra)
            own[key] = _zeros(one, (use.times,))

    def run(probes):
        total, own, rest = probes
        layers = {key: (extras.get(key), probe) for key, probe in own.items()}
        return f(params, x, tap=_Sender(layers, rest, total, rule))

    probes = (_zeros(total), own, _probes(used, False))
    _, pull = jax.vjp(run, probes)
    out_axes = ((None, None, _axes(probes[2:])[0]),)
    return jax.vmap(pull, out_axes=out_axes)(cotangents)[0]
