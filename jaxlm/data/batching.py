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
    check_words,
    encode_all,
    encode_prompted,
    share_prompts,
)
from jaxlm.data.prompts import prompted
from jaxlm.data.rows import (
    Batch,
    EncodedSplits,
    PaddedRows,
    SplitName,
    TokenRow,
    bucket_of,
    check_vocabulary,
    eval_places,
    length_buckets,
    pad,
    round_up,
)
from jaxlm.data.tasks import Task
from jaxlm.models.attention import ANY

Form = Literal["label_words", "continuations", "options", "joined"]
Objective = Literal["classification", "completion", "generation"]


@dataclass(frozen=True, eq=False)
class EncodedTask(EncodedSplits):
    """The tokens of a task's splits, and their batches.

    In the form "label_words", the model reads one row per example and compares the logits of the
    label words at one position. In "continuations", it reads the prompt once and each option after
    it. In "options", it reads one row per option. The first form that every example allows is used.
    In "joined", which preference pairs have, one row holds the prompt and all options, which do not
    see each other: training by gradients then keeps the activations of the prompt once.

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

    Batches of the form "joined" have `positions`, `targets` and `target_mask` as those of "options"
    do, `input_ids` and `attention_mask` [B, T], and for the tokens' `position_ids` and
    `segment_ids` [B, T], see `jaxlm.models.transformer.apply`.

    C is the largest of the batch rounded up to a multiple of 8, but at most the largest of the
    task; in "continuations" K is one of a few lengths. With the objective "completion", training
    batches hold each prompt with its right option, as `jaxlm.train.losses.lm_objective` takes them;
    with "generation" they hold prompts and the `index` of their examples, for
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
        joined: whether to use the form "joined".
    """

    labels: tuple[str, ...]
    token_ids: Int32[np.ndarray, "C"] | None
    pad_id: int
    buckets: tuple[int, ...]
    train: tuple[Encoded, ...]
    validation: tuple[Encoded, ...]
    test: tuple[Encoded, ...]
    objective: Objective = "classification"
    joined: bool = False

    @functools.cached_property
    def form(self) -> Form:
        if self.token_ids is not None:
            return "label_words"
        if self.joined:
            return "joined"
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

    @functools.cached_property
    def _option_buckets(self) -> tuple[int, ...]:
        lengths = [len(row) for each in self._examples for row in each.targets]
        return length_buckets(lengths, self.num_targets)

    def rows(self, split: SplitName, ids: Sequence[str]) -> list[TokenRow]:
        """Return the prompts of a split, each with its right option, which alone is in the loss.

        Args:
            split: the split.
            ids: name of each example.
        """
        return [self._row(name, each) for name, each in zip(ids, getattr(self, split), strict=True)]

    def _row(self, name: str, example: Encoded) -> TokenRow:
        if self.token_ids is not None:
            option: Tokens = (int(self.token_ids[example.label]),)
        else:
            option = example.targets[example.label]
        if self.form == "options":
            ids = (*example.input_ids[example.label], option[-1])
        else:
            ids = example.input_ids[0] + option
        return TokenRow(name, ids, tuple(range(len(ids) - len(option), len(ids))))

    def digests(self) -> dict[str, str]:
        """Return SHA-256 of the tokens of each non-empty split and of how they are scored."""
        whole = (self.form, None if self.token_ids is None else self.token_ids.tolist())
        return {
            name: hashlib.sha256(repr((whole, getattr(self, name))).encode()).hexdigest()
            for name, size in self.sizes.items()
            if size
        }

    def eval_batches(self, split: SplitName, *, batch_size: int) -> Iterator[Batch]:
        """Yield batches that hold every example of a split once, longest first.

        They also have the key "index", int32 [B]: the place of the example in the split, or -1 for
        the rows of weight 0 that fill the last batch.
        """
        examples: tuple[Encoded, ...] = getattr(self, split)
        lengths = [max(map(len, self._read_rows(each))) for each in examples]
        for index in eval_places(lengths, batch_size):
            batch = self.collate([examples[index[0] if i < 0 else i] for i in index])
            batch["weights"] = (index >= 0).astype(np.float32)
            yield {**batch, "index": index}

    def collate(self, examples: Sequence[Encoded]) -> Batch:
        """Pad examples to the shortest bucket that holds them."""
        rows = [self._read_rows(each) for each in examples]
        length = bucket_of(max(len(row) for each in rows for row in each), self.buckets)
        batch = {
            "labels": np.asarray([each.label for each in examples], np.int32),
            "weights": np.ones(len(examples), np.float32),
        }
        targets = [each.targets for each in examples]
        if self.form in ("continuations", "joined"):
            # Few sizes mean few compilations; a batch never exceeds the largest size of the task.
            options = min(self.num_options, round_up(max(map(len, targets))))
            longest = max(len(row) for each in targets for row in each)
            ids, mask = pad(targets, (options, bucket_of(longest, self._option_buckets)))
            if self.form == "joined":
                batch |= _joined(examples, ids.shape[1:], length, self.pad_id)
                return batch | {"targets": ids, "target_mask": mask.astype(np.float32)}
            prompts = [each.input_ids[0] for each in examples]
            batch["prompt_ids"], batch["prompt_mask"] = pad(prompts, (length,), self.pad_id)
            return batch | {"option_ids": ids, "option_mask": mask.astype(np.float32)}
        label_words = self.form == "label_words"
        options = 1 if label_words else min(self.num_options, round_up(max(map(len, rows))))
        ids, mask = pad(rows, (options, length), self.pad_id)
        batch |= {"input_ids": ids, "attention_mask": mask}
        places = [each.positions for each in examples]
        batch["positions"], _ = pad(places, (options, self.num_targets))
        types = [each.token_type_ids for each in examples if each.token_type_ids is not None]
        if types:
            batch["token_type_ids"], _ = pad(types, (options, length))
        if label_words:
            for key in batch.keys() - {"labels", "weights"}:
                batch[key] = batch[key][:, 0]
            batch["positions"] = batch["positions"][:, 0]
            return batch
        batch["targets"], mask = pad(targets, (options, self.num_targets))
        return batch | {"target_mask": mask.astype(np.float32)}

    def _read_rows(self, example: Encoded) -> tuple[Tokens, ...]:
        return (joined_row(example),) if self.joined else example.input_ids

    def _train_batch(self, places: Sequence[int]) -> Batch:
        examples = [self.train[place] for place in places]
        if self.objective == "classification":
            return self.collate(examples)
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


