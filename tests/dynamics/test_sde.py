"""Equations against the optimizers that they follow, and against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from jaxlm import dynamics
from jaxlm.core.errors import UserError

KEY = jax.random.key(11)


def running(function, **static):
    """A compiled `simulate` or `run_optimizer` of a key."""
    return jax.jit(functools.partial(function, **static))(KEY)


def lagged_rms(eta, decay, eps, first):
    """RMSprop as the theory has it: a step divides by the v from before its gradient."""

    def init(params):
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, first), params)

    def update(grads, v, params=None):
        del params
        updates = jax.tree.map(lambda g, v: -eta * g / (jnp.sqrt(v) + eps), grads, v)
        return updates, jax.tree.map(lambda g, v: decay * v + (1 - decay) * g**2, grads, v)

    return optax.GradientTransformation(init, update)


def test_rmsprop_goes_to_its_equation_with_the_square_of_eta():
    """With Σ = 1 and u = 1 the equation is an Ornstein-Uhlenbeck process."""
    end, widths = 0.96, (0.4, 0.2, 0.1)
    first = dynamics.AdaptiveConstants(eta=0.4, sigma0=1.0, eps0=0.1, c2=2.0)
    mean, variance = dynamics.ou_moments(1 / 1.1, (1.0 / 1.1) ** 2, end, 1.0)
    errors = []
    for eta in widths:
        c = first.at(eta)
        x = running(
            dynamics.run_optimizer,
            optimizer=lagged_rms(eta, c.b2, c.eps, c.sigma**2),
            grad=lambda x: x,
            sqrt_cov=lambda x: 1.0,
            x0=1.0,
            steps=round(end / eta**2),
            sigma=c.sigma,
            n_paths=400_000,
        )
        centred = [lambda x: x, lambda x: (x - float(mean)) ** 2]
        errors.append(dynamics.weak_error(x[:, 0], [mean, variance], centred).error)
    for each in np.transpose(errors):
        assert 1.5 <= dynamics.weak_order(each, widths) <= 2.5


def test_the_equation_of_rmsprop_is_that_process():
    c = dynamics.AdaptiveConstants(eta=0.1, sigma0=1.0, eps0=0.1, c2=2.0)
    sde = dynamics.rmsprop_sde(lambda x: x, lambda x: 1.0, lambda x: 1.0, c)
    assert sde.time_per_step == pytest.approx(0.01)
    state = sde.init(jnp.ones(()))
    x = running(dynamics.simulate, sde=sde, x0=state, t1=1.0, dt0=0.02, n_paths=40_000)
    np.testing.assert_allclose(x.u, 1.0, rtol=1e-6)
    # Euler's own moments in 50 steps.
    r, n = 1 - 0.02 / 1.1, 50
    mean, variance = r**n, 0.02 / 1.1**2 * (1 - r ** (2 * n)) / (1 - r**2)
    assert_moments(x.params[:, 0], mean, variance)


def assert_moments(x, mean, variance, slack=0.0):
    """Of normal numbers, within 4.5 standard errors."""
    x = np.asarray(x, np.float64)
    n = len(x)
    assert abs(x.mean() - mean) <= 4.5 * np.sqrt(variance / n) + slack
    assert abs(x.var() - variance) <= 4.5 * variance * np.sqrt(2 / n) + slack


def test_adam_follows_its_equation():
    c = dynamics.AdaptiveConstants(eta=0.05, sigma0=1.0, eps0=0.1, c2=2.0, c1=20.0)
    sde = dynamics.adam_sde(lambda x: x, lambda x: 1.0, lambda x: 1.0, c)
    assert sde.t0 == sde.time_per_step == pytest.approx(0.0025)
    n = 20_000
    x = running(
        dynamics.simulate, sde=sde, x0=sde.init(jnp.ones(())), t1=1.0, dt0=0.01, n_paths=n
    ).params
    y = running(
        dynamics.run_optimizer,
        optimizer=optax.adam(0.05, c.b1, c.b2, c.eps),
        grad=lambda x: x,
        sqrt_cov=lambda x: 1.0,
        x0=1.0,
        steps=400,
        sigma=c.sigma,
        n_paths=n,
    )
    mean = float(np.mean(y))
    found = dynamics.weak_error(x, y, [lambda x: x, lambda x: (x - mean) ** 2])
    assert (found.error <= 4 * found.standard_error + 0.02).all()
    assert (found.standard_error < 0.01).all()
    # Both have moved far from where they began.
    assert mean < 0.5
    assert np.var(y) > 0.3


def test_constants_are_the_optimizers():
    c = dynamics.AdaptiveConstants.of(0.05, sigma=20, b1=0.95, b2=0.995, eps=2)
    np.testing.assert_allclose([*c], [0.05, 1.0, 0.1, 2.0, 20.0], rtol=1e-6)
    half = c.at(0.025)
    np.testing.assert_allclose(
        [half.sigma, half.b1, half.b2, half.eps], [40, 0.9875, 0.99875, 4], rtol=1e-6
    )
    with pytest.raises(
        UserError, match=r"c1 = 20 and eta = 0.5 make a decay of -4: take an eta of at most 0.22"
    ):
        _ = c.at(0.5).b1
    lacking = dynamics.AdaptiveConstants.of(0.05, sigma=20, b2=0.995, eps=2)
    with pytest.raises(UserError, match="no c1: give b1"):
        dynamics.adam_sde(lambda x: x, lambda x: 1.0, lambda x: 1.0, lacking)


def test_the_equation_of_adam_is_the_mean_of_one_step_and_its_noise():
    """At every state, up to η² and the squares of gradients beside those of noise."""
    c = dynamics.AdaptiveConstants(eta=1e-2, sigma0=0.7, eps0=0.2, c2=2.0, c1=5.0)
    theta = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    grad = lambda x: jax.tree.map(lambda leaf: 3 * leaf, x)  # noqa: E731
    root = {"a": jnp.array([0.4, 1.2]), "b": jnp.array(0.9)}
    cov = jax.tree.map(jnp.square, root)
    sde = dynamics.adam_sde(grad, lambda x: cov, lambda x: root, c)
    m, u = jax.tree.map(lambda x: 0.3 * x, theta), jax.tree.map(lambda s: 0.8 * s, cov)
    state, step = dynamics.AdamState(theta, m, u), 2_000
    adam = optax.scale_by_adam(c.b1, c.b2, c.eps)
    v = jax.tree.map(lambda u: c.sigma**2 * u, u)
    before = optax.ScaleByAdamState(jnp.int32(step - 1), m, v)

    def after(sign):
        noisy = jax.tree.map(lambda g, s: g + sign * c.sigma * s, grad(theta), root)
        moved, moments = adam.update(noisy, before)
        rates = (
            jax.tree.map(lambda x: -c.eta * x, moved),
            jax.tree.map(jnp.subtract, moments.mu, m),
            jax.tree.map(lambda v, u: v / c.sigma**2 - u, moments.nu, u),
        )
        return jax.tree.map(lambda change: change / c.eta**2, rates)

    up, down = jax.jit(after)(1.0), jax.jit(after)(-1.0)
    drift = sde.drift(step * c.eta**2, state)
    kick = sde.diffusion(step * c.eta**2, state).mv(jax.tree.map(jnp.ones_like, theta))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, up, down)
    half = jax.tree.map(lambda a, b: (a - b) / 2, up, down)
    for name in theta:
        for found, expected, rtol in zip(mean, drift, (0.02, 0.002, 0.1), strict=True):
            np.testing.assert_allclose(found[name], expected[name], rtol=rtol)
        np.testing.assert_allclose(half[1][name], kick.m[name] / c.eta, rtol=0.002)
        assert not np.any(kick.params[name])
        assert not np.any(kick.u[name])


def test_sgd_with_noise_that_grows_with_x():
    """dX = -aX dt + sqrt(η) b X dW, whose second moment is known, in Euler's steps as well."""
    a, b, eta, end, n = 1.0, 0.8, 0.5, 1.0, 100_000
    sde = dynamics.sgd_sde(lambda x: a * x, lambda x: b * x, eta)
    assert sde.time_per_step == eta
    saved = [0.0, 0.5, end]
    x = running(dynamics.simulate, sde=sde, x0=2.0, t1=end, dt0=0.1, n_paths=n, save_at=saved)
    assert x.shape == (n, 3)
    steps = np.array([0, 5, 10])
    exact = 4 * ((1 - 0.1 * a) ** 2 + 0.1 * eta * b**2) ** steps
    found = dynamics.weak_error(x, np.full((2, 3), 0.0), [lambda x: x**2])
    assert (np.abs(found.error - exact) <= 4.5 * found.standard_error + 1e-5).all()
    # And Euler is within its own error of the equation: h times half the square of the exponent.
    exponent = -2 * a + eta * b**2
    continuous = 4 * np.exp(exponent * np.array(saved))
    np.testing.assert_allclose(exact, continuous, rtol=0.1 * exponent**2 / 2)


