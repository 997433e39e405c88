"""The two sides of a score, training rows and target rows, as arrays or as stores."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxlm.core.errors import UserError
from jaxlm.influence import specs
from jaxlm.influence.store import GradientStore

BLOCK_BYTES = 2**25


class Side(NamedTuple):
    """The rows of one side at every checkpoint.

    Attributes:
      name: for messages.
      rows: for every checkpoint an array [N, R] or a store.
    """

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
        """That of products with these rows."""
        wide = np.dtype(np.float32)
        for rows in self.rows:
            wide = np.promote_types(wide, getattr(rows, "dtype", wide))
        return wide

    @property
    def block_rows(self) -> int:
        """Rows of a block: a power of two that depends on N and R alone."""
        most = max(1, BLOCK_BYTES // (4 * self.dim))
        return 1 << min(most.bit_length() - 1, (self.examples - 1).bit_length())

    def specs(self) -> list[tuple[str, specs.StoreSpec]] | None:
        """The specs of the stores with their names, or None of arrays."""
        if not isinstance(self.rows[0], GradientStore):
            return None
        return [(str(store.directory), store.spec) for store in self.rows]

    def blocks(self, checkpoint: int) -> Iterator[tuple[int, Any]]:
        """The first row of every block, and its rows."""
        for start in range(0, self.examples, self.block_rows):
            yield start, self.rows[checkpoint][start : start + self.block_rows]

    def not_finite(self, example: int) -> UserError:
        """The error of a row that is not finite."""
        return UserError(
            f"row {example} of {self.name} gives no finite number; leave the example out, or scale "
            "the rows down"
        )


def side(given: Any, name: str) -> Side:
    """A side from an array [E, N, R] or [N, R], one store, or E stores or arrays [N, R].

    Raises:
      UserError: for something else, for no rows, or where checkpoints do not have the same
        examples.
    """
    if isinstance(given, GradientStore):
        return Side(name, [_not_empty(given, str(given.directory))])
    if isinstance(given, Sequence) and given:
        rows = [each if isinstance(each, GradientStore) else _array(each) for each in given]
    else:
        array = _array(given)
        if len(array.shape) not in (2, 3) or not array.shape[0]:
            raise UserError(
                f"{name} has shape {tuple(array.shape)}; give [checkpoints, examples, numbers], or "
                "[examples, numbers] of one"
            )
        rows = [array] if len(array.shape) == 2 else list(array)
    for each in rows:
        if len(each.shape) != 2 or tuple(each.shape) != tuple(rows[0].shape):
            raise UserError(
                f"{name} has checkpoints of shapes {tuple(rows[0].shape)} and "
                f"{tuple(each.shape)}; give all the same [examples, numbers]"
            )
        _not_empty(each, name)
    found = Side(name, rows)
    if len({isinstance(each, GradientStore) for each in rows}) > 1:
        raise UserError(f"{name} has stores and arrays; give all of one kind")
    if (of_stores := found.specs()) is not None:
        specs.check_equal(of_stores, specs.OF_SIDE)
        _check_ids(rows)
    return found


def check_sides(train: Side, targets: Side) -> None:
    """Checks that inner products between two sides mean something.

    Raises:
      UserError: if they differ in the number of checkpoints or the length of rows; between stores
        also in the projection, the parameters, or in the model, name or weight of a checkpoint.
    """
    if len(train.rows) != len(targets.rows):
        raise UserError(
            f"train has {len(train.rows)} checkpoints and targets {len(targets.rows)}; give both "
            "the same"
        )
    left, right = train.specs(), targets.specs()
    for pair in zip(left or [], right or [], strict=False):
        specs.check_equal(pair, specs.OF_CHECKPOINT)
    if train.dim != targets.dim:
        raise UserError(
            f"train has rows of {train.dim} numbers and targets of {targets.dim}; give both the "
            "same projection"
        )


def weights_of(train: Side, weights: Any) -> Float[np.ndarray, " E"]:
    """The weights of the checkpoints, by default those of the stores.

    Raises:
      UserError: for other shapes, weights that are negative or not finite, or where all are zero.
    """
    if weights is None:
        of_stores = train.specs()
        if of_stores is None and len(train.rows) > 1:
            raise UserError("weights are missing; give the learning rate of every checkpoint")
        weights = [1.0] if of_stores is None else [spec.weight for _, spec in of_stores]
    found = np.asarray(weights, np.float64)
    if found.shape != (len(train.rows),):
        raise UserError(
            f"weights have shape {found.shape}; give one for each of {len(train.rows)} checkpoints"
        )
    if not (np.isfinite(found).all() and (found >= 0).all() and found.any()):
        raise UserError(f"weights are {found.tolist()}; give learning rates, 0 or more")
    return found


def subtasks_of(count: int, subtask: Any) -> Int[np.ndarray, " M"]:
    """The subtask of each of `count` targets, zeros for None.

    Raises:
      UserError: for other shapes or numbers, or a subtask without targets.
    """
    if subtask is None:
        return np.zeros(count, np.int64)
    found = np.asarray(subtask)
    if found.shape != (count,) or not np.issubdtype(found.dtype, np.integer):
        raise UserError(
            f"subtask is {found.dtype} of shape {found.shape}; give an integer for each of the "
            f"{count} targets"
        )
    if found.min() < 0:
        raise UserError(f"subtask has {found.min()}; number subtasks from 0")
    empty = np.setdiff1d(np.arange(found.max() + 1), found)
    if empty.size:
        raise UserError(f"subtask {empty[0]} has no target; number subtasks without gaps")
    return found.astype(np.int64)


def _array(given: Any) -> Any:
    return given if hasattr(given, "shape") and hasattr(given, "dtype") else np.asarray(given)


def _not_empty(rows: Any, name: str) -> Any:
    if not all(rows.shape):
        raise UserError(f"{name} has no rows; give at least one")
    return rows


def _check_ids(stores: list[GradientStore]) -> None:
    first = stores[0]
    for other in stores[1:]:
        if other.ids != first.ids:
            at = next(
                i for i, (a, b) in enumerate(zip(first.ids, other.ids, strict=True)) if a != b
            )
            raise UserError(
                f"row {at} is of example {first.ids[at]!r} in {first.directory} and of "
                f"{other.ids[at]!r} in {other.directory}; write the same examples in the same order"
            )
