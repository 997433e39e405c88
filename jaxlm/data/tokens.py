"""Strings as tokens, with the places of the label and of the fields among them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxlm.data.templates import Rendered

Kind = Literal["decoder", "encoder"]


@dataclass(frozen=True)
class TokenizedText:
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


def read_tokens(tokenizer: Any, rendered: Sequence[Rendered], kind: Kind) -> list[TokenizedText]:
    """Rows of strings, by the character offsets of a tokenizer where it gives them."""
    read = _rows_by_offsets if getattr(tokenizer, "is_fast", False) else _rows_by_prefixes
    return read(tokenizer, rendered, kind)


def _rows_by_offsets(
    tokenizer: Any, rendered: Sequence[Rendered], kind: Kind
) -> list[TokenizedText]:
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
        rows.append(TokenizedText(ids[:end], encoding.type_ids[:end], scored, fields))
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


def _rows_by_prefixes(
    tokenizer: Any, rendered: Sequence[Rendered], kind: Kind
) -> list[TokenizedText]:
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
        rows.append(TokenizedText(ids, list(types)[: len(ids)], scored, fields))
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
