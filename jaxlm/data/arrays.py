"""Encoded examples as padded arrays."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxlm.data.continuations import completion
from jaxlm.data.encoding import Encoded, Tokens

Form = Literal["label_words", "continuations", "options"]
Batch = dict[str, np.ndarray]
_MULTIPLE = 8


def collate(
    examples: Sequence[Encoded],
    *,
    form: Form,
    buckets: Sequence[int],
    num_targets: int,
    pad_id: int,
    num_options: int | None = None,
) -> Batch:
    """Pads examples to the shortest bucket that holds them; `EncodedTask` describes the keys.

    Args:
        examples: the examples.
        form: of the batch.
        buckets: lengths of rows, increasing.
        num_targets: most tokens of an option in the task.
        pad_id: token of the padding.
        num_options: most options of an example in the task; None for those of this batch.
    """
    length = _bucket(examples, buckets)
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


def collate_completions(
    examples: Sequence[Encoded],
    *,
    words: Sequence[int] | None,
    buckets: Sequence[int],
    num_targets: int,
    pad_id: int,
) -> Batch:
    """Rows of prompt and right option, for `jaxlm.train.objective.lm_objective`.

    A token of the option has weight 1, so the loss is the mean over the option tokens of the batch,
    as in MeZO's code.

    Args:
        examples: the examples, in any form.
        words: the label words' tokens, in the form "label_words".
        buckets: lengths of the examples' rows, increasing.
        num_targets: most tokens of an option in the task.
        pad_id: token of the padding.

    Returns:
        `input_ids` and `attention_mask` int32 [B, T], `weights` float32 [B, T].
    """
    rows = [completion(each, words) for each in examples]
    length = _ceil(_bucket(examples, buckets) + num_targets)
    scored = [((0,) * (len(ids) - count) + (1,) * count,) for ids, count in rows]
    ids = [(each,) for each, _ in rows]
    return {
        "input_ids": _pad(ids, (1, length), pad_id)[:, 0],
        "attention_mask": _pad(_ones(ids), (1, length))[:, 0],
        "weights": _pad(scored, (1, length))[:, 0].astype(np.float32),
    }


def collate_prompts(examples: Sequence[Encoded], *, buckets: Sequence[int], pad_id: int) -> Batch:
    """Rows of prompts alone, for `jaxlm.train.rewards.generation_objective`.

    Args:
        examples: the examples, in the form "continuations".
        buckets: lengths of rows, increasing.
        pad_id: token of the padding.

    Returns:
        `input_ids` and `attention_mask` int32 [B, T].
    """
    shape = (1, _bucket(examples, buckets))
    ids = [each.input_ids for each in examples]
    return {
        "input_ids": _pad(ids, shape, pad_id)[:, 0],
        "attention_mask": _pad(_ones(ids), shape)[:, 0],
    }


def _bucket(examples: Sequence[Encoded], buckets: Sequence[int]) -> int:
    longest = max(len(row) for each in examples for row in each.input_ids)
    length = next((bucket for bucket in buckets if bucket >= longest), None)
    if length is None:
        raise ValueError(f"a row has {longest} tokens, but the longest bucket is {buckets[-1]}")
    return length


def _rounded(count: int, most: int) -> int:
    """One of few sizes that hold a count: the most there is, or the next multiple of 8."""
    return min(most, _ceil(count))


def _ceil(count: int) -> int:
    return -(-count // _MULTIPLE) * _MULTIPLE


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
