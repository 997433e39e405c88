"""From a task's examples to tokens, in the form that costs the model least."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxlm.core.errors import UserError
from jaxlm.data._prompted import prompted
from jaxlm.data.batching import EncodedTask
from jaxlm.data.continuations import encode_prompted, share_prompts
from jaxlm.data.encoding import Encoded, encode_all
from jaxlm.data.examples import Example, Task
from jaxlm.data.opt_tasks import opt_task
from jaxlm.data.rows import check_vocabulary, length_buckets
from jaxlm.data.tasks import TaskConfig
from jaxlm.data.tokens import Kind


def prepare(
    task: Task,
    tokenizer: Any,
    *,
    kind: Kind,
    max_length: int | None = None,
    vocab_size: int | None = None,
    buckets: Sequence[int] | None = None,
) -> EncodedTask:
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
        UserError: see `encode_all`; or there is no tokenizer, it is not the model's, or an answer
            leaves no room for a prompt.
    """
    if tokenizer is None:
        raise UserError("model: has no tokenizer. Add tokenizer.json to its folder.")
    limits = [limit for limit in (max_length, task.config.max_length) if limit is not None]
    examples = [*task.train, *task.validation, *task.test]
    limit = min(limits, default=None)
    if limit is not None and task.config.answered:
        limit = _room(limit, task.config)
    encoded = _encode(task, tokenizer, examples, kind, limit)
    largest = max(max(map(max, (*x.input_ids, *x.targets))) for x in encoded)
    check_vocabulary(largest, vocab_size)
    token_ids = _label_words(encoded)
    if token_ids is not None:
        _check_words(task.config.labels, token_ids.tolist(), tokenizer)
        encoded = [_first_option(each) for each in encoded]
    elif kind == "decoder" and not task.template.after:
        encoded = share_prompts(encoded) or encoded
    known = opt_task(task.config.name)
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
        objective="classification" if known is None else known.objective,
    )


def prepare_for(lm: Any, task: Task, *, max_length: int | None = None) -> EncodedTask:
    """`prepare` for a `jaxlm.models.LanguageModel`; `max_length` is the model's where not given.

    A classifier has outputs in place of label words, in an order of its own: `token_ids` are then
    the outputs of the task's classes, by their names.

    Raises:
        UserError: see `prepare`; or the names of a classifier's classes are not those of the task.
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
    # One of another number of classes gets a new classifier (`jaxlm.train.load.with_head`).
    names = lm.config.label_names if lm.config.num_labels == count else ()
    return replace(encoded, token_ids=np.asarray(task.config.columns_of(names), np.int32))


def _encode(
    task: Task, tokenizer: Any, examples: Sequence[Example], kind: Kind, limit: int | None
) -> list[Encoded]:
    """Rows of tokens for the options of every example, cut as the configuration says."""
    config = task.config
    if kind == "encoder" and (config.own_options or any(each.context for each in examples)):
        wanted = "options of several tokens" if config.own_options else "demonstrations"
        raise UserError(
            f"model: an encoder cannot read {wanted}, which the task has (got {config.name}). Give "
            "a decoder."
        )
    if kind == "encoder" or (config.truncation == "fields" and not config.own_options):
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
    """Tokens that an answer leaves for a prompt."""
    if limit <= config.answer_length:
        raise UserError(
            f"task.max_new_tokens: leaves no room for a prompt, since task.max_length or the model "
            f"allow {limit} tokens in all (got {config.answer_length}). Lower it."
        )
    return limit - config.answer_length


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


def _check_words(labels: Sequence[str], tokens: Sequence[int], tokenizer: Any) -> None:
    for i, (label, token) in enumerate(zip(labels, tokens, strict=True)):
        if token == tokenizer.unk_token_id:
            raise UserError(
                f"task.labels: {label!r} is unknown to the tokenizer. Choose another label word."
            )
        if token in tokens[:i]:
            raise UserError(
                f"task.labels: {labels[tokens.index(token)]!r} and {label!r} are the same tokens. "
                "Change one."
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
