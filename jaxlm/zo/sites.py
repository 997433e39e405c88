"""Sites, the places where noise is drawn or parameters move, and loops over all of them.

Under `jit` with donated parameters the loops write in place: only one block and its intermediate
values are alive beside the parameters.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlm.core import paths, prng
from jaxlm.core.errors import UserError

BLOCK = 2**22
"""Elements in a block of rows: large enough that the loop costs nothing, small beside a model."""


class Site(NamedTuple):
    """One layer of a leaf, or some rows of it.

    Attributes:
      path: path of the leaf.
      shape: shape of the whole leaf, or of one layer if layers are stacked.
      layer: index of the layer, or None.
      rows: which rows, see `jaxlm.core.prng`; None for all.
      value: the parameters at the site.
    """

    path: str
    shape: tuple[int, ...]
    layer: Any = None
    rows: prng.Rows = None
    value: Any = None

    def key(self, key: Array) -> Array:
        """Derive the key of this leaf from the key of all leaves.

        Raises:
          UserError: if a loss reads an undeclared leaf layer by layer.
        """
        # The update would take the leaf as one array and draw other noise than the loss saw.
        if isinstance(self.layer, jax.core.Tracer) and not paths.is_declared(self.path):
            raise UserError(
                f"{self.path}: must be declared as stacked (got a loss that reads it in a loop "
                f"over layers). Call jaxlm.core.paths.declare_stacked({{{self.path!r}: "
                f"{len(self.shape)}}}) once, beside the model."
            )
        return prng.leaf_key(key, self.path, self.layer)


def over_blocks(
    function: Callable[[Site], tuple[Array, Array]], leaf: paths.Leaf
) -> tuple[Array, Array]:
    """Apply `function(site) -> (new value, number)` to the layers and blocks of a leaf in turn.

    The leaf with its new values, and the sum of the numbers, are returned.
    """
    if not leaf.stacked:
        return _over_rows(function, leaf.path, leaf.value, leaf.layer)

    def body(layer, carry):
        stack, total = carry
        value = lax.dynamic_index_in_dim(stack, layer, keepdims=False)
        value, number = _over_rows(function, leaf.path, value, layer)
        here = _depend_on(number, layer)
        return lax.dynamic_update_index_in_dim(stack, value, here, 0), total + _narrow(number)

    return lax.fori_loop(0, leaf.value.shape[0], body, (leaf.value, _narrow(0)))


def sum_over_blocks(function: Callable[[Site], Array], leaf: paths.Leaf) -> Array:
    """Return the sum of `function(site)` over the sites of a leaf."""

    def rows(value, layer):
        blocks = _Blocks.of(leaf.path, value, layer)
        if blocks is None:
            return function(Site(leaf.path, value.shape, layer, None, value))
        parted = blocks.parted(value)

        def add(start, size, total):
            return total + _narrow(function(blocks.site(parted, start, size)))

        return blocks.fold(add, _narrow(0))

    if not leaf.stacked:
        return rows(leaf.value, leaf.layer)

    def add(layer, total):
        value = lax.dynamic_index_in_dim(leaf.value, layer, keepdims=False)
        return total + _narrow(rows(value, layer))

    return lax.fori_loop(0, leaf.value.shape[0], add, _narrow(0))


def _narrow(number: Any) -> Array:
    # Under 64 bits a Python number would make the carry of a loop float64.
    return jnp.asarray(number, jnp.float32)


def _depend_on(number, index):
    """Return `index`, in such a way that XLA must compute `number` first."""
    # `number` and the write both read the old leaf. If XLA is free to order them, it copies the
    # leaf so that `number` can be computed after the write. The minimum is always `index`, but the
    # compiler cannot know that, so the write has to wait for `number`.
    return jnp.minimum(index, index + (jnp.abs(number) > 0).astype(jnp.int32))


def _over_rows(function, path, value, layer):
    blocks = _Blocks.of(path, value, layer)
    if blocks is None:
        return function(Site(path, value.shape, layer, None, value))

    def write(start, size, carry):
        value, total = carry
        new, number = function(blocks.site(value, start, size))
        new = new.reshape(value.shape[0], size, *value.shape[2:])
        start = _depend_on(number, start)
        value = lax.dynamic_update_slice_in_dim(value, new, start, axis=1)
        return value, total + _narrow(number)

    written, total = blocks.fold(write, (blocks.parted(value), _narrow(0)))
    return written.reshape(value.shape), total


class _Blocks(NamedTuple):
    """Blocks of rows of one layer: the same few rows of each of `parts` equal parts."""

    # A block takes rows from every part, so that each device updates rows of its own shard. Blocks
    # of consecutive rows would lie on one device, and the others would have to fetch them.

    path: str
    shape: tuple[int, ...]
    layer: Any
    parts: int
    size: int

    @classmethod
    def of(cls, path, value, layer):
        """Return the blocks of a value, or None if it is small enough to be one block."""
        size = max(1, BLOCK // max(1, value[0].size)) if value.ndim else 0
        if value.ndim == 0 or value.shape[0] <= size:
            return None
        parts = math.gcd(value.shape[0], jax.device_count())
        return cls(path, value.shape, layer, parts, max(1, size // parts))

    @property
    def length(self):
        return self.shape[0] // self.parts

    def parted(self, value):
        return value.reshape(self.parts, self.length, *self.shape[1:])

    def site(self, parted, start, size):
        block = lax.dynamic_slice_in_dim(parted, start, size, axis=1)
        if self.parts == 1:
            return Site(self.path, self.shape, self.layer, (start, size), block[0])
        firsts = self.length * jnp.arange(self.parts)[:, None]
        rows = firsts + (start + jnp.arange(size))[None]
        return Site(self.path, self.shape, self.layer, rows, block)

    def fold(self, function, carry):
        """Apply `function(start, size, carry)` to one block after another."""
        count, rest = divmod(self.length, self.size)

        def at(i, carry):
            return function(i * self.size, self.size, carry)

        carry = lax.fori_loop(0, count, at, carry)
        return function(count * self.size, rest, carry) if rest else carry
