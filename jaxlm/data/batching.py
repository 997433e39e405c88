"""Encode a task for a model and batch it: few shapes, and a pure function of seed and step."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from jaxlm.core.errors import UserError
from jaxlm.data.encoding import (
    Encoded,
    Kind,
    Tokens,
    completion,
    encode_all,
    encode_prompted,
    share_prompts,
)
from jaxlm.data.prompts import prompted
from jaxlm.data.rows import (
    Batch,
    PaddedRows,
    SplitName,
    TokenRow,
    bucket_of,
    check_vocabulary,
    eval_places,
    length_buckets,
    round_up,
    stack_steps,
)
from jaxlm.data.tasks import Example, Task, TaskConfig

Form = Literal["label_words", "continuations", "options"]
Objective = Literal["classification", "completion", "generation"]


@dataclass(frozen=True, eq=False)
class EncodedTask:
    """The tokens of a task's splits, and their batches.

    In the form "label_words", the model reads one row per example and compares the logits of the
    label words at one position. In "continuations", it reads the prompt once and each option after
    it. In "options", it reads one row per option. The first form that every example allows is used.

    A batch is a dict of arrays, padded on the right (B examples, C options, T one of `buckets`,
    K the most tokens scored in any option of the task). `labels` and `weights` are in every form:

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
    weights        float32 [B]         [B]       1 for examples, 0 for filler rows
    ============== ======= =========== ========= ==================================

    ============== ======= ============= ==========================================
    key            dtype   continuations meaning
    ============== ======= ============= ==========================================
    prompt_ids     int32   [B, T]        tokens
    prompt_mask    int32   [B, T]        1 for tokens, 0 for padding
    option_ids     int32   [B, C, K]     tokens of the options, all of them scored
    option_mask    float32 [B, C, K]     1 for tokens; all 0 for a missing option
    ============== ======= ============= ==========================================

    C, and in "continuations" also K, is the largest of the batch rounded up to a multiple of 8, but
    at most the largest of the task. With the objective "completion", training batches hold each
    prompt with its right option, as `jaxlm.train.losses.lm_objective` takes them; with "generation"
    they hold prompts and the `index` of their examples, for
    `jaxlm.train.rewards.generation_objective`.

    Attributes:
        labels: the label words; empty if every example has its own options.
        token_ids: int32 [C], tokens of the label words or outputs of a classifier; None for the
            other forms.
        pad_id: id of the padding token.
        buckets: lengths that batches are padded to, increasing.
        train: encoded examples.
        validation: encoded examples.
        test: encoded examples.
        objective: the loss that training batches are made for.
    """

    labels: tuple[str, ...]
    token_ids: Int32[np.ndarray, "C"] | None
    pad_id: int
    buckets: tuple[int, ...]
    train: tuple[Encoded, ...]
    validation: tuple[Encoded, ...]
    test: tuple[Encoded, ...]
    objective: Objective = "classification"

    @functools.cached_property
    def form(self) -> Form:
        if self.token_ids is not None:
            return "label_words"
        return "options" if all(each.positions for each in self._examples) else "continuations"

    @property
    def _examples(self) -> tuple[Encoded, ...]:
        return self.train + self.validation + self.test

    @functools.cached_property
    def num_options(self) -> int:
        """C, the most options of any example."""
        if self.token_ids is not None:
            return len(self.token_ids)
        return max(len(each.targets) for each in self._examples)

    @functools.cached_property
    def num_targets(self) -> int:
        """K, the most tokens scored in any option."""
        return max(len(row) for each in self._examples for row in each.targets or each.positions)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of examples of each split."""
        return {name: len(getattr(self, name)) for name in ("train", "validation", "test")}

    def rows(self, split: SplitName, ids: Sequence[str]) -> list[TokenRow]:
        """Return the prompts of a split, each with its right option, which alone is in the loss.

        Args:
            split: the split.
            ids: name of each example.
        """
        return [self._row(name, each) for name, each in zip(ids, getattr(self, split), strict=True)]

    def _row(self, name: str, example: Encoded) -> TokenRow:
        words = None if self.token_ids is None else self.token_ids.tolist()
        ids, count = completion(example, words)
        return TokenRow(name, ids, tuple(range(len(ids) - count, len(ids))))

    def digests(self) -> dict[str, str]:
        """Return SHA-256 of the tokens of each non-empty split and of how they are scored."""
        whole = (self.form, None if self.token_ids is None else self.token_ids.tolist())
        splits = {name: getattr(self, name) for name in ("train", "validation", "test")}
        return {
            name: hashlib.sha256(repr((whole, examples)).encode()).hexdigest()
            for name, examples in splits.items()
            if examples
        }

    def batch(self, step: int, *, batch_size: int, seed: int) -> Batch:
        """Return the training batch of a step, a pure function of (seed, step)."""
        stacked = self.batches(step, 1, batch_size=batch_size, seed=seed)
        return {key: x[0] for key, x in stacked.items()}

    def batches(self, step: int, count: int, *, batch_size: int, seed: int) -> Batch:
        """Return the batches of `count` steps from `step` on, leaves [count, B, ...]."""
        streams = self.streams(step, count, batch_size=batch_size, seeds=(seed,))
        return {key: x[:, 0] for key, x in streams.items()}

    def streams(self, step: int, count: int, *, batch_size: int, seeds: Sequence[int]) -> Batch:
        """Return training batches, leaves [count, seeds, B, ...]; see `rows.stack_steps`.

        Raises:
            UserError: there are no training examples.
        """
        size = len(self.train)
        if not size:
            raise UserError("task.train: there are no training examples (got none). Give some.")
        return stack_steps(
            self._collate_train, size, step, count, batch_size=batch_size, seeds=seeds
        )

    def eval_batches(self, split: SplitName, *, batch_size: int) -> Iterator[Batch]:
        """Yield batches that hold every example of a split once, longest first.

        They also have the key "index", int32 [B]: the place of the example in the split, or -1 for
        the rows of weight 0 that fill the last batch.
        """
        examples: tuple[Encoded, ...] = getattr(self, split)
        lengths = [max(map(len, each.input_ids)) for each in examples]
        for index in eval_places(lengths, batch_size):
            batch = self._collate([examples[index[0] if i < 0 else i] for i in index])
            batch["weights"] = (index >= 0).astype(np.float32)
            yield {**batch, "index": index}

    def _collate(self, examples: Sequence[Encoded]) -> Batch:
        return collate(
            examples,
            form=self.form,
            buckets=self.buckets,
            num_targets=self.num_targets,
            pad_id=self.pad_id,
            num_options=1 if self.form == "label_words" else self.num_options,
        )

    def _collate_train(self, places: Sequence[int]) -> Batch:
        examples = [self.train[place] for place in places]
        if self.objective == "classification":
            return self._collate(examples)
        length = bucket_of(max(len(x) for each in examples for x in each.input_ids), self.buckets)
        if self.objective == "generation":
            rows = [TokenRow("", each.input_ids[0], ()) for each in examples]
        else:
            rows = [self._row("", each) for each in examples]
            length = round_up(length + self.num_targets)
        batch = PaddedRows(rows, self.pad_id, buckets=(length,)).batch(range(len(rows)))
        if self.objective == "generation":
            del batch["weights"]
            batch["index"] = np.asarray(places, np.int32)
        return batch


