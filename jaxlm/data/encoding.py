"""Tokenize the examples of a task, and find the tokens that are scored.

A decoder reads a prompt with each of its options; an encoder reads a mask in place of the label
word. `encode_all` renders a template with every label word, `encode_prompted` takes prompts and
options as texts. Both return `Encoded`.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from jaxlm.core.errors import UserError
from jaxlm.data.prompts import Prompted
from jaxlm.data.tasks import Example
from jaxlm.data.templates import Rendered, Template

Kind = Literal["decoder", "encoder"]
Tokens = tuple[int, ...]

X = TypeVar("X")

# Strings per call of the tokenizer: enough for all its threads, few enough to hold their offsets.
_CHUNK = 4096


@dataclass(frozen=True)
class TokenizedText:
    """The tokens of one string.

    Attributes:
        ids: tokens with special tokens.
        types: segment of each token.
        scored: places of the label's tokens (encoder), or of all tokens from the label on
            (decoder).
        fields: function that returns the places of each field's tokens. It is called only for a
            row that is too long, since without offsets it tokenizes again.
    """

    ids: list[int]
    types: list[int]
    scored: range
    fields: Callable[[], Sequence[range]]


@dataclass(frozen=True)
class Encoded:
    """One example as tokens, one row per option.

    The score of option c is the mean over k of the log-probability of `targets[c][k]` in the logits
    at `positions[c][k]` of `input_ids[c]`. If the options share a prompt, `input_ids` has one row,
    the prompt, `positions` is empty, and the targets follow the prompt.

    Attributes:
        label: class of the example.
        input_ids: what the model reads. A decoder's row ends before its last target.
        positions: places in the row whose logits predict the targets.
        targets: the tokens that are scored.
        token_type_ids: segments, if an encoder's tokenizer has them.
        gold: all right options, if there are several.
    """

    label: int
    input_ids: tuple[Tokens, ...]
    positions: tuple[Tokens, ...]
    targets: tuple[Tokens, ...]
    token_type_ids: tuple[Tokens, ...] | None = None
    gold: tuple[int, ...] = ()


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
    """Tokenize examples with every label word, each string once and as a whole.

    A decoder scores every token that ends after the start of the label word, so its first token may
    include the space before the word, and text after the label is scored too. An encoder reads its
    mask token in place of the label word, which must be one token. If a row is too long, tokens are
    removed one by one from the end of whichever field then has the most.
    """
    if kind == "encoder" and tokenizer.mask_token_id is None:
        raise UserError("tokenizer: has no mask token. Give an encoder with one, or a decoder.")
    # A decoder does not read its last target, so its string may have one token more.
    room = None if max_length is None else max_length + (kind == "decoder")
    bounds = [limit for limit in (room, first_field_limit) if limit is not None]

    def render(example: Example) -> list[Rendered]:
        return [template.render(example.fields, label) for label in labels]

    for example, rows in _tokenized(examples, render, tokenizer, kind):
        if bounds and max(len(row.ids) for row in rows) > min(bounds):
            rows = _cut_fields(rows, room, first_field_limit)
        for row, label in zip(rows, labels, strict=True):
            if not row.scored:
                raise UserError(
                    f"task.labels: a word has no token (got {label!r}). Choose another."
                )
            if kind == "decoder" and row.scored.start == 0:
                raise UserError(
                    f"{example.id}: has no token before the label word (got {label!r}). Put text "
                    "before {label} in task.template."
                )
        encoded = _joined(rows, labels, tokenizer, kind, example.id)
        check_words(encoded, labels, tokenizer)
        yield replace(encoded, label=example.label)


def encode_prompted(
    examples: Sequence[Prompted], tokenizer: Any, *, max_length: int | None = None
) -> Iterator[Encoded]:
    """Tokenize prompts with each of their options, each string once and as a whole, for a decoder.

    The tokens of an option are those that end after the prompt, so a token that begins with the
    space between them belongs to the option. Rows that are too long are cut on the left.
    """
    special = set(tokenizer.all_special_ids)

    def render(example: Prompted) -> list[Rendered]:
        if not example.options:
            raise UserError(f"{example.id}: has no options (got none). Leave it out.")
        start = len(example.prompt)
        return [
            Rendered(example.prompt + option, (start, start + len(option)), ())
            for option in example.options
        ]

    for example, rows in _tokenized(examples, render, tokenizer, "decoder"):
        if max_length is not None:
            rows = _cut_left(rows, max_length, special)
        encoded = _joined(rows, example.options, tokenizer, "decoder", example.id)
        gold = example.gold if len(example.gold) > 1 else ()
        yield replace(encoded, label=example.gold[0], gold=gold)


def encode_responses(
    examples: Sequence[Prompted],
    tokenizer: Any,
    *,
    max_length: int,
    end: int | None = None,
    special: bool = True,
) -> Iterator[Encoded | None]:
    """Tokenize prompts with each of their responses, of which all tokens are scored.

    All responses begin after the same tokens: where the tokenizer joins the end of the prompt and
    the beginning of a response, that is one token earlier. Prompts that are too long are cut on the
    left to one token, and then responses on the right.

    Args:
        examples: prompts whose options are the responses.
        tokenizer: a transformers tokenizer.
        max_length: most tokens of prompt and response.
        end: token to put after a response; None for none.
        special: whether the tokenizer adds its special tokens; a chat template writes them.

    Yields:
        What the model reads, the prompt once; or None if two responses have the same tokens, or one
        has none.
    """
    known = set(tokenizer.all_special_ids)
    last = () if end is None else (end,)

    def render(example: Prompted) -> list[Rendered]:
        start = len(example.prompt)
        return [
            Rendered(example.prompt + option, (start, start + len(option)), ())
            for option in example.options
        ]

    for _, rows in _tokenized(examples, render, tokenizer, "decoder", special):
        texts = [row.ids if row.ids[-1:] == [*last] else [*row.ids, *last] for row in rows]
        start = min(row.scored.start for row in rows)
        start = min(start, *(_first_difference(texts[0], text) for text in texts[1:]))
        kept = min(special_prefix(texts[0], known), start)
        excess = max(map(len, texts)) - max_length
        gone = min(max(excess, 0), max(start - max(kept, 1), 0))
        prompt = (*texts[0][:kept], *texts[0][kept + gone : start])
        room = max_length - len(prompt)
        responses = tuple(tuple(text[start : start + room]) for text in texts)
        usable = prompt and all(responses) and len(set(responses)) == len(responses)
        yield Encoded(0, (prompt,), (), responses) if usable else None


def _tokenized(
    examples: Sequence[X],
    render: Callable[[X], list[Rendered]],
    tokenizer: Any,
    kind: Kind,
    special: bool = True,
) -> Iterator[tuple[X, list[TokenizedText]]]:
    """Yield each example with the tokens of its rendered options."""
    read = _rows_by_offsets if getattr(tokenizer, "is_fast", False) else _rows_by_prefixes
    chunk: list[tuple[X, int]] = []
    texts: list[Rendered] = []
    for number, example in enumerate(examples, start=1):
        options = render(example)
        chunk.append((example, len(options)))
        texts += options
        if len(texts) >= _CHUNK or number == len(examples):
            rows = iter(read(tokenizer, texts, kind, special))
            for whose, count in chunk:
                yield whose, list(itertools.islice(rows, count))
            chunk, texts = [], []


def _cut_fields(
    options: Sequence[TokenizedText], room: int | None, first: int | None
) -> list[TokenizedText]:
    """Remove tokens from the ends of the fields, the same number from every option."""
    longest = max(options, key=lambda row: len(row.ids))
    kept = [len(field) for field in longest.fields()]
    excess = 0 if room is None else len(longest.ids) - room
    if first is not None and kept and kept[0] > first:
        excess -= kept[0] - first
        kept[0] = first
    if sum(kept) < excess:
        raise UserError(
            "task.template: with its label words is longer than task.max_length or the model "
            f"allows (got {excess - sum(kept)} tokens too many). Shorten it, or raise the limit."
        )
    for _ in range(excess):
        kept[kept.index(max(kept))] -= 1
    return [
        _without(row, {i for field, n in zip(row.fields(), kept, strict=True) for i in field[n:]})
        for row in options
    ]


def _cut_left(
    options: Sequence[TokenizedText], limit: int, special: Collection[int]
) -> list[TokenizedText]:
    """Remove tokens after the special ones at the beginning, the same number from every option."""
    # The same cut for all options: they must be compared after the same prompt.
    excess = max(0, max(len(row.ids) for row in options) - limit)
    kept = special_prefix(options[0].ids, special)
    shorter = []
    for row in options:
        cut = _without(row, range(kept, kept + excess))
        if row.scored.start < kept + excess:  # no prompt is left, which `_joined` refuses
            cut = replace(cut, scored=range(len(cut.ids)))
        shorter.append(cut)
    return shorter


def special_prefix(ids: Sequence[int], special: Collection[int]) -> int:
    """Return the number of special tokens at the beginning."""
    return next((i for i, token in enumerate(ids) if token not in special), 0)


def _without(row: TokenizedText, gone: Collection[int]) -> TokenizedText:
    """Remove the tokens at some places."""
    left = [i for i in range(len(row.ids)) if i not in gone]
    scored = [place for place, i in enumerate(left) if i in row.scored]
    return replace(
        row,
        ids=[row.ids[i] for i in left],
        types=[row.types[i] for i in left],
        scored=range(scored[0], scored[-1] + 1) if scored else range(0),
    )


def _joined(
    rows: Sequence[TokenizedText], options: Sequence[str], tokenizer: Any, kind: Kind, name: str
) -> Encoded:
    """Check the options of one example and combine them."""
    inputs: list[Tokens] = []
    positions: list[Tokens] = []
    targets: list[Tokens] = []
    for row, option in zip(rows, options, strict=True):
        place, scored = row.scored.start, tuple(row.ids[i] for i in row.scored)
        if kind == "encoder" and len(scored) != 1:
            raise UserError(
                "task.labels: an encoder needs words of one token (got "
                f"{option!r}, {len(scored)} tokens). Choose another."
            )
        if not scored:
            raise UserError(f"{name}: an option has no token (got {option!r}). Give it text.")
        if kind == "encoder":
            inputs.append((*row.ids[:place], tokenizer.mask_token_id, *row.ids[place + 1 :]))
            positions.append((place,))
        else:
            if place == 0:
                raise UserError(
                    f"{name}: has no token before an option (got {option!r}). Give it a prompt, or "
                    "a model that reads longer texts."
                )
            inputs.append(tuple(row.ids[:-1]))
            positions.append(tuple(i - 1 for i in row.scored))
        targets.append(scored)
    types = None
    if kind == "encoder" and "token_type_ids" in tokenizer.model_input_names:
        types = tuple(tuple(row.types) for row in rows)
    return Encoded(0, tuple(inputs), tuple(positions), tuple(targets), types)


def check_words(encoded: Encoded, labels: Sequence[str], tokenizer: Any) -> None:
    """Raise UserError for a label word that the tokenizer does not know, or two that are alike."""
    seen: dict[tuple[Tokens, Tokens], str] = {}
    for label, ids, scored in zip(labels, encoded.input_ids, encoded.targets, strict=True):
        if tokenizer.unk_token_id in scored:
            raise UserError(
                f"task.labels: a word is unknown to the tokenizer (got {label!r}). Choose another."
            )
        twin = seen.setdefault((ids, scored), label)
        if twin != label:
            raise UserError(
                f"task.labels: two words have the same tokens (got {twin!r} and {label!r}). Change "
                "one."
            )


def share_prompts(examples: Sequence[Encoded]) -> list[Encoded] | None:
    """Keep the prompt of each example once, or return None if an example's options share no prompt.

    They share none if the tokenizer joins the end of the prompt and the beginning of an option.
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


