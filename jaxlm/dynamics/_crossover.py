"""Where the scaling laws of two recipes meet: what wins on a small scale may lose on a large."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq

from jaxlm.core.errors import UserError
from jaxlm.dynamics.laws import PowerLaw


def crossover(
    first: PowerLaw, second: PowerLaw, *, low: float = 1.0, high: float = 1e30
) -> tuple[float, ...]:
    r"""Where the curves of two recipes meet: none, one or two x, the smallest first.

    With one constant, $x = (A_1 / A_2)^{1 / (\alpha_1 - \alpha_2)}$. In general the difference of
    two curves has one extremum in log x, and a root at most on either side of it.

    Args:
        first, second: laws of one variable, for example compute.
        low, high: where to look.

    Raises:
        UserError: a law of several variables.

    References:
        Xiao 2024, arXiv:2409.15156.

    >>> crossover(PowerLaw(2, np.ones(1), np.ones(1)), PowerLaw(2, np.full(1, 0.1), np.ones(1) / 2))
    (100.0...,)
    """
    if len(first.A) != 1 or len(second.A) != 1:
        raise UserError("crossover compares laws of one variable; fit each to compute alone")
    constant = first.E - second.E

    def difference(log_x: float) -> float:
        one, other = (law.A[0] * math.exp(-law.alpha[0] * log_x) for law in (first, second))
        return float(constant + one - other)

    ends = [math.log(low), math.log(high)]
    slopes = [float(law.A[0] * law.alpha[0]) for law in (first, second)]
    faster = float(first.alpha[0] - second.alpha[0])
    if faster and min(slopes) > 0:
        extremum = math.log(slopes[0] / slopes[1]) / faster
        if ends[0] < extremum < ends[1]:
            ends.insert(1, extremum)
    return tuple(
        math.exp(brentq(difference, left, right, xtol=1e-14))
        for left, right in itertools.pairwise(ends)
        if difference(left) * difference(right) < 0
    )


def crossover_probability(
    first: Sequence[PowerLaw],
    second: Sequence[PowerLaw],
    *,
    low: float = 1.0,
    high: float = 1e30,
) -> float:
    """Share of pairs of resampled laws whose curves meet between `low` and `high`."""
    pairs = zip(first, second, strict=True)
    return float(np.mean([bool(crossover(a, b, low=low, high=high)) for a, b in pairs]))