def collate(
    examples: Sequence[Encoded],
    *,
    form: Form,
    buckets: Sequence[int],
    num_targets: int,
    pad_id: int,
    num_options: int | None = None,
) -> Batch:
    """Pad examples to the shortest bucket that holds them; `EncodedTask` describes the keys.

    Args:
        examples: the examples.
        form: form of the batch.
        buckets: lengths of rows, increasing.
        num_targets: largest number of tokens of an option in the task.
        pad_id: id of the padding token.
        num_options: largest number of options in the task; None for that of the batch.
    """
    length = bucket_of(max(len(row) for each in examples for row in each.input_ids), buckets)
    batch = {
        "labels": np.asarray([each.label for each in examples], np.int32),
        "weights": np.ones(len(examples), np.float32),
    }
    counts = [len(each.targets if form == "continuations" else each.input_ids) for each in examples]
    options = _rounded(max(counts), max(counts) if num_options is None else num_options)
    if form == "continuations":
        prompts = [each.input_ids for each in examples]
        batch["prompt_ids"] = _pad(prompts, (1, length), pad_id)[:, 0]
        batch["prompt_mask"] = _pad(_ones(prompts), (1, length))[:, 0]
        targets = [each.targets for each in examples]
        longest = max(len(row) for rows in targets for row in rows)
        shape = (options, _rounded(longest, num_targets))
        batch["option_ids"] = _pad(targets, shape)
        batch["option_mask"] = _pad(_ones(targets), shape).astype(np.float32)
        return batch
    rows = [each.input_ids for each in examples]
    batch["input_ids"] = _pad(rows, (options, length), pad_id)
    batch["attention_mask"] = _pad(_ones(rows), (options, length))
    batch["positions"] = _pad([each.positions for each in examples], (options, num_targets))
    types = [each.token_type_ids for each in examples if each.token_type_ids is not None]
    if types:
        batch["token_type_ids"] = _pad(types, (options, length))
    if form == "label_words":
        for key in ("input_ids", "attention_mask", "token_type_ids"):
            if key in batch:
                batch[key] = batch[key][:, 0]
        batch["positions"] = batch["positions"][:, 0, 0]
        return batch
    targets = [each.targets for each in examples]
    batch["targets"] = _pad(targets, (options, num_targets))
    batch["target_mask"] = _pad(_ones(targets), (options, num_targets)).astype(np.float32)
    return batch


