"""Templates, which combine an example's fields and a label word into one string.

There are two syntaxes. In braces, `"{text} It was {label}"`: `{label}` (or `{mask}`) is the place
of the label word, every other brace names a field, and `{{` and `}}` are literal braces. In
LM-BFF's, `*cls**sent_0*_It_was*mask*.*sep+*`: the pieces between stars are keywords or literal
text, and `_` is a space.
"""

import itertools
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jaxlm.core.checks import show
from jaxlm.core.errors import UserError

_LABEL_NAMES = ("label", "mask")
_SENTENCE = re.compile(r"(\+?)sent([lu]?)(-?)_(\d+)")
_STARRED = re.compile(r"\*sent_(\d+)\*")
_KEYWORD = re.compile(r"\*(?:cls|mask|sep\+?|\+?sent[lu]?-?_\d+)\*")
_USUAL_NAMES: tuple[tuple[str, ...], ...] = (
    ("text",),
    ("sentence",),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
)


@dataclass(frozen=True)
class Field:
    """A field of the example, with LM-BFF's changes of its text.

    `first_letter` is "keep", "lower" or "upper"; `drop_last` leaves out the last character, usually
    a full stop.
    """

    name: str
    first_letter: str = "keep"
    drop_last: bool = False

    def text(self, value: str) -> str:
        if self.drop_last:
            value = value[:-1]
        if self.first_letter == "lower":
            return value[:1].lower() + value[1:]
        if self.first_letter == "upper":
            return value[:1].upper() + value[1:]
        return value


Part = str | Field


@dataclass(frozen=True)
class Rendered:
    """A filled-in template, with the (start, end) of the label word and of each field in order."""

    text: str
    label: tuple[int, int]
    fields: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Template:
    """The parts before and after the label word.

    >>> template = Template.parse("{text} It was {label}.")
    >>> template.render({"text": "A joy."}, "great").text
    'A joy. It was great.'
    """

    before: tuple[Part, ...]
    after: tuple[Part, ...]

    @property
    def field_names(self) -> tuple[str, ...]:
        """Names of the fields, each once, in order of appearance."""
        parts = self.before + self.after
        return tuple(dict.fromkeys(part.name for part in parts if isinstance(part, Field)))

    @property
    def bare(self) -> "Template":
        """The template without fields: the text between them and the label word.

        >>> Template.parse("{text} Is it about {topic}? I say {label}.").bare
        Template(before=('? I say ',), after=('.',))
        """
        near = [str(part) for part in itertools.takewhile(_is_text, reversed(self.before))]
        text = "".join(reversed(near))
        return Template((text.lstrip() or text,), tuple(itertools.takewhile(_is_text, self.after)))

    @classmethod
    def parse(cls, text: str) -> "Template":
        """Parse a template in either syntax.

        The fields of an LM-BFF template are named *sent_0*, *sent_1*, ... until `with_names`.

        Raises:
            UserError: the template is malformed, or has no place for the label or several.
        """
        lm_bff = _KEYWORD.search(text) is not None
        parts = _parse_stars(text) if lm_bff else _parse_braces(text)
        places = [i for i, part in enumerate(parts) if part is None]
        where = "*mask*" if lm_bff else "{label}"
        if not places:
            raise UserError(
                f"task.template: has no {where} (got {show(text)}). Put it where the label word "
                "stands."
            )
        if len(places) > 1:
            raise UserError(
                f"task.template: has several places for the label (got {show(text)}). Keep one."
            )
        before = tuple(part for part in parts[: places[0]] if part)
        after = tuple(part for part in parts[places[0] + 1 :] if part)
        return cls(before, after)

    def with_names(self, names: Sequence[str] | None, columns: Sequence[str]) -> "Template":
        """Give the sentences of an LM-BFF template the names of the data's fields.

        Args:
            names: the fields that *sent_0*, *sent_1*, ... stand for; None for the usual names
                among `columns`: text or sentence; premise and hypothesis, or sentence1 and
                sentence2.
            columns: the fields of the data.

        Raises:
            UserError: there are too few names, or no usual ones.
        """
        sentences = [match for name in self.field_names if (match := _STARRED.fullmatch(name))]
        if not sentences:
            return self
        count = 1 + max(int(match[1]) for match in sentences)
        usual = [s for s in _USUAL_NAMES if len(s) == count and set(s) <= set(columns)]
        given = names or next(iter(usual), ())
        if len(given) < count:
            raise UserError(
                f"task.fields: task.template has {count} sentences (got {len(given)} fields). Name "
                "the field of each."
            )

        def named(part: Part) -> Part:
            if isinstance(part, str):
                return part
            match = _STARRED.fullmatch(part.name)
            return part if match is None else replace(part, name=given[int(match[1])])

        return Template(tuple(map(named, self.before)), tuple(map(named, self.after)))

    def render(self, fields: Mapping[str, str], label: str) -> Rendered:
        """Fill in the fields and a label word."""
        text, place = "", (0, 0)
        spans: list[tuple[int, int]] = []
        for part in (*self.before, None, *self.after):
            start = len(text)
            if part is None:
                text += label
                place = start, len(text)
            elif isinstance(part, str):
                text += part
            else:
                text += part.text(fields[part.name])
                spans.append((start, len(text)))
        return Rendered(text, place, tuple(spans))


def _is_text(part: Part) -> bool:
    return isinstance(part, str)


def _parse_braces(text: str) -> list[Part | None]:
    """Parse braces into parts; None is the place of the label."""
    parts: list[Part | None] = []
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UserError(
            f"task.template: has an unmatched brace (got {show(text)}). Write {{{{ or }}}} for a "
            "literal one."
        ) from error
    for literal, name, spec, conversion in pieces:
        parts.append(literal)
        if name is None:
            continue
        if not name or spec or conversion:
            raise UserError(
                "task.template: has a brace that is not a field's name alone (got "
                f"{show(text)}). Write {{name}}, and {{{{ or }}}} for a literal brace."
            )
        parts.append(None if name in _LABEL_NAMES else Field(name))
    return parts


def _parse_stars(text: str) -> list[Part | None]:
    """Parse LM-BFF's syntax into parts; None is the place of the label."""
    parts: list[Part | None] = []
    ended = False
    for piece in text.split("*"):
        if not piece or piece == "cls":
            continue
        if ended:
            raise UserError(
                f"task.template: goes on after *sep+* (got {show(text)}). Leave out all but the "
                "last *sep+*."
            )
        if piece in ("sep", "sep+"):
            ended = True
        elif piece == "mask":
            # LM-BFF's label word is " " + word, so exactly one space stands before the mask.
            last = parts[-1] if parts else None
            if not (isinstance(last, str) and last.endswith(" ")):
                parts.append(" ")
            parts.append(None)
        elif match := _SENTENCE.fullmatch(piece):
            if len(match[4]) > 2:
                raise UserError(
                    f"task.template: numbers a sentence beyond 99 (got {show(text)}). Number them "
                    "from 0 on."
                )
            first_letter = {"": "keep", "l": "lower", "u": "upper"}[match[2]]
            parts.append(" " if match[1] else "")
            parts.append(Field(f"*sent_{match[4]}*", first_letter, bool(match[3])))
        else:
            parts.append(piece.replace("_", " "))
    return parts
