"""Options as continuations of a prompt that the model reads once."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.data._prompted import Prompted
from jaxlm.data.encoding import Encoded, Tokens
from jaxlm.data.templates import Rendered
from jaxlm.data.tokens import TokenizedText, read_tokens

_CHUNK = 512  # examples a call of the tokenizer


def encode_prompted(
    examples: Sequence[Prompted], tokenizer: Any, *, max_length: int | None = None
) -> Iterator[Encoded]:
    """Tokens of prompts with each of their options, for a decoder.

    Each string is tokenised once as a whole. The tokens of an option are those that end after the
    prompt, so the space between both counts with the option. What is longer than `max_length` is
    cut on the left, by as many tokens for every option of an example; the special tokens at the
    beginning stay.

    Args:
        examples: the examples.
        tokenizer: one of transformers.
        max_length: most tokens of a prompt with an option.

    Raises:
        UserError: an option without a token, no token before the option, or options that leave no
            room for a prompt.
    """
    for each in examples:
        if not each.options:
            raise UserError(f"{each.id}: has no options. Leave it out.")
    special = set(tokenizer.all_special_ids)
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        rendered = [
            Rendered(each.prompt + option, (len(each.prompt), len(each.prompt + option)), ())
            for each in chunk
            for option in each.options
        ]
        rows = iter(read_tokens(tokenizer, rendered, "decoder"))
        for each in chunk:
            yield _encoded(each, [next(rows) for _ in each.options], special, max_length)


def _encoded(
    each: Prompted, rows: Sequence[TokenizedText], special: set[int], limit: int | None
) -> Encoded:
    ids = rows[0].ids
    kept = next((i for i, token in enumerate(ids) if token not in special), 0)
    excess = 0 if limit is None else max(0, max(len(row.ids) for row in rows) - limit)
    inputs: list[Tokens] = []
    positions: list[Tokens] = []
    targets: list[Tokens] = []
    for option, row in zip(each.options, rows, strict=True):
        first = row.scored.start - excess
        if not row.scored:
            raise UserError(f"{each.id}: the option {option!r} has no token. Give it text.")
        if first < max(kept, 1):
            raise UserError(
                f"{each.id}: has no token before the option {option!r}. Give it a prompt, or a "
                "model that reads longer texts."
            )
        cut = (*row.ids[:kept], *row.ids[kept + excess :])
        inputs.append(cut[:-1])
        positions.append(tuple(range(first - 1, len(cut) - 1)))
        targets.append(cut[first:])
    gold = each.gold if len(each.gold) > 1 else ()
    return Encoded(each.gold[0], tuple(inputs), tuple(positions), tuple(targets), None, gold)


def share_prompts(examples: Sequence[Encoded]) -> list[Encoded] | None:
    """The examples with their prompts once, or None where the options of one have no common prompt.

    A tokenizer may join the end of a prompt with the beginning of an option.
    """
    shared = []
    for each in examples:
        prompts = {
            ids[: places[0] + 1] for ids, places in zip(each.input_ids, each.positions, strict=True)
        }
        if len(prompts) > 1:
            return None
        shared.append(replace(each, input_ids=tuple(prompts), positions=()))
    return shared


def completion(each: Encoded, words: Sequence[int] | None) -> tuple[Tokens, int]:
    """The tokens of an example with the option to train on, and how many of them are the option's.

    Args:
        each: the example, in any form.
        words: the label words' tokens, in the form "label_words".
    """
    if words is not None:
        return (*each.input_ids[0], words[each.label]), 1
    option = each.targets[each.label]
    if not each.positions:
        return each.input_ids[0] + option, len(option)
    return (*each.input_ids[each.label], option[-1]), len(option)
