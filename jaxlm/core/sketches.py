"""Random linear maps from the numbers of one leaf to `dim`, by blocks and without a stored matrix.

Each is a function `(key, dim, g [N, ...]) -> [N, dim]` with E<Sx, Sy> = <x, y>. A leaf is read in
blocks along its flat index, and what is random in block i is drawn from `fold_in(key, i)`; the
blocks are added in this order. So a row of the result is a function of the key and of the same row
of `g`: the same, to the last bit, whichever rows stand beside it and wherever they are stored.

Second moments, for unit vectors at an angle whose cosine is c:

| map         | Var <Sx, Sy>                                    | operations a number       |
|-------------|-------------------------------------------------|---------------------------|
| gaussian    | (1 + c^2) / dim                                 | 2 dim, dim normal numbers |
| rademacher  | (1 + c^2 - 2 sum_i x_i^2 y_i^2) / dim           | 2 dim, dim / 32 words     |
| countsketch | at most that of rademacher, with heavier tails  | 2                         |
| srht        | about that, whatever single numbers are         | 160                       |
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

Sketch = Callable[[Array, int, Array], Array]

ROWS = 512
"""Numbers of a leaf in a block of a dense map."""
EXAMPLES = 16
"""Examples in a product with such a block: always as many, since rounding depends on the number."""
AHEAD = 16
"""Blocks of a dense map that are drawn at once where the machine is no CPU."""
MIX = 1024
"""Numbers that a Hadamard matrix mixes, at most."""
GROUP = 2**15
"""Numbers of a leaf, about, that share the words of their signs."""

_product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _wide(g: Array) -> Array:
    return g.astype(jnp.promote_types(g.dtype, jnp.float32))


def _flip(x: Array, words: UInt32[Array, "..."]) -> Array:
    """x with its sign changed where the top bit of the word is set."""
    return jnp.where(lax.bitcast_convert_type(words, jnp.int32) < 0, -x, x)


def _slices(g: Array, start: int | Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(g, start, size, axis=1)


def _each(function: Callable[[Any], Array], xs: Any) -> Array:
    """Maps over examples, one by one on a CPU and in groups of always as many elsewhere."""

    def grouped(xs):
        count = len(jax.tree.leaves(xs)[0])
        more = -count % EXAMPLES

        def groups(x):
            padded = jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1))
            return padded.reshape(-1, EXAMPLES, *x.shape[1:])

        found = lax.map(jax.vmap(function), jax.tree.map(groups, xs))
        return found.reshape(-1, *found.shape[2:])[:count]

    return lax.platform_dependent(xs, cpu=functools.partial(lax.map, function), default=grouped)


# Dense maps.


def signs(key: Array, rows: int, dim: int, dtype) -> Float[Array, "rows dim"]:
    """Random signs, 32 rows of them from each row of words."""
    count = -(-rows // 32)
    words = lax.optimization_barrier(prng.counter_bits(key, (count, dim)))
    shifts = lax.iota(jnp.uint32, 32)[None, :, None]
    drawn = _flip(jnp.ones((), dtype), words[:, None, :] << shifts)
    return drawn.reshape(count * 32, dim)[:rows]


def normals(key: Array, rows: int, dim: int, dtype) -> Float[Array, "rows dim"]:
    """Standard normal numbers."""
    return prng.normal(key, (rows, dim)).astype(dtype)


def _dense(entries: Callable[..., Array], key: Array, dim: int, g: Array) -> Array:
    flat = g.reshape(len(g), -1)
    run = functools.partial(dense_blocks, entries, dim=dim)
    # Many small products keep a CPU's caches warm; an accelerator wants few large ones.
    return lax.platform_dependent(
        key,
        flat,
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
        part = _wide(_slices(g, start * ROWS, blocks * length))
        part = jnp.pad(part, [(0, padded - count), (0, 0)]).reshape(-1, examples, blocks * length)
        # One product for each group of examples: a larger product would round otherwise.
        return total + lax.map(lambda x: _product(x, block), part)

    full, rest = divmod(size, ROWS)
    steps, single = divmod(full, ahead)
    total = jnp.zeros((padded // examples, examples, dim), dtype)
    total = lax.fori_loop(0, steps, lambda i, t: step(i * ahead, ahead, ROWS, t), total)
    first = steps * ahead
    total = lax.fori_loop(0, single, lambda i, t: step(first + i, 1, ROWS, t), total)
    if rest:
        total = step(full, 1, rest, total)
    # Behind a barrier, or the product would be fused with an addition and rounded with it.
    scaled = lax.optimization_barrier(total * np.asarray(1 / math.sqrt(dim), dtype))
    return scaled.reshape(padded, dim)[:count]


def gaussian(key: Array, dim: int, g: Array) -> Float[Array, "N dim"]:
    """Entries N(0, 1 / dim)."""
    return _dense(normals, key, dim, g)


def rademacher(key: Array, dim: int, g: Array) -> Float[Array, "N dim"]:
    """Entries +-1 / sqrt(dim), a bit of a counter each."""
    return _dense(signs, key, dim, g)


# Folds: every number goes to one of `dim` buckets.


def windows_in_group(width: int) -> int:
    """How many windows of `width` numbers share the words of their signs: bits of a word."""
    return max(4, min(32, GROUP // width))


def _draw(key: Array, group: int | Array, width: int, dim: int) -> tuple[Array, Array]:
    """Words whose top bits are the signs of a group of windows, and where the windows begin."""
    count = windows_in_group(width)
    drawn = prng.counter_bits(jax.random.fold_in(key, group), (width + count,))
    words, places = lax.optimization_barrier((drawn[:width], drawn[width:] % np.uint32(dim)))
    words = words[None, :] << lax.iota(jnp.uint32, count)[:, None]
    return words.reshape(-1), places.astype(jnp.int32)


def hadamard(x: Float[Array, " n"], size: int) -> Float[Array, " n"]:
    """Multiplies each run of `size` numbers, a power of 4, by a symmetric orthogonal matrix.

    Its entries are +-1 / sqrt(size): a Hadamard matrix as the Kronecker product of two.
    """
    inner = min(64, size)
    outer = size // inner
    y = _product(x.reshape(-1, inner), _hadamard_matrix(inner, x.dtype)).reshape(-1, outer, inner)
    if outer > 1:
        matrix = _hadamard_matrix(outer, x.dtype)
        y = jnp.einsum("nab,ac->ncb", y, matrix, precision=lax.Precision.HIGHEST)
    return y.reshape(x.shape) * np.asarray(1 / math.sqrt(size), x.dtype)


def _hadamard_matrix(size: int, dtype) -> np.ndarray:
    index = np.arange(size)
    return 1 - 2 * (np.bitwise_count(index[:, None] & index) % 2).astype(dtype)


def add_windows(
    x: Float[Array, "N n"], places: Array, width: int, total: Float[Array, "N R"]
) -> Float[Array, "N R"]:
    """Adds windows where they begin in `total`, twice as long as the ring it stands for.

    Only contiguous memory is read and written, which suits a CPU.
    """
    for i, start in enumerate(range(0, x.shape[1], width)):
        part = x[:, start : start + width]
        old = _slices(total, places[i], part.shape[1])
        total = lax.dynamic_update_slice_in_dim(total, old + part, places[i], axis=1)
    return total


def gather_windows(
    x: Float[Array, "N n"], places: Array, width: int, total: Float[Array, "N R"]
) -> Float[Array, "N R"]:
    """As `add_windows`, every bucket looking for its numbers, which suits parallel machines."""
    count, dim = -(-x.shape[1] // width), total.shape[1] // 2
    padded = jnp.pad(x, [(0, 0), (0, count * width - x.shape[1])]).reshape(len(x), count, width)
    index = (lax.iota(jnp.int32, dim)[None, :] - places[:count, None]) % dim
    found = jnp.take_along_axis(padded, index[None], axis=2, mode="fill", fill_value=0)
    return total.at[:, :dim].add(found.sum(1))


def fold(
    key: Array, g: Float[Array, "N n"], *, dim: int, mix: int, place: Callable[..., Array]
) -> Float[Array, "N dim"]:
    """Adds the numbers of each row of g, with random signs, window by window to a ring of `dim`.

    Where a window begins in the ring is random, so that two numbers of different windows meet with
    probability 1 / dim; two of the same window never meet.

    Args:
      key: of the leaf.
      g: gradients.
      dim: length of the ring.
      mix: size of the Hadamard matrices that the numbers pass after their signs; 1 for none.
      place: `add_windows` or `gather_windows`.
    """
    width = dim // mix * mix
    group = windows_in_group(width) * width
    full, rest = divmod(g.shape[1], group)

    def step(i, size, total):
        words, places = _draw(key, i, width, dim)
        x = _flip(_wide(_slices(g, i * group, size)), words[None, :size])
        if mix > 1:
            x = jnp.pad(x, [(0, 0), (0, -size % mix)])
            x = _each(functools.partial(hadamard, size=mix), x)
        return place(x, places, width, total)

    total = jnp.zeros((len(g), 2 * dim), jnp.promote_types(g.dtype, jnp.float32))
    total = lax.fori_loop(0, full, lambda i, total: step(i, group, total), total)
    if rest:
        total = step(full, rest, total)
    return total[:, :dim] + total[:, dim:]


def _fold(key: Array, dim: int, mix: int, g: Array) -> Array:
    run = functools.partial(fold, dim=dim, mix=mix)
    return lax.platform_dependent(
        key,
        g.reshape(len(g), -1),
        cpu=functools.partial(run, place=add_windows),
        default=functools.partial(run, place=gather_windows),
    )


def countsketch(key: Array, dim: int, g: Array) -> Float[Array, "N dim"]:
    """One entry +-1 for each number, windows of `dim` numbers turned by random places."""
    return _fold(key, dim, 1, g)


def srht(key: Array, dim: int, g: Array) -> Float[Array, "N dim"]:
    """Random signs, a Hadamard matrix on each block, then windows turned by random places.

    The numbers of a block, at most 1024, share their size, so that a few large ones do no harm.
    """
    return _fold(key, dim, mixed(dim), g)


def mixed(dim: int) -> int:
    """Size of the blocks of `srht`: a power of 4, so that its scale is a power of 2."""
    return min(MIX, 4 ** ((dim.bit_length() - 1) // 2))


# Products of two maps.


def factors_of(dim: int) -> tuple[int, int]:
    """The two nearest factors of `dim`, the smaller one first."""
    small = next(k for k in range(math.isqrt(dim), 0, -1) if dim % k == 0)
    return small, dim // small


def sides(key: Array, dim: int, rows: int, columns: int, dtype) -> tuple[Array, Array]:
    """P_in [rows, k_in] and P_out [columns, k_out] of `kronecker`, of entries +-1."""
    small, large = factors_of(dim)
    into, out = (jax.random.fold_in(key, side) for side in range(2))
    return signs(into, rows, small, dtype), signs(out, columns, large, dtype)


def _scaled(x: Array, dim: int) -> Array:
    flat = x.reshape(len(x), dim)
    return lax.optimization_barrier(flat * np.asarray(1 / math.sqrt(dim), flat.dtype))


def kronecker(key: Array, dim: int, g: Array) -> Float[Array, "N dim"]:
    """P_in^T G P_out of a matrix G, all but the last axis of which are rows; vectors are dense."""
    if g.ndim < 3:
        return rademacher(key, dim, g)
    matrices = g.reshape(len(g), -1, g.shape[-1])
    dtype = jnp.promote_types(g.dtype, jnp.float32)
    left, right = sides(key, dim, matrices.shape[1], matrices.shape[2], dtype)
    return _scaled(_each(lambda x: _product(left.T, _product(_wide(x), right)), matrices), dim)


def kronecker_factors(key: Array, dim: int, a: Array, b: Array) -> Float[Array, "N dim"]:
    """`kronecker` of sum_t a_t b_t^T, a [N, T, in] and b [N, T, out], which is never formed."""
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    left, right = sides(key, dim, a.shape[-1], b.shape[-1], dtype)

    def one(x):
        into, out = (side.astype(dtype) for side in x)
        return _product(_product(into, left).T, _product(out, right))

    return _scaled(_each(one, (a, b)), dim)


SKETCHES: dict[str, Sketch] = {
    "countsketch": countsketch,
    "gaussian": gaussian,
    "kronecker": kronecker,
    "rademacher": rademacher,
    "srht": srht,
}
