"""Rows of training and target examples, as arrays or stores, and their products block by block."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlm.artifacts.folder import short
from jaxlm.core.errors import UserError
from jaxlm.influence.store import GradientStore

BLOCK_BYTES = 2**25

SAME_PROJECTION = ("dim", "projection", "parameters")
"""Fields of a `StoreSpec` that must agree for inner products of rows to be meaningful."""
SAME_CHECKPOINT = (*SAME_PROJECTION, "model", "checkpoint", "weight")
"""Fields that training rows and target rows of one checkpoint must share."""
SAME_EXAMPLES = (*SAME_PROJECTION, "dtype", "gradient", "data")
"""Fields that the rows of the same examples must share over checkpoints."""


class CheckpointRows(NamedTuple):
    """The rows of some examples: an array [N, R] or a store for every checkpoint."""

    name: str
    rows: list[Any]

    @property
    def examples(self) -> int:
        return self.rows[0].shape[0]

    @property
    def dim(self) -> int:
        return self.rows[0].shape[1]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of products with these rows."""
        wide = np.dtype(np.float32)
        for rows in self.rows:
            wide = np.promote_types(wide, getattr(rows, "dtype", wide))
        return wide

    @property
    def stores(self) -> list[GradientStore]:
        """The stores; none if the rows are arrays."""
        return [rows for rows in self.rows if isinstance(rows, GradientStore)]

    @property
    def block_rows(self) -> int:
        """Rows in a block: a power of 2 that depends on N and R alone.

        So a store and an array with the same rows give bitwise equal results.
        """
        most = max(1, BLOCK_BYTES // (4 * self.dim))
        return 1 << min(most.bit_length() - 1, (self.examples - 1).bit_length())

    def blocks(self, checkpoint: int) -> Iterator[tuple[int, Any]]:
        """Yield the index of the first row of every block, and the rows of the block."""
        for start in range(0, self.examples, self.block_rows):
            yield start, self.rows[checkpoint][start : start + self.block_rows]

    def check_finite(self, first: int, values: np.ndarray) -> None:
        """Require finite values [n, ...] that were computed from the rows from `first` on."""
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            raise UserError(
                f"{self.name}: the products of row {first + int(finite.argmin())} are not finite. "
                "Leave the example out, or scale the rows down."
            )


def rows_of(given: Any, name: str) -> CheckpointRows:
    """Return the rows of an array [E, N, R] or [N, R], of a store, or of E stores or arrays."""
    if isinstance(given, CheckpointRows):
        return given
    if isinstance(given, GradientStore):
        rows = [given]
    elif isinstance(given, Sequence) and given:
        rows = [x if isinstance(x, GradientStore) else _array(x) for x in given]
    else:
        array = _array(given)
        if len(array.shape) not in (2, 3) or not array.shape[0]:
            raise UserError(
                f"{name}: must have shape [checkpoints, examples, numbers], or [examples, numbers] "
                f"for one checkpoint (got {tuple(array.shape)}). Correct it."
            )
        rows = [array] if len(array.shape) == 2 else list(array)
    for x in rows:
        if len(x.shape) != 2 or tuple(x.shape) != tuple(rows[0].shape):
            raise UserError(
                f"{name}: must have one shape [examples, numbers] at all checkpoints (got "
                f"{tuple(rows[0].shape)} and {tuple(x.shape)}). Correct it."
            )
        if not all(x.shape):
            raise UserError(f"{name}: has no rows (got {tuple(x.shape)}). Give at least one.")
    result = CheckpointRows(name, rows)
    if result.stores:
        if len(result.stores) < len(rows):
            raise UserError(f"{name}: mixes stores and arrays. Give only one kind.")
        _check_specs(result.stores, SAME_EXAMPLES)
        _check_ids(result.stores)
    return result


def _array(given: Any) -> Any:
    return given if hasattr(given, "shape") and hasattr(given, "dtype") else np.asarray(given)


def _check_specs(stores: Sequence[GradientStore], fields: Sequence[str]) -> None:
    first, *others = stores
    for field in fields:
        for other in others:
            a, b = (dataclasses.asdict(store.spec)[field] for store in (first, other))
            if a != b:
                raise UserError(
                    f"{field}: {first.directory} and {other.directory} differ (got {short(a)} and "
                    f"{short(b)}). Give stores that agree."
                )


def _check_ids(stores: Sequence[GradientStore]) -> None:
    first = stores[0]
    for other in stores[1:]:
        for row, (a, b) in enumerate(zip(first.ids, other.ids, strict=True)):
            if a != b:
                raise UserError(
                    f"ids: row {row} differs between {first.directory} and {other.directory} (got "
                    f"{a!r} and {b!r}). Write the same examples in the same order."
                )


def check_pair(train: CheckpointRows, targets: CheckpointRows) -> None:
    """Check that inner products of training rows and target rows are meaningful."""
    if len(train.rows) != len(targets.rows):
        raise UserError(
            f"targets: must have the {len(train.rows)} checkpoints of train (got "
            f"{len(targets.rows)}). Give rows at the same checkpoints."
        )
    for pair in zip(train.stores, targets.stores, strict=False):
        _check_specs(pair, SAME_CHECKPOINT)
    if train.dim != targets.dim:
        raise UserError(
            f"targets: must have {train.dim} numbers per row, as train (got {targets.dim}). Use "
            "one projection for both."
        )


def weights_of(train: CheckpointRows, weights: Any) -> Float[np.ndarray, " E"]:
    """Return the weights of the checkpoints, by default those of the stores."""
    if weights is None:
        stores = train.stores
        if not stores and len(train.rows) > 1:
            raise UserError("weights: missing. Give the learning rate of every checkpoint.")
        weights = [store.spec.weight for store in stores] or [1.0]
    values = np.asarray(weights, np.float64)
    if values.shape != (len(train.rows),):
        raise UserError(
            f"weights: must be one for each of {len(train.rows)} checkpoints (got shape "
            f"{values.shape}). Correct them."
        )
    if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        raise UserError(
            f"weights: must be 0 or more, not all of them 0 (got {values.tolist()}). Give learning "
            "rates."
        )
    return values


def subtasks_of(count: int, subtask: Any) -> Int[np.ndarray, " M"]:
    """Return the subtask of each of `count` targets, zeros for None."""
    if subtask is None:
        return np.zeros(count, np.int64)
    values = np.asarray(subtask)
    if values.shape != (count,) or not np.issubdtype(values.dtype, np.integer):
        raise UserError(
            f"subtask: must be one integer for each of {count} targets (got {values.dtype} "
            f"{values.shape}). Correct it."
        )
    missing = np.setdiff1d(np.arange(values.max() + 1), values)
    if values.min() < 0 or missing.size:
        wrong = f"has {values.min()}" if values.min() < 0 else f"has no target for {missing[0]}"
        raise UserError(f"subtask: {wrong}. Number subtasks from 0 without gaps.")
    return values.astype(np.int64)


# Products of all training rows with a few directions.

Product = Callable[[Array, Array], Array]


@jax.jit
def dots(rows: Array, directions: Array) -> Array:
    """Return <row, direction>: [N, R] and [S, R] give [N, S]."""
    rows = rows.astype(directions.dtype)
    return lax.dot_general(
        rows, directions, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
    )


def _scaled_and_norm(rows: Array) -> tuple[Array, Array, Array]:
    """Return rows divided by their largest |entry|, that entry, and the norm of the quotient.

    The squares of an unscaled row could overflow or underflow.
    """
    largest = jnp.abs(rows).max(axis=1, keepdims=True)
    scaled = rows / jnp.where(largest == 0, 1, largest)
    return scaled, largest, jnp.sqrt(jnp.square(scaled).sum(axis=1, keepdims=True))


@jax.jit
def cosines(rows: Array, directions: Array) -> Array:
    """Return <row, direction> / ||row||, which is 0 for a row of zeros."""
    scaled, _, norm = _scaled_and_norm(rows.astype(directions.dtype))
    return dots(scaled, directions) / jnp.where(norm == 0, 1, norm)


@jax.jit
def norms(rows: Array, weight: Array) -> Array:
    """Return ||row|| times a weight [1, 1], as a column."""
    _, largest, norm = _scaled_and_norm(rows.astype(weight.dtype))
    return largest * norm * weight


def products(
    train: CheckpointRows, directions: list[Float[np.ndarray, "S R"]], product: Product
) -> Float[np.ndarray, "N S"]:
    """Return the sum over checkpoints of `product` of the training rows with directions."""
    total = np.zeros((train.examples, len(directions[0])), train.dtype)
    # Rows in float64 keep their digits even if `jax_enable_x64` is off.
    with jax.enable_x64(train.dtype == np.float64):
        for checkpoint, direction in enumerate(directions):
            placed = jnp.asarray(direction, train.dtype)
            for start, rows in train.blocks(checkpoint):
                values = np.asarray(product(_pad(rows, train.block_rows), placed))[: len(rows)]
                train.check_finite(start, values)
                total[start : start + len(rows)] += values
    return total


def _pad(rows: Any, size: int) -> Any:
    """Pad the last block to the size of the others, so that one program is compiled."""
    if len(rows) == size:
        return rows
    return np.pad(np.asarray(rows), ((0, size - len(rows)), (0, 0)))


# Directions: sums and means of the rows of targets, in float64.


def sums(
    targets: CheckpointRows, checkpoint: int, groups: np.ndarray, *, normalize: bool
) -> Float[np.ndarray, "S R"]:
    """Return the sum of the rows of each group, or of the rows divided by their norms."""
    total = np.zeros((int(groups.max()) + 1, targets.dim))
    for start, rows in targets.blocks(checkpoint):
        values = np.asarray(rows).astype(np.float64)
        norm = np.linalg.norm(values, axis=1, keepdims=True)
        targets.check_finite(start, norm)
        if normalize:
            if not norm.all():
                raise _no_direction(targets, f"row {start + int(norm[:, 0].argmin())}")
            values /= norm
        np.add.at(total, groups[start : start + len(values)], values)
    return total


def means(
    targets: CheckpointRows, checkpoint: int, groups: np.ndarray, *, normalize: bool = False
) -> Float[np.ndarray, "S R"]:
    """Return `sums` divided by the number of rows in each group."""
    total = sums(targets, checkpoint, groups, normalize=normalize)
    return total / np.bincount(groups)[:, None]


def unit_sums(
    targets: CheckpointRows, checkpoint: int, groups: np.ndarray
) -> Float[np.ndarray, "S R"]:
    """Return the sums of the rows of each group, scaled to norm 1."""
    total = sums(targets, checkpoint, groups, normalize=False)
    norm = np.linalg.norm(total, axis=1, keepdims=True)
    if not norm.all():
        raise _no_direction(targets, f"the mean of subtask {int(norm[:, 0].argmin())}")
    return total / norm


def _no_direction(targets: CheckpointRows, what: str) -> UserError:
    return UserError(f"{targets.name}: {what} is zero and has no direction. Leave it out.")


def second_moment(train: CheckpointRows, checkpoint: int) -> Float[np.ndarray, "R R"]:
    """Return the sum of row^T row, in float64."""
    total = np.zeros((train.dim, train.dim))
    for start, rows in train.blocks(checkpoint):
        values = np.asarray(rows).astype(np.float64)
        train.check_finite(start, values)
        total += values.T @ values
    return total