def test_momentum_has_the_stationary_law_of_its_optimizer():
    """Linear, so that both covariances solve equations: none is sampled."""
    a, s, eta, beta = 1.0, 0.7, 0.01, 0.95
    sde = dynamics.sgdm_sde(lambda x: a * x, lambda x: s, eta, beta)
    zero = dynamics.MomentumState(jnp.zeros(()), jnp.zeros(()))
    slope = jax.jacfwd(lambda state: sde.drift(0.0, state))(zero)
    F = np.array([[float(x) for x in row] for row in slope], np.float64)
    kick = np.array([float(x) for x in sde.diffusion(0.0, zero).mv(jnp.ones(()))])
    C = scipy.linalg.solve_continuous_lyapunov(F, -np.outer(kick, kick))
    np.testing.assert_allclose(C[0, 0], eta * s**2 / (2 * a), rtol=1e-5)
    # m' = βm + (1-β)(ax + sz), x' = x - ηm'
    step = np.array([[1 - eta * (1 - beta) * a, -eta * beta], [(1 - beta) * a, beta]])
    noise = np.array([-eta * (1 - beta) * s, (1 - beta) * s])
    D = scipy.linalg.solve_discrete_lyapunov(step, np.outer(noise, noise))
    expected = eta * s**2 / (2 * a) / (1 - eta * a * (1 - beta) / (2 * (1 + beta)))
    np.testing.assert_allclose(D[0, 0], expected, rtol=1e-9)
    np.testing.assert_allclose(C[0, 0], D[0, 0], rtol=1e-3)
    np.testing.assert_allclose(C[1, 1], D[1, 1], rtol=0.05)
    assert sde.init(jnp.float32(3.0)).m == 3.0


