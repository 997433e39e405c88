"""Blocks of examples, all of one size, and what is computed of each.

The size follows from the shapes of one example and of the parameters. So a row has the same bits
whichever examples are given with it, in which order, and on how many devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxlm.core import adam, paths, per_example, tapped
from jaxlm.core.projection import Projector

BLOCK_BYTES = 2**29
"""What activations of a block take at most, about, by default."""
HELD_BYTES = 2**28
"""What gradients of the selected parameters may take; above that they are formed by layers."""
MOST = 16
"""Examples in a block, by default, at most."""
TOGETHER = 64
"""Examples that are projected at once, where gradients are held."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What is done with each example.

    Attributes:
      loss_fn: of one example, or with a keyword `tap` of a batch.
      select: parameters to differentiate by.
      constants: of Adam, or None.
      project: whether rows are projected layer by layer inside the backward pass.
    """

    loss_fn: Callable[..., Array]
    select: paths.Select
    constants: adam.Constants | None
    project: bool


def size_of_block(
    loss_fn: Callable[..., Array], params: Any, examples: Any, select: paths.Select
) -> tuple[int, bool]:
    """Examples in a block, a power of 2, and whether the gradients of a block are held."""
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *np.shape(a)[1:]), a.dtype), examples)
    taken = paths.flatten(paths.split(params, select)[0])[0]
    whole = 4 * sum(leaf.value.size for leaf in taken)
    lean = per_example.untapped(loss_fn, params, one, select) is None
    each = whole
    if lean:
        each = per_example.activation_bytes(tapped.uses(loss_fn, params, one))
        each += 4 * max(leaf.value[0].size if leaf.stacked else leaf.value.size for leaf in taken)
    most = min(MOST, max(1, BLOCK_BYTES // max(each, 1)))
    size = 1 << (most.bit_length() - 1)
    return size, not lean or size * whole <= HELD_BYTES


def blocks(
    work: Work, params: Any, batch: Any, projector: Any, moments: Any, size: int, mesh: Mesh | None
) -> Iterator[tuple[int, Any]]:
    """For block after block how many of its rows are real, and `_block` of it.

    The last block is filled up with copies of the last example.
    """
    count = len(jax.tree.leaves(batch)[0])
    run = functools.partial(_block, work=work)
    if mesh is not None:
        whole = NamedSharding(mesh, PartitionSpec())
        params, projector, moments = jax.device_put((params, projector, moments), whole)
        run = functools.partial(_on_mesh, work=work, mesh=mesh)
        size *= mesh.size
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        part = jax.tree.map(lambda a, rows=rows: a[rows], batch)
        if mesh is not None:
            part = jax.device_put(part, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
        yield min(size, count - start), run(params, part, projector, moments)


@functools.partial(jax.jit, static_argnames="work")
def _block(params, batch, projector, moments, *, work):
    return _rows(params, batch, projector, moments, work)


@functools.partial(jax.jit, static_argnames=("work", "mesh"))
def _on_mesh(params, batch, projector, moments, *, work, mesh):
    """A block on each device, which has all parameters."""
    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    divided = jax.shard_map(
        functools.partial(_rows, work=work),
        mesh=mesh,
        in_specs=(whole, rows, whole, whole),
        out_specs=rows,
        check_vma=False,
    )
    return divided(params, batch, projector, moments)


def _rows(params, batch, projector: Projector | None, moments, work: Work):
    """(projected rows, or the gradients of each leaf; sums over leaves; losses)."""
    examples, segments = batch
    extras = steps = None
    if work.constants is not None:
        first, second, steps = moments
        extras = list(zip(first, second, strict=True))

    def rule(gradient, extra, shared):
        seed, steps = shared
        g = gradient.formed()
        sums, g = _transformed(g, extra, steps, work.constants)
        if not work.project:
            return sums, g
        here = dataclasses.replace(projector, seed=seed)
        return {**sums, "rows": here.leaf(gradient.path, gradient.layer, g)}, ()

    seed = projector.seed if projector is not None and work.project else None
    found = per_example.reduce(
        work.loss_fn,
        params,
        examples,
        rule,
        select=work.select,
        extras=extras,
        shared=(seed, steps),
        segments=segments,
    )
    sums = dict(found.total)
    skipped = (sums["bad"] > 0) | (sums["nonzero"] == 0) | ~jnp.isfinite(found.losses)

    def kept(g):
        return jnp.where(skipped.reshape(-1, *[1] * (g.ndim - 1)), 0, g)

    rows = kept(sums.pop("rows")) if work.project else [kept(g) for g in found.own]
    return rows, {**sums, "skipped": skipped, "loss": found.losses}


def _transformed(g, extra, steps, constants):
    """Sums over one leaf for each example, and Adam's step on g, or g."""
    over = tuple(range(1, g.ndim))
    count = functools.partial(jnp.sum, axis=over, dtype=jnp.float32)
    sums = {
        "bad": count(~jnp.isfinite(g)),
        "nonzero": count(g != 0),
        "square": jnp.square(g).sum(over),
        "eps": jnp.zeros(len(g), jnp.float32),
    }
    if constants is not None:
        g, small = adam.step(g, extra[0][None], extra[1][None], steps, constants)
        sums["eps"] = count(small)
    return sums, g