def _rounded(count: int, most: int) -> int:
    # Few sizes mean few compilations; a batch never exceeds the largest size of the task.
    return min(most, round_up(count))


def _ones(rows: Sequence[Sequence[Tokens]]) -> list[list[tuple[int, ...]]]:
    return [[(1,) * len(row) for row in options] for options in rows]


def _pad(
    rows: Sequence[Sequence[Sequence[int]]], shape: tuple[int, int], fill: int = 0
) -> np.ndarray:
    padded = np.full((len(rows), *shape), fill, np.int32)
    for i, options in enumerate(rows):
        for j, row in enumerate(options):
            padded[i, j, : len(row)] = row
    return padded


def prepare(
    task: Task,
    tokenizer: Any,
    *,
    kind: Kind,
    max_length: int | None = None,
    vocab_size: int | None = None,
    buckets: Sequence[int] | None = None,
) -> EncodedTask:
    """Encode every split of a task.

    Args:
        task: the task.
        tokenizer: a transformers tokenizer.
        kind: "decoder" or "encoder".
        max_length: the model's limit on the tokens of a row; the task's own limit applies too.
        vocab_size: vocabulary size of the model, to refuse another model's tokenizer.
        buckets: lengths that batches are padded to; None for `length_buckets`.

    Raises:
        UserError: as `encode_all`; or there is no tokenizer, it is not the model's, or the answer
            leaves no room for a prompt.
    """
    if tokenizer is None:
        raise UserError("model: has no tokenizer. Add tokenizer.json to its folder.")
    limits = [limit for limit in (max_length, task.config.max_length) if limit is not None]
    examples = [*task.train, *task.validation, *task.test]
    limit = min(limits, default=None)
    if limit is not None and task.config.is_generative:
        limit = _room(limit, task.config)
    encoded = _encode(task, tokenizer, examples, kind, limit)
    largest = max(max(map(max, (*x.input_ids, *x.targets))) for x in encoded)
    check_vocabulary(largest, vocab_size)
    # Cheapest form first: one row per example, then the prompt once, then one row per option.
    token_ids = _label_words(encoded)
    if token_ids is not None:
        _check_words(task.config.labels, token_ids.tolist(), tokenizer)
        encoded = [_first_option(each) for each in encoded]
    elif kind == "decoder" and not task.template.after:
        # With fields after the label, most of a row may be scored, and sharing saves little.
        encoded = share_prompts(encoded) or encoded
    ends = np.cumsum([len(task.train), len(task.validation)])
    pad_id = tokenizer.pad_token_id
    lengths = [max(map(len, each.input_ids)) for each in encoded]
    return EncodedTask(
        labels=task.config.labels,
        token_ids=token_ids,
        pad_id=0 if pad_id is None else pad_id,
        buckets=tuple(buckets or length_buckets(lengths, limit)),
        train=tuple(encoded[: ends[0]]),
        validation=tuple(encoded[ends[0] : ends[1]]),
        test=tuple(encoded[ends[1] :]),
        objective=task.config.objective or "classification",
    )