def joined_row(example: Encoded) -> Tokens:
    """Return the prompt and all options but their last tokens, which nothing reads."""
    return (*example.input_ids[0], *(token for option in example.targets for token in option[:-1]))


def _joined(examples: Sequence[Encoded], shape: tuple[int, int], length: int, pad_id: int) -> Batch:
    """Return the batch of prompts with all their options, of `shape`, in rows of one length."""
    ids, mask = pad([joined_row(each) for each in examples], (length,), pad_id)
    position_ids, segment_ids = np.zeros((2, *ids.shape), np.int32)
    positions = np.zeros((len(examples), *shape), np.int32)
    for i, each in enumerate(examples):
        start = count = len(each.input_ids[0])
        position_ids[i, :start], segment_ids[i, :start] = np.arange(start), ANY
        for c, option in enumerate(each.targets):
            end = start + len(option) - 1
            position_ids[i, start:end] = np.arange(count, count + end - start)
            segment_ids[i, start:end] = c + 1
            # The prompt's last token predicts the first one of every option.
            positions[i, c, : len(option)] = [count - 1, *range(start, end)]
            start = end
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
    return batch | {"segment_ids": segment_ids, "positions": positions}


def prepare(
    task: Task,
    tokenizer: Any,
    *,
    kind: Kind | Literal["classifier"],
    max_length: int | None = None,
    vocab_size: int | None = None,
) -> EncodedTask:
    """Encode every split of a task.

    Args:
        task: the task.
        tokenizer: a transformers tokenizer.
        kind: "decoder" or "encoder", which score label words, or "classifier", which reads the
            template without them; `token_ids` are then its outputs in the order of the classes.
        max_length: the model's limit on the tokens of a row; the task's own limit applies too.
        vocab_size: vocabulary size of the model, to refuse another model's tokenizer.

    Raises:
        UserError: as `encode_all`; or there is no tokenizer, it is not the model's, or the answer
            leaves no room for a prompt.
    """
    if tokenizer is None:
        raise UserError("model: has no tokenizer. Add tokenizer.json to its folder.")
    config = task.config
    limits = [limit for limit in (max_length, config.max_length) if limit is not None]
    limit = min(limits, default=None)
    if limit is not None and config.is_generative:
        if limit <= config.answer_length:
            raise UserError(
                "task.max_new_tokens: leaves no room for a prompt, since task.max_length or the "
                f"model allows {limit} tokens in all (got {config.answer_length}). Lower it."
            )
        limit -= config.answer_length
    if kind == "classifier":
        encoded = _encode_texts(task, tokenizer, limit)
    else:
        encoded = _encode(task, tokenizer, kind, limit)
    largest = max(max(map(max, (*x.input_ids, *x.targets))) for x in encoded)
    check_vocabulary(largest, vocab_size)
    # Cheapest form first: one row per example, then the prompt once, then one row per option.
    outputs = np.arange(len(config.labels), dtype=np.int32)
    token_ids = outputs if kind == "classifier" else _label_words(encoded)
    if token_ids is not None:
        encoded = [_first_option(each) for each in encoded]
    elif kind == "decoder" and not task.template.after:
        # With fields after the label, most of a row may be scored, and sharing saves little.
        encoded = share_prompts(encoded) or encoded
    ends = np.cumsum([len(task.train), len(task.validation)])
    pad_id = tokenizer.pad_token_id
    lengths = [max(map(len, each.input_ids)) for each in encoded]
    return EncodedTask(
        labels=config.labels,
        token_ids=token_ids,
        pad_id=0 if pad_id is None else pad_id,
        buckets=length_buckets(lengths, limit),
        train=tuple(encoded[: ends[0]]),
        validation=tuple(encoded[ends[0] : ends[1]]),
        test=tuple(encoded[ends[1] :]),
        objective=config.objective or "classification",
        key="task",
    )


