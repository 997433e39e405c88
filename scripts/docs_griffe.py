"""A griffe extension: examples become code blocks, names that share a line get one line each."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.M)


SECTION = re.compile(r"^(?:Args|Attributes):\n(?:(?:[ ]+\S.*)?\n)*(?:[ ]+\S.*)?", re.M)
SHARED = re.compile(r"^( +)(\*{0,2}\w+(?:, \*{0,2}\w+)+):((?: .*)?(?:\n\1 +\S.*)*)", re.M)


def separated(docstring: str) -> str:
    """Split items such as `low, high: the ends` in two; griffe would read them as one name."""

    def items(match: re.Match) -> str:
        indent, names, text = match.groups()
        return "\n".join(f"{indent}{name}:{text}" for name in names.split(", "))

    return SECTION.sub(lambda section: SHARED.sub(items, section[0]), docstring)


class Examples(griffe.Extension):
    """Put every paragraph that begins with `>>>` into a code block, and apply `separated`."""

    def on_object(self, *, obj: griffe.Object, **options: Any) -> None:
        del options
        if obj.docstring:
            text = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
            obj.docstring.value = separated(text)
