"""Estimates of gradient noise over all batches there are, and oracles whose covariance is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import dynamics
from jaxlm.core.errors import UserError

RNG = np.random.default_rng(0)
BATCHES = {"w": RNG.normal(size=(4, 2, 3)) + 1, "b": RNG.normal(size=(4,))}


def as_rows(tree):
    return np.concatenate([np.reshape(x, (len(x), -1)) for x in jax.tree.leaves(tree)], axis=1)


@pytest.mark.parametrize("m", [2, 3])
def test_estimates_are_unbiased(m):
    """Over every way to draw m of the 4 batches with replacement the means are exact."""
    draws = np.array(list(itertools.product(range(4), repeat=m)))
    chosen = jax.tree.map(lambda x: jnp.asarray(x[draws], jnp.float32), BATCHES)
    found = jax.jit(jax.vmap(dynamics.grad_noise_stats))(chosen)
    rows = as_rows(BATCHES)
    np.testing.assert_allclose(found.G.mean(), (rows.mean(0) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.N.mean(), rows.var(0).sum(), rtol=1e-5)


def test_sums_give_the_same_inside_a_loop():
    stacked = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), BATCHES)

    @jax.jit
    def accumulate(stacked):
        zeros = dynamics.NoiseSums.zeros(jax.tree.map(lambda x: x[0], stacked))
        return jax.lax.scan(lambda sums, g: (sums.add(g), None), zeros, stacked)[0]

    sums = accumulate(stacked)
    assert sums.gradient["w"].dtype == jnp.float32
    np.testing.assert_allclose(
        sums.gradient["w"] / sums.batches, stacked["w"].astype(jnp.float32).mean(0), rtol=1e-5
    )
    expected = dynamics.grad_noise_stats(stacked)
    np.testing.assert_allclose(sums.stats, expected, rtol=1e-5)
    rows = as_rows(jax.tree.map(lambda x: np.asarray(x, np.float64), stacked))
    np.testing.assert_allclose(expected.N, rows.var(0, ddof=1).sum(), rtol=1e-5)


def test_noise_beside_an_accumulated_gradient():
    x = jax.random.normal(jax.random.key(0), (3, 4, 2))
    params = {"w": jnp.array([0.5, -1.0]), "b": jnp.float32(0.2)}

    def loss_fn(params, x, power, *, key, scale):
        bent = jnp.tanh(x @ params["w"] + params["b"] + jax.random.normal(key))
        return scale * jnp.mean(bent**power)

    fn = jax.jit(
        lambda key: dynamics.value_and_grad_with_noise(loss_fn)(params, x, 2, key=key, scale=3.0)
    )
    (loss, stats), grads = fn(jax.random.key(1))
    each = [
        jax.value_and_grad(loss_fn)(params, batch, 2, key=key, scale=3.0)
        for batch, key in zip(x, jax.random.split(jax.random.key(1), 3), strict=True)
    ]
    np.testing.assert_allclose(loss, np.mean([loss for loss, _ in each]), rtol=1e-5)
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *(grads for _, grads in each))
    np.testing.assert_allclose(stats, dynamics.grad_noise_stats(stacked), rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b.mean(0), rtol=1e-5), grads, stacked)


def test_running_averages_come_before_the_ratio():
    steps = [dynamics.NoiseStats(jnp.float32(g), jnp.float32(n)) for g, n in [(-1, 4), (5, 6)]]
    running = dynamics.RunningNoise.zeros()
    for stats in steps:
        running = running.add(stats, decay=0.5)
    np.testing.assert_allclose(running.stats, [3.0, 16 / 3], rtol=1e-6)
    np.testing.assert_allclose(running.stats.ratio, 16 / 9, rtol=1e-6)
    assert steps[0].ratio == np.inf
    with jax.enable_x64(True):  # numbers keep their width in a loop, whatever is added
        wide = dynamics.NoiseStats(jnp.float64(5), jnp.float64(6))
        after = jax.lax.fori_loop(0, 2, lambda _, x: x.add(wide), running)
    assert after.N.dtype == jnp.float32


def test_where_the_linear_rule_ends():
    """There N, which falls as 1/B, has fallen to G / (C^2 - 1)."""
    stats = dynamics.NoiseStats(jnp.float32(0.5), jnp.float32(8.0))
    for closeness in (2**0.5, 1.1):
        end = stats.critical_batch_size(32, closeness)
        np.testing.assert_allclose(8.0 * 32 / end, 0.5 / (closeness**2 - 1), rtol=1e-5)


def test_example_weights_have_the_covariance_of_a_batch():
    n, dim, batch_size, draws = 32, 5, 4, 20_000
    grads = RNG.normal(size=(n, dim)) @ RNG.normal(size=(dim, dim))
    weights = jax.jit(jax.vmap(lambda key: dynamics.gaussian_example_weights(key, n, batch_size)))(
        jax.random.split(jax.random.key(0), draws)
    )
    np.testing.assert_allclose(weights.mean(1), 1, atol=1e-5)
    noisy = np.asarray(weights, np.float64) @ grads / n
    found = np.cov(noisy.T)
    expected = np.cov(grads.T, ddof=0) / batch_size
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
    error = np.sqrt(np.diag(expected) / draws)
    assert (np.abs(noisy.mean(0) - grads.mean(0)) < 4.5 * error).all()
    skewness = ((noisy - noisy.mean(0)) ** 3).mean(0) / noisy.std(0) ** 3
    assert np.abs(skewness).max() < 4.5 * np.sqrt(6 / draws)


def ones(key, shape, dtype):
    del key
    return jnp.ones(shape, dtype)


def test_oracles_apply_the_root_of_the_covariance():
    params = {"w": jnp.array([1.0, 2.0]), "b": jnp.float32(3.0)}
    oracle = dynamics.ngos(lambda p: jax.tree.map(lambda x: 10 * x, p), lambda p: p, 0.5, draw=ones)
    found = oracle(jax.random.key(0), params)
    assert (found["w"].tolist(), float(found["b"])) == ([10.5, 21.0], 31.5)
    matrix = jnp.array([[1.0, 2.0, 3.0], [0.0, -1.0, 4.0]])
    oracle = dynamics.ngos(lambda x: x, lambda x: matrix, 2, draw=ones)
    assert oracle(jax.random.key(0), params["w"]).tolist() == [13.0, 8.0]


@pytest.mark.parametrize("draw", [jax.random.normal, jax.random.rademacher])
def test_oracle_noise_has_mean_0_and_variance_1_and_differs_between_leaves(draw):
    oracle = dynamics.ngos(
        lambda p: jax.tree.map(jnp.zeros_like, p),
        lambda p: jax.tree.map(jnp.ones_like, p),
        1.0,
        draw=draw,
    )
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    keys = jax.random.split(jax.random.key(1), 4000)
    noise = as_rows(jax.jit(jax.vmap(lambda key: oracle(key, params)))(keys))
    error = 4.5 / np.sqrt(len(noise))
    assert np.abs(noise.mean(0)).max() < error
    covariance = noise.T @ noise / len(noise)
    assert np.abs(covariance - np.eye(4)).max() < np.sqrt(2) * error


@pytest.mark.parametrize("grads", [{"w": jnp.ones((1, 3))}, {"w": jnp.ones(2), "b": jnp.ones(3)}])
def test_one_gradient_has_no_noise(grads):
    with pytest.raises(UserError) as found:
        dynamics.grad_noise_stats(grads)
    assert str(found.value) == (
        "per_batch_grads has leaves without a common leading axis of 2 or more gradients; stack "
        "the gradients of at least two batches"
    )


def test_weights_of_no_batch():
    with pytest.raises(UserError) as found:
        dynamics.gaussian_example_weights(jax.random.key(0), 8, 0)
    assert str(found.value) == "n=8 examples in batches of 0 make no noise; give both from 1"


@pytest.mark.parametrize("ratio", [1e-6, 1e-9])
def test_noise_that_is_small_beside_the_gradient(ratio):
    """N in float64 of the same float32 numbers, by sums, by stacks, and in a step."""
    rng = np.random.default_rng(1)
    x = (1 + (ratio / 50) ** 0.5 * rng.normal(size=(8, 3, 50))).astype(np.float32)
    rows = x.astype(np.float64).mean(1)
    wanted = rows.var(0, ddof=1).sum()
    stacked = jnp.asarray(rows, jnp.float32)
    exact = np.asarray(stacked, np.float64).var(0, ddof=1).sum()
    sums = dynamics.NoiseSums.zeros(stacked[0])
    for g in stacked:
        sums = sums.add(g)
    _, stats = dynamics.value_and_grad_with_noise(lambda w, x: jnp.mean(x @ w))(jnp.ones(50), x)[0]
    np.testing.assert_allclose(dynamics.grad_noise_stats(stacked).N, exact, rtol=1e-2)
    np.testing.assert_allclose(sums.stats.N, exact, rtol=1e-2)
    np.testing.assert_allclose(stats.N, wanted, rtol=2e-2)
