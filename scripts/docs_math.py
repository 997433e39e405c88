"""Formulas of the site: MathML at build time, and a check of built pages for raw LaTeX."""

import re

CODE = re.compile(r"<(pre|code|script|style)\b.*?</\1>", re.S)
RAW = re.compile(r"\\\(|\\\[|\$\$|\\[A-Za-z]{2,}")
ELSEWHERE = re.compile(
    r"<(?:script|iframe|img|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preload|preconnect|icon))[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>"
    r"|(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"']*"
)

NORM = re.compile(r"\\(?:\||Vert\b)(.*?)\\(?:\||Vert\b)")
ABSOLUTE = re.compile(r"\\lvert\b(.*?)\\rvert\b|(?<!\\)\|(.*?)(?<!\\)\|")
PRIME = re.compile(r"<msup>(<mi>[^<]*</mi>)<mi>&#x02032;</mi></msup>")


def mathml(latex: str, display: bool = False) -> str:
    """Convert a formula from LaTeX to MathML.

    Raises:
      ValueError: the converter does not know a command, and would show it as text.
    """
    from latex2mathml.converter import convert

    # \left and \right tell the converter that bars are a pair: it adds no space around them.
    latex = ABSOLUTE.sub(lambda m: rf"\left|{m[1] or m[2]}\right|", latex)
    latex = NORM.sub(r"\\left\\Vert \1\\right\\Vert ", latex)
    found = convert(latex, display="block" if display else "inline")
    # The glyph of a prime is already small and raised: as a superscript it is hardly visible.
    found = PRIME.sub(r'<mrow>\1<mo lspace="0" rspace="0">&#x02032;</mo></mrow>', found)
    if "\\" in found:
        raise ValueError(f"no MathML of {latex!r}: write it with other commands.")
    return found


def faults(page: str) -> list[str]:
    """Return a page's raw LaTeX, and the addresses of other hosts that it loads from."""
    shown = CODE.sub("", page)
    found = [f"raw LaTeX: {shown[m.start() : m.start() + 60]}" for m in RAW.finditer(shown)]
    return found + [f"from elsewhere: {m[0]}" for m in ELSEWHERE.finditer(page)]
