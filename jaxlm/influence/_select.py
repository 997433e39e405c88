"""The examples with the highest scores."""

from typing import Any

import numpy as np
from jaxtyping import Int

from jaxlm.core.errors import UserError


def select(
    scores: Any, fraction: float | int = 0.05, *, count: int | None = None
) -> Int[np.ndarray, " K"]:
    """Indices of the examples with the highest scores, the highest first.

    Of equal scores the lower index comes first, so that a selection is the same everywhere.

    Args:
      scores: [N], higher is better.
      fraction: above 0, at most 1: of N examples `floor(fraction * N)` are taken.
      count: how many are taken, instead of a fraction.

    Returns:
      int64 indices [K].

    Raises:
      UserError: for scores of another shape or not finite, and where none or more than all are
        taken.

    >>> select([0.1, 0.7, 0.3, 0.7], fraction=0.5)
    array([1, 3])

    References: Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning",
    arXiv:2402.04333.
    """
    values = np.asarray(scores)
    if values.ndim != 1:
        raise UserError(
            f"scores have shape {values.shape}; give [N], such as the largest over subtasks"
        )
    finite = np.isfinite(values)
    if not finite.all():
        raise UserError(
            f"the score of example {int(finite.argmin())} is not finite; leave the example out"
        )
    if count is None:
        if not 0 < fraction <= 1:
            raise UserError(f"fraction={fraction} is impossible; give 0 < fraction <= 1")
        # 0.29 * 100 is 28.999999999999996
        count = int(np.floor(fraction * len(values) * (1 + 1e-12)))
        if not count:
            raise UserError(
                f"fraction={fraction} of {len(values)} examples takes none; give a larger one"
            )
    if not 0 < count <= len(values):
        raise UserError(f"count={count} of {len(values)} examples is impossible")
    order = np.argsort(-values.astype(np.promote_types(values.dtype, np.float32)), kind="stable")
    return order[:count]
