"""Momentum next to SGD: stationary variance, effective learning rates, coupling, slow dynamics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.linalg import solve_discrete_lyapunov

from jaxlm.dynamics import momentum


def linear_map(tx, a, amplitude):
    """(x, m) -> A (x, m) + B z of a step on a x^2 / 2 with gradient noise amplitude * z."""

    def step(x, m, z):
        state = optax.tree.set(tx.init(x), ema=m)
        updates, state = tx.update(a * x + amplitude * z, state, x)
        return jnp.stack([x + updates, optax.tree.get(state, "ema")])

    zero = jnp.float32(0)
    columns = jax.jit(jax.jacobian(step, argnums=(0, 1, 2)))(zero, zero, zero)
    columns = np.stack(columns, axis=1).astype(np.float64)
    return columns[:, :2], columns[:, 2:]


@pytest.mark.parametrize("l", [1, 4])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_stationary_variance(beta, l):
    eta, a, s = 0.5, 1.0, 1.0
    A, B = linear_map(momentum.sgdm(eta / l, beta), a, s * math.sqrt(l))
    found = solve_discrete_lyapunov(A, B @ B.T)[0, 0]
    limit = eta * s**2 / (2 * a)
    expected = limit / (1 - eta / l * a * (1 - beta) / (2 * (1 + beta)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # of float32
    known = {0.0: 0.3333, 0.5: 0.2727, 0.9: 0.2533}
    if l == 1:
        np.testing.assert_allclose(found, known[beta], rtol=0.01)


def test_the_gap_to_sgd_vanishes_as_1_over_l():
    gaps = []
    for l in (4, 8, 16):
        with_momentum, without = (
            solve_discrete_lyapunov(A, B @ B.T)[0, 0]
            for A, B in (
                linear_map(momentum.sgdm(0.5 / l, beta), 1.0, math.sqrt(l)) for beta in (0.9, 0.0)
            )
        )
        gaps.append(without - with_momentum)
    ratios = np.array(gaps[:-1]) / gaps[1:]
    np.testing.assert_allclose(ratios, 2, rtol=0.1)


GRADS = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)


def follow(tx, grads=GRADS, keep="ema"):
    """Iterates and momenta on given gradients, from 0."""

    @jax.jit
    def run(grads):
        def step(carry, g):
            x, state = carry
            updates, state = tx.update(g, state, x)
            return (x + updates, state), (x + updates, optax.tree.get(state, keep))

        x = jnp.zeros(3)
        return jax.lax.scan(step, (x, tx.init(x)), grads)[1]

    return map(np.asarray, run(grads))


def coupled(x, m, eta, beta):
    """The point that moves by SGD steps on the gradients of SGDM."""
    return x - beta * eta / (1 - beta) * m


def test_the_coupled_point_takes_sgd_steps():
    for form, keep, eta, rate in (("ema", "ema", 0.1, 0.1), ("heavy_ball", "trace", 0.1, 0.5)):
        x, m = follow(momentum.sgdm(eta, 0.8, form), keep=keep)
        z = coupled(x, m, eta, 0.8)
        np.testing.assert_allclose(z, -rate * GRADS.cumsum(0), rtol=1e-5, atol=1e-6)


def test_forms_of_momentum():
    ema, _ = follow(momentum.sgdm(0.5, 0.8))
    ball, _ = follow(momentum.sgdm(0.1, 0.8, "heavy_ball"), keep="trace")
    np.testing.assert_allclose(ema, ball, rtol=1e-5, atol=1e-6)
    plain, _ = follow(optax.sgd(0.1, momentum=0.8), keep="trace")
    np.testing.assert_array_equal(ball, plain)


def test_effective_learning_rates_of_schedules():
    """They sum the gradients to the point where SGDM would come to rest without further ones."""
    eta = optax.linear_schedule(0.2, 0.05, 8)
    beta = optax.linear_schedule(0.5, 0.9, 10)
    x, m = follow(momentum.sgdm(eta, beta))
    rates = momentum.effective_lr_schedule(eta, beta, len(GRADS))
    last_eta, last_beta = 0.05, 0.9
    rest = coupled(x[-1], m[-1], last_eta, last_beta)
    np.testing.assert_allclose(rest, -rates @ GRADS, rtol=1e-5, atol=1e-6)
    etas, betas = (np.asarray(jax.vmap(f)(jnp.arange(600)), np.float64) for f in (eta, beta))
    direct = [
        sum(etas[s] * (1 - betas[k]) * betas[k + 1 : s + 1].prod() for s in range(k, 600))
        for k in (0, 5, 11)
    ]
    np.testing.assert_allclose(rates[[0, 5, 11]], direct, rtol=1e-5)
    np.testing.assert_allclose(momentum.effective_lr_schedule(0.3, 0.9, 5), 0.3, rtol=1e-14)


def test_runs_with_common_noise_have_the_means_and_variances_of_theory():
    a, eta, beta, runs, steps = 1.0, 0.2, 0.8, 4096, 20

    def oracle(key, x):
        return a * x + jax.random.normal(key)

    found = jax.jit(
        lambda key: momentum.compare_momentum(
            key,
            oracle,
            jnp.float32(1.0),
            eta=eta,
            beta=beta,
            steps=steps,
            num_runs=runs,
            test_fn=lambda x: jnp.stack([x, x**2]),
        )
    )(jax.random.key(0))
    for values, b in ((found.sgd, 0.0), (found.sgdm, beta)):
        A, B = linear_map(momentum.sgdm(eta, b), a, 1.0)
        mean, cov = np.array([1.0, 0.0]), np.zeros((2, 2))
        for _ in range(steps):
            mean, cov = A @ mean, A @ cov @ A.T + B @ B.T
        expected = np.array([mean[0], mean[0] ** 2 + cov[0, 0]])
        error = np.asarray(values).std(0) / math.sqrt(runs)
        assert (np.abs(values.mean(0) - expected) < 4.5 * error).all()
    independent = np.sqrt((found.sgd.var(0) + found.sgdm.var(0)) / runs)
    assert (found.standard_error < 0.8 * independent).all()
    assert (found.wasserstein >= found.gap * (1 - 1e-5)).all()
    np.testing.assert_allclose(
        found.gap, np.abs((found.sgdm - found.sgd).mean(0)), rtol=1e-4, atol=1e-6
    )


def test_both_follow_the_slow_flow_of_label_noise():
    """u v fits 1 with noisy labels: u^2 - v^2 decays as exp(-s^2 tau) in time tau = eta^2 k."""
    s, eta, tau = 0.5, 0.02, 4.0

    def oracle(key, x):
        label = 1 + s * jax.random.rademacher(key, (), jnp.float32)
        return (x[0] * x[1] - label) * x[::-1]

    found = jax.jit(
        lambda key: momentum.compare_momentum(
            key,
            oracle,
            jnp.array([2.0, 0.5]),
            eta=eta,
            beta=0.9,
            steps=round(tau / eta**2),
            num_runs=64,
            test_fn=lambda x: (x[0] ** 2 - x[1] ** 2)[None],
        )
    )(jax.random.key(0))
    expected = 3.75 * math.exp(-(s**2) * tau)
    for values in found:
        np.testing.assert_allclose(values.mean(), expected, rtol=0.05)
