"""Blocks of examples, all of one size, and what is computed of each.

The size follows from the shapes of one example and of the parameters. So a row has the same bits
whichever examples are given with it, in which order, and on how many devices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxlm.core import paths, taps
from jaxlm.core.programs import Program
from jaxlm.gradients import adam, per_example
from jaxlm.gradients.projection import Projector

CACHE_BYTES, BLOCK_BYTES = 2**27, 2**31
"""What activations of a block take at most, about, by default: on a CPU, and elsewhere."""
HELD_BYTES = 2**28
"""What gradients of the selected parameters may take; above that they are formed by layers."""
TOGETHER = 64
"""Examples that are projected at once, where gradients are held, and at most in a block."""


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
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), examples)
    taken = paths.flatten(paths.split(params, select)[0])[0]
    whole = 4 * sum(leaf.value.size for leaf in taken)
    lean = per_example.untapped(loss_fn, params, one, select) is None
    each = whole
    if lean:
        each = per_example.activation_bytes(taps.uses(loss_fn, params, one))
        each += 4 * max(math.prod(leaf.value.shape[leaf.stacked :]) for leaf in taken)
    room = CACHE_BYTES if jax.default_backend() == "cpu" else BLOCK_BYTES
    most = min(TOGETHER, max(1, room // max(each, 1)))
    size = 1 << (most.bit_length() - 1)
    return size, not lean or size * whole <= HELD_BYTES


def groups(
    work: Work, params: Any, batch: Any, projector: Any, moments: Any, size: int, mesh: Mesh | None
) -> Iterator[tuple[Any, dict[str, Array]]]:
    """(features, sums) of `_rows` of group after group of examples, without what fills it up.

    A group is what is projected at once, some blocks of `size` examples. The last block of all is
    filled up with copies of the last example. On a mesh the groups go round its devices, each of
    which runs the same program as a single one would.
    """
    count = len(jax.tree.leaves(batch)[0])
    at_once = size * max(1, TOGETHER // size)
    devices = [None] if mesh is None else list(mesh.local_devices)
    arguments = (params, projector, moments)
    program = Program(functools.partial(_rows, work))
    placed = [arguments if d is None else jax.device_put(arguments, d) for d in devices]
    for number, first in enumerate(range(0, count, at_once)):
        at = number % len(devices)
        params, projector, moments = placed[at]
        found = []
        for start in range(first, min(first + at_once, count), size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            part = jax.tree.map(lambda a, rows=rows: a[rows], batch)
            part = part if devices[at] is None else jax.device_put(part, devices[at])
            found.append(program(params, part, projector, moments))
        features, sums = jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)
        if not work.project:
            features = _joined(features, params, work.select, projector)
        per_row = len(sums["loss"]) // (size * len(found))
        real = per_row * min(at_once, count - first)
        result = jax.tree.map(lambda a, real=real: a[:real], (features, sums))
        yield result if len(devices) == 1 else jax.device_put(result, devices[0])


def _joined(leaves, params, select, projector):
    """Features from the gradients of each leaf."""
    if projector is None:
        return jnp.concatenate([g.reshape(len(g), -1) for g in leaves], axis=1)
    structure = jax.tree.structure(paths.split(params, select)[0])
    return projector.project(jax.tree.unflatten(structure, leaves))


def _rows(work: Work, params, batch, projector: Projector | None, moments):
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
        assert projector is not None
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
