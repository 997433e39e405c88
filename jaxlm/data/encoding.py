"""Tokens of a prompt with each of its label words, and which of them are scored."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxlm.core.errors import UserError
from jaxlm.data.examples import Example
from jaxlm.data.templates import Rendered, Template

Kind = Literal["decoder", "encoder"]
Tokens = tuple[int, ...]
_CHUNK = 4096  # strings a call of the tokenizer


@dataclass(frozen=True)
class Encoded:
    """One example as tokens, a row for each option.

    The score of option c is the mean over k of the log-probability of `targets[c][k]` in the logits
    at `positions[c][k]` of `input_ids[c]`.

    Attributes:
        label: the class of the example.
        input_ids: what the model reads. A decoder's row ends before its last target.
        positions: places in the row whose logits predict the targets.
        targets: the tokens that are scored.
        token_type_ids: segments, where an encoder's tokenizer gives them.
    """

    label: int
    input_ids: tuple[Tokens, ...]
    positions: tuple[Tokens, ...]
    targets: tuple[Tokens, ...]
    token_type_ids: tuple[Tokens, ...] | None = None


@dataclass(frozen=True)
class _Row:
    """Tokens of one string.

    Attributes:
        ids: tokens with special tokens.
        types: segment of each token.
        scored: places of the label's tokens (encoder), or of all from the label on (decoder).
        fields: gives the places of each field's tokens; only a row that is too long is asked.
    """

    ids: list[int]
    types: list[int]
    scored: range
    fields: Callable[[], Sequence[range]]


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

    Raises:
        UserError: a label word that is no single token (encoder), has no token or the same tokens
            as another, or has nothing before it (decoder); a template longer than `max_length`.
    """
    if kind == "encoder" and tokenizer.mask_token_id is None:
        raise UserError("the tokenizer has no mask token: give an encoder with one, or a decoder.")
    read = _read_offsets if getattr(tokenizer, "is_fast", False) else _read_prefixes
    room = None if max_length is None else max_length + (kind == "decoder")
    size = max(1, _CHUNK // len(labels))
    for start in range(0, len(examples), size):
        chunk = examples[start : start + size]
        rendered = [template.render(x.fields, label) for x in chunk for label in labels]
        rows = read(tokenizer, rendered, kind)
        for i, example in enumerate(chunk):
            options = rows[i * len(labels) : (i + 1) * len(labels)]
            if room is not None and max(len(row.ids) for row in options) > room:
                options = _truncate(options, room)
            yield _join(options, example, labels, tokenizer, kind)


def _read_offsets(tokenizer: Any, rendered: Sequence[Rendered], kind: Kind) -> list[_Row]:
    """Rows by the character offsets of a fast tokenizer."""
    texts = [each.text for each in rendered]
    encodings = tokenizer(texts, return_attention_mask=False, verbose=False).encodings
    rows = []
    for each, encoding in zip(rendered, encodings, strict=True):
        ids, spans = encoding.ids, encoding.offsets
        special = encoding.special_tokens_mask
        end = len(ids)
        while kind == "decoder" and end and special[end - 1]:
            end -= 1
        last = end
        while last and (special[last - 1] or spans[last - 1][0] >= each.label[1]):
            last -= 1
        first = last
        while first and not special[first - 1] and spans[first - 1][1] > each.label[0]:
            first -= 1
        scored = range(first, end if kind == "decoder" else last)
        fields = functools.partial(_fields_by_offsets, each, spans[:end])
        rows.append(_Row(ids[:end], encoding.type_ids[:end], scored, fields))
    return rows


def _fields_by_offsets(each: Rendered, spans: Sequence[tuple[int, int]]) -> list[range]:
    """Places of the tokens inside each field; a space before the first of them is allowed."""
    places = []
    for start, end in each.fields:
        inside = [
            i
            for i, (first, last) in enumerate(spans)
            if start < last <= end and not each.text[first:start].strip()
        ]
        places.append(range(inside[0], inside[-1] + 1) if inside else range(0))
    return places


def _read_prefixes(tokenizer: Any, rendered: Sequence[Rendered], kind: Kind) -> list[_Row]:
    """Rows by comparison with the tokens of the prompt alone, for a tokenizer without offsets."""
    tokens = functools.partial(_tokens, tokenizer)
    body = functools.partial(_tokens_before_end, tokenizer)
    rows = []
    for each in rendered:
        start, end = each.label
        if kind == "decoder":
            ids = body(each.text)
            scored = range(_first_difference(ids, body(each.text[:start])), len(ids))
        else:
            ids = tokens(each.text)
            masked = tokens(each.text[:start].rstrip(" ") + tokenizer.mask_token + each.text[end:])
            first = _first_difference(ids, masked)
            scored = range(first, first + len(ids) - len(masked) + 1)
        types = tokenizer(each.text, verbose=False).get("token_type_ids") or [0] * len(ids)
        fields = functools.partial(_fields_by_prefixes, each, body)
        rows.append(_Row(ids, list(types)[: len(ids)], scored, fields))
    return rows


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])


