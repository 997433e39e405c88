"""Where the scaling laws of two recipes meet: what wins on a small scale may lose on a large."""

import math
import sys
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
    two curves has one extremum in log x, and a root at most on either side of it. Equal curves meet
    nowhere in particular.

    Args:
        first, second: laws of one variable, for example compute.
        low, high: where to look, ends included.

    Raises:
        UserError: a law of several variables, or ends that are not finite, positive and ascending.

    References:
        Xiao 2024, arXiv:2409.15156.

    >>> crossover(PowerLaw(2, np.ones(1), np.ones(1)), PowerLaw(2, np.full(1, 0.1), np.ones(1) / 2))
    (100.0...,)
    """
    if len(first.A) != 1 or len(second.A) != 1:
        raise UserError("crossover compares laws of one variable; fit each to compute alone")
    if not 0 < low < high < math.inf:
        raise UserError(
            f"low, high: no range of a positive variable (got {low:g}, {high:g}). Give "
            "0 < low < high."
        )
    constant = float(first.E - second.E)

    def difference(log_x: float) -> float:
        """Zero where rounding leaves no sign, so that curves that only touch have a root."""
        laws = [(float(law.A[0]), float(law.alpha[0])) for law in (first, second)]
        terms = [A * math.exp(-alpha * log_x) for A, alpha in laws]
        value = constant + terms[0] - terms[1]
        steps = [1 + abs(alpha * log_x) for _, alpha in laws]
        noise = abs(constant) + sum(map(math.prod, zip(map(abs, terms), steps, strict=True)))
        return 0.0 if abs(value) <= 4 * sys.float_info.epsilon * noise else value

    ends = [math.log(low), math.log(high)]
    slopes = [float(law.A[0] * law.alpha[0]) for law in (first, second)]
    faster = float(first.alpha[0] - second.alpha[0])
    if faster and min(slopes) > 0:
        extremum = math.log(slopes[0] / slopes[1]) / faster
        if ends[0] < extremum < ends[1]:
            ends.insert(1, extremum)
    signs = [math.copysign(bool(value), value) for value in map(difference, ends)]
    if not any(signs):
        return ()
    roots = [end for end, sign in zip(ends, signs, strict=True) if not sign]
    roots += [
        brentq(difference, *ends[i : i + 2], xtol=1e-14)
        for i in range(len(ends) - 1)
        if signs[i] * signs[i + 1] < 0
    ]
    return tuple(min(max(math.exp(root), low), high) for root in sorted(roots))


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
