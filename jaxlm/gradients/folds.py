"""Folds: every number goes to one of `dim` buckets, with a random sign."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxlm.core import prng
from jaxlm.gradients.dense_maps import each, flat, flip, product, slices, wide

MIX = 1024
"""Numbers that a Hadamard matrix mixes, at most."""
GROUP = 2**15
"""Numbers of a leaf, about, that share the words of their signs."""
UNROLLED = 4
"""Windows in a step of a loop."""


def windows_in_group(width: int) -> int:
    """How many windows of `width` numbers share the words of their signs: bits of a word."""
    return max(4, min(32, GROUP // width))


def draw_windows(
    key: Array, group: int | Array, width: int, dim: int, sets: int
) -> tuple[Array, Array]:
    """What is random of a group of windows.

    Returns:
      Words [sets, numbers of the group], whose top bits are signs, and where the windows begin.
    """
    count = windows_in_group(width)
    drawn = prng.counter_bits(jax.random.fold_in(key, group), (sets * width + count,))
    words, places = lax.optimization_barrier((drawn[:-count], drawn[-count:]))
    words = words.reshape(sets, 1, width) << lax.iota(jnp.uint32, count)[None, :, None]
    return words.reshape(sets, count * width), (places % np.uint32(dim)).astype(jnp.int32)


def hadamard(x: Float[Array, " n"], size: int) -> Float[Array, " n"]:
    """Multiplies each run of `size` numbers, a power of 4, by a symmetric orthogonal matrix.

    Its entries are +-1 / sqrt(size): a Hadamard matrix as the Kronecker product of two.
    """
    inner = min(64, size)
    outer = size // inner
    y = product(x.reshape(-1, inner), _hadamard_matrix(inner, x.dtype)).reshape(-1, outer, inner)
    if outer > 1:
        matrix = _hadamard_matrix(outer, x.dtype)
        y = jnp.einsum("nab,ac->ncb", y, matrix, precision=lax.Precision.HIGHEST)
    return y.reshape(x.shape) * np.asarray(1 / math.sqrt(size), x.dtype)


def _hadamard_matrix(size: int, dtype) -> np.ndarray:
    index = np.arange(size)
    return 1 - 2 * (np.bitwise_count(index[:, None] & index) % 2).astype(dtype)


Read = Callable[[Any, int], Array]
"""`read(start, size)`: some columns of a group of windows, [N, size]."""


def add_windows(
    read: Read, size: int, width: int, places: Array, total: Float[Array, "N R"]
) -> Float[Array, "N R"]:
    """Adds windows where they begin in `total`, twice as long as the ring it stands for.

    Only contiguous memory is read and written, which suits a CPU.

    Args:
      read: the numbers of the windows.
      size: how many numbers there are.
      width: of a window; the last may be shorter.
      places: where each begins.
      total: to be added to.
    """

    def add(i, total, length=width):
        part = read(i * width, length)
        old = slices(total, places[i], length)
        return lax.dynamic_update_slice_in_dim(total, old + part, places[i], axis=1)

    full, rest = divmod(size, width)
    if full:
        total = lax.fori_loop(0, full, add, total, unroll=min(UNROLLED, full))
    return add(full, total, rest) if rest else total


def gather_windows(
    read: Read, size: int, width: int, places: Array, total: Float[Array, "N R"]
) -> Float[Array, "N R"]:
    """As `add_windows`, every bucket looking for its numbers, which suits parallel machines."""
    count, dim = -(-size // width), total.shape[1] // 2
    padded = jnp.pad(read(0, size), [(0, 0), (0, count * width - size)])
    index = (lax.iota(jnp.int32, dim)[None, :] - places[:count, None]) % dim
    found = jnp.take_along_axis(
        padded.reshape(-1, count, width), index[None], axis=2, mode="fill", fill_value=0
    )
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
      mix: size of the Hadamard matrices that the numbers pass between two sets of signs; 1 for
        none. Columns of two such matrices that are turned against each other are not orthogonal,
        and without the second signs blocks filled alike would meet more often than by chance.
      place: `add_windows` or `gather_windows`.
    """
    width = dim // mix * mix
    group = windows_in_group(width) * width
    full, rest = divmod(g.shape[1], group)

    def step(i, size, total):
        words, places = draw_windows(key, i, width, dim, sets=1 + (mix > 1))

        def signed(start, length):
            return flip(
                wide(slices(g, i * group + start, length)), slices(words[:1], start, length)
            )

        if mix == 1:
            return place(signed, size, width, places, total)
        size, padded = -(-size // mix) * mix, jnp.pad(signed(0, size), [(0, 0), (0, -size % mix)])
        mixed = each(functools.partial(hadamard, size=mix), padded)
        mixed = flip(mixed, words[1:, :size])
        return place(functools.partial(slices, mixed), size, width, places, total)

    total = jnp.zeros((len(g), 2 * dim), jnp.promote_types(g.dtype, jnp.float32))
    if full:
        total = lax.fori_loop(0, full, lambda i, total: step(i, group, total), total)
    if rest:
        total = step(full, rest, total)
    return total[:, :dim] + total[:, dim:]


def _fold(key: Array, dim: int, mix: int, g: Array) -> Array:
    run = functools.partial(fold, dim=dim, mix=mix)
    return lax.platform_dependent(
        key,
        flat(g),
        cpu=functools.partial(run, place=add_windows),
        default=functools.partial(run, place=gather_windows),
    )


def countsketch(key: Array, dim: int, g: Array) -> Float[Array, "N dim"]:
    """One entry +-1 for each number, windows of `dim` numbers turned by random places."""
    return _fold(key, dim, 1, g)


def srht(key: Array, dim: int, g: Array) -> Float[Array, "N dim"]:
    """Signs, a Hadamard matrix on each block, signs, and windows turned by random places.

    The numbers of a block, at most 1024, share their size, so that a few large ones do no harm.
    """
    return _fold(key, dim, mixed(dim), g)


def mixed(dim: int) -> int:
    """Size of the blocks of `srht`: a power of 4, so that its scale is a power of 2."""
    return min(MIX, 4 ** ((dim.bit_length() - 1) // 2))
