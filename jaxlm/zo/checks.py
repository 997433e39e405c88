"""Checks of numbers; those that `jit` or `vmap` traces have no value yet and pass."""

from typing import Any

import jax

from jaxlm.core import checks

MOST_COPIES = 2**16
"""Largest number of directions, rank or horizon: arrays of that length are allocated at once."""


def is_traced(value: Any) -> bool:
    """Return whether a number is traced, so that its value is unknown."""
    return isinstance(value, jax.core.Tracer)


def real(key: str, value: Any, **bounds: float) -> None:
    """Require a number within bounds, as `jaxlm.core.checks.real` does."""
    if not is_traced(value):
        checks.real(key, float(value), **bounds)


def decay_rates(**values: Any) -> None:
    """Require numbers from 0 to below 1 that float32 does not round to 1."""
    for key, value in values.items():
        real(key, value, least=0.0, below=1.0)
        if not is_traced(value):
            checks.in_float32(key, value, below=1.0)
