"""Norms by group, for perturbations that are rescaled by them: each layer, "embed", and "head"."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlm.core import paths
from jaxlm.zo.estimators import spsa
from jaxlm.zo.samplers import Gaussian, Sampler
from jaxlm.zo.structured import group, layer_blocks


def tree_norms(tree: Any, select: paths.Select = None) -> dict[str, Array]:
    r"""$\|x_g\|_2$ of each group of a tree: of parameters, or of a gradient.

    Returns:
      Scalars, and [L] for "layers", a stack or a list of them; what `variance_modified` takes.
    """
    takes = paths.leaf_predicate(select)
    leaves = [leaf for leaf in paths.flatten(tree)[0] if takes(leaf.path, leaf.value)]
    depth = _depth(leaves)
    squares: dict[str, Array] = {}
    for leaf in leaves:
        wide = leaf.value.astype(jnp.promote_types(leaf.value.dtype, jnp.float32))
        square = jnp.square(wide).sum(tuple(range(1 if leaf.stacked else 0, wide.ndim)))
        name, layer = group(leaf.path), paths.identity(leaf.path, leaf.layer)[1]
        if layer is not None:
            square = jnp.zeros(depth, square.dtype).at[layer].set(square)
        squares[name] = squares[name] + square if name in squares else square
    return {name: jnp.sqrt(square) for name, square in squares.items()}


def _depth(leaves: list[paths.Leaf]) -> int:
    """How many layers there are, in a stack or in a list; 0 where there are none."""
    listed = (paths.identity(leaf.path, leaf.layer)[1] for leaf in leaves if not leaf.stacked)
    found = {layer + 1 for layer in listed if layer is not None}
    return max(found | {leaf.value.shape[0] for leaf in leaves if leaf.stacked}, default=0)


def probed_norms(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    key: Array,
    select: paths.Select = None,
    base: Sampler = Gaussian(),
    **options: Any,
) -> dict[str, Array]:
    r"""Norms of the gradient of each group, by forward passes: $|g|$ of a z on that group alone.

    Two forward passes a group. One draw of $|g| = |z\cdot\nabla_g L|$ has the size of
    $\|\nabla_g L\|$ and a spread as large; options are those of `spsa`.

    References: arXiv:2305.17333, proposition 1.
    """
    takes, floats = paths.path_predicate(select), paths.leaf_predicate(select)
    leaves = [leaf for leaf in paths.flatten(params)[0] if floats(leaf.path, leaf.value)]
    found = {}
    depth = _depth(leaves)
    alone = {group(leaf.path) for leaf in leaves} - ({paths.LAYERS} if depth else set())
    for name in sorted(alone):

        def chosen(path, name=name):
            return takes(path) and group(path) == name

        est = spsa(loss_fn, params, *args, key=key, select=chosen, sampler=base, **options)
        found[name] = jnp.abs(est.projected_grad).mean()
    if depth:
        blocks = layer_blocks(depth, base=base)

        def one(layer):
            est = spsa(
                loss_fn,
                params,
                *args,
                key=key,
                select=lambda path: takes(path) and group(path) == paths.LAYERS,
                sampler=dataclasses.replace(blocks, active=layer),
                **options,
            )
            return jnp.abs(est.projected_grad).mean()

        found[paths.LAYERS] = lax.map(one, jnp.arange(depth))
    return found
