"""Checks of values, so that the same mistake gives the same message everywhere.

`integer`, `real`, `in_float32`, `text`, `texts`, `one_of`, `distinct` and `regex` take a key and a
value; `whole`, `number` and `seeds` check several fields of a dataclass. None passes, since it
means "not given". They raise UserError with a message of the form
`KEY: what is wrong (got VALUE). What to do.`
"""

import math
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
import regex as limited_re

from jaxlm.core.errors import UserError

MOST = 2**31 - 1
"""Largest count: XLA indexes arrays with 32-bit integers."""
SEARCH_SECONDS = 1.0
"""Time limit for searching one path; a usual search takes microseconds."""
MAX_PATTERN = 2000
"""Largest length of a regular expression, in characters."""
MAX_REPETITIONS = 10_000
"""Largest product of all counts in braces, since `regex` expands `(a{99}){99}` when it compiles."""


def show(value: Any) -> str:
    """Return a value as text for a message, cut to 60 characters."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def integer(key: str, value: Any, *, least: int = 1, most: int = MOST) -> None:
    """Require a whole number from `least` to `most`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UserError(f"{key}: must be a whole number (got {show(value)}). Correct it.")
    if not least <= value <= most:
        raise UserError(f"{key}: must be from {least} to {most} (got {show(value)}). Correct it.")


def real(
    key: str,
    value: Any,
    *,
    least: int | float = -math.inf,
    above: int | float = -math.inf,
    most: int | float = math.inf,
    below: int | float = math.inf,
) -> None:
    """Require a finite number x with `least <= x <= most` and `above < x < below`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise UserError(f"{key}: must be a number (got {show(value)}). Correct it.")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        finite = False
    if finite and least <= value <= most and above < value < below:
        return
    low = f"above {above:g}" if above >= least else f"at least {least:g}"
    high = f"below {below:g}" if below <= most else f"at most {most:g}"
    wanted = " and ".join(text for text in (low, high) if "inf" not in text) or "finite"
    raise UserError(f"{key}: must be {wanted} (got {show(value)}). Correct it.")


def whole(config: Any, *names: str, section: str = "", **bounds: int) -> None:
    """Apply `integer` to several fields; `section` (`optimizer.`) goes before their names."""
    for name in names:
        integer(section + name, getattr(config, name), **bounds)


def number(config: Any, *names: str, section: str = "", **bounds: int | float) -> None:
    """Apply `real` to several fields; `section` (`optimizer.`) goes before their names."""
    for name in names:
        real(section + name, getattr(config, name), **bounds)


def in_float32(key: str, value: Any, *, below: int | float = math.inf) -> None:
    """Require a number that neither overflows nor vanishes in float32, nor rounds up to `below`."""
    if value is None or value == 0:
        return
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    if math.isinf(rounded):
        reason = "overflows"
    elif abs(rounded) < np.finfo(np.float32).tiny:
        reason = "vanishes"
    elif rounded >= below:
        reason = f"is {below:g}"
    else:
        return
    raise UserError(f"{key}: {reason} in float32 (got {show(value)}). Give another number.")


def seeds(config: Any, *names: str) -> None:
    """Require seeds from 0 to 2**32 - 1, or tuples of them."""
    for name in names:
        values = getattr(config, name)
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
                raise UserError(
                    f"{name}: must be from 0 to 2**32 - 1 (got {show(value)}). Correct it."
                )


def text(key: str, value: Any) -> None:
    """Require a text that UTF-8 can write; YAML and JSON may write half of a surrogate pair."""
    if value is None:
        return
    if not isinstance(value, str):
        raise UserError(f"{key}: must be text (got {show(value)}). Put it in quotes.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{key}: has half of a character (got {ascii(value)[:60]}). Write the whole one."
        ) from None


def texts(key: str, values: Any, *, numbers: bool = False) -> None:
    """Require a list of texts; with `numbers`, whole numbers are accepted too."""
    if values is None:
        return
    if not isinstance(values, list | tuple):
        raise UserError(f"{key}: must be a list (got {show(values)}). Write [a, b].")
    for value in values:
        if value is None:
            raise UserError(f"{key}: must hold text (got null). Put it in quotes.")
        if numbers and isinstance(value, int) and not isinstance(value, bool):
            integer(key, value, least=-MOST)
        else:
            text(key, value)


_DTYPES = {
    "float32": ("f32", "fp32", "float"),
    "bfloat16": ("bf16",),
    "auto": (),  # that of the model's files
}


def dtype_name(value: Any, key: str = "param_dtype") -> str:
    """Return the canonical name of a parameter dtype, given in any spelling.

    >>> dtype_name("bf16")
    'bfloat16'
    """
    short = str(value).lower().removeprefix("torch.")
    known = {name: also for name, also in _DTYPES.items() if name != "auto" or key == "param_dtype"}
    for name, spellings in known.items():
        if short == name or short in spellings:
            return name
    half = short in ("float16", "fp16", "f16", "half")
    reason = "overflows in training" if half else "not known"
    raise UserError(f"{key}: {reason} (got {show(value)}). Choose one of {', '.join(known)}.")


def one_of(key: str, value: Any, choices: Collection[Any]) -> None:
    """Require one of several values."""
    if value not in choices:
        raise UserError(
            f"{key}: not known (got {show(value)}). Choose one of {', '.join(map(str, choices))}."
        )


def distinct(key: str, values: Iterable[Any]) -> None:
    """Require at least one value, and no value twice."""
    seen: list[Any] = []
    for value in values:
        if value in seen:
            raise UserError(f"{key}: has a value twice (got {show(value)}). Give each once.")
        seen.append(value)
    if not seen:
        raise UserError(f"{key}: is empty (got nothing). Give at least one.")


def regex(key: str, pattern: str | None) -> Callable[[str], bool]:
    """Return a predicate: whether a regular expression is found in a text; None is in every text.

    An expression such as `(a+)+$` can backtrack almost for ever, and the module `re` has no time
    limit. The package `regex` has the same syntax and takes one, so the predicate raises UserError
    when a search takes too long.
    """
    if pattern is None:
        return lambda text: True
    counts = re.findall(r"\{(?:\d*,)?(\d+)", pattern[:MAX_PATTERN])
    repetitions = math.prod(int(count[:9]) or 1 for count in counts)  # {0} must not hide others
    if len(pattern) > MAX_PATTERN or repetitions > MAX_REPETITIONS:
        raise UserError(
            f"{key}: is too long, or repeats too often (got {show(pattern)}). Shorten it."
        )
    try:
        re.compile(pattern)  # Python's grammar decides what a regular expression is
        compiled = limited_re.compile(pattern)
    except (re.error, limited_re.error, RecursionError, OverflowError) as error:
        raise UserError(
            f"{key}: not a regular expression, {error} (got {show(pattern)}). Correct it."
        ) from None

    def search(text: str) -> bool:
        try:
            return compiled.search(text, timeout=SEARCH_SECONDS) is not None
        except TimeoutError:
            raise UserError(
                f"{key}: takes more than {SEARCH_SECONDS:g} s to search (got {show(pattern)}). "
                "Leave out repetitions within repetitions."
            ) from None

    return search