def prepare_for(lm: Any, task: Task, *, max_length: int | None = None) -> EncodedTask:
    """Call `prepare` for a `jaxlm.models.LanguageModel`, whose limit `max_length` defaults to.

    For a classifier, `token_ids` are its outputs for the task's classes, matched by name, since it
    may have its classes in another order.

    Raises:
        UserError: as `prepare`; or the names of a classifier's classes are not those of the task.
    """
    encoded = prepare(
        task,
        lm.tokenizer,
        kind=lm.config.kind,
        max_length=lm.config.max_positions if max_length is None else max_length,
        vocab_size=lm.config.vocab_size,
    )
    if lm.config.head in ("lm", "mlm"):
        return encoded
    count = len(task.config.labels)
    # A classifier with another number of classes is replaced later (`jaxlm.train.load.with_head`).
    names = lm.config.label_names if lm.config.num_labels == count else ()
    return replace(encoded, token_ids=np.asarray(task.config.columns_of(names), np.int32))


def _encode(
    task: Task, tokenizer: Any, examples: Sequence[Example], kind: Kind, limit: int | None
) -> list[Encoded]:
    config = task.config
    if kind == "encoder" and (
        config.has_per_example_options or any(each.context for each in examples)
    ):
        wanted = "options of several tokens" if config.has_per_example_options else "demonstrations"
        raise UserError(
            f"model: an encoder cannot read {wanted}, which the task has (got {config.name}). Give "
            "a decoder."
        )
    if kind == "encoder" or (config.truncation == "fields" and not config.has_per_example_options):
        return list(
            encode_all(
                task.template,
                tokenizer,
                examples,
                config.labels,
                kind=kind,
                max_length=limit,
                first_field_limit=config.first_field_limit,
            )
        )
    return list(
        encode_prompted([prompted(task, each) for each in examples], tokenizer, max_length=limit)
    )


def _room(limit: int, config: TaskConfig) -> int:
    if limit <= config.answer_length:
        raise UserError(
            f"task.max_new_tokens: leaves no room for a prompt, since task.max_length or the model "
            f"allows {limit} tokens in all (got {config.answer_length}). Lower it."
        )
    return limit - config.answer_length


def _label_words(examples: Sequence[Encoded]) -> Int32[np.ndarray, "C"] | None:
    """Return the label words' tokens if the options of each example differ in the last one only."""
    words = examples[0].targets
    for each in examples:
        shared = len(set(each.input_ids)) == len(set(each.positions)) == 1
        if not shared or each.targets != words:
            return None
    if any(len(word) != 1 for word in words):
        return None
    return np.asarray(words, np.int32)[:, 0]


def _check_words(labels: Sequence[str], tokens: Sequence[int], tokenizer: Any) -> None:
    for i, (label, token) in enumerate(zip(labels, tokens, strict=True)):
        if token == tokenizer.unk_token_id:
            raise UserError(
                f"task.labels: a word is unknown to the tokenizer (got {label!r}). Choose another."
            )
        if token in tokens[:i]:
            raise UserError(
                "task.labels: two words have the same tokens (got "
                f"{labels[tokens.index(token)]!r} and {label!r}). Change one."
            )


def _first_option(each: Encoded) -> Encoded:
    types = each.token_type_ids
    return replace(
        each,
        input_ids=each.input_ids[:1],
        positions=each.positions[:1],
        targets=(),
        token_type_ids=types and types[:1],
    )