def _tokens_before_end(tokenizer: Any, text: str) -> list[int]:
    """Tokens without the special ones after the end."""
    ids = _tokens(tokenizer, text)
    special = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
    while ids and special[len(ids) - 1]:
        ids.pop()
    return ids


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _fields_by_prefixes(each: Rendered, body: Callable[[str], list[int]]) -> list[range]:
    """Places of the tokens of each field, a space before it among them."""
    return [
        range(len(body(each.text[:start].rstrip(" "))), len(body(each.text[:end])))
        for start, end in each.fields
    ]


def _truncate(options: Sequence[_Row], room: int) -> list[_Row]:
    """Removes tokens from the fields' ends, the same number from every option."""
    longest = max(options, key=lambda row: len(row.ids))
    kept = [len(field) for field in longest.fields()]
    excess = len(longest.ids) - room
    if sum(kept) < excess:
        raise UserError(
            f"task.template with its label words needs {excess - sum(kept)} tokens more than "
            "task.max_length or the model allow: shorten it or raise task.max_length."
        )
    for _ in range(excess):
        kept[kept.index(max(kept))] -= 1
    shorter = []
    for row in options:
        gone = {i for field, keep in zip(row.fields(), kept, strict=True) for i in field[keep:]}
        left = [i for i in range(len(row.ids)) if i not in gone]
        scored = [place for place, i in enumerate(left) if i in row.scored]
        shorter.append(
            _Row(
                [row.ids[i] for i in left],
                [row.types[i] for i in left],
                range(scored[0], scored[-1] + 1) if scored else range(0),
                row.fields,
            )
        )
    return shorter


def _join(
    options: Sequence[_Row], example: Example, labels: Sequence[str], tokenizer: Any, kind: Kind
) -> Encoded:
    """Checks the options of one example and puts them together."""
    inputs: list[Tokens] = []
    positions: list[Tokens] = []
    targets: list[Tokens] = []
    for row, label in zip(options, labels, strict=True):
        scored = tuple(row.ids[i] for i in row.scored)
        if kind == "encoder" and len(scored) != 1:
            raise UserError(
                f"task.labels: {label!r} is {len(scored)} tokens of the tokenizer: an encoder "
                "needs label words of one token."
            )
        if not scored:
            raise UserError(f"task.labels: {label!r} has no token: choose another label word.")
        if tokenizer.unk_token_id in scored:
            raise UserError(
                f"task.labels: {label!r} is unknown to the tokenizer: choose another label word."
            )
        if kind == "encoder":
            place = row.scored.start
            inputs.append((*row.ids[:place], tokenizer.mask_token_id, *row.ids[place + 1 :]))
            positions.append((place,))
        else:
            if row.scored.start == 0:
                raise UserError(
                    f"{example.id} has no token before the label word {label!r}: put text before "
                    "{label} in task.template."
                )
            inputs.append(tuple(row.ids[:-1]))
            positions.append(tuple(i - 1 for i in row.scored))
        targets.append(scored)
    options_seen = [*zip(inputs, targets, strict=True)]
    for c, label in enumerate(labels):
        twin = options_seen.index(options_seen[c])
        if twin < c:
            raise UserError(
                f"task.labels: {labels[twin]!r} and {label!r} are the same tokens: change one."
            )
    types = None
    if kind == "encoder" and "token_type_ids" in tokenizer.model_input_names:
        types = tuple(tuple(row.types) for row in options)
    return Encoded(example.label, tuple(inputs), tuple(positions), tuple(targets), types)
