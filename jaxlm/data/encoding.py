"""Tokens of a prompt with each of its label words, and which of them are scored."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.data.examples import Example
from jaxlm.data.templates import Template
from jaxlm.data.tokens import Kind, TokenizedText, read_tokens

Tokens = tuple[int, ...]
_CHUNK = 4096  # strings a call of the tokenizer


@dataclass(frozen=True)
class Encoded:
    """One example as tokens, a row for each option.

    The score of option c is the mean over k of the log-probability of `targets[c][k]` in the logits
    at `positions[c][k]` of `input_ids[c]`. Where the options share a prompt, `input_ids` holds that
    alone, `positions` nothing, and the targets go on after it.

    Attributes:
        label: the class of the example.
        input_ids: what the model reads. A decoder's row ends before its last target.
        positions: places in the row whose logits predict the targets.
        targets: the tokens that are scored.
        token_type_ids: segments, where an encoder's tokenizer gives them.
        gold: all right options, where there are several.
    """

    label: int
    input_ids: tuple[Tokens, ...]
    positions: tuple[Tokens, ...]
    targets: tuple[Tokens, ...]
    token_type_ids: tuple[Tokens, ...] | None = None
    gold: tuple[int, ...] = ()


def encode(
    template: Template,
    tokenizer: Any,
    example: Example,
    labels: Sequence[str],
    *,
    kind: Kind,
    max_length: int | None = None,
) -> Encoded:
    """Tokens of one example with every label word; `encode_all` is the faster way for many."""
    options = encode_all(template, tokenizer, [example], labels, kind=kind, max_length=max_length)
    return next(options)


def encode_all(
    template: Template,
    tokenizer: Any,
    examples: Sequence[Example],
    labels: Sequence[str],
    *,
    kind: Kind,
    max_length: int | None = None,
    first_field_limit: int | None = None,
) -> Iterator[Encoded]:
    """Tokens of examples with every label word.

    Each string is tokenised once as a whole, with the special tokens that the tokenizer adds, but
    without one after the end for a decoder. A decoder scores every token that ends after the first
    character of the label word, so that a space in its first token counts with the word, and what
    the template has after the label is scored too. An encoder reads its mask token in place of the
    label word, which must be one token. Too many tokens: tokens are removed one by one from the end
    of the field that has the most.

    With a tokenizer that gives no character offsets, a decoder scores what follows the tokens that
    the string has in common with the prompt alone.

    Args:
        template: the template.
        tokenizer: one of transformers.
        examples: the examples.
        labels: the label words.
        kind: "decoder" or "encoder".
        max_length: longest row of `input_ids`.
        first_field_limit: most tokens of the template's first field.

    Raises:
        UserError: a label word that is no single token (encoder), has no token or the same tokens
            as another, or has nothing before it (decoder); a template longer than `max_length`.
    """
    if kind == "encoder" and tokenizer.mask_token_id is None:
        raise UserError("tokenizer: has no mask token. Give an encoder with one, or a decoder.")
    room = None if max_length is None else max_length + (kind == "decoder")
    size = max(1, _CHUNK // len(labels))
    for start in range(0, len(examples), size):
        chunk = examples[start : start + size]
        rendered = [template.render(x.fields, label) for x in chunk for label in labels]
        rows = read_tokens(tokenizer, rendered, kind)
        for i, example in enumerate(chunk):
            options = rows[i * len(labels) : (i + 1) * len(labels)]
            bounds = [limit for limit in (room, first_field_limit) if limit is not None]
            if bounds and max(len(row.ids) for row in options) > min(bounds):
                options = _truncate(options, room, first_field_limit)
            yield _join(options, example, labels, tokenizer, kind)


def _truncate(
    options: Sequence[TokenizedText], room: int | None, first: int | None
) -> list[TokenizedText]:
    """Removes tokens from the fields' ends, the same number from every option."""
    longest = max(options, key=lambda row: len(row.ids))
    kept = [len(field) for field in longest.fields()]
    excess = 0 if room is None else len(longest.ids) - room
    if first is not None and kept and kept[0] > first:
        excess -= kept[0] - first
        kept[0] = first
    if sum(kept) < excess:
        raise UserError(
            f"task.template: with its label words needs {excess - sum(kept)} tokens more than "
            "task.max_length or the model allow. Shorten it or raise task.max_length."
        )
    for _ in range(excess):
        kept[kept.index(max(kept))] -= 1
    shorter = []
    for row in options:
        gone = {i for field, keep in zip(row.fields(), kept, strict=True) for i in field[keep:]}
        left = [i for i in range(len(row.ids)) if i not in gone]
        scored = [place for place, i in enumerate(left) if i in row.scored]
        shorter.append(
            TokenizedText(
                [row.ids[i] for i in left],
                [row.types[i] for i in left],
                range(scored[0], scored[-1] + 1) if scored else range(0),
                row.fields,
            )
        )
    return shorter


def _join(
    options: Sequence[TokenizedText],
    example: Example,
    labels: Sequence[str],
    tokenizer: Any,
    kind: Kind,
) -> Encoded:
    """Checks the options of one example and puts them together."""
    inputs: list[Tokens] = []
    positions: list[Tokens] = []
    targets: list[Tokens] = []
    for row, label in zip(options, labels, strict=True):
        scored = tuple(row.ids[i] for i in row.scored)
        if kind == "encoder" and len(scored) != 1:
            raise UserError(
                f"task.labels: {label!r} is {len(scored)} tokens of the tokenizer, and an "
                "encoder reads label words of one token. Choose another label word."
            )
        if not scored:
            raise UserError(f"task.labels: {label!r} has no token. Choose another label word.")
        if tokenizer.unk_token_id in scored:
            raise UserError(
                f"task.labels: {label!r} is unknown to the tokenizer. Choose another label word."
            )
        if kind == "encoder":
            place = row.scored.start
            inputs.append((*row.ids[:place], tokenizer.mask_token_id, *row.ids[place + 1 :]))
            positions.append((place,))
        else:
            if row.scored.start == 0:
                raise UserError(
                    f"{example.id}: has no token before the label word {label!r}. Put text before "
                    "{label} in task.template."
                )
            inputs.append(tuple(row.ids[:-1]))
            positions.append(tuple(i - 1 for i in row.scored))
        targets.append(scored)
    seen: dict[tuple[Tokens, Tokens], str] = {}
    for label, option in zip(labels, zip(inputs, targets, strict=True), strict=True):
        twin = seen.setdefault(option, label)
        if twin != label:
            raise UserError(f"task.labels: {twin!r} and {label!r} are the same tokens. Change one.")
    types = None
    if kind == "encoder" and "token_type_ids" in tokenizer.model_input_names:
        types = tuple(tuple(row.types) for row in options)
    return Encoded(example.label, tuple(inputs), tuple(positions), tuple(targets), types)
