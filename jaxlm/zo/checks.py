"""Checks of numbers that may be traced, as under `jit` or `vmap`: those are unknown and pass."""

import types
from typing import Any

import jax

from jaxlm.core import checks

MOST_COPIES = 2**16
"""Largest number of directions, rank or horizon: arrays of that length are allocated at once."""


def is_traced(value: Any) -> bool:
    """Whether the value of a number is unknown."""
    return isinstance(value, jax.core.Tracer)


def real(key: str, value: Any, **bounds: float) -> None:
    """Require a number within bounds, as `jaxlm.core.checks.real` does."""
    if not is_traced(value):
        checks.real(key, float(value), **bounds)


def decay_rates(**values: Any) -> None:
    """Require numbers from 0 to below 1, which float32 must not round to 1."""
    for key, value in values.items():
        real(key, value, least=0.0, below=1.0)
    known = {key: value for key, value in values.items() if not is_traced(value)}
    checks.in_float32(types.SimpleNamespace(**known), *known, below=1.0)
