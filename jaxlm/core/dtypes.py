"""Promotion to float32: sums, norms, losses and scores of narrow numbers are computed wide."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def wide_dtype(x: Any) -> np.dtype:
    """Return the dtype in which to compute with `x`, an array or a dtype: at least float32.

    >>> wide_dtype(jnp.bfloat16), wide_dtype(np.dtype("float64"))
    (dtype('float32'), dtype('float64'))
    """
    return jnp.promote_types(getattr(x, "dtype", x), jnp.float32)


def wide(x: Array) -> Array:
    """Return `x` in at least float32."""
    return x.astype(wide_dtype(x))
