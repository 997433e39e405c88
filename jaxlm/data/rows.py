"""Token rows with a loss mask, and their padded batches in few shapes.

A row is one text of which some tokens are in the loss: a prompt with its answer, a conversation, or
a piece of a document. Shapes: B rows of a batch, T their length, K tokens in the loss.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from jaxlm.core.errors import UserError

Batch = dict[str, np.ndarray]
SplitName = Literal["train", "validation", "test"]
RowForm = Literal["weights", "targets"]

MULTIPLE = 8
"""Of lengths: odd ones are slow, and every length costs a compilation."""

# A bucket per quantile of the lengths. Four shapes keep compilations few, while half of the rows
# are padded to no more than the median length.
_QUANTILES = (0.5, 0.8, 0.95, 1.0)


def round_up(count: int) -> int:
    """The next multiple of `MULTIPLE`."""
    return -(-count // MULTIPLE) * MULTIPLE


def length_buckets(lengths: Sequence[int], limit: int | None = None) -> tuple[int, ...]:
    """Few lengths to pad rows to, increasing: quantiles of the rows' lengths, rounded up.

    Args:
        lengths: of the rows, at least one.
        limit: most tokens of a row, which no bucket exceeds.

    >>> length_buckets([3, 5, 9, 30], limit=29)
    (16, 29)
    """
    marks = np.quantile(lengths, _QUANTILES, method="higher").astype(int)
    rounded = {round_up(int(mark)) for mark in marks}
    return tuple(sorted({min(length, limit or length) for length in rounded}))


def bucket_of(longest: int, buckets: Sequence[int]) -> int:
    """The shortest bucket that holds a row.

    Raises:
        ValueError: none does.
    """
    bucket = next((bucket for bucket in buckets if bucket >= longest), None)
    if bucket is None:
        raise ValueError(f"a row has {longest} tokens, but the longest bucket is {buckets[-1]}")
    return bucket


def epoch_places(start: int, count: int, size: int, *, seed: int) -> list[int]:
    """Places `start, ..., start + count - 1` of an endless stream of shuffled epochs.

    Place p of the stream is place p mod `size` of a permutation keyed by (seed, p div `size`).
    Every epoch has each example once; the stream is a pure function of the arguments, so a run
    that resumes at a step sees what it would have seen.

    >>> sorted(epoch_places(3, 3, 3, seed=0))
    [0, 1, 2]
    """
    return [int(_permutation(seed, p // size, size)[p % size]) for p in range(start, start + count)]


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)


def eval_places(lengths: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
    """Places of all examples once, longest first, in batches of one size; -1 fills the last.

    Examples of a batch have similar lengths, so that little of it is padding.
    """
    order = np.argsort(-np.asarray(lengths, int), kind="stable")
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        index = np.full(batch_size, -1, np.int32)
        index[: len(places)] = places
        yield index


@dataclass(frozen=True, eq=False)
class TokenRow:
    """The tokens of one text, and which of them are in the loss.

    Attributes:
        id: name of the row, unique among the rows of a data form.
        ids: tokens with special tokens.
        loss_positions: increasing places of the tokens in the loss; place 0, which nothing
            predicts, is never one. A row without any has no loss.
        subtask: group that the row belongs to; empty for none.
    """

    id: str
    ids: tuple[int, ...]
    loss_positions: tuple[int, ...]
    subtask: str = ""


def digest(rows: Sequence[TokenRow]) -> str:
    """SHA-256 of the ids of rows, their tokens, and which of those are in the loss."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr((row.id, row.ids, row.loss_positions)).encode())
    return found.hexdigest()


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """Rows, each padded on the right to the shortest bucket that holds it.

    A batch has `input_ids` and `attention_mask` int32 [B, T], and of the tokens in the loss

    - in the form "weights", `weights` float32 [B, T]: 1 for a token in the loss. That is the batch
      of `jaxlm.train.objective.lm_objective`.
    - in the form "targets", `positions` of the states that predict them and `targets`, int32
      [B, K], and `target_mask` float32 [B, K]. A model then needs logits at these positions alone.

    Attributes:
        rows: the rows.
        pad_id: token of the padding.
        form: of a batch.
        buckets: lengths to pad to, increasing; None for `length_buckets` of the rows.
    """

    rows: Sequence[TokenRow]
    pad_id: int
    form: RowForm = "weights"
    buckets: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        return [len(row.ids) for row in self.rows]

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(T, K) of each bucket, T increasing; K is a power of 2, so that there are few shapes."""
        buckets = self.buckets or (length_buckets(self.lengths) if self.rows else ())
        counts = np.array([len(row.loss_positions) for row in self.rows], int)
        bucket = np.searchsorted(buckets, self.lengths)
        most = [counts[bucket == i].max(initial=1) for i in range(len(buckets))]
        widths = [1 << max(0, int(k) - 1).bit_length() for k in np.maximum.accumulate(most)]
        return tuple(zip(map(int, buckets), widths, strict=True))

    @functools.cached_property
    def _bucket(self) -> np.ndarray:
        return np.searchsorted([length for length, _ in self.shapes], self.lengths)

    def batch(self, places: Sequence[int]) -> Batch:
        """The rows at some places, in the shape of the longest."""
        length, width = self.shapes[int(self._bucket[list(places)].max())]
        rows = [self.rows[place] for place in places]
        batch = {
            "input_ids": np.full((len(rows), length), self.pad_id, np.int32),
            "attention_mask": np.zeros((len(rows), length), np.int32),
        }
        if self.form == "weights":
            batch["weights"] = np.zeros((len(rows), length), np.float32)
        else:
            batch["positions"] = np.zeros((len(rows), width), np.int32)
            batch["targets"] = np.zeros((len(rows), width), np.int32)
            batch["target_mask"] = np.zeros((len(rows), width), np.float32)
        for i, row in enumerate(rows):
            batch["input_ids"][i, : len(row.ids)] = row.ids
            batch["attention_mask"][i, : len(row.ids)] = 1
            scored = np.array(row.loss_positions, int)
            if self.form == "weights":
                batch["weights"][i, scored] = 1
            else:
                batch["positions"][i, : len(scored)] = scored - 1
                batch["targets"][i, : len(scored)] = np.array(row.ids)[scored]
                batch["target_mask"][i, : len(scored)] = 1
        return batch

    def streams(self, first: int, count: int, *, batch_size: int, seeds: Sequence[int]) -> Batch:
        """Training batches of `count` steps under each of several seeds; see `epoch_places`.

        All have one length: the bucket of the longest row among them. A batch may hold the end of
        one epoch and the start of the next.

        Returns:
            Leaves [count, seeds, B, ...].
        """
        drawn = [
            epoch_places(first * batch_size, count * batch_size, len(self.rows), seed=seed)
            for seed in seeds
        ]
        places = np.stack([np.reshape(each, (count, batch_size)) for each in drawn], axis=1)
        batch = self.batch(places.reshape(-1).tolist())
        return {key: x.reshape(*places.shape, *x.shape[1:]) for key, x in batch.items()}

    def batches(self, first: int, count: int, *, batch_size: int, seed: int) -> Batch:
        """`streams` of one seed, leaves [count, B, ...]."""
        streams = self.streams(first, count, batch_size=batch_size, seeds=(seed,))
        return {key: x[:, 0] for key, x in streams.items()}

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Batches of every row once, see `eval_places`.

        Each has a key "index" more, int32 [B]: the place of the row, -1 in the rows that fill the
        last batch, none of whose tokens is in the loss.
        """
        mask = "weights" if self.form == "weights" else "target_mask"
        for index in eval_places(self.lengths, batch_size):
            batch = self.batch([int(index[0]) if place < 0 else int(place) for place in index])
            batch[mask][index < 0] = 0
            yield {**batch, "index": index}

    def order(self) -> list[int]:
        """All places, those of one shape after another."""
        places: list[int] = np.argsort(self._bucket, kind="stable").tolist()
        return places

    def blocks(
        self, size: int, start: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[list[int]]:
        """Places from `start` on, at most `size` of one shape at a time.

        Args:
            size: most places in a block.
            start: number of places that are skipped.
            part: (p, P) for every P-th place of `order` from the p-th on.
        """
        order = self.order()[part[0] :: part[1]]
        while start < len(order):
            stop = start + 1
            while stop < min(len(order), start + size) and (
                self._bucket[order[stop]] == self._bucket[order[start]]
            ):
                stop += 1
            yield order[start:stop]
            start = stop


class EncodedData(Protocol):
    """What the encoded splits of every data form have in common; the trainer needs no more."""

    @property
    def sizes(self) -> dict[str, int]:
        """Number of rows of each split."""

    def streams(self, first: int, count: int, *, batch_size: int, seeds: Sequence[int]) -> Batch:
        """Training batches of `count` steps from `first` on, leaves [count, seeds, B, ...].

        A pure function of the arguments.
        """

    def eval_batches(self, split: SplitName, *, batch_size: int) -> Iterator[Batch]:
        """Batches of every row of a split once, with its place in `index`, or -1 for filling."""

    def digests(self) -> dict[str, str]:
        """SHA-256 of the tokens of each split that is there, and of how they are scored."""


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """The token rows of a data form's splits, and their batches.

    Attributes:
        train, validation, test: rows with a token in the loss; a split that is not there is empty.
        buckets: lengths that batches are padded to, increasing.
        dropped: ids of the rows, by split, that truncation left without a token in the loss.
        key: of the data form in a configuration, for messages.
    """

    train: PaddedRows
    validation: PaddedRows
    test: PaddedRows
    buckets: tuple[int, ...]
    dropped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    key: str = "data"

    @classmethod
    def pad(
        cls,
        splits: dict[str, list[TokenRow]],
        *,
        pad_id: int,
        limit: int | None = None,
        form: RowForm = "weights",
        key: str = "data",
    ) -> "EncodedRows":
        """Drops rows without a loss, and gives all splits the same buckets.

        Args:
            splits: rows of "train", "validation" and "test".
            pad_id: token of the padding.
            limit: most tokens of a row.
            form: of the batches.
            key: of the data form.

        Raises:
            UserError: no row of a split that was given has a token in the loss.
        """
        kept = {name: [row for row in rows if row.loss_positions] for name, rows in splits.items()}
        for name, rows in splits.items():
            if rows and not kept[name]:
                raise UserError(
                    f"{key}.{name}: no row has a token in the loss (got {len(rows)} rows). Raise "
                    f"{key}.max_length, or give rows with an answer."
                )
        everything = [len(row.ids) for rows in kept.values() for row in rows]
        buckets = length_buckets(everything, limit)
        padded = {name: PaddedRows(rows, pad_id, form, buckets) for name, rows in kept.items()}
        dropped = {
            name: tuple(row.id for row in rows if not row.loss_positions)
            for name, rows in splits.items()
        }
        return cls(**padded, buckets=buckets, dropped=dropped, key=key)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of rows of each split."""
        return {name: len(getattr(self, name)) for name in ("train", "validation", "test")}

    def digests(self) -> dict[str, str]:
        """`digest` of each split that is there."""
        return {name: digest(getattr(self, name).rows) for name, size in self.sizes.items() if size}

    def streams(self, first: int, count: int, *, batch_size: int, seeds: Sequence[int]) -> Batch:
        """Training batches of `count` steps from `first` on; see `PaddedRows.streams`.

        Raises:
            UserError: there are no training rows.
        """
        if not len(self.train):
            raise UserError(f"{self.key}.train: there are no rows to train on. Give some.")
        return self.train.streams(first, count, batch_size=batch_size, seeds=seeds)

    def eval_batches(self, split: SplitName, *, batch_size: int) -> Iterator[Batch]:
        """Batches of every row of a split once; see `PaddedRows.eval_batches`."""
        rows: PaddedRows = getattr(self, split)
        return rows.eval_batches(batch_size)


def check_vocabulary(largest: int, vocab_size: int | None) -> None:
    """Refuses tokens that the model does not have.

    Raises:
        UserError: the tokenizer is not the model's.
    """
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"tokenizer: makes tokens beyond the {vocab_size} of the model (got {largest}). Take "
            "that of the model."
        )


def tokenizer_of(lm: Any) -> Any:
    """The tokenizer of a model.

    Raises:
        UserError: it has none.
    """
    if lm.tokenizer is None:
        raise UserError("model: has no tokenizer. Add tokenizer.json to its folder.")
    return lm.tokenizer
