"""A tap is an identity on activations that sends something out through the backward pass.

`tap(path, op, x, y, layer) -> y` stands at every place where a parameter is used: `x` goes in, `y`
comes out, `op` says how. `factors` uses it to return, from one backward pass, the two factors of
every per-example gradient; none of the gradients themselves is formed.

| op      | parameter         | per-example gradient from factors (A, B)             |
|---------|-------------------|------------------------------------------------------|
| dense   | kernel [I, O]     | sum_t A[t, :, None] * B[t, None, :]                  |
| head    | embedding [V, D]  | the transpose of dense                               |
| bias    | bias [O]          | sum_t B[t]                                           |
| scale   | scale [D]         | sum_t A[t] * B[t], A the normalised activation       |
| embed   | embedding [V, D]  | scatter-add of B[t] at row A[t]                      |
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

Op = Literal["dense", "head", "bias", "scale", "embed"]


@runtime_checkable
class Tap(Protocol):
    """What a tap is; the leading axis of `layers`, a pytree, is scanned with the layers."""

    layers: Any

    def __call__(self, path: str, op: Op, x: Array, y: Array, layer: Array | None) -> Array: ...


def apply(tap: Tap | None, path: str, op: Op, x: Array, y: Array, layer: Array | None) -> Array:
    """Returns `y`, through the tap if there is one."""
    return y if tap is None else tap(path, op, x, y, layer)


@jax.custom_vjp
def _probe(y, x, probe_x, probe_y):
    del x, probe_x, probe_y
    return y


def _probe_forward(y, x, probe_x, probe_y):
    del probe_x, probe_y
    return y, x


def _probe_backward(x, cotangent):
    return cotangent, jnp.zeros_like(x), x, cotangent


_probe.defvjp(_probe_forward, _probe_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _FactorTap:
    layers: dict[str, tuple[Array, Array]]
    rest: dict[str, tuple[Array, Array]]

    def __call__(self, path, op, x, y, layer):
        probe_x, probe_y = (self.rest if layer is None else self.layers)[path]
        return _probe(y, x.astype(probe_x.dtype), probe_x, probe_y)


class _ShapeTap:
    """Records the shapes that pass; used under `eval_shape`, where no value exists."""

    layers = None

    def __init__(self):
        self.seen: dict[bool, dict[str, tuple[Any, Any]]] = {True: {}, False: {}}

    def __call__(self, path, op, x, y, layer):
        width = jnp.float32 if jnp.issubdtype(x.dtype, jnp.integer) else x.dtype
        self.seen[layer is not None][path] = (
            jax.ShapeDtypeStruct(x.shape, width),
            jax.ShapeDtypeStruct(y.shape, y.dtype),
        )
        return y


def factors(
    f: Callable[..., Array], params: Any, x: Any, *, num_layers: int, cotangent: Array | None = None
) -> dict[str, tuple[Array, Array]]:
    """Returns the two factors of every per-example gradient of `f`.

    Args:
      f: `f(params, x, *, tap) -> [N, ...]`, example n depending on row n of `x` alone.
      params: the parameters.
      x: a batch, any pytree.
      num_layers: length of the scan over layers.
      cotangent: like f's value; ones if None.

    Returns:
      `{path: (A, B)}` with A what entered and B the gradient with respect to what left the
      parameter's operation, both with the batch axis first, and the layer axis before it under
      `layers`. Ids of an embedding come back as exact integers in float32.
    """
    shapes = _ShapeTap()
    out = jax.eval_shape(lambda p, v: f(p, v, tap=shapes), params, x)

    def zeros(stacked: bool):
        lead = (num_layers,) if stacked else ()
        return jax.tree.map(lambda s: jnp.zeros(lead + s.shape, s.dtype), shapes.seen[stacked])

    probes = _FactorTap(zeros(True), zeros(False))
    _, pull = jax.vjp(lambda tap: f(params, x, tap=tap), probes)
    (found,) = pull(jnp.ones(out.shape, out.dtype) if cotangent is None else cotangent)
    return {**found.layers, **found.rest}
