"""Dense random maps, of which one block of rows is alive at a time."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt32

from jaxlm.core import prng

ROWS = 512
"""Numbers of a leaf in a block."""
EXAMPLES = 16
"""Examples in a product with a block: always as many, since rounding depends on the number."""
AHEAD = 16
"""Blocks that are drawn at once where the machine is no CPU."""

product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def wide(g: Array) -> Array:
    """g in at least float32."""
    return g.astype(jnp.promote_types(g.dtype, jnp.float32))


def flip(x: Array, words: UInt32[Array, "..."]) -> Array:
    """x with its sign changed where the top bit of the word is set."""
    return jnp.where(lax.bitcast_convert_type(words, jnp.int32) < 0, -x, x)


def slices(g: Array, start: int | Array, size: int) -> Array:
    """`size` columns of g from `start` on."""
    return lax.dynamic_slice_in_dim(g, start, size, axis=1)


def each(function: Callable[[Any], Array], xs: Any) -> Array:
    """Maps over examples, one by one on a CPU and in groups of always as many elsewhere."""

    def grouped(xs):
        count = len(jax.tree.leaves(xs)[0])
        more = -count % EXAMPLES

        def groups(x):
            padded = jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1))
            return padded.reshape(-1, EXAMPLES, *x.shape[1:])

        found = lax.map(jax.vmap(function), jax.tree.map(groups, xs))
        return found.reshape(-1, *found.shape[2:])[:count]

    def one_by_one(xs):
        if len(jax.tree.leaves(xs)[0]) != 1:
            return lax.map(function, xs)
        # A loop of one turn is none to XLA, which then fuses, and rounds, otherwise.
        twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), xs)
        return lax.map(function, twice)[:1]

    return lax.platform_dependent(xs, cpu=one_by_one, default=grouped)


def flat(g: Array) -> Float[Array, "N n"]:
    """Gradients of one leaf, each as a row."""
    return g.reshape(len(g), math.prod(g.shape[1:]))


def scaled(x: Array, dim: int) -> Float[Array, "N dim"]:
    """x / sqrt(dim), behind a barrier: an addition fused with it would change the rounding."""
    rows = x.reshape(-1, dim)
    return lax.optimization_barrier(rows * np.asarray(1 / math.sqrt(dim), rows.dtype))


def signs(key: Array, rows: int, dim: int, dtype) -> Float[Array, "rows dim"]:
    """Random signs, 32 rows of them from each row of words."""
    count = -(-rows // 32)
    words = lax.optimization_barrier(prng.counter_bits(key, (count, dim)))
    shifts = lax.iota(jnp.uint32, 32)[None, :, None]
    drawn = flip(jnp.ones((), dtype), words[:, None, :] << shifts)
    return drawn.reshape(count * 32, dim)[:rows]


def normals(key: Array, rows: int, dim: int, dtype) -> Float[Array, "rows dim"]:
    """Standard normal numbers."""
    return prng.normal(key, (rows, dim)).astype(dtype)


def _dense(entries: Callable[..., Array], key: Array, dim: int, g: Array) -> Array:
    run = functools.partial(dense_blocks, entries, dim=dim)
    # Many small products keep a CPU's caches warm; an accelerator wants few large ones.
    return lax.platform_dependent(
        key,
        flat(g),
        cpu=functools.partial(run, ahead=1, examples=EXAMPLES),
        default=functools.partial(run, ahead=AHEAD, examples=8 * EXAMPLES),
    )


def dense_blocks(
    entries: Callable[..., Array], key: Array, g: Array, *, dim: int, ahead: int, examples: int
) -> Float[Array, "N dim"]:
    """`g @ S / sqrt(dim)`, with the rows of S drawn by blocks.

    Args:
      entries: `(key, rows, dim, dtype)` -> a block of S.
      key: of the leaf.
      g: [N, n].
      dim: columns of S.
      ahead: blocks in a step.
      examples: rows of g in a product.
    """
    count, size = g.shape
    padded = -(-count // examples) * examples
    dtype = jnp.promote_types(g.dtype, jnp.float32)

    def step(start, blocks, length, total):
        """Adds `blocks` blocks from number `start` on, the last of `length` rows."""
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(start + jnp.arange(blocks))
        draw = functools.partial(entries, rows=length, dim=dim, dtype=dtype)
        block = lax.optimization_barrier(jax.vmap(draw)(keys).reshape(blocks * length, dim))
        part = wide(slices(g, start * ROWS, blocks * length))
        part = jnp.pad(part, [(0, padded - count), (0, 0)]).reshape(-1, examples, blocks * length)
        # One product for each group of examples: a larger product would round otherwise.
        return total + lax.map(lambda x: product(x, block), part)

    full, rest = divmod(size, ROWS)
    steps, single = divmod(full, ahead)
    total = jnp.zeros((padded // examples, examples, dim), dtype)
    if steps:
        total = lax.fori_loop(0, steps, lambda i, t: step(i * ahead, ahead, ROWS, t), total)
    if single:
        first = steps * ahead
        total = lax.fori_loop(first, full, lambda i, t: step(i, 1, ROWS, t), total)
    if rest:
        total = step(full, 1, rest, total)
    return scaled(total, dim)[:count]


def gaussian(key: Array, dim: int, g: Array) -> Float[Array, "N dim"]:
    """Entries N(0, 1 / dim)."""
    return _dense(normals, key, dim, g)


def rademacher(key: Array, dim: int, g: Array) -> Float[Array, "N dim"]:
    """Entries +-1 / sqrt(dim), a bit of a counter each."""
    return _dense(signs, key, dim, g)
