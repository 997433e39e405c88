"""Batches of an encoded task: few shapes, and every training batch a function of seed and step."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from jaxlm.core.errors import UserError
from jaxlm.data.encoding import Encoded, encode_all
from jaxlm.data.examples import Task
from jaxlm.data.tokens import Kind

Split = Literal["train", "validation", "test"]
Batch = dict[str, np.ndarray]
_QUANTILES = (0.5, 0.8, 0.95, 1.0)
_MULTIPLE = 8


def prepare(
    task: Task,
    tokenizer: Any,
    *,
    kind: Kind,
    max_length: int | None = None,
    vocab_size: int | None = None,
    buckets: Sequence[int] | None = None,
) -> "EncodedTask":
    """Encodes every split of a task.

    Args:
        task: the task.
        tokenizer: one of transformers.
        kind: "decoder" or "encoder".
        max_length: longest row that the model takes; the smaller of it and the task's own counts.
        vocab_size: tokens of the model; a tokenizer that makes others is refused.
        buckets: lengths that batches are padded to; without it, quantiles of the rows' lengths,
            rounded up to a multiple of 8.

    Raises:
        UserError: see `encode_all`; or there is no tokenizer, or it is not the model's.
    """
    if tokenizer is None:
        raise UserError("the model has no tokenizer: add tokenizer.json to its folder.")
    limits = [limit for limit in (max_length, task.config.max_length) if limit is not None]
    examples = [*task.train, *task.validation, *task.test]
    encoded = list(
        encode_all(
            task.template,
            tokenizer,
            examples,
            task.config.labels,
            kind=kind,
            max_length=min(limits, default=None),
        )
    )
    largest = max(max(map(max, (*x.input_ids, *x.targets))) for x in encoded)
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"the tokenizer makes token {largest}, the model has {vocab_size}: take the tokenizer "
            "of the model."
        )
    token_ids = _label_words(encoded)
    if token_ids is not None:
        encoded = [_first_option(each) for each in encoded]
    ends = np.cumsum([len(task.train), len(task.validation)])
    pad_id = tokenizer.pad_token_id
    return EncodedTask(
        labels=task.config.labels,
        token_ids=token_ids,
        pad_id=0 if pad_id is None else pad_id,
        buckets=tuple(buckets or _buckets(encoded, min(limits, default=None))),
        train=tuple(encoded[: ends[0]]),
        validation=tuple(encoded[ends[0] : ends[1]]),
        test=tuple(encoded[ends[1] :]),
    )


def prepare_for(lm: Any, task: Task, *, max_length: int | None = None) -> "EncodedTask":
    """`prepare` for a `jaxlm.models.LanguageModel`; `max_length` is the model's where not given."""
    return prepare(
        task,
        lm.tokenizer,
        kind=lm.config.kind,
        max_length=lm.config.max_positions if max_length is None else max_length,
        vocab_size=lm.config.vocab_size,
    )


def _label_words(examples: Sequence[Encoded]) -> Int32[np.ndarray, "C"] | None:
    """The label words' tokens, if in every example the options differ in one last token alone."""
    words = examples[0].targets
    for each in examples:
        shared = len(set(each.input_ids)) == len(set(each.positions)) == 1
        if not shared or each.targets != words:
            return None
    if any(len(word) != 1 for word in words):
        return None
    return np.asarray(words, np.int32)[:, 0]


def _first_option(each: Encoded) -> Encoded:
    types = each.token_type_ids
    return replace(
        each,
        input_ids=each.input_ids[:1],
        positions=each.positions[:1],
        targets=(),
        token_type_ids=types and types[:1],
    )


