"""Kernels from the gradients themselves: any function, any kind.

All gradients of the examples at hand are formed, [N, C, P] numbers, and contracted leaf by leaf.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core import paths
from jaxlm.core.programs import held
from jaxlm.kernels import gram
from jaxlm.kernels.arguments import features_of


def row_of(f: Callable[..., Array], params: Any, row: Any) -> Float[Array, "C"]:
    """f's value at one example, by a batch of one."""
    return f(params, jax.tree.map(lambda a: a[None], row))[0]


def as_slices(leaf: paths.Leaf, value: Array, lead: int) -> Array:
    """An array like a leaf, behind `lead` axes, as [..., S, p]."""
    head = value.shape[:lead]
    count = leaf.value.shape[0] if leaf.stacked else 1
    return value.reshape(*head, count, -1 if value.size else 0)


def gradients(
    f: Callable[..., Array], params: Any, x: Any, select: paths.Select = None
) -> list[Array]:
    """The gradients of f's outputs at every example, each example by itself.

    Args:
      f: `f(params, x) -> [N, C]`.
      params: any pytree.
      x: a pytree of arrays whose axis 0 is N.
      select: parameters to differentiate by.

    Returns:
      For every selected leaf, in the order of the tree, [N, C, S, p]: S layers of p numbers where
      the leaf is stacked, else S = 1.
    """
    taken, rest = paths.split(params, select)

    def one(row):
        value, pull = jax.vjp(lambda chosen: row_of(f, paths.merge(chosen, rest), row), taken)
        return jax.vmap(pull)(jnp.eye(value.shape[0], dtype=value.dtype))[0]

    with jax.default_matmul_precision("highest"):
        found = jax.vmap(one)(x)
    pairs = zip(paths.flatten(taken)[0], jax.tree.leaves(found), strict=True)
    return [as_slices(leaf, value, 2) for leaf, value in pairs]


def jacobian_contraction(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    kind: str = "sgd",
    trace_axes: Sequence[int] = (),
    diagonal_axes: Sequence[int] = (),
    select: paths.Select = None,
    sign_threshold: float | int | None = None,
    adam_state: Any = None,
    b1: float | int = 0.9,
    b2: float | int = 0.999,
    eps: float | int = 1e-8,
) -> Array:
    """The kernel from all gradients, formed and contracted.

    Time is that of (N1 + N2) C backward passes and of a product of [N1 C, P] with [P, N2 C]; the
    gradients are held, once where `x2` is None. It makes no assumption about f, and is the method
    of choice for few outputs, long sequences and small models. Pure; `jax.jit` is the caller's.

    Args:
      f: `f(params, x) -> [N, C]`, row n depending on example n alone.
      params: any pytree of floats.
      x1, x2: pytrees of arrays whose axis 0 is N1 and N2; `x2=None` stands for `x1`.
      kind, trace_axes, diagonal_axes, select, sign_threshold, adam_state, b1, b2, eps: see `ntk`.

    Returns:
      [N1, C, N2, C]; traced [N1, N2]; diagonal [N1, N2, C]. float32, or float64 for gradients of
      that dtype.

    >>> f = lambda params, x: x @ params
    >>> jacobian_contraction(f, jnp.ones((2, 1)), jnp.eye(2), trace_axes=(-1,)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]

    References: Novak et al., "Fast Finite Width Neural Tangent Kernel", arXiv:2206.08720 (Jacobian
    contraction).
    """
    over = gram.axes(trace_axes, diagonal_axes)
    f, params = held(f, params)
    features = features_of(kind, params, select, sign_threshold, adam_state, b1, b2, eps)
    return block(f, params, x1, x2, features, over, select)


def block(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any,
    features: gram.Features,
    over: gram.Axes,
    select: paths.Select,
) -> Array:
    """`jacobian_contraction` of checked arguments."""
    first = gradients(f, params, x1, select)
    left = features.left(first)
    if x2 is not None:
        return gram.contract(left, features.right(gradients(f, params, x2, select)), over)
    if features.symmetric:
        return gram.contract_self(left, over)
    return gram.contract(left, features.right(first), over)