def prepare_for(lm: Any, task: Task, *, max_length: int | None = None) -> EncodedTask:
    """Call `prepare` for a `jaxlm.models.LanguageModel`, whose limit `max_length` defaults to.

    For a classifier, `token_ids` are its outputs for the task's classes, matched by name, since it
    may have its classes in another order.

    Raises:
        UserError: as `prepare`; or a classifier's classes have other names than the task's, or the
            task has none.
    """
    classifies = lm.config.head not in ("lm", "mlm")
    encoded = prepare(
        task,
        lm.tokenizer,
        kind="classifier" if classifies else lm.config.kind,
        max_length=lm.config.max_positions if max_length is None else max_length,
        vocab_size=lm.config.vocab_size,
    )
    if not classifies:
        return encoded
    count = len(task.config.labels)
    # A classifier with another number of classes is replaced later (`jaxlm.train.load.with_head`).
    fits = lm.config.head == "classifier" and lm.config.num_labels == count
    names = lm.config.label_names if fits else ()
    return replace(encoded, token_ids=np.asarray(task.config.columns_of(names), np.int32))


def _encode_texts(task: Task, tokenizer: Any, limit: int | None) -> list[Encoded]:
    """Encode the template without the label, cut at its end: what a classifier was trained on."""
    if task.config.has_per_example_options:
        raise UserError(
            f"model: has a classifier, and the task has no classes (got {task.config.name}). Give "
            "a model without one."
        )
    examples = [*task.train, *task.validation, *task.test]
    texts = [each.context + task.template.render(each.fields, "").text for each in examples]
    rows = tokenizer(
        [text.strip() for text in texts], truncation=limit is not None, max_length=limit
    )
    encoded = []
    for i, (each, ids) in enumerate(zip(examples, rows["input_ids"], strict=True)):
        if not ids:
            raise UserError(f"{each.id}: has no token (got an empty text). Leave it out.")
        types = (tuple(rows["token_type_ids"][i]),) if "token_type_ids" in rows else None
        # A classifier knows which token it reads; the place stands for that.
        encoded.append(Encoded(each.label, (tuple(ids),), ((0,),), (), types))
    return encoded


def _encode(task: Task, tokenizer: Any, kind: Kind, limit: int | None) -> list[Encoded]:
    config, examples = task.config, [*task.train, *task.validation, *task.test]
    own_options = config.has_per_example_options
    if kind == "encoder" and (own_options or any(each.context for each in examples)):
        wanted = "options of several tokens" if own_options else "demonstrations"
        raise UserError(
            f"model: an encoder cannot read {wanted}, which the task has (got {config.name}). Give "
            "a decoder."
        )
    if kind == "encoder" or (config.truncation == "fields" and not own_options):
        encoded = encode_all(
            task.template,
            tokenizer,
            examples,
            config.labels,
            kind=kind,
            max_length=limit,
            first_field_limit=config.first_field_limit,
        )
        return list(encoded)
    texts = [prompted(task, each) for each in examples]
    prompts = list(encode_prompted(texts, tokenizer, max_length=limit))
    if not own_options:
        for each in prompts:
            check_words(each, config.labels, tokenizer)
    return prompts


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


def _first_option(each: Encoded) -> Encoded:
    types = each.token_type_ids
    return replace(
        each,
        input_ids=each.input_ids[:1],
        positions=each.positions[:1],
        targets=(),
        token_type_ids=types and types[:1],
    )