def _buckets(examples: Sequence[Encoded], limit: int | None) -> list[int]:
    lengths = [max(map(len, each.input_ids)) for each in examples]
    marks = np.quantile(lengths, _QUANTILES, method="higher").astype(int)
    rounded = {-(-int(mark) // _MULTIPLE) * _MULTIPLE for mark in marks}
    return sorted({min(length, limit or length) for length in rounded})


@dataclass(frozen=True, eq=False)
class EncodedTask:
    """The tokens of a task's splits, and their batches.

    In the form "label_words" one row an example is read, and the label words are compared by their
    logits at one position; "options" reads a row for each label word. The first is used where every
    example allows it.

    A batch is a dict of arrays, padded on the right (B examples, C label words, T one of `buckets`,
    K the most tokens scored in any option of the task):

    ============== ======= =========== ========= ==================================
    key            dtype   label_words options   meaning
    ============== ======= =========== ========= ==================================
    input_ids      int32   [B, T]      [B, C, T] tokens
    attention_mask int32   [B, T]      [B, C, T] 1 for tokens, 0 for padding
    token_type_ids int32   [B, T]      [B, C, T] segments, if the tokenizer has them
    positions      int32   [B]         [B, C, K] place whose logits predict a target
    targets        int32               [B, C, K] tokens scored
    target_mask    float32             [B, C, K] 1 for targets, 0 for padding
    labels         int32   [B]         [B]       class
    weights        float32 [B]         [B]       1 for examples, 0 for filling rows
    ============== ======= =========== ========= ==================================

    Attributes:
        labels: the label words.
        token_ids: int32 [C], the label words' tokens; None in the form "options".
        pad_id: token of the padding.
        vocab_size: tokens of the model; a tokenizer that makes others is refused.
        buckets: lengths that batches are padded to, increasing.
        train: encoded examples.
        validation: encoded examples.
        test: encoded examples.
    """

    labels: tuple[str, ...]
    token_ids: Int32[np.ndarray, "C"] | None
    pad_id: int
    buckets: tuple[int, ...]
    train: tuple[Encoded, ...]
    validation: tuple[Encoded, ...]
    test: tuple[Encoded, ...]

    @property
    def form(self) -> Literal["label_words", "options"]:
        return "options" if self.token_ids is None else "label_words"

    @functools.cached_property
    def num_targets(self) -> int:
        """K, the most tokens scored in any option."""
        examples = self.train + self.validation + self.test
        return max(len(row) for each in examples for row in each.positions)

    def batch(self, step: int, *, batch_size: int, seed: int) -> Batch:
        """The training batch of a step, a pure function of (seed, step).

        Place p = step * batch_size + i of the stream of examples is place p mod N of a permutation
        keyed by (seed, p div N): every epoch has each example once, a batch may hold the end of one
        epoch and the start of the next, and one larger than the data repeats examples.

        Raises:
            UserError: there are no training examples.
        """
        return self._collate(self._stream(step * batch_size, batch_size, seed))

    def batches(self, step: int, count: int, *, batch_size: int, seed: int) -> Batch:
        """The batches of `count` steps from `step` on, stacked on a new first axis.

        All have one length: the bucket of the longest row among them.
        """
        examples = self._stream(step * batch_size, count * batch_size, seed)
        stacked = self._collate(examples)
        return {
            key: value.reshape(count, batch_size, *value.shape[1:])
            for key, value in stacked.items()
        }

    def eval_batches(self, split: Split, *, batch_size: int) -> Iterator[Batch]:
        """Batches of every example of a split once, longest first.

        Each has a key "index" more, int32 [B]: the place of the example in the split, -1 in the
        rows of weight 0 that fill the last batch.
        """
        examples: tuple[Encoded, ...] = getattr(self, split)
        lengths = [max(map(len, each.input_ids)) for each in examples]
        order = np.argsort(-np.asarray(lengths, int), kind="stable")
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            index = np.full(batch_size, -1, np.int32)
            index[: len(places)] = places
            batch = self._collate([examples[places[0] if i < 0 else i] for i in index])
            batch["weights"] = (index >= 0).astype(np.float32)
            yield {**batch, "index": index}

    def _stream(self, start: int, count: int, seed: int) -> list[Encoded]:
        size = len(self.train)
        if not size:
            raise UserError("there are no training examples: give task.train.")
        places = range(start, start + count)
        return [self.train[_permutation(seed, p // size, size)[p % size]] for p in places]

    def _collate(self, examples: Sequence[Encoded]) -> Batch:
        return collate(
            examples,
            form=self.form,
            buckets=self.buckets,
            num_targets=self.num_targets,
            pad_id=self.pad_id,
        )


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)


def collate(
    examples: Sequence[Encoded],
    *,
    form: Literal["label_words", "options"],
    buckets: Sequence[int],
    num_targets: int,
    pad_id: int,
) -> Batch:
    """Pads examples to the shortest bucket that holds them; `EncodedTask` describes the keys."""
    longest = max(len(row) for each in examples for row in each.input_ids)
    length = next((bucket for bucket in buckets if bucket >= longest), None)
    if length is None:
        raise ValueError(f"a row has {longest} tokens, but the longest bucket is {buckets[-1]}")
    batch = {
        "input_ids": _pad([each.input_ids for each in examples], length, pad_id),
        "attention_mask": _pad(
            [[[1] * len(row) for row in each.input_ids] for each in examples], length
        ),
        "positions": _pad([each.positions for each in examples], num_targets),
        "labels": np.asarray([each.label for each in examples], np.int32),
        "weights": np.ones(len(examples), np.float32),
    }
    types = [each.token_type_ids for each in examples if each.token_type_ids is not None]
    if types:
        batch["token_type_ids"] = _pad(types, length)
    if form == "label_words":
        for key in ("input_ids", "attention_mask", "token_type_ids"):
            if key in batch:
                batch[key] = batch[key][:, 0]
        batch["positions"] = batch["positions"][:, 0, 0]
        return batch
    batch["targets"] = _pad([each.targets for each in examples], num_targets)
    ones = [[[1] * len(row) for row in each.targets] for each in examples]
    batch["target_mask"] = _pad(ones, num_targets).astype(np.float32)
    return batch


def _pad(rows: Sequence[Sequence[Sequence[int]]], length: int, fill: int = 0) -> np.ndarray:
    padded = np.full((len(rows), len(rows[0]), length), fill, np.int32)
    for i, options in enumerate(rows):
        for j, row in enumerate(options):
            padded[i, j, : len(row)] = row
    return padded
