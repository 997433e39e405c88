"""Token rows with a loss mask, and their padded batches of few shapes.

A row is a text with some of its tokens in the loss: a prompt with its answer, a conversation, or a
piece of a document. Shapes: B rows of a batch, T their length, K tokens in the loss.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from jaxlm.core.errors import UserError

Batch = dict[str, np.ndarray]
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
RowForm = Literal["weights", "targets"]

MULTIPLE = 8
"""Divisor of padded lengths: odd lengths are slow, and every length costs a compilation."""

# One bucket per quantile of the lengths. Four shapes keep compilations few, and half of the rows
# are padded to no more than the median length.
_QUANTILES = (0.5, 0.8, 0.95, 1.0)


def round_up(count: int) -> int:
    """Return the next multiple of `MULTIPLE`."""
    return -(-count // MULTIPLE) * MULTIPLE


def length_buckets(lengths: Sequence[int], limit: int | None = None) -> tuple[int, ...]:
    """Return a few increasing lengths to pad rows to: quantiles of their lengths, rounded up.

    >>> length_buckets([3, 5, 9, 30], limit=29)
    (16, 29)
    """
    marks = np.quantile(lengths, _QUANTILES, method="higher").astype(int)
    rounded = {round_up(int(mark)) for mark in marks}
    return tuple(sorted({min(length, limit or length) for length in rounded}))


def fixed_buckets(longest: int, limit: int) -> tuple[int, ...]:
    """Return lengths to pad to that do not depend on the rows, the last one for `longest` tokens.

    Data that are read in parts then have few shapes in all, two for each doubling of the length.

    >>> fixed_buckets(70, limit=512)
    (8, 16, 24, 32, 48, 64, 96)
    """
    lengths = itertools.chain((MULTIPLE,), (k << n for n in itertools.count(3) for k in (2, 3)))
    buckets = [min(next(lengths), limit)]
    while buckets[-1] < min(longest, limit):
        buckets.append(min(next(lengths), limit))
    return tuple(buckets)


def bucket_of(longest: int, buckets: Sequence[int]) -> int:
    """Return the shortest bucket that holds a row; raise ValueError if none does."""
    bucket = next((bucket for bucket in buckets if bucket >= longest), None)
    if bucket is None:
        raise ValueError(f"a row has {longest} tokens, but the longest bucket is {buckets[-1]}")
    return bucket


def epoch_places(start: int, count: int, size: int, *, seed: int) -> list[int]:
    """Return rows `start, ..., start + count - 1` of an endless stream of shuffled epochs.

    Row p of the stream is entry p mod `size` of a permutation keyed by (seed, p div `size`). The
    stream is a pure function of the arguments: a run that resumes at any step sees the same rows as
    one that was never interrupted.
    """
    return [int(_permutation(seed, p // size, size)[p % size]) for p in range(start, start + count)]


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)


def stack_steps(
    collate: Callable[[list[int]], Batch],
    size: int,
    first: int,
    count: int,
    *,
    batch_size: int,
    seeds: Sequence[int],
) -> Batch:
    """Return the training batches of `count` steps from `first` on, leaves [count, seeds, B, ...].

    A batch may hold the end of one epoch and the start of the next; a batch larger than the data
    repeats rows. The rows of all steps are collated together, so all batches have the same length.
    """
    # Draw places, a few bytes per row, on the host, and collate once for all steps and seeds.
    drawn = [
        epoch_places(first * batch_size, count * batch_size, size, seed=seed) for seed in seeds
    ]
    places = np.stack([np.reshape(each, (count, batch_size)) for each in drawn], axis=1)
    batch = collate(places.reshape(-1).tolist())
    return {key: x.reshape(*places.shape, *x.shape[1:]) for key, x in batch.items()}


def eval_places(lengths: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
    """Yield each row's place once, longest first, in batches of one size; -1 fills the last batch.

    The rows of a batch have similar lengths, so little of it is padding.
    """
    order = np.argsort(-np.asarray(lengths, int), kind="stable")
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        index = np.full(batch_size, -1, np.int32)
        index[: len(places)] = places
        yield index


def pad(
    rows: Sequence[Any], shape: tuple[int, ...], fill: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Pad rows, or lists of rows, on the right to one shape; return them and the mask of theirs."""
    padded = np.full((len(rows), *shape), fill, np.int32)
    mask = np.zeros_like(padded)
    for i, row in enumerate(rows):
        if len(shape) > 1:
            places = slice(len(row))
            padded[i, places], mask[i, places] = pad(row, shape[1:], fill)
        else:
            padded[i, : len(row)] = row
            mask[i, : len(row)] = 1
    return padded, mask


