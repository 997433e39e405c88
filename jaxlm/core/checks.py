"""Checks that value objects share, so that each says the same thing in the same words.

Each takes the object and the names of its fields, or a key and a value; None passes, since it means
"not given". The form of every message is `KEY: what is wrong (got VALUE). What to do.` A `section`,
such as `optimizer.`, stands before the name of a field in messages.
"""

import math
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from jaxlm.core.errors import UserError

MOST = 2**31 - 1
"""Above every sensible count, and within 32 bits, in which arrays are indexed."""


def show(value: Any) -> str:
    """A value for a message, at most 60 characters of it."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def whole(config: Any, *names: str, least: int = 1, most: int = MOST, section: str = "") -> None:
    """Requires whole numbers from `least` to `most`.

    Raises:
      UserError: naming the first field that is not.
    """
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(
                f"{section}{name}: must be a whole number (got {show(value)}). Correct it."
            )
        if not least <= value <= most:
            raise UserError(
                f"{section}{name}: must be from {least} to {most} (got {show(value)}). Correct it."
            )


def number(
    config: Any,
    *names: str,
    least: int | float = -math.inf,
    above: int | float = -math.inf,
    most: int | float = math.inf,
    below: int | float = math.inf,
    section: str = "",
) -> None:
    """Requires finite numbers x with `least <= x <= most` and `above < x < below`.

    Raises:
      UserError: naming the first field that is not.
    """
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{section}{name}: must be a number (got {show(value)}). Correct it.")
        try:
            finite = math.isfinite(value)
        except OverflowError:  # a whole number of more than 308 digits
            finite = False
        if not (finite and least <= value <= most and above < value < below):
            bounds = [
                f"{word} {bound:g}"
                for word, bound in (
                    ("at least", least),
                    ("above", above),
                    ("at most", most),
                    ("below", below),
                )
                if math.isfinite(bound)
            ]
            wanted = " and ".join(bounds) or "finite"
            raise UserError(f"{section}{name}: must be {wanted} (got {show(value)}). Correct it.")


def in_float32(config: Any, *names: str, below: int | float = math.inf, section: str = "") -> None:
    """Requires numbers that float32, in which they are used, neither loses nor rounds to a bound.

    Raises:
      UserError: naming the first field whose number vanishes there, overflows, or becomes `below`.
    """
    limits = np.finfo(np.float32)
    for name in names:
        value = getattr(config, name)
        if value is None or value == 0:
            continue
        with np.errstate(over="ignore"):
            rounded = float(np.float32(value))
        reason = "overflows" if math.isinf(rounded) else ""
        reason = "vanishes" if abs(rounded) < limits.tiny else reason
        reason = f"is {below:g}" if rounded >= below and not reason else reason
        if reason:
            raise UserError(
                f"{section}{name}: {reason} in float32 (got {show(value)}). Give another number."
            )


def seeds(config: Any, *names: str) -> None:
    """Requires seeds, from 0 to 2**32 - 1; of a tuple, each of them.

    Raises:
      UserError: naming the first field that is not.
    """
    for name in names:
        values = getattr(config, name)
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
                raise UserError(
                    f"{name}: must be from 0 to 2**32 - 1 (got {show(value)}). Correct it."
                )


_DTYPES = {
    "float32": ("f32", "fp32", "float"),
    "bfloat16": ("bf16",),
}


def dtype_name(value: Any, key: str = "param_dtype") -> str:
    """The name of a dtype of parameters, in any of its spellings.

    >>> dtype_name("bf16")
    'bfloat16'

    Raises:
      UserError: parameters cannot have it.
    """
    short = str(value).lower().removeprefix("torch.")
    for name, spellings in _DTYPES.items():
        if short == name or short in spellings:
            return name
    half = short in ("float16", "fp16", "f16", "half")
    reason = "overflows in training" if half else "not known"
    raise UserError(f"{key}: {reason} (got {show(value)}). Choose one of {', '.join(_DTYPES)}.")


def one_of(key: str, value: Any, choices: Collection[Any]) -> None:
    """Requires one of several values.

    Raises:
      UserError: listing the choices.
    """
    if value not in choices:
        raise UserError(
            f"{key}: not known (got {show(value)}). Choose one of {', '.join(map(str, choices))}."
        )


def distinct(key: str, values: Iterable[Any]) -> None:
    """Requires at least one value, and none twice.

    Raises:
      UserError: naming the value that is there twice.
    """
    seen: list[Any] = []
    for value in values:
        if value in seen:
            raise UserError(f"{key}: has a value twice (got {show(value)}). Give each once.")
        seen.append(value)
    if not seen:
        raise UserError(f"{key}: is empty (got nothing). Give at least one.")
