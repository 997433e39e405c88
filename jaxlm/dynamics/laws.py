"""Scaling laws: sums of power laws fitted to losses, with bootstrap intervals and crossovers."""

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy  # loads its submodules on first use, which saves every command 0.3 s
from jaxtyping import Float

from jaxlm.core.checks import real
from jaxlm.core.errors import UserError
from jaxlm.typing import PRNGKey

__all__ = [
    "PowerLaw",
    "StepLaw",
    "average_params",
    "bootstrap_interval",
    "bootstrap_power_law",
    "crossover",
    "fit_chinchilla",
    "fit_power_law",
    "step_law",
]

START_EXPONENTS = (0.1, 0.3, 0.6, 1.0)
FITTED_STARTS = 4
SMALLEST_SHARE = 1e-6


class PowerLaw(NamedTuple):
    r"""$L = E + \sum_j A_j x_j^{-\alpha_j}$; call it with one argument for each x to get L.

    Attributes:
        E: the irreducible loss.
        A: one coefficient for each x.
        alpha: one exponent for each x.
        objective: the minimum that the fit found, see `fit_power_law`.
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
    r"""Fit a sum of power laws and a constant by robust regression of the log loss.

    $$\min \sum_i H_\delta\Big(\log\big(E + \sum_j A_j x_{ij}^{-\alpha_j}\big) - \log L_i\Big)$$

    H is half the square up to δ and linear beyond (Huber), so that with a small δ a few bad runs
    count little. E and A stay positive. A narrow range of x determines the fitted losses well but
    the parameters poorly: see `bootstrap_power_law`.

    Args:
        x: [n], or [n, J] for J variables, above 0.
        loss: [n], above 0.
        delta: δ.
        start: a law to start from, in place of a grid of exponents.

    References:
        Hoffmann et al. 2022, arXiv:2203.15556, whose δ is the default.

    >>> compute = np.logspace(0, 4, 9)
    >>> law = fit_power_law(compute, 2 + 3 * compute**-0.5)
    >>> round(law.E, 6), law.A.round(6).tolist(), law.alpha.round(6).tolist()
    (2.0, [3.0], [0.5])
    """
    columns, losses = _checked(x, loss)
    real("delta", delta, above=0)
    logs = np.log(columns)
    # Centred logarithms decouple A from α; otherwise the fit would creep along a narrow valley.
    centre = logs.mean(0)
    if start is None:
        points = _starts(logs - centre, losses, delta)
    else:
        E, A, alpha, _ = start
        points = [np.concatenate([[np.log(E)], np.log(A) - alpha * centre, alpha])]
    fits = [
        scipy.optimize.least_squares(
            _residuals,
            point,
            _jacobian,
            loss="huber",
            f_scale=delta,
            args=(logs - centre, np.log(losses)),
            max_nfev=300,
            **dict.fromkeys(("ftol", "xtol", "gtol"), 1e-10),
        )
        for point in points
    ]
    best = min(fits, key=lambda fit: fit.cost)
    e, a, alpha = _unpacked(best.x)
    return PowerLaw(float(np.exp(e)), np.exp(a + alpha * centre), alpha, float(best.cost))


def fit_chinchilla(N: Any, D: Any, loss: Any, *, delta: float = 1e-3) -> PowerLaw:
    r"""Fit $L = E + A N^{-\alpha} + B D^{-\beta}$ by `fit_power_law` on parameters and tokens.

    Args:
        N: [n], parameters; for models that are pruned during training, `average_params`.
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
            f"x: must be [n] or [n, J] for losses [n] (got {list(np.shape(x))} and "
            f"{list(losses.shape)}). Correct one of them."
        )
    for name, numbers in (("x", columns), ("loss", losses)):
        wrong = numbers[~((numbers > 0) & (numbers < math.inf))]
        if wrong.size:
            raise UserError(f"{name}: must be positive, finite (got {wrong[0]:g}). Leave it out.")
    parameters = 1 + 2 * columns.shape[1]
    if len(losses) < parameters:
        raise UserError(
            f"loss: must have a point for each of {parameters} parameters (got {len(losses)}). "
            "Give more."
        )
    return columns, losses


