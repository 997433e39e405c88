"""Estimates of gradient noise over all batches there are, and oracles whose covariance is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.dynamics import noise

RNG = np.random.default_rng(0)
BATCHES = {"w": RNG.normal(size=(4, 2, 3)) + 1, "b": RNG.normal(size=(4,))}


def as_rows(tree):
    return np.concatenate([np.reshape(x, (len(x), -1)) for x in jax.tree.leaves(tree)], axis=1)


@pytest.mark.parametrize("m", [2, 3])
def test_estimates_are_unbiased(m):
    """Over every way to draw m of the 4 batches with replacement the means are exact."""
    draws = np.array(list(itertools.product(range(4), repeat=m)))
    chosen = jax.tree.map(lambda x: jnp.asarray(x[draws], jnp.float32), BATCHES)
    found = jax.jit(jax.vmap(noise.grad_noise_stats))(chosen)
    rows = as_rows(BATCHES)
    np.testing.assert_allclose(found.G.mean(), (rows.mean(0) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.N.mean(), rows.var(0).sum(), rtol=1e-5)


def test_sums_give_the_same_inside_a_loop():
    stacked = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), BATCHES)

    @jax.jit
    def accumulate(stacked):
        zeros = noise.NoiseSums.zeros(jax.tree.map(lambda x: x[0], stacked))
        return jax.lax.scan(lambda sums, g: (sums.add(g), None), zeros, stacked)[0]

    sums = accumulate(stacked)
    assert sums.gradient["w"].dtype == jnp.float32
    np.testing.assert_allclose(
        sums.gradient["w"] / sums.batches, stacked["w"].astype(jnp.float32).mean(0), rtol=1e-5
    )
    expected = noise.grad_noise_stats(stacked)
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
        lambda key: noise.value_and_grad_with_noise(loss_fn)(params, x, 2, key=key, scale=3.0)
    )
    (loss, stats), grads = fn(jax.random.key(1))
    each = [
        jax.value_and_grad(loss_fn)(params, batch, 2, key=key, scale=3.0)
        for batch, key in zip(x, jax.random.split(jax.random.key(1), 3), strict=True)
    ]
    np.testing.assert_allclose(loss, np.mean([loss for loss, _ in each]), rtol=1e-5)
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *(grads for _, grads in each))
    np.testing.assert_allclose(stats, noise.grad_noise_stats(stacked), rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b.mean(0), rtol=1e-5), grads, stacked)


def test_running_averages_come_before_the_ratio():
    steps = [noise.NoiseStats(jnp.float32(g), jnp.float32(n)) for g, n in [(-1, 4), (5, 6)]]
    running = noise.RunningNoise.zeros()
    for stats in steps:
        running = running.add(stats, decay=0.5)
    np.testing.assert_allclose(running.stats, [3.0, 16 / 3], rtol=1e-6)
    np.testing.assert_allclose(running.stats.ratio, 16 / 9, rtol=1e-6)
    assert steps[0].ratio == np.inf
    with jax.enable_x64(True):  # numbers keep their width in a loop, whatever is added
        wide = noise.NoiseStats(jnp.float64(5), jnp.float64(6))
        after = jax.lax.fori_loop(0, 2, lambda _, x: x.add(wide), running)
    assert after.N.dtype == jnp.float32


def test_where_the_linear_rule_ends():
    """There N, which falls as 1/B, has fallen to G / (C^2 - 1)."""
    stats = noise.NoiseStats(jnp.float32(0.5), jnp.float32(8.0))
    for closeness in (2**0.5, 1.1):
        end = stats.critical_batch_size(32, closeness)
        np.testing.assert_allclose(8.0 * 32 / end, 0.5 / (closeness**2 - 1), rtol=1e-5)


@pytest.mark.parametrize("ratio", [1e-6, 1e-9])
def test_noise_that_is_small_beside_the_gradient(ratio):
    """N in float64 of the same float32 numbers, by sums, by stacks, and in a step."""
    rng = np.random.default_rng(1)
    x = (1 + (ratio / 50) ** 0.5 * rng.normal(size=(8, 3, 50))).astype(np.float32)
    rows = x.astype(np.float64).mean(1)
    wanted = rows.var(0, ddof=1).sum()
    stacked = jnp.asarray(rows, jnp.float32)
    exact = np.asarray(stacked, np.float64).var(0, ddof=1).sum()
    sums = noise.NoiseSums.zeros(stacked[0])
    for g in stacked:
        sums = sums.add(g)
    _, stats = noise.value_and_grad_with_noise(lambda w, x: jnp.mean(x @ w))(jnp.ones(50), x)[0]
    np.testing.assert_allclose(noise.grad_noise_stats(stacked).N, exact, rtol=1e-2)
    np.testing.assert_allclose(sums.stats.N, exact, rtol=1e-2)
    np.testing.assert_allclose(stats.N, wanted, rtol=2e-2)
