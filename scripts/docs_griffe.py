"""An extension of griffe: examples are shown as code, and names that share a line get one each."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.M)


SECTION = re.compile(r"^(?:Args|Attributes):\n(?:(?:[ ]+\S.*)?\n)*(?:[ ]+\S.*)?", re.M)
SHARED = re.compile(r"^( +)(\*{0,2}\w+(?:, \*{0,2}\w+)+):((?: .*)?(?:\n\1 +\S.*)*)", re.M)


def separated(docstring: str) -> str:
    """The docstring with `low, high: the ends` as two items, of which griffe would make one."""

    def items(match: re.Match) -> str:
        indent, names, text = match.groups()
        return "\n".join(f"{indent}{name}:{text}" for name in names.split(", "))

    return SECTION.sub(lambda section: SHARED.sub(items, section[0]), docstring)


class Examples(griffe.Extension):
    """Puts every paragraph that begins with `>>>` into a block of its own, and see `separated`."""

    def on_object(self, *, obj: griffe.Object, **options: Any) -> None:
        del options
        if obj.docstring:
            text = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
            obj.docstring.value = separated(text)
