"""Where in the parameters something is drawn or moved, and loops over all such places.

Under `jit` with donated parameters the loops write in place: beside the parameters only one block
and what is computed of it are alive.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlm.core import paths, prng

BLOCK = 2**22
"""Elements in a block of rows."""


class Site(NamedTuple):
    """A leaf, or some of its rows, of one layer.

    Attributes:
      path: of the leaf.
      shape: of the whole leaf, of one layer where layers are stacked.
      layer: index of the layer, or None.
      rows: which rows, see `jaxlm.core.prng`; None for all.
      value: the parameters there.
    """

    path: str
    shape: tuple[int, ...]
    layer: Any = None
    rows: prng.Rows = None
    value: Any = None

    def key(self, key: Array) -> Array:
        """The key of this leaf, from one for all leaves."""
        return prng.leaf_key(key, self.path, self.layer)


def over_blocks(
    function: Callable[[Site], tuple[Array, Array]], leaf: paths.Leaf
) -> tuple[Array, Array]:
    """Applies `function(site) -> (new value, number)` to a leaf.

    Args:
      function: of a site whose value is a block of rows of one layer.
      leaf: the leaf; its layers and blocks come one after another.

    Returns:
      The leaf with its new values, and the sum of the numbers.
    """
    if not leaf.stacked:
        return _over_rows(function, leaf.path, leaf.value, leaf.layer)

    def body(layer, carry):
        stack, total = carry
        value = lax.dynamic_index_in_dim(stack, layer, keepdims=False)
        value, number = _over_rows(function, leaf.path, value, layer)
        here = _after(number, layer)
        return lax.dynamic_update_index_in_dim(stack, value, here, 0), total + number

    return lax.fori_loop(0, leaf.value.shape[0], body, (leaf.value, jnp.zeros(())))


def _after(number, index):
    """`index`, known only after `number`; else XLA copies the leaf for the two that read it."""
    return jnp.minimum(index, index + (jnp.abs(number) > 0).astype(jnp.int32))


def _over_rows(function, path, value, layer):
    shape = value.shape
    size = max(1, BLOCK // max(1, value[0].size)) if value.ndim else 0
    if value.ndim == 0 or shape[0] <= size:
        return function(Site(path, shape, layer, None, value))
    # A block has rows from every shard, or each device would need those of the others.
    parts = math.gcd(shape[0], jax.device_count())
    length, size = shape[0] // parts, max(1, size // parts)
    firsts = length * jnp.arange(parts)[:, None]

    def at(start, size, carry):
        value, total = carry
        rows = (start, size) if parts == 1 else firsts + (start + jnp.arange(size))[None]
        block = lax.dynamic_slice_in_dim(value, start, size, axis=1)
        flat = block[0] if parts == 1 else block
        new, number = function(Site(path, shape, layer, rows, flat))
        start = _after(number, start)
        value = lax.dynamic_update_slice_in_dim(value, new.reshape(block.shape), start, axis=1)
        return value, total + number

    count, rest = divmod(length, size)
    carry = (value.reshape(parts, length, *shape[1:]), jnp.zeros(()))
    carry = lax.fori_loop(0, count, lambda i, carry: at(i * size, size, carry), carry)
    value, total = at(count * size, rest, carry) if rest else carry
    return value.reshape(shape), total
