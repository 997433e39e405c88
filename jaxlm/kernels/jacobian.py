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
from jaxtyping import Array

from jaxlm.core import paths


def as_slices(leaf: paths.Leaf, value: Array, lead: int) -> Array:
    """Return an array of `lead` axes and then the axes of a leaf as [..., S, p]."""
    count = leaf.value.shape[0] if leaf.stacked else 1
    return value.reshape(*value.shape[:lead], count, -1 if value.size else 0)


def gradients(
    f: Callable[..., Array], params: Any, x: Any, select: paths.Select = None
) -> list[Array]:
    """Return the gradients of f's outputs at every example, each example by itself.

    For every selected leaf, in the order of the tree, [N, C, S, p]: S layers of p entries where the
    leaf is stacked, else S = 1.
    """
    taken, rest = paths.split(params, select)

    def one(row):
        batch = jax.tree.map(lambda a: a[None], row)
        value, pull = jax.vjp(lambda chosen: f(paths.merge(chosen, rest), batch)[0], taken)
        return jax.vmap(pull)(jnp.eye(value.shape[0], dtype=value.dtype))[0]

    with jax.default_matmul_precision("highest"):
        by_leaf = jax.vmap(one)(x)
    pairs = zip(paths.flatten(taken)[0], jax.tree.leaves(by_leaf), strict=True)
    return [as_slices(leaf, value, 2) for leaf, value in pairs]
