"""Fits of scaling laws: exact data, noise, outliers, intervals, crossovers, average parameters."""

import jax
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize

from jaxlm.dynamics import laws
from jaxlm.dynamics.laws import PowerLaw

CHINCHILLA = PowerLaw(1.69, np.array([406.4, 410.7]), np.array([0.34, 0.28]))
N, D = (x.ravel() for x in np.meshgrid(np.logspace(7.5, 10, 6), np.logspace(9, 11.5, 6)))


def parameters(law):
    return np.concatenate([[law.E], law.A, law.alpha])


def test_exact_losses_give_the_law_back():
    found = laws.fit_chinchilla(N, D, CHINCHILLA(N, D))
    np.testing.assert_allclose(parameters(found), parameters(CHINCHILLA), rtol=1e-4)
    assert found.objective < 1e-12


def test_average_parameters_take_the_place_of_parameters():
    start = np.random.default_rng(0).uniform(0.25, 0.75, len(N))
    average = np.array(
        [
            laws.average_params([0, s, s, 1], [n, n, n / 2, n / 2])
            for s, n in zip(start, N, strict=True)
        ]
    )
    np.testing.assert_allclose(average, N * (1 + start) / 2, rtol=1e-12)
    found = laws.fit_chinchilla(average, D, CHINCHILLA(average, D))
    np.testing.assert_allclose(parameters(found), parameters(CHINCHILLA), rtol=1e-4)


def huber(law, x, loss, delta):
    size = np.abs(np.log(law(*x)) - np.log(loss))
    return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum()


@pytest.mark.parametrize("delta", [1e-3, 0.1])
def test_no_other_minimiser_finds_less(delta):
    loss = CHINCHILLA(N, D) * np.exp(0.005 * np.random.default_rng(0).normal(size=len(N)))
    found = laws.fit_chinchilla(N, D, loss, delta=delta)
    np.testing.assert_allclose(found.objective, huber(found, (N, D), loss, delta), rtol=1e-6)

    def objective(point):
        law = PowerLaw(np.exp(point[0]), np.exp(point[1:3]), point[3:])
        return huber(law, (N, D), loss, delta) / delta**2

    truth = np.concatenate([np.log([1.69, 406.4, 410.7]), [0.34, 0.28]])
    other = minimize(objective, truth, method="Nelder-Mead", options={"maxiter": 4000})
    assert found.objective < other.fun * delta**2 * (1 + 1e-3)


def test_a_few_bad_runs_count_little():
    loss = CHINCHILLA(N, D)
    loss[::9] *= 1.3
    robust, squares = (laws.fit_chinchilla(N, D, loss, delta=delta) for delta in (1e-3, 1e3))
    np.testing.assert_allclose(robust.alpha, CHINCHILLA.alpha, atol=0.02)
    assert np.abs(squares.alpha - CHINCHILLA.alpha).max() > 0.05


@pytest.mark.parametrize(
    ("E", "A", "alpha"),
    [pytest.param(2.0, 6.0, 0.30, marks=pytest.mark.slow), (1.8, 3.0, 0.08)],
)
def test_one_variable_over_a_narrow_range(E, A, alpha):
    """The losses are found though the parameters are not determined."""
    law = PowerLaw(E, np.array([A]), np.array([alpha]))
    n = 256.0 * np.arange(501, 3001, 10)
    loss = law(n) * np.exp(0.01 * np.random.default_rng(0).normal(size=len(n)))
    found = laws.fit_power_law(n, loss)
    assert np.abs(found(n) / law(n) - 1).max() < 0.005


def test_bootstrap_intervals_are_as_wide_as_the_fits_to_other_data_are_spread():
    rng, draws, delta = np.random.default_rng(1), 40, 0.1

    def noisy():
        return CHINCHILLA(N, D) * np.exp(0.005 * rng.normal(size=len(N)))

    def statistic(law):
        return np.append(law.alpha, law(1e9, 1e11))

    x = np.stack([N, D], axis=1)
    fits = [laws.fit_power_law(x, noisy(), delta=delta, start=CHINCHILLA) for _ in range(draws)]
    spread = np.std([statistic(law) for law in fits], axis=0)
    key = jax.random.key(0)
    resampled = laws.bootstrap_power_law(key, x, noisy(), resamples=draws, delta=delta)
    assert len(resampled) == draws
    low, high = laws.bootstrap_interval(resampled, statistic, 0.6827)  # one deviation each way
    ratio = (high - low) / (2 * spread)
    assert (ratio > 0.5).all()
    assert (ratio < 2).all()


