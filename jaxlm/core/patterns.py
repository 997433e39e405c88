"""Regular expressions from configurations, which may not search for ever."""

import math
import re
from collections.abc import Callable

import regex

from jaxlm.core.checks import show
from jaxlm.core.errors import UserError

SECONDS = 1.0
"""Time to search one path, which takes microseconds."""
LENGTH = 2000
"""Characters of an expression."""
REPETITIONS = 10_000
"""Product of all counts in braces: `regex` writes `(a{99}){99}` out when it compiles."""


def searcher(pattern: str, key: str) -> Callable[[str], bool]:
    """Whether an expression is found in a text, within a limit of time.

    An expression such as `(a+)+$` can try more ways to match than there is time for, and the module
    `re` cannot be stopped in it; `regex`, which reads the same language, can.

    Args:
      pattern: the expression.
      key: what names it, for messages.

    Raises:
      UserError: it is no regular expression or too long; later, of a search, it takes too long.
    """
    counts = re.findall(r"\{(?:\d*,)?(\d+)", pattern[:LENGTH])
    if len(pattern) > LENGTH or math.prod(int(n[:9]) or 1 for n in counts) > REPETITIONS:
        raise UserError(
            f"{key}: is too long, or repeats too often (got {show(pattern)}). Shorten it."
        )
    try:
        re.compile(pattern)  # what is an expression, Python says
        compiled = regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise UserError(
            f"{key}: is no regular expression, {error} (got {show(pattern)}). Correct it."
        ) from None

    def search(text: str) -> bool:
        try:
            return compiled.search(text, timeout=SECONDS) is not None
        except TimeoutError:
            raise UserError(
                f"{key}: takes more than {SECONDS:g} s to search (got {show(pattern)}). Leave out "
                "repetitions within repetitions."
            ) from None

    return search


def check_pattern(key: str, pattern: str | None) -> None:
    """Refuses what is no expression, before there is a text to search; None passes.

    Raises:
      UserError: see `searcher`.
    """
    if pattern is not None:
        searcher(pattern, key)