def drift_by_covariances(workers, h, eta, curvature):
    """Variance of a worker where it takes gradients, over that at H = 1, by iterated rounds."""
    mean = np.full((workers, workers), 1 / workers)
    C, rho = np.zeros((workers, workers)), (1 - eta * curvature) ** 2
    for _ in range(4000 // h + 50):
        seen = []
        for _ in range(h):
            seen.append(C[0, 0])
            C = rho * C + np.eye(workers)
        C = mean @ C @ mean
    return np.mean(seen) * workers * (1 - rho)


@pytest.mark.parametrize("h", [1, 7, 50])
def test_the_drift_factor_is_the_spread_of_workers(h):
    """Of a linear chain with equal noise, whose covariance is iterated over rounds."""
    workers, eta, curvature = 4, 0.05, 2.0
    found = dynamics.local_drift_factor(workers, h, eta, curvature)
    np.testing.assert_allclose(found, drift_by_covariances(workers, h, eta, curvature), rtol=1e-6)


def test_the_drift_factor_of_a_simulated_problem():
    """-(d log D / dτ)/s² of a label-noise problem with K = 8 and η = .02, by other code."""
    measured = {1: 0.130, 20: 0.735, 50: 0.907, 400: 1.020}
    for h, rate in measured.items():
        assert dynamics.local_drift_factor(8, h, 0.02, 4.25) / 8 == pytest.approx(rate, rel=0.05)
    sde = dynamics.local_sgd_sde(lambda x: -x, lambda x: 0.5, 0.1, factor=8.0)
    assert sde.drift(0.0, jnp.float32(2.0)) == -16
    assert sde.time_per_step == pytest.approx(0.01)
    assert sde.diffusion(0.0, jnp.float32(2.0)) == 0.5


def test_errors_of_means():
    x, y = jnp.array([0.0, 2.0, 4.0]), jnp.array([1.0, 1.0])
    found = dynamics.weak_error(x, y, [lambda x: x, lambda x: x**2])
    np.testing.assert_allclose(found.error, [1, 20 / 3 - 1], rtol=1e-6)
    np.testing.assert_allclose(found.standard_error[0], np.sqrt(4 / 3), rtol=1e-6)
    with pytest.raises(UserError, match="1 exact values for 2 test functions: give one"):
        dynamics.weak_error(x, [1.0], [lambda x: x, lambda x: x**2])
    assert dynamics.weak_order([1e-2, 1e-3], [1e-1, 1e-2]) == pytest.approx(1)
