"""A view replaces a stored leaf by what the model sees, just before use.

`view(path, leaf, layer, *, rows=None) -> leaf'` runs inside the scan over layers, so one layer of
`leaf'` is in memory at a time. `path` is a Python string; `layer` is a traced int32, or None
outside `layers`. `rows` (indices on axis 0, or a pair (start, size)) says that only `leaf[rows]` is
needed.

Views are frozen dataclasses registered as pytrees, so they cross `jit` and `vmap`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlm.core.dtypes import wide_dtype
from jaxlm.core.precision import Packed
from jaxlm.core.prng import Rows

FEW = 8
"""Largest rank whose product is a sum of outer products, see `LowRank.dense`."""


@runtime_checkable
class View(Protocol):
    """The interface of a view: a function from a stored leaf to the leaf that the model uses."""

    def __call__(
        self, path: str, leaf: Any, layer: Array | int | None, *, rows: Rows = None
    ) -> Any: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A matrix as two factors, `left @ right`: [*rows, rank] and [rank, out]."""

    left: Array
    right: Array

    def __rmul__(self, scale: Any) -> "LowRank":
        return LowRank(self.left, scale * self.right)

    def dense(self) -> Array:
        """Return the product, [*rows, out]."""
        # A matrix product may round a block of rows differently from the same rows in the whole. A
        # sum of outer products does not, so noise drawn by blocks has the same bits.
        rank = self.left.shape[-1]
        if rank > FEW:
            return self.left @ self.right
        right = self.right.reshape(rank, *(1,) * (self.left.ndim - 1), -1)
        terms = [self.left[..., i, None] * right[i] for i in range(rank)]
        return functools.reduce(jnp.add, terms)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankSum:
    """`weight + left @ right.T`, kept apart so that a dense layer reads `weight` once.

    The shapes are [in, out], [in, rank] and [out, rank].
    """

    weight: Array
    left: Array
    right: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self):
        return self.weight.dtype

    def __add__(self, delta: Array | LowRank) -> "LowRankSum":
        if not isinstance(delta, LowRank):
            return dataclasses.replace(self, weight=add(self.weight, delta))
        left = jnp.concatenate([self.left, delta.left], axis=-1)
        right = jnp.concatenate([self.right, delta.right.T], axis=-1)
        return LowRankSum(self.weight, left, right)

    def dot(self, x: Array) -> Array:
        """Return `x @ weight + (x @ left) @ right.T` in the dtype of the first product."""
        y = x @ self.weight
        return (y + LowRank(x @ self.left, self.right.T).dense()).astype(y.dtype)

    def dense(self) -> Array:
        """Return the sum as one array, in the dtype of `weight`."""
        return add(self.weight, LowRank(self.left, self.right.T).dense())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatheredRows:
    """The gathered rows of a leaf, as one of several views passes them to the next."""

    value: Any


def take(leaf: Any, rows: Rows) -> Any:
    """Return `leaf[rows]` as an array or `LowRankSum`; `GatheredRows` are unwrapped."""
    if isinstance(leaf, GatheredRows):
        return leaf.value
    if isinstance(leaf, Packed):
        return unpack(leaf, lambda name, part, rows: take(part, rows), rows)
    if rows is None:
        return leaf
    if isinstance(leaf, LowRankSum):
        return LowRankSum(take(leaf.weight, rows), take(leaf.left, rows), leaf.right)
    if isinstance(rows, tuple):
        return lax.dynamic_slice_in_dim(leaf, *rows, axis=0)
    return jnp.take(leaf, rows, axis=0, mode="clip")


def unpack(leaf: Packed, read: Callable[[str, Array, Rows], Array], rows: Rows = None) -> Array:
    """Return the weights of a packed leaf, whose arrays are read by `read(name, part, rows)`."""
    by_rows = leaf.ndim + leaf.axis > 0
    part_rows = rows if by_rows else None
    values = read("values", leaf.values, part_rows)
    scale = read("scale", leaf.scale, part_rows)
    weights = dataclasses.replace(leaf, values=values, scale=scale).dense()
    return weights if by_rows else take(weights, rows)


def shape_of(leaf: Any, rows: Rows) -> tuple[int, ...]:
    """Return the shape of the whole leaf; `GatheredRows` have 1 in place of the unknown length."""
    if not isinstance(leaf, GatheredRows):
        return leaf.shape
    index_dims = rows.ndim if isinstance(rows, jax.Array) else 1
    return (1, *leaf.value.shape[index_dims:])


def add(leaf: Any, delta: Array | LowRank) -> Any:
    """Return `leaf + delta`, summed in at least float32 and rounded once to the leaf's dtype."""
    if isinstance(leaf, LowRankSum):
        return leaf + delta
    if isinstance(delta, LowRank):
        delta = delta.dense()
    dtype = wide_dtype(leaf)
    return (leaf.astype(dtype) + delta.astype(dtype)).astype(leaf.dtype)


def add_factors(path: str, leaf: Any, delta: LowRank, rows: Rows) -> Any:
    """Return `leaf + delta`, with the factors kept apart if a whole kernel is read."""
    if rows is None and path.endswith("kernel") and not isinstance(leaf, LowRankSum):
        return LowRankSum(leaf, delta.left, delta.right.T)
    return add(leaf, delta)


def apply(
    view: View | None, path: str, leaf: Any, layer: Array | int | None, *, rows: Rows = None
) -> Any:
    """Return what the model sees of `leaf`; without a view, the leaf itself."""
    return take(leaf, rows) if view is None else view(path, leaf, layer, rows=rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Composed:
    """Views applied in order, the first one to the stored leaf."""

    views: tuple[Any, ...]

    def __call__(
        self, path: str, leaf: Any, layer: Array | int | None, *, rows: Rows = None
    ) -> Any:
        for view in self.views:
            leaf = view(path, leaf, layer, rows=rows)
            if rows is not None:
                leaf = GatheredRows(leaf)
        return take(leaf, rows)


def compose(*views: View | None) -> View | None:
    """Return the composition of views, the first applied first; None is the identity."""
    kept = tuple(view for view in views if view is not None)
    return kept[0] if len(kept) == 1 else Composed(kept) if kept else None
