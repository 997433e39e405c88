"""Random numbers as a pure function of (key, path, layer, index).

The key of a leaf is the threefry `fold_in` of a stable hash of its path, never of a position in the
flattened tree, so noise does not change when a tree is reordered, stacked or sharded. Element
`index` of a leaf depends on `(key, index)` only, so any block of rows can be drawn without the
rest, on any device, with the same bits.

There are two generators. `threefry_bits` is the reference. `counter_bits` passes `(key, counter)`
through two rounds of a 32-bit multiply-xorshift finaliser and is several times faster.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt32

from jaxlm.core.errors import UserError
from jaxlm.core.paths import identity, path_hash

Rows = Array | tuple[int | Array, int] | None
Generator = Literal["counter", "threefry"]


def leaf_key(key: Array, path: str, layer: int | Array | None = None) -> Array:
    """Return the key of one leaf: `fold_in(fold_in(key, hash(path)), layer)`.

    An index after `layers` in the path is the layer.
    """
    path, layer = identity(path, layer)
    key = jax.random.fold_in(key, path_hash(path))
    return key if layer is None else jax.random.fold_in(key, layer)


def _row_indices(shape: tuple[int, ...], rows: Rows) -> Array:
    if rows is None:
        return lax.iota(jnp.uint32, shape[0])
    if isinstance(rows, tuple):
        start, size = rows
        return jnp.asarray(start, jnp.uint32) + lax.iota(jnp.uint32, size)
    return jnp.asarray(rows).astype(jnp.uint32)


def _counters(offset: Array, shape: tuple[int, ...], rows: Rows) -> Array:
    """Return `offset` plus the flat index of each element."""
    if not shape:
        return offset
    # Add the offset to the rows, not to the whole index. In a loop over layers, whose offsets
    # differ, XLA would otherwise hoist the index, an array of the size of the leaf.
    row_size = math.prod(shape[1:])
    first = _row_indices(shape, rows) * np.uint32(row_size) + offset
    within = lax.iota(jnp.uint32, row_size).reshape(shape[1:])
    first = jnp.expand_dims(first, tuple(range(first.ndim, first.ndim + within.ndim)))
    return first + jnp.expand_dims(within, tuple(range(first.ndim - within.ndim)))


def _finalise(x: Array) -> Array:
    x ^= x >> 16
    x *= np.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def counter_bits(key: Array, shape: tuple[int, ...], rows: Rows = None) -> UInt32[Array, "..."]:
    """Return 32 random bits for each element of a leaf, by a keyed hash of its flat index.

    With key words `(k0, k1)`, counter `c = index + k0` and finaliser `f`: `f((f(c) ^ k1) + c)`.
    `shape` is that of the whole leaf, of fewer than 2**32 elements. `rows` are indices on axis 0
    of any shape, or a pair (start, size): the result has shape `[*rows.shape, *shape[1:]]`.
    """
    if math.prod(shape) >= 2**32:
        raise UserError(f"shape: has 2**32 elements or more (got {shape}). Split the leaf.")
    words = jax.random.key_data(key).reshape(-1)[-2:].astype(jnp.uint32)
    counter = _counters(words[0], shape, rows)
    return _finalise((_finalise(counter) ^ words[1]) + counter)


def threefry_bits(key: Array, shape: tuple[int, ...], rows: Rows = None) -> UInt32[Array, "..."]:
    """Return 32 random bits for each element, row i from `fold_in(key, i)`; see `counter_bits`."""
    if not shape:
        return jax.random.bits(key, (), jnp.uint32)
    index = _row_indices(shape, rows)
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(index.reshape(-1))
    bits = jax.vmap(lambda row_key: jax.random.bits(row_key, shape[1:], jnp.uint32))(row_keys)
    return bits.reshape(*index.shape, *shape[1:])


_GENERATORS: dict[str, Callable[..., Array]] = {"counter": counter_bits, "threefry": threefry_bits}


def bits(
    key: Array, shape: tuple[int, ...], rows: Rows = None, generator: Generator = "counter"
) -> UInt32[Array, "..."]:
    """Return 32 random bits for each element from the named generator; see `counter_bits`."""
    return _GENERATORS[generator](key, shape, rows)


# Minimax polynomials, lowest power first. The inverse of the normal distribution function is
# x * CENTRE(x^2) for |x| < 7/8, and TAIL(t) beyond, with t = (log2(1 - |x|) + 13.5) / 10.5. LOG2 is
# log2 of a mantissa m, in 2m - 3.
_CENTRE = (1.25392566, 0.301889142, 0.502692847, -1.58568484, 4.54232963, -5.60736501, 2.97656776)
_TAIL = (
    *(3.92612501, -1.75173568, -0.350300392, -0.133729939, -0.0740931393),
    *(-0.0496694375, 0.00058624778, 0.0139330353, -0.0252339169, -0.021729302),
)
_LOG2 = (0.584950496, 0.480919836, -0.0799372741, 0.0176778719, -0.00500066598, 0.00140229374)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + np.float32(coefficient)
    return total


@jax.jit
def _inverse_normal(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return z with `erf(z / sqrt(2)) = x` to 1e-4, for float32 |x| < 1.

    It is jitted since the rounding of `a * b + c` depends on compilation, and an eager call must
    give the bits of a compiled one.
    """
    # Multiplications and additions only, which XLA fuses with the bits before and the update after.
    # `lax.erf_inv` creates two more arrays of the size of the leaf and takes longer.
    size = jnp.abs(x)
    word = lax.bitcast_convert_type(1 - size, jnp.int32)
    exponent = ((word >> 23) - 127).astype(jnp.float32)
    mantissa = lax.bitcast_convert_type((word & 0x7FFFFF) | 0x3F800000, jnp.float32)
    log2 = exponent + _polynomial(_LOG2, 2 * mantissa - 3)
    tail = _polynomial(_TAIL, (log2 + np.float32(13.5)) * np.float32(1 / 10.5))
    centre = size * _polynomial(_CENTRE, size * size)
    z = jnp.where(size < np.float32(7 / 8), centre, tail)
    return jnp.where(x < 0, -z, z)


def normal(
    key: Array, shape: tuple[int, ...], rows: Rows = None, generator: Generator = "counter"
) -> Float[Array, "..."]:
    """Return standard normal float32 numbers, by the inverse distribution function of 24 bits.

    `erf(z / sqrt(2)) = (2k + 1) / 2**24 - 1`, where k is the upper 24 bits. The numbers are
    symmetric about 0, below 5.42 in size, and within 1e-4 of the exact inverse.

    >>> z = normal(jax.random.key(0), (1000, 3))
    >>> bool((normal(jax.random.key(0), (1000, 3), rows=(7, 2)) == z[7:9]).all())
    True
    """
    upper = (bits(key, shape, rows, generator) >> 8).astype(jnp.int32)
    return _inverse_normal(
        (2 * upper - np.int32(2**24 - 1)).astype(jnp.float32) * np.float32(2**-24)
    )


def prevent_recompute(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x unchanged (x must be finite), but computed once for all its consumers."""
    # XLA's CPU compiler fuses cheap producers, such as noise, into each consumer and computes them
    # again in every one. It does not fuse a division, so divide by ones that it cannot fold.
    return x / (1 + 0 * x)


def rademacher(
    key: Array, shape: tuple[int, ...], rows: Rows = None, generator: Generator = "counter"
) -> Float[Array, "..."]:
    """Return signs, +1.0 or -1.0 in float32 with equal probability, from the top bit."""
    top = (bits(key, shape, rows, generator) >> 31).astype(jnp.float32)
    return 1.0 - 2.0 * top
