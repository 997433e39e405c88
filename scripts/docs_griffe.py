"""An extension of griffe: the examples of a docstring are shown as code, with what they print."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.M)


class Examples(griffe.Extension):
    """Puts every paragraph that begins with `>>>` into a block of its own."""

    def on_object(self, *, obj: griffe.Object, **options: Any) -> None:
        del options
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
