"""Scaling laws: sums of power laws fitted to losses, with bootstrap intervals."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares, nnls
from scipy.special import logsumexp

from jaxlm.core.errors import UserError
from jaxlm.typing import PRNGKey

START_EXPONENTS = (0.1, 0.3, 0.6, 1.0)
FITTED_STARTS = 4
SMALLEST_SHARE = 1e-6


class PowerLaw(NamedTuple):
    r"""$L = E + \sum_j A_j x_j^{-\alpha_j}$; called with one argument for each x, it returns L.

    Attributes:
        E: loss that no x removes.
        A: one for each x.
        alpha: likewise.
        objective: what the fit left, see `fit_power_law`.
    """

    E: float
    A: Float[np.ndarray, " J"]
    alpha: Float[np.ndarray, " J"]
    objective: float = 0.0

    def __call__(self, *x: Any) -> np.ndarray:
        terms = zip(self.A, self.alpha, x, strict=True)
        total = sum(A * np.asarray(x, np.float64) ** -alpha for A, alpha, x in terms)
        return np.asarray(self.E + total)


def fit_power_law(
    x: Any, loss: Any, *, delta: float = 1e-3, start: PowerLaw | None = None
) -> PowerLaw:
    r"""Fits a sum of power laws and a constant by robust regression of the log loss.

    $$\min \sum_i H_\delta\Big(\log\big(E + \sum_j A_j x_{ij}^{-\alpha_j}\big) - \log L_i\Big)$$

    H is half the square up to δ and linear beyond, so that with a small δ a few bad runs count
    little. E and A stay positive. For exponents on a grid, E and A follow by non-negative least
    squares; the best few of these are starts, and the best end wins. Over a narrow range of x the
    parameters are hardly determined though the fitted losses are: see `bootstrap_power_law`.

    Args:
        x: [n], or [n, J] for J variables, above 0.
        loss: [n], above 0.
        delta: δ.
        start: a law to start from, in place of the grid.

    Raises:
        UserError: a number is not above 0 and finite, the lengths differ, or there are fewer points
            than parameters, 1 + 2 J.

    References:
        Hoffmann et al. 2022, arXiv:2203.15556, whose δ this is.

    >>> compute = np.logspace(0, 4, 9)
    >>> law = fit_power_law(compute, 2 + 3 * compute**-0.5)
    >>> round(law.E, 6), law.A.round(6).tolist(), law.alpha.round(6).tolist()
    (2.0, [3.0], [0.5])
    """
    columns, losses = _checked(x, loss)
    if not delta > 0:
        raise UserError(f"delta={delta:g} is impossible; give a number above 0")
    logs = np.log(columns)
    centre = logs.mean(0)
    points = _starts(logs - centre, losses, delta) if start is None else [_packed(start, centre)]
    fits = [_minimum(point, logs - centre, np.log(losses), delta) for point in points]
    best = min(fits, key=lambda fit: fit.cost)
    e, a, alpha = _unpacked(best.x)
    return PowerLaw(
        E=float(np.exp(e)),
        A=np.exp(a + alpha * centre),
        alpha=alpha,
        objective=float(best.cost),
    )


def fit_chinchilla(N: Any, D: Any, loss: Any, *, delta: float = 1e-3) -> PowerLaw:
    r"""Fits $L = E + A N^{-\alpha} + B D^{-\beta}$; `fit_power_law` of parameters and tokens.

    Args:
        N: [n], parameters; of models that are pruned as they train their `average_params`.
        D: [n], tokens.
        loss, delta: see `fit_power_law`.

    References:
        Hoffmann et al. 2022, arXiv:2203.15556; Jin et al. 2025, arXiv:2501.12486 (averages).
    """
    return fit_power_law(np.stack([N, D], axis=1), loss, delta=delta)


def _checked(x: Any, loss: Any) -> tuple[np.ndarray, np.ndarray]:
    columns, losses = np.asarray(x, np.float64), np.asarray(loss, np.float64)
    columns = columns[:, None] if columns.ndim == 1 else columns
    if columns.ndim != 2 or losses.shape != columns.shape[:1]:
        raise UserError(
            f"x has shape {list(np.shape(x))} and loss {list(losses.shape)}; give [n] or [n, J] "
            "and [n]"
        )
    for name, numbers in (("x", columns), ("loss", losses)):
        wrong = numbers[~((numbers > 0) & (numbers < math.inf))]
        if wrong.size:
            raise UserError(f"{name} has {wrong[0]:g}, which has no logarithm; leave such runs out")
    parameters = 1 + 2 * columns.shape[1]
    if len(losses) < parameters:
        raise UserError(
            f"{len(losses)} points do not determine {parameters} parameters; give at least "
            f"{parameters}"
        )
    return columns, losses


def _packed(law: PowerLaw, centre: np.ndarray) -> np.ndarray:
    return np.concatenate([[np.log(law.E)], np.log(law.A) - law.alpha * centre, law.alpha])


def _unpacked(point: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """log E, log A at the centre of x, α."""
    return point[0], *np.split(point[1:], 2)


def _starts(logs: np.ndarray, losses: np.ndarray, delta: float) -> list[np.ndarray]:
    found = []
    for exponents in itertools.product(START_EXPONENTS, repeat=logs.shape[1]):
        terms = np.exp(-logs * exponents)
        relative = np.concatenate([np.ones((len(losses), 1)), terms], axis=1) / losses[:, None]
        amounts, _ = nnls(relative, np.ones(len(losses)))
        amounts = np.maximum(amounts, SMALLEST_SHARE * losses.min())
        point = np.concatenate([np.log(amounts), exponents])
        found.append((_huber(_residuals(point, logs, np.log(losses)), delta), point))
    found.sort(key=lambda pair: pair[0])
    return [point for _, point in found[:FITTED_STARTS]]


def _huber(residuals: np.ndarray, delta: float) -> float:
    size = np.abs(residuals)
    return float(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum())


def _log_terms(point: np.ndarray, logs: np.ndarray) -> np.ndarray:
    e, a, alpha = _unpacked(point)
    return np.concatenate([np.full((len(logs), 1), e), a - alpha * logs], axis=1)


def _residuals(point: np.ndarray, logs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return logsumexp(_log_terms(point, logs), axis=1) - targets


def _jacobian(point: np.ndarray, logs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    del targets
    terms = _log_terms(point, logs)
    shares = np.exp(terms - logsumexp(terms, axis=1, keepdims=True))
    return np.concatenate([shares, -shares[:, 1:] * logs], axis=1)


def _minimum(point: np.ndarray, logs: np.ndarray, targets: np.ndarray, delta: float) -> Any:
    tolerances = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-10)
    return least_squares(
        _residuals,
        point,
        _jacobian,
        loss="huber",
        f_scale=delta,
        args=(logs, targets),
        max_nfev=300,
        **tolerances,
    )


def bootstrap_power_law(
    key: PRNGKey, x: Any, loss: Any, *, resamples: int = 200, delta: float = 1e-3
) -> list[PowerLaw]:
    """Laws fitted to points drawn from the given ones with replacement, as many as there are.

    Args:
        key: of the draws.
        x, loss, delta: see `fit_power_law`. Each fit starts from that of all points.
        resamples: how many laws.

    Raises:
        UserError: see `fit_power_law`.
    """
    columns, losses = _checked(x, loss)
    whole = fit_power_law(columns, losses, delta=delta)
    drawn = jax.random.randint(key, (resamples, len(losses)), 0, len(losses))
    return [
        fit_power_law(columns[rows], losses[rows], delta=delta, start=whole)
        for rows in np.asarray(drawn)
    ]


def bootstrap_interval(
    laws: Sequence[PowerLaw], statistic: Callable[[PowerLaw], Any], level: float = 0.95
) -> tuple[Any, Any]:
    """Lower and upper end of the interval that holds a share of a statistic over resampled laws.

    Args:
        laws: of `bootstrap_power_law`.
        statistic: for example `lambda law: law.alpha`, or a loss, `lambda law: law(1e9, 2e10)`.
        level: the share.

    >>> laws = [PowerLaw(E, np.ones(1), np.ones(1)) for E in range(101)]
    >>> [round(float(end), 9) for end in bootstrap_interval(laws, lambda law: law.E, 0.9)]
    [5.0, 95.0]
    """
    values = np.stack([np.asarray(statistic(law)) for law in laws])
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