def _rows_by_offsets(
    tokenizer: Any, rendered: Sequence[Rendered], kind: Kind, add_special: bool
) -> list[TokenizedText]:
    texts = [each.text for each in rendered]
    encodings = tokenizer(
        texts, add_special_tokens=add_special, return_attention_mask=False, verbose=False
    ).encodings
    rows = []
    for each, encoding in zip(rendered, encodings, strict=True):
        ids, spans = encoding.ids, encoding.offsets
        special = encoding.special_tokens_mask
        # Walk back from the end: over special tokens, over what follows the label, over the label.
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
    """Return places of the tokens in each field; the first may include white space before it."""
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
    tokenizer: Any, rendered: Sequence[Rendered], kind: Kind, add_special: bool
) -> list[TokenizedText]:
    """Find labels by comparing with the tokens of the prompt alone, or with a mask in its place."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=add_special, verbose=False)["input_ids"])

    def body(text: str) -> list[int]:
        """Return the tokens of a text without the special ones at its end."""
        ids = tokens(text)
        special = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        while ids and special[len(ids) - 1]:
            ids.pop()
        return ids

    def fields(each: Rendered) -> list[range]:
        return [
            range(len(body(each.text[:start].rstrip(" "))), len(body(each.text[:end])))
            for start, end in each.fields
        ]

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
        rows.append(
            TokenizedText(ids, list(types)[: len(ids)], scored, functools.partial(fields, each))
        )
    return rows


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
