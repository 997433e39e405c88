"""Inner products of many rows with a few directions, a block of rows at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxlm.core.errors import UserError
from jaxlm.influence.sides import Side

Product = Callable[[Array, Array], Array]


@jax.jit
def dots(rows: Array, directions: Array) -> Array:
    """<row, direction>: [N, R] and [S, R] give [N, S]."""
    rows = rows.astype(directions.dtype)
    return lax.dot_general(
        rows, directions, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
    )


@jax.jit
def cosines(rows: Array, directions: Array) -> Array:
    """<row, direction> / ||row||, and 0 of a row of zeros, whatever the size of the numbers."""
    rows = rows.astype(directions.dtype)
    largest = jnp.abs(rows).max(axis=1, keepdims=True)
    scaled = rows / jnp.where(largest == 0, 1, largest)
    size = jnp.sqrt(jnp.square(scaled).sum(axis=1, keepdims=True))
    return dots(scaled, directions) / jnp.where(size == 0, 1, size)


@jax.jit
def norms(rows: Array, weight: Array) -> Array:
    """||row|| times a weight [1, 1], as a column."""
    rows = rows.astype(weight.dtype)
    largest = jnp.abs(rows).max(axis=1, keepdims=True)
    scaled = rows / jnp.where(largest == 0, 1, largest)
    return largest * jnp.sqrt(jnp.square(scaled).sum(axis=1, keepdims=True)) * weight


def products(
    train: Side, directions: list[Float[np.ndarray, "S R"]], product: Product
) -> Float[np.ndarray, "N S"]:
    """The sum over checkpoints of `product` of the training rows with directions.

    One block of rows is in memory beside the result. Blocks depend on N and R alone, so stores and
    arrays of the same rows give the same bits.

    Raises:
      UserError: naming a row, if a product is not finite.
    """
    total = np.zeros((train.examples, len(directions[0])), train.dtype)
    # Rows in float64 keep their digits, whatever the width that JAX has elsewhere.
    with jax.enable_x64(train.dtype == np.float64):
        for checkpoint, each in enumerate(directions):
            placed = jnp.asarray(each, train.dtype)
            for start, rows in train.blocks(checkpoint):
                found = np.asarray(product(_padded(rows, train.block_rows), placed))[: len(rows)]
                finite = np.isfinite(found).all(axis=1)
                if not finite.all():
                    raise train.not_finite(start + int(finite.argmin()))
                total[start : start + len(rows)] += found
    return total


def _padded(rows: Any, size: int) -> Any:
    if len(rows) == size:
        return rows
    return np.pad(np.asarray(rows), ((0, size - len(rows)), (0, 0)))


def sums(
    side: Side, checkpoint: int, groups: np.ndarray, *, normalize: bool
) -> Float[np.ndarray, "S R"]:
    """Sums of the rows of each group in float64, of whole rows or of their directions.

    Raises:
      UserError: naming a row, if it is not finite, or is zero and has no direction.
    """
    total = np.zeros((int(groups.max()) + 1, side.dim))
    for start, rows in side.blocks(checkpoint):
        values = np.asarray(rows).astype(np.float64)
        size = np.linalg.norm(values, axis=1, keepdims=True)
        if not np.isfinite(size).all():
            raise side.not_finite(start + int(np.isfinite(size[:, 0]).argmin()))
        if normalize:
            if not size.all():
                raise _no_direction(f"row {start + int(size[:, 0].argmin())} of {side.name}")
            values /= size
        np.add.at(total, groups[start : start + len(values)], values)
    return total


def means(
    side: Side, checkpoint: int, groups: np.ndarray, *, normalize: bool = False
) -> Float[np.ndarray, "S R"]:
    """`sums` over the number of rows of each group."""
    return sums(side, checkpoint, groups, normalize=normalize) / np.bincount(groups)[:, None]


def second_moment(side: Side, checkpoint: int) -> Float[np.ndarray, "R R"]:
    """The sum of row^T row, in float64."""
    total = np.zeros((side.dim, side.dim))
    for start, rows in side.blocks(checkpoint):
        values = np.asarray(rows).astype(np.float64)
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            raise side.not_finite(start + int(finite.argmin()))
        total += values.T @ values
    return total


def unit(directions: Float[np.ndarray, "S R"], name: str) -> Float[np.ndarray, "S R"]:
    """Directions of length 1.

    Raises:
      UserError: if one is zero.
    """
    size = np.linalg.norm(directions, axis=1, keepdims=True)
    if not size.all():
        raise _no_direction(f"the mean of {name} in subtask {int(size[:, 0].argmin())}")
    return directions / size


def _no_direction(what: str) -> UserError:
    return UserError(f"{what} is zero and has no direction; leave it out")
