"""Random linear maps from the numbers of one leaf to `dim`, whose matrix is never stored.

Each is a function `(key, dim, g [N, ...]) -> [N, dim]` with E<Sx, Sy> = <x, y>. A leaf is read in
blocks along its flat index. The randomness of block i is drawn from `fold_in(key, i)`, and blocks
are added in order. So a row of the result depends, to the last bit, only on the key and on the same
row of `g`, and not on the batch or its sharding.

Variance and cost, for unit vectors with cosine c:

| map         | Var <Sx, Sy>                                    | operations per number     |
|-------------|-------------------------------------------------|---------------------------|
| gaussian    | (1 + c^2) / dim                                 | 2 dim, dim normal numbers |
| rademacher  | (1 + c^2 - 2 sum_i x_i^2 y_i^2) / dim           | 2 dim, dim / 32 words     |
| countsketch | at most that of rademacher, with heavier tails  | 2                         |
| srht        | about that, however large single numbers are    | 160                       |
| kronecker   | about 1 / k_in + 1 / k_out for rank-one G       | k_in + k_out              |
"""

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
from jaxlm.core.dtypes import wide, wide_dtype

Sketch = Callable[[Array, int, Array], Array]

BLOCK_NUMBERS = 512
"""Numbers of a leaf in a block of a dense map."""
GROUP_EXAMPLES = 16
"""Examples in one product. The number is fixed, because rounding depends on it."""
BLOCKS_AT_ONCE = 16
"""Blocks drawn together on an accelerator."""
MIXED = 1024
"""Largest Hadamard matrix of `srht`."""
GROUP_NUMBERS = 2**15
"""Approximate count of numbers of a leaf whose signs are bits of the same words."""
UNROLLED = 4
"""Windows added in one turn of a loop."""

matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


# Parts that several maps share.


def flip(x: Array, bits: UInt32[Array, "..."]) -> Array:
    """Return x with its sign changed where the top bit of the word is set."""
    return jnp.where(lax.bitcast_convert_type(bits, jnp.int32) < 0, -x, x)


def columns(g: Array, start: int | Array, size: int) -> Array:
    """Return `size` columns of g, beginning at `start`."""
    return lax.dynamic_slice_in_dim(g, start, size, axis=1)


def flatten_examples(g: Array) -> Float[Array, "N n"]:
    """Return the gradients of one leaf, one row per example."""
    return g.reshape(len(g), math.prod(g.shape[1:]))


def scaled(x: Array, dim: int) -> Float[Array, "N dim"]:
    """Return x / sqrt(dim)."""
    rows = x.reshape(-1, dim)
    # Without the barrier XLA may fuse this product with a later addition and round once instead of
    # twice, so the result would depend on the caller.
    return lax.optimization_barrier(rows * np.asarray(1 / math.sqrt(dim), rows.dtype))


def map_examples(function: Callable[[Any], Array], xs: Any) -> Array:
    """Map over examples: one at a time on a CPU, in groups of fixed size on accelerators."""

    def grouped(xs):
        count = len(jax.tree.leaves(xs)[0])
        missing = -count % GROUP_EXAMPLES

        # Groups are padded to one size: the size of a product decides how it is rounded.
        def groups(x):
            padded = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
            return padded.reshape(-1, GROUP_EXAMPLES, *x.shape[1:])

        mapped = lax.map(jax.vmap(function), jax.tree.map(groups, xs))
        return mapped.reshape(-1, *mapped.shape[2:])[:count]

    def one_by_one(xs):
        if len(jax.tree.leaves(xs)[0]) != 1:
            return lax.map(function, xs)
        # XLA removes a loop of one turn, then fuses its body with the surrounding code and rounds
        # differently. Two equal examples keep the loop.
        twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), xs)
        return lax.map(function, twice)[:1]

    return lax.platform_dependent(xs, cpu=one_by_one, default=grouped)


# Dense maps. One block of rows of the matrix exists at a time.