def one(E, A, alpha):
    return PowerLaw(E, np.array([A]), np.array([alpha]))


def test_crossovers():
    first, second = one(2.0, 30.0, 0.4), one(2.0, 5.0, 0.25)
    np.testing.assert_allclose(laws.crossover(first, second), [6 ** (1 / 0.15)], rtol=1e-9)
    assert laws.crossover(first, second, high=1e4) == ()
    assert laws.crossover(first, one(2.5, 30.0, 0.4)) == ()
    # 0.25 + y^2 = 1.25 y with y = x^(-1/4): at y = 1 and y = 1/4.
    found = laws.crossover(one(1.25, 1.0, 0.5), one(1.0, 1.25, 0.25), low=0.5)
    np.testing.assert_allclose(found, [1.0, 256.0], rtol=1e-9)


def test_crossovers_at_the_ends_and_where_curves_touch():
    first, second = one(1.25, 1.0, 0.5), one(1.0, 1.25, 0.25)  # meet at 1 and 256
    np.testing.assert_allclose(laws.crossover(first, second), [1.0, 256.0], rtol=1e-12)
    np.testing.assert_allclose(laws.crossover(first, second, low=1.0, high=256.0), [1, 256])
    np.testing.assert_allclose(laws.crossover(first, second, low=256.0), [256])
    meet = laws.crossover(one(0.0, 3.0, 1.0), one(0.0, 1.0, 0.0), low=1.0, high=3.0)
    assert meet == (3.0,)  # and not the 3.0000000000000004 of exp(log(3))
    assert laws.crossover(first, second, low=1.01, high=255.0) == ()
    # 1.25 + y^2 - (1 + y) = (y - 1/2)^2 with y = x^(-1/4): both touch at y = 1/2.
    touching = laws.crossover(one(1.25, 1.0, 0.5), one(1.0, 1.0, 0.25))
    np.testing.assert_allclose(touching, [16.0], rtol=1e-9)
    assert laws.crossover(one(1.26, 1.0, 0.5), one(1.0, 1.0, 0.25)) == ()
    assert laws.crossover(first, first) == ()
    # Terms whose product is no number of float64 have signs nevertheless.
    small = laws.crossover(one(0.0, 1e-170, 0.4), one(0.0, 1e-171, 0.2), high=1e20)
    np.testing.assert_allclose(small, [1e5], rtol=1e-9)


def test_average_parameters_are_the_integral():
    tokens = [0.0, 2e9, 5e9, 5e9, 9e9]
    params = [4e8, 4e8, 2.5e8, 2e8, 1e8]
    pieces = [(0.0, 2e9), (2e9, 5e9 * (1 - 1e-15)), (5e9 * (1 + 1e-15), 9e9)]
    whole = sum(quad(np.interp, *piece, args=(tokens, params))[0] for piece in pieces)
    np.testing.assert_allclose(laws.average_params(tokens, params), whole / 9e9, rtol=1e-9)
    # Pruned linearly between shares f0 and f1.
    start, end, f0, f1 = 4e8, 1e8, 0.2, 0.7
    expected = start * f0 + (start + end) / 2 * (f1 - f0) + end * (1 - f1)
    found = laws.average_params([0, f0, f1, 1], [start, start, end, end])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("params", "tokens", "lr", "batch"),
    [
        (6e7, 1e9, 2.951e-3, 79_878),
        (4e8, 4e10, 2.368e-3, 656_454),
        (1e9, 1e11, 1.632e-3, 1_107_715),
        (7e9, 1.4e12, 9.166e-4, 4_998_815),
    ],
)
def test_step_law(params, tokens, lr, batch):
    found = laws.step_law(params, tokens)
    np.testing.assert_allclose(found, [lr, batch], rtol=5e-4)  # four digits