@dataclass(frozen=True, eq=False)
class EncodedSplits:
    """The encoded splits of a data form; a trainer uses these methods and `eval_batches`.

    Attributes:
        key: section of the data form, for error messages.
        dropped: by split, the ids of examples that were left out, since nothing of them is learnt.
        columns: by split, arrays [N, ...] with a number or more for each example, such as
            log-probabilities of a reference model. Training batches have those of their examples.
    """

    key: str = field(default="data", kw_only=True)
    dropped: Mapping[str, Sequence[str]] = field(default_factory=dict, kw_only=True)
    columns: Mapping[SplitName, Mapping[str, np.ndarray]] = field(
        default_factory=dict, kw_only=True
    )

    @property
    def sizes(self) -> dict[str, int]:
        """Number of examples of each split."""
        return {name: len(getattr(self, name)) for name in SPLITS}

    def batch(self, step: int, *, batch_size: int, seed: int) -> Batch:
        """Return the training batch of a step, a pure function of (seed, step)."""
        stacked = self.batches(step, 1, batch_size=batch_size, seed=seed)
        return {key: x[0] for key, x in stacked.items()}

    def batches(self, step: int, count: int, *, batch_size: int, seed: int) -> Batch:
        """Return the batches of `count` steps from `step` on, leaves [count, B, ...]."""
        streams = self.streams(step, count, batch_size=batch_size, seeds=(seed,))
        return {key: x[:, 0] for key, x in streams.items()}

    def streams(self, step: int, count: int, *, batch_size: int, seeds: Sequence[int]) -> Batch:
        """Return training batches of `count` steps, leaves [count, seeds, B, ...].

        Raises:
            UserError: there are no training examples.
        """
        size = self.sizes["train"]
        if not size:
            raise UserError(
                f"{self.key}.train: there are no training examples (got none). Give some."
            )
        columns = self.columns.get("train", {})

        def collate(places: list[int]) -> Batch:
            own = {name: column[places] for name, column in columns.items()}
            return self._train_batch(places) | own

        return stack_steps(collate, size, step, count, batch_size=batch_size, seeds=seeds)

    def _train_batch(self, places: Sequence[int]) -> Batch:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class TokenRow:
    """The tokens of one text, and which of them are in the loss.

    Attributes:
        id: name of the row, unique in its split.
        ids: tokens with special tokens.
        loss_positions: increasing places of the tokens in the loss. Where tokens are predicted,
            place 0 is never one of them, since nothing predicts it. A row without such places has
            no loss.
        subtask: group of the row; empty for none.
        starts: places where its texts begin, of which a row of `pack` has several.
        tags: the class of each token in the loss, where classes are predicted in place of tokens.
    """

    id: str
    ids: tuple[int, ...]
    loss_positions: tuple[int, ...]
    subtask: str = ""
    starts: tuple[int, ...] = field(default=(0,), kw_only=True)
    tags: tuple[int, ...] = field(default=(), kw_only=True)


def digest(rows: Sequence[TokenRow]) -> str:
    """Return SHA-256 of the ids of rows, their tokens, and which of those are in the loss."""
    # Tuples, not the class: renaming one of its fields must not change the digests on disk.
    found = hashlib.sha256()
    for row in rows:
        packed = (row.starts,) if len(row.starts) > 1 else ()
        tags = (row.tags,) if row.tags else ()
        found.update(repr((row.id, row.ids, row.loss_positions, *packed, *tags)).encode())
    return found.hexdigest()


def pack(rows: Sequence[TokenRow], length: int) -> list[TokenRow]:
    """Join rows to windows of at most `length` tokens, so that little of a batch is padding.

    Best fit, the longest row first: a row goes into the fullest window that has room for it.

    >>> rows = [TokenRow(str(n), tuple(range(n)), (1,)) for n in (3, 5, 2)]
    >>> [(row.id, row.starts, row.loss_positions) for row in pack(rows, 8)]
    [('5 3', (0, 5), (1, 6)), ('2', (0,), (1,))]
    """
    windows: list[list[TokenRow]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, window), sorted
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        at = bisect.bisect_left(rooms, (len(row.ids), 0))
        left, number = rooms.pop(at) if at < len(rooms) else (length, len(windows))
        if number == len(windows):
            windows.append([])
        windows[number].append(row)
        bisect.insort(rooms, (left - len(row.ids), number))
    return [_joined(window) for window in windows]