def signs(key: Array, rows: int, dim: int, dtype: Any) -> Float[Array, "rows dim"]:
    """Draw random signs. One row of 32-bit words makes 32 rows of signs."""
    count = -(-rows // 32)
    # Without the barrier XLA draws the words again in each of the 32 uses.
    words = lax.optimization_barrier(prng.counter_bits(key, (count, dim)))
    shifts = lax.iota(jnp.uint32, 32)[None, :, None]
    drawn = flip(jnp.ones((), dtype), words[:, None, :] << shifts)
    return drawn.reshape(count * 32, dim)[:rows]


def normals(key: Array, rows: int, dim: int, dtype: Any) -> Float[Array, "rows dim"]:
    """Draw standard normal numbers."""
    return prng.normal(key, (rows, dim)).astype(dtype)


def dense_blocks(
    entries: Callable[..., Array],
    key: Array,
    g: Array,
    *,
    dim: int,
    blocks_at_once: int,
    examples: int,
) -> Float[Array, "N dim"]:
    """Return `g @ S / sqrt(dim)` for g [N, n], drawing the rows of S in blocks.

    `entries(key, rows, dim, dtype)` draws a block of S. One turn of the loop draws
    `blocks_at_once` of them; one product takes `examples` rows of g.
    """
    count, size = g.shape
    padded = -(-count // examples) * examples
    dtype = wide_dtype(g)

    def add_blocks(start, blocks, length, total):
        """Add `blocks` blocks of `length` rows each, the first with number `start`."""
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(start + jnp.arange(blocks))
        draw = functools.partial(entries, rows=length, dim=dim, dtype=dtype)
        # Draw the block once, not once for each group of examples.
        block = lax.optimization_barrier(jax.vmap(draw)(keys).reshape(blocks * length, dim))
        part = wide(columns(g, start * BLOCK_NUMBERS, blocks * length))
        part = jnp.pad(part, [(0, padded - count), (0, 0)]).reshape(-1, examples, blocks * length)
        # One product for each group of examples, since the rounding of a product depends on its
        # size: so a row has the same bits in any batch.
        return total + lax.map(lambda x: matmul(x, block), part)

    full, rest = divmod(size, BLOCK_NUMBERS)
    steps, single = divmod(full, blocks_at_once)
    total = jnp.zeros((padded // examples, examples, dim), dtype)
    for first, blocks, turns in ((0, blocks_at_once, steps), (steps * blocks_at_once, 1, single)):

        def turn(i, total, first=first, blocks=blocks):
            return add_blocks(first + i * blocks, blocks, BLOCK_NUMBERS, total)

        total = lax.fori_loop(0, turns, turn, total) if turns else total
    if rest:
        total = add_blocks(full, 1, rest, total)
    return scaled(total, dim)[:count]


def _dense(entries: Callable[..., Array], key: Array, dim: int, g: Array) -> Array:
    run = functools.partial(dense_blocks, entries, dim=dim)
    # Many small products stay in the caches of a CPU; an accelerator wants few large ones.
    return lax.platform_dependent(
        key,
        flatten_examples(g),
        cpu=functools.partial(run, blocks_at_once=1, examples=GROUP_EXAMPLES),
        default=functools.partial(run, blocks_at_once=BLOCKS_AT_ONCE, examples=8 * GROUP_EXAMPLES),
    )


def gaussian(key: Array, dim: int, g: Array) -> Float[Array, "N dim"]:
    """Map by a matrix with entries N(0, 1 / dim)."""
    return _dense(normals, key, dim, g)


def rademacher(key: Array, dim: int, g: Array) -> Float[Array, "N dim"]:
    """Map by a matrix with entries +-1 / sqrt(dim), each from one bit of a counter."""
    return _dense(signs, key, dim, g)


# CountSketch and SRHT. The numbers of a leaf are cut into windows of about `dim` numbers; each
# window gets random signs and is added to a ring of `dim` buckets at a random offset. Only that
# offset is random, so memory is read and written contiguously.


def windows_in_group(width: int) -> int:
    """Return how many windows of `width` numbers share words of signs; a word has 32 bits."""
    return max(4, min(32, GROUP_NUMBERS // width))


def draw_windows(
    key: Array, group: int | Array, width: int, dim: int, sets: int
) -> tuple[Array, Array]:
    """Draw the randomness of a group of windows.

    The words [sets, numbers in the group], whose top bits are signs; and the index in the ring at
    which each window begins.
    """
    count = windows_in_group(width)
    drawn = prng.counter_bits(jax.random.fold_in(key, group), (sets * width + count,))
    # Without the barrier XLA draws the bits again for each window that reads them.
    words, places = lax.optimization_barrier((drawn[:-count], drawn[-count:]))
    words = words.reshape(sets, 1, width) << lax.iota(jnp.uint32, count)[None, :, None]
    return words.reshape(sets, count * width), (places % np.uint32(dim)).astype(jnp.int32)


def hadamard(x: Float[Array, " n"], size: int) -> Float[Array, " n"]:
    """Multiply each run of `size` numbers, a power of 4, by a symmetric orthogonal matrix.

    A Hadamard matrix over sqrt(size), applied as the Kronecker product of two smaller ones.
    """
    inner = min(64, size)
    outer = size // inner
    y = matmul(x.reshape(-1, inner), _hadamard_matrix(inner, x.dtype)).reshape(-1, outer, inner)
    if outer > 1:
        matrix = _hadamard_matrix(outer, x.dtype)
        y = jnp.einsum("nab,ac->ncb", y, matrix, precision=lax.Precision.HIGHEST)
    return y.reshape(x.shape) * np.asarray(1 / math.sqrt(size), x.dtype)


def _hadamard_matrix(size: int, dtype: Any) -> np.ndarray:
    index = np.arange(size)
    return 1 - 2 * (np.bitwise_count(index[:, None] & index) % 2).astype(dtype)


Read = Callable[[Any, int], Array]
"""`read(start, size)` returns columns of a group of windows, [N, size]."""


def add_windows(
    read: Read, size: int, width: int, places: Array, total: Float[Array, "N R"]
) -> Float[Array, "N R"]:
    """Add windows to `total` one after another, which suits a CPU.

    `total` is twice as long as the ring, so that no window has to wrap around.
    """

    def add(i, total, length=width):
        part = read(i * width, length)
        old = columns(total, places[i], length)
        return lax.dynamic_update_slice_in_dim(total, old + part, places[i], axis=1)

    full, rest = divmod(size, width)
    if full:
        total = lax.fori_loop(0, full, add, total, unroll=min(UNROLLED, full))
    return add(full, total, rest) if rest else total


def gather_windows(
    read: Read, size: int, width: int, places: Array, total: Float[Array, "N R"]
) -> Float[Array, "N R"]:
    """Gather the numbers of every bucket at once: `add_windows` in a form for accelerators."""
    count, dim = -(-size // width), total.shape[1] // 2
    padded = jnp.pad(read(0, size), [(0, 0), (0, count * width - size)])
    index = (lax.iota(jnp.int32, dim)[None, :] - places[:count, None]) % dim
    gathered = jnp.take_along_axis(
        padded.reshape(-1, count, width), index[None], axis=2, mode="fill", fill_value=0
    )
    return total.at[:, :dim].add(gathered.sum(1))


def ring_sketch(
    key: Array, g: Float[Array, "N n"], *, dim: int, mix: int, place: Callable[..., Array]
) -> Float[Array, "N dim"]:
    """Add the numbers of each row of g, with random signs, window by window to a ring.

    Two numbers of different windows collide with probability 1 / dim; two of the same window never
    collide. `mix` is the size of the Hadamard matrices that mix the numbers, 1 for none; `place`
    is `add_windows` or `gather_windows`.
    """
    width = dim // mix * mix
    group = windows_in_group(width) * width
    full, rest = divmod(g.shape[1], group)

    def add_group(i, size, total):
        # Signs before and after mixing. With one set, two equal blocks would become shifted copies
        # of the same mixed block; the columns of a Hadamard matrix and of its shifted copy are not
        # orthogonal, so such blocks would collide more often than by chance.
        words, places = draw_windows(key, i, width, dim, sets=1 + (mix > 1))

        def signed(start, length):
            numbers = wide(columns(g, i * group + start, length))
            return flip(numbers, columns(words[:1], start, length))

        if mix == 1:
            return place(signed, size, width, places, total)
        size, padded = -(-size // mix) * mix, jnp.pad(signed(0, size), [(0, 0), (0, -size % mix)])
        mixed = map_examples(functools.partial(hadamard, size=mix), padded)
        mixed = flip(mixed, words[1:, :size])
        return place(functools.partial(columns, mixed), size, width, places, total)

    total = jnp.zeros((len(g), 2 * dim), wide_dtype(g))
    if full:
        total = lax.fori_loop(0, full, lambda i, total: add_group(i, group, total), total)
    if rest:
        total = add_group(full, rest, total)
    return total[:, :dim] + total[:, dim:]


def _ring(key: Array, dim: int, mix: int, g: Array) -> Array:
    run = functools.partial(ring_sketch, dim=dim, mix=mix)
    return lax.platform_dependent(
        key,
        flatten_examples(g),
        cpu=functools.partial(run, place=add_windows),
        default=functools.partial(run, place=gather_windows),
    )


def countsketch(key: Array, dim: int, g: Array) -> Float[Array, "N dim"]:
    """Map by adding every number to one bucket, with a random sign."""
    return _ring(key, dim, 1, g)


def srht(key: Array, dim: int, g: Array) -> Float[Array, "N dim"]:
    """Mix blocks of at most 1024 numbers by signs, a Hadamard matrix and signs; then countsketch.

    Mixing spreads the size of a few large numbers over their block, which lowers the variance.
    """
    return _ring(key, dim, mixed_block(dim), g)


def mixed_block(dim: int) -> int:
    """Return the block size of `srht`: a power of 4, so that 1 / sqrt(size) is exact."""
    return min(MIXED, 4 ** ((dim.bit_length() - 1) // 2))


# Kronecker: a matrix is multiplied from both sides.


def factors_of(dim: int) -> tuple[int, int]:
    """Return the two nearest factors of `dim`, the smaller one first."""
    small = next(k for k in range(math.isqrt(dim), 0, -1) if dim % k == 0)
    return small, dim // small


def kronecker_signs(
    key: Array, dim: int, inputs: int, outputs: int, dtype: Any
) -> tuple[Array, Array]:
    """Draw P_in [inputs, k_in] and P_out [outputs, k_out], with entries +-1."""
    small, large = factors_of(dim)
    into, out = (jax.random.fold_in(key, side) for side in range(2))
    return signs(into, inputs, small, dtype), signs(out, outputs, large, dtype)


def kronecker(key: Array, dim: int, g: Array) -> Float[Array, "N dim"]:
    """Return P_in^T G P_out of a matrix G, whose last axis is the columns; map vectors densely."""
    if g.ndim < 3:
        return rademacher(key, dim, g)
    matrices = g.reshape(len(g), math.prod(g.shape[1:-1]), g.shape[-1])
    left, right = kronecker_signs(key, dim, matrices.shape[1], matrices.shape[2], wide_dtype(g))
    return scaled(map_examples(lambda x: matmul(left.T, matmul(wide(x), right)), matrices), dim)


def kronecker_of_factors(key: Array, dim: int, a: Array, b: Array) -> Float[Array, "N dim"]:
    """Return `kronecker` of sum_t a_t b_t^T, a [N, T, in] and b [N, T, out], without forming it."""
    dtype = wide_dtype(jnp.result_type(a, b))
    left, right = kronecker_signs(key, dim, a.shape[-1], b.shape[-1], dtype)

    def one(pair):
        into, out = (x.astype(dtype) for x in pair)
        return matmul(matmul(into, left).T, matmul(out, right))

    return scaled(map_examples(one, (a, b)), dim)


SKETCHES: dict[str, Sketch] = {
    "countsketch": countsketch,
    "gaussian": gaussian,
    "kronecker": kronecker,
    "rademacher": rademacher,
    "srht": srht,
}
