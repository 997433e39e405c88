"""Random numbers as a pure function of (key, path, layer, index).

Keys derive by threefry `fold_in` of a stable hash of the path, never from a position in a flattened
tree, so noise does not change when a tree is reordered, stacked or sharded. The bulk bits of one leaf
come from a generator of which element `index` depends on `(key, index)` alone: any block of rows can be
drawn without the rest, on any device, with the same bits.

Two generators share one interface. `threefry_bits` is the reference. `counter_bits` passes `(key,
counter)` through two rounds of a 32-bit multiply-xorshift finaliser, and is several times faster.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt32

from jaxlm.core.paths import path_hash

Rows = Array | tuple[int | Array, int] | None
Generator = Literal["counter", "threefry"]


def leaf_key(key: Array, path: str, layer: int | Array | None = None) -> Array:
    """Returns the key of one leaf: `fold_in(fold_in(key, hash(path)), layer)`."""
    key = jax.random.fold_in(key, path_hash(path))
    return key if layer is None else jax.random.fold_in(key, layer)


def _row_indices(shape: tuple[int, ...], rows: Rows) -> Array:
    if rows is None:
        return lax.iota(jnp.uint32, shape[0])
    if isinstance(rows, tuple):
        start, size = rows
        return jnp.asarray(start, jnp.uint32) + lax.iota(jnp.uint32, size)
    return jnp.asarray(rows).astype(jnp.uint32)


def _finalise(x: Array) -> Array:
    x ^= x >> 16
    x *= np.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def counter_bits(key: Array, shape: tuple[int, ...], rows: Rows = None) -> UInt32[Array, "..."]:
    """32 random bits for each element of a leaf, by a keyed hash of its flat index.

    With key words `(k0, k1)`, index `i` and finaliser `f`: `f((f(i * 0x9E3779B9 + k0) ^ k1) + i)`.

    Args:
      key: typed PRNG key.
      shape: the leaf's whole shape; its size must be below 2**32.
      rows: indices on axis 0 (any shape), or a pair (start, size); only those rows are drawn.

    Returns:
      uint32 of shape `[*rows.shape, *shape[1:]]`.
    """
    if math.prod(shape) >= 2**32:
        raise ValueError(f"a leaf of shape {shape} has 2**32 elements or more")
    words = jax.random.key_data(key).reshape(-1)[-2:].astype(jnp.uint32)
    if not shape:
        index = jnp.zeros((), jnp.uint32)
    else:
        row_size = math.prod(shape[1:])
        index = _row_indices(shape, rows)
        index = index.reshape(*index.shape, *(1,) * (len(shape) - 1)) * np.uint32(row_size)
        if len(shape) > 1:
            within = lax.iota(jnp.uint32, row_size).reshape(shape[1:])
            index = index + within.reshape(*(1,) * (index.ndim - within.ndim), *shape[1:])
    mixed = _finalise(index * np.uint32(0x9E3779B9) + words[0])
    return _finalise((mixed ^ words[1]) + index)


def threefry_bits(key: Array, shape: tuple[int, ...], rows: Rows = None) -> UInt32[Array, "..."]:
    """32 random bits for each element, row `i` from `jax.random.bits(fold_in(key, i))`; see `counter_bits`."""
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
    """32 random bits for each element from the named generator; see `counter_bits`."""
    return _GENERATORS[generator](key, shape, rows)


def normal(
    key: Array, shape: tuple[int, ...], rows: Rows = None, generator: Generator = "counter"
) -> Float[Array, "..."]:
    """Standard normal float32 numbers by the inverse distribution function of 24 bits each.

    `z = sqrt(2) erfinv((2k + 1) / 2**24 - 1)` with k the upper 24 bits: symmetric, |z| <= 5.42.

    >>> z = normal(jax.random.key(0), (1000, 3))
    >>> bool((normal(jax.random.key(0), (1000, 3), rows=(7, 2)) == z[7:9]).all())
    True
    """
    upper = (bits(key, shape, rows, generator) >> 8).astype(jnp.int32)
    uniform = (2 * upper - np.int32(2**24 - 1)).astype(jnp.float32) * np.float32(2**-24)
    return lax.erf_inv(uniform) * np.float32(math.sqrt(2.0))


def rademacher(
    key: Array, shape: tuple[int, ...], rows: Rows = None, generator: Generator = "counter"
) -> Float[Array, "..."]:
    """Signs, +1.0 or -1.0 in float32 with equal probability, from the top bit."""
    top = (bits(key, shape, rows, generator) >> 31).astype(jnp.float32)
    return 1.0 - 2.0 * top
