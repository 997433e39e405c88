"""The papers behind a function, as BibTeX.

They are in `assets/papers.bib`, where the field `functions` of an entry lists what cites it. If a
function has several papers, the one with a star comes first, the others in the order of the file.
"""

import difflib
import functools
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

from jaxlm.core.errors import UserError


def cite(name: str | Callable[..., Any]) -> str:
    """Return BibTeX of the papers behind a function, an optimizer's name, or a shipped task.

    Args:
      name: a name such as `"mezo"`, `"zo.mezo"` or `"subj"`, or the function itself.

    Returns:
      One BibTeX entry for each paper, the main one first, separated by blank lines.

    Raises:
      UserError: no paper is recorded under that name.

    >>> print(cite("mezo").splitlines()[0])
    @inproceedings{malladi2023mezo,
    """
    full = name if isinstance(name, str) else getattr(name, "__name__", str(name))
    short, known = full.rpartition(".")[2], _entries()
    if short not in known:
        near = difflib.get_close_matches(short, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Choose one of {', '.join(known)}."
        raise UserError(f"cite: no paper is recorded (got {full!r}). {hint}")
    return "\n\n".join(known[short])


@functools.cache
def _entries() -> dict[str, list[str]]:
    """Map each name to the entries that list it, without their field `functions`."""
    text = resources.files("jaxlm").joinpath("assets", "papers.bib").read_text(encoding="utf-8")
    entries: dict[str, list[str]] = {}
    for entry, names in re.findall(r"(@.*?),\n  functions +\= \{(.*?)\}\n\}", text, re.DOTALL):
        for name in names.split():
            listed = entries.setdefault(name.rstrip("*"), [])
            listed.insert(0 if name.endswith("*") else len(listed), f"{entry}\n}}")
    return entries