def _joined(rows: Sequence[TokenRow]) -> TokenRow:
    starts = list(itertools.accumulate((len(row.ids) for row in rows), initial=0))[:-1]
    placed = list(zip(rows, starts, strict=True))
    return TokenRow(
        " ".join(row.id for row in rows),
        tuple(token for row in rows for token in row.ids),
        tuple(start + place for row, start in placed for place in row.loss_positions),
        starts=tuple(starts),
        tags=tuple(tag for row in rows for tag in row.tags),
    )


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """Rows, each padded on the right to the shortest bucket that holds it.

    A batch has `input_ids` and `attention_mask` int32 [B, T], and

    - in the form "weights": `weights` float32 [B, T], 1 for a token in the loss, as
      `jaxlm.train.losses.lm_objective` takes them; rows with tags also have `tags` int32 [B, T].
    - in the form "targets": `targets` int32 [B, K], the tokens in the loss, `positions` int32
      [B, K] of the states that predict them, and `target_mask` float32 [B, K]. A model then needs
      logits at these positions only.

    Rows of `pack` also have `segment_ids` int32 [B, T], see `jaxlm.models.transformer.apply`.

    Attributes:
        rows: the rows.
        pad_id: id of the padding token.
        form: form of the batches.
        buckets: lengths to pad to, increasing; None for `length_buckets` of the rows.
        packed: whether the rows are those of `pack`.
    """

    rows: Sequence[TokenRow]
    pad_id: int
    form: RowForm = "weights"
    buckets: Sequence[int] | None = None
    packed: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        return [len(row.ids) for row in self.rows]

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(T, K) of each bucket, T increasing; K is a power of 2 and depends on T alone."""
        buckets = self.buckets or (length_buckets(self.lengths) if self.rows else ())
        counts = np.array([len(row.loss_positions) for row in self.rows], int)
        bucket = np.searchsorted(buckets, self.lengths)
        most = [counts[bucket == i].max(initial=1) for i in range(len(buckets))]
        # K never shrinks as T grows, so that the shape of a batch's longest row has room for the
        # loss tokens of its shorter rows.
        widths = [1 << max(0, int(k) - 1).bit_length() for k in np.maximum.accumulate(most)]
        return tuple(zip(map(int, buckets), widths, strict=True))

    @functools.cached_property
    def _bucket(self) -> np.ndarray:
        return np.searchsorted([length for length, _ in self.shapes], self.lengths)

    def batch(self, places: Sequence[int]) -> Batch:
        """Return the batch of the rows at some places, in the shape of the longest row."""
        length, width = self.shapes[int(self._bucket[list(places)].max())]
        rows = [self.rows[place] for place in places]
        ids, mask = pad([row.ids for row in rows], (length,), self.pad_id)
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.packed:
            batch["segment_ids"] = np.zeros_like(ids)
            for i, row in enumerate(rows):
                batch["segment_ids"][i, list(row.starts)] = 1
            batch["segment_ids"] = np.cumsum(batch["segment_ids"], axis=1, dtype=np.int32) * mask
        if self.form == "weights":
            batch["weights"] = np.zeros((len(rows), length), np.float32)
            for i, row in enumerate(rows):
                batch["weights"][i, list(row.loss_positions)] = 1
            if any(row.tags for row in rows):
                batch["tags"] = np.zeros_like(ids)
                for i, row in enumerate(rows):
                    batch["tags"][i, list(row.loss_positions)] = row.tags
            return batch
        scored = [np.array(row.loss_positions, int) for row in rows]
        batch["positions"], mask = pad([places - 1 for places in scored], (width,))
        batch["targets"] = np.take_along_axis(ids, batch["positions"] + mask, axis=1) * mask
        batch["target_mask"] = mask.astype(np.float32)
        return batch

    def batches(self, first: int, count: int, *, batch_size: int, seed: int) -> Batch:
        """Return the training batches of `count` steps from `first` on, leaves [count, B, ...]."""
        size = len(self.rows)
        streams = stack_steps(self.batch, size, first, count, batch_size=batch_size, seeds=(seed,))
        return {key: x[:, 0] for key, x in streams.items()}

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield batches that hold every row once, see `eval_places`.

        They also have the key "index", int32 [B]: the place of the row, or -1 for the rows that
        fill the last batch, which have no token in the loss.
        """
        mask = "weights" if self.form == "weights" else "target_mask"
        for index in eval_places(self.lengths, batch_size):
            # Filler rows repeat a real row: a row of padding alone has nothing to attend to.
            batch = self.batch([int(index[0]) if place < 0 else int(place) for place in index])
            batch[mask][index < 0] = 0
            yield {**batch, "index": index}

    def blocks(
        self, size: int, start: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[list[int]]:
        """Yield blocks of at most `size` places whose rows share a shape, sorted by shape.

        Args:
            size: largest number of places in a block.
            start: number of places to skip.
            part: (p, P) for every P-th place from the p-th on, the share of process p of P.
        """
        # A stable sort: a store that resumes after `start` rows relies on their order.
        order = np.argsort(self._bucket, kind="stable")[part[0] :: part[1]].tolist()
        while start < len(order):
            stop = start + 1
            while stop < min(len(order), start + size) and (
                self._bucket[order[stop]] == self._bucket[order[start]]
            ):
                stop += 1
            yield order[start:stop]
            start = stop


@dataclass(frozen=True, eq=False)
class EncodedRows(EncodedSplits):
    """The token rows of a data form's splits, and their batches.

    Attributes:
        train, validation, test: rows with a token in the loss; a split that does not exist is
            empty.
        buckets: lengths that batches are padded to, increasing.
        labels: names of the classes of tags; empty where tokens are predicted.
    """

    train: PaddedRows
    validation: PaddedRows
    test: PaddedRows
    buckets: tuple[int, ...]
    labels: tuple[str, ...] = ()

    @classmethod
    def pad(
        cls,
        splits: dict[str, list[TokenRow]],
        *,
        pad_id: int,
        limit: int | None = None,
        key: str = "data",
        packing: bool = False,
        labels: tuple[str, ...] = (),
    ) -> "EncodedRows":
        """Drop rows without a loss, and give all splits the same buckets.

        Args:
            splits: rows of "train", "validation" and "test".
            pad_id: id of the padding token.
            limit: largest number of tokens in a row.
            key: section of the data form, for error messages.
            packing: whether to `pack` training rows to windows of `limit` tokens.
            labels: names of the classes of tags.

        Raises:
            UserError: a split has rows, but none with a token in the loss.
        """
        # The mean loss of a batch of rows without loss tokens would be 0 / 0.
        kept = {name: [row for row in rows if row.loss_positions] for name, rows in splits.items()}
        for name, rows in splits.items():
            if rows and not kept[name]:
                raise UserError(
                    f"{key}.{name}: no row has a token in the loss (got {len(rows)} rows). Raise "
                    f"{key}.max_length, or give rows with an answer."
                )
        everything = [len(row.ids) for rows in kept.values() for row in rows]
        buckets = length_buckets(everything, limit)
        padded = {name: PaddedRows(rows, pad_id, buckets=buckets) for name, rows in kept.items()}
        if packing and limit is not None:
            windows = pack(kept["train"], limit)
            padded["train"] = PaddedRows(windows, pad_id, buckets=(limit,), packed=True)
        dropped = {
            name: tuple(row.id for row in rows if not row.loss_positions)
            for name, rows in splits.items()
        }
        train, validation, test = (padded[split] for split in SPLITS)
        shared: dict[str, Any] = {"buckets": buckets, "dropped": dropped, "key": key}
        return cls(train, validation, test, labels=labels, **shared)

    def sparse(self) -> "EncodedRows":
        """Return the data with training batches of the form "targets" if that makes them smaller.

        That is, if at most half of the places of every batch have a token in the loss.
        """
        if not self.train.rows or any(2 * width > length for length, width in self.train.shapes):
            return self
        return dataclasses.replace(self, train=dataclasses.replace(self.train, form="targets"))

    def digests(self) -> dict[str, str]:
        """Return `digest` of each split that exists."""
        return {name: digest(getattr(self, name).rows) for name, size in self.sizes.items() if size}

    def _train_batch(self, places: Sequence[int]) -> Batch:
        return self.train.batch(places)

    def eval_batches(self, split: SplitName, *, batch_size: int) -> Iterator[Batch]:
        """Yield batches that hold every row of a split once, see `PaddedRows.eval_batches`."""
        rows: PaddedRows = getattr(self, split)
        return rows.eval_batches(batch_size)


def check_vocabulary(largest: int, vocab_size: int | None) -> None:
    """Raise UserError if the largest token id is outside the model's vocabulary."""
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"tokenizer: has tokens beyond the {vocab_size} of the model (got {largest}). Take the "
            "model's own tokenizer."
        )


def tokenizer_of(lm: Any) -> Any:
    """Return the tokenizer of a model; raise UserError if it has none."""
    if lm.tokenizer is None:
        raise UserError("model: has no tokenizer. Add tokenizer.json to its folder.")
    return lm.tokenizer