def _unpacked(point: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Return log E, log A at the centre of x, and α."""
    return point[0], *np.split(point[1:], 2)


def _starts(logs: np.ndarray, losses: np.ndarray, delta: float) -> list[np.ndarray]:
    """Return the best starts from a grid of exponents.

    The objective has several minima in α. For given exponents, E and A solve a linear problem, by
    non-negative least squares.
    """
    starts = []
    for exponents in itertools.product(START_EXPONENTS, repeat=logs.shape[1]):
        terms = np.exp(-logs * exponents)
        relative = np.concatenate([np.ones((len(losses), 1)), terms], axis=1) / losses[:, None]
        amounts, _ = scipy.optimize.nnls(relative, np.ones(len(losses)))
        amounts = np.maximum(amounts, SMALLEST_SHARE * losses.min())
        point = np.concatenate([np.log(amounts), exponents])
        residuals = _residuals(point, logs, np.log(losses))
        starts.append((scipy.special.huber(delta, residuals).sum(), point))
    starts.sort(key=lambda pair: pair[0])
    return [point for _, point in starts[:FITTED_STARTS]]


def _log_terms(point: np.ndarray, logs: np.ndarray) -> np.ndarray:
    e, a, alpha = _unpacked(point)
    return np.concatenate([np.full((len(logs), 1), e), a - alpha * logs], axis=1)


def _residuals(point: np.ndarray, logs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return scipy.special.logsumexp(_log_terms(point, logs), axis=1) - targets


def _jacobian(point: np.ndarray, logs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    shares = scipy.special.softmax(_log_terms(point, logs), axis=1)
    return np.concatenate([shares, -shares[:, 1:] * logs], axis=1)


def bootstrap_power_law(
    key: PRNGKey, x: Any, loss: Any, *, resamples: int = 200, delta: float = 1e-3
) -> list[PowerLaw]:
    """Fit laws to `resamples` bootstrap resamples: n of the n points, drawn with replacement.

    `x`, `loss` and `delta` are those of `fit_power_law`. Each fit starts from that to all points.
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
    """Return the ends of the percentile interval of a statistic over resampled laws.

    Args:
        laws: from `bootstrap_power_law`.
        statistic: for example `lambda law: law.alpha`, or a loss, `lambda law: law(1e9, 2e10)`.
        level: the share of the values inside the interval.

    >>> laws = [PowerLaw(E, np.ones(1), np.ones(1)) for E in range(101)]
    >>> [round(float(end), 9) for end in bootstrap_interval(laws, lambda law: law.E, 0.9)]
    [5.0, 95.0]
    """
    values = np.stack([np.asarray(statistic(law)) for law in laws])
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def crossover(
    first: PowerLaw, second: PowerLaw, *, low: float = 1.0, high: float = 1e30
) -> tuple[float, ...]:
    r"""Return where the curves of two recipes meet: none, one or two x, ascending.

    The better recipe at a small scale may be the worse one at a large scale. With equal E, $x =
    (A_1 / A_2)^{1 / (\alpha_1 - \alpha_2)}$. Identical curves have no crossover.

    Args:
        first, second: laws of one variable, for example compute.
        low, high: the range to search, ends included.

    References:
        Xiao 2024, arXiv:2409.15156.

    >>> crossover(PowerLaw(2, np.ones(1), np.ones(1)), PowerLaw(2, np.full(1, 0.1), np.ones(1) / 2))
    (100.0...,)
    """
    for name, law in (("first", first), ("second", second)):
        if len(law.A) != 1:
            raise UserError(
                f"{name}: must be a law of one variable (got {len(law.A)}). Fit compute alone."
            )
    real("low", low, above=0)
    real("high", high, above=low)
    constant = float(first.E - second.E)

    def difference(log_x: float) -> float:
        laws = [(float(law.A[0]), float(law.alpha[0])) for law in (first, second)]
        terms = [A * math.exp(-alpha * log_x) for A, alpha in laws]
        value = constant + terms[0] - terms[1]
        # Zero if rounding hides the sign, so that curves that only touch have a root.
        steps = [1 + abs(alpha * log_x) for _, alpha in laws]
        noise = abs(constant) + sum(map(math.prod, zip(map(abs, terms), steps, strict=True)))
        return 0.0 if abs(value) <= 4 * sys.float_info.epsilon * noise else value

    # The difference has one extremum in log x, and at most one root on either side of it.
    ends = [math.log(low), math.log(high)]
    slopes = [float(law.A[0] * law.alpha[0]) for law in (first, second)]
    faster = float(first.alpha[0] - second.alpha[0])
    if faster and min(slopes) > 0:
        extremum = math.log(slopes[0] / slopes[1]) / faster
        if ends[0] < extremum < ends[1]:
            ends.insert(1, extremum)
    # Compare signs, and not the sign of a product of values, which may underflow.
    signs = [math.copysign(bool(value), value) for value in map(difference, ends)]
    if not any(signs):
        return ()
    roots = [end for end, sign in zip(ends, signs, strict=True) if not sign]
    roots += [
        scipy.optimize.brentq(difference, *ends[i : i + 2], xtol=1e-14)
        for i in range(len(ends) - 1)
        if signs[i] * signs[i + 1] < 0
    ]
    return tuple(min(max(math.exp(root), low), high) for root in sorted(roots))


def average_params(tokens: Any, params: Any) -> float:
    r"""Return the average parameter count over training, $\bar N = \frac1D \int_0^D N(t)\, dt$.

    Args:
        tokens: [K], ascending knots, in tokens or in fractions of the run.
        params: [K], N at the knots, linear between them. Two knots at the same place make a jump.

    References:
        Jin et al. 2025, arXiv:2501.12486, where the average replaces N in Chinchilla's law.

    >>> average_params([0.0, 0.25, 0.75, 1.0], [4e8, 4e8, 2e8, 2e8])
    300000000.0
    """
    knots, sizes = np.asarray(tokens, np.float64), np.asarray(params, np.float64)
    ascending = (
        knots.ndim == 1 and knots.size and (np.diff(knots) >= 0).all() and knots[0] < knots[-1]
    )
    if not ascending:
        raise UserError(f"tokens: must be ascending knots (got {tokens}). Give for example [0, 1].")
    if sizes.shape != knots.shape or not (sizes > 0).all():
        raise UserError(
            f"params: must be a count above 0 for each of {len(knots)} knots (got {params}). "
            "Correct it."
        )
    lengths = np.diff(knots)
    return float((lengths * (sizes[1:] + sizes[:-1]) / 2).sum() / lengths.sum())


class StepLaw(NamedTuple):
    """The best peak learning rate, and the best batch size in tokens."""

    lr: float
    batch_tokens: float


def step_law(N: float | int, D: float | int) -> StepLaw:
    r"""Return the best learning rate and batch size for pre-training a language model with AdamW.

    $$\eta = 1.79\, N^{-0.713} D^{0.307}, \qquad B = 0.58\, D^{0.571}$$

    The law was fitted to dense and mixture-of-experts models, in runs whose cosine schedule ends at
    a learning rate of 1e-5 and not at a share of the peak.

    Args:
        N: parameters without embeddings.
        D: tokens of the run.

    References:
        Li et al. 2025, arXiv:2503.04715.

    >>> law = step_law(1e9, 1e11)
    >>> f"{law.lr:.3e}, {law.batch_tokens:.0f}"
    '1.632e-03, 1107715'
    """
    real("N", N, above=0)
    real("D", D, above=0)
    return StepLaw(1.79 * N**-0.713 * D**0.307, 0.58 * D**0.571)
