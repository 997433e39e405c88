"""Method "jacobian": form the gradients of all examples of a block, and contract them.

Time is that of (N1 + N2) C backward passes and of a product of [N1 C, P] with [P, N2 C]. Nothing is
assumed about f. It is the method of choice for few outputs, long sequences and small models.

References: Novak et al., "Fast Finite Width Neural Tangent Kernel", arXiv:2206.08720 (Jacobian
contraction).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core import paths
from jaxlm.kernels.contraction import KernelSpec, contract, contract_self


def row_of(f: Callable[..., Array], params: Any, row: Any) -> Float[Array, "C"]:
    """Return f at one example, called with a batch of one."""
    return f(params, jax.tree.map(lambda a: a[None], row))[0]


def as_slices(leaf: paths.Leaf, value: Array, lead: int) -> Array:
    """Return an array of `lead` axes and then the axes of a leaf as [..., S, p]."""
    count = leaf.value.shape[0] if leaf.stacked else 1
    return value.reshape(*value.shape[:lead], count, -1 if value.size else 0)


def gradients(
    f: Callable[..., Array], params: Any, x: Any, select: paths.Select = None
) -> list[Array]:
    """Return the gradients of f's outputs at every example, each example by itself.

    Args:
      f: `f(params, x) -> [N, C]`.
      params: any pytree.
      x: a pytree of arrays whose axis 0 is N.
      select: parameters to differentiate by.

    Returns:
      For every selected leaf, in the order of the tree, [N, C, S, p]: S layers of p entries where
      the leaf is stacked, else S = 1.
    """
    taken, rest = paths.split(params, select)

    def one(row):
        value, pull = jax.vjp(lambda chosen: row_of(f, paths.merge(chosen, rest), row), taken)
        return jax.vmap(pull)(jnp.eye(value.shape[0], dtype=value.dtype))[0]

    with jax.default_matmul_precision("highest"):
        by_leaf = jax.vmap(one)(x)
    pairs = zip(paths.flatten(taken)[0], jax.tree.leaves(by_leaf), strict=True)
    return [as_slices(leaf, value, 2) for leaf, value in pairs]


def block(f: Callable[..., Array], params: Any, x1: Any, x2: Any, spec: KernelSpec) -> Array:
    """Return the kernel of a block of examples; `x2=None` means `x1`."""
    first, kind = gradients(f, params, x1, spec.select), spec.kind
    left = kind.left(first)
    if x2 is None and kind.symmetric:
        return contract_self(left, spec.over)
    second = first if x2 is None else gradients(f, params, x2, spec.select)
    return contract(left, kind.right(second), spec.over)
