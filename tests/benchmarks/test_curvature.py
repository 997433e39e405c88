"""Curvature against quadratic losses whose Hessians are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import curvature

EIGENVALUES = np.array([3.0, 1.0, 1.0, 0.5, -0.25], np.float32)


@pytest.fixture
def loss():
    """Half of x H x with a dense H of known eigenvalues, x spread over two leaves."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0].astype(np.float32)
    hessian = jnp.asarray(rotation * EIGENVALUES @ rotation.T)

    def quadratic(params):
        x = jnp.concatenate([params["a"], params["b"].ravel()])
        return 0.5 * x @ hessian @ x

    return quadratic


@pytest.fixture
def params():
    return {"a": jnp.ones(3), "b": jnp.ones((1, 2))}


def test_the_trace_of_a_diagonal_hessian_is_exact_with_one_sign_vector():
    scales = jnp.array([1.0, 2.0, 4.0])
    loss = lambda params: 0.5 * jnp.sum(scales * params**2)  # noqa: E731
    trace, error = curvature.hutchinson_trace(loss, jnp.ones(3), jax.random.key(0), 2)
    np.testing.assert_allclose([trace, error], [7.0, 0.0], atol=1e-6)


def test_the_trace_is_within_its_error(loss, params):
    trace, error = curvature.hutchinson_trace(loss, params, jax.random.key(0), 200)
    assert abs(trace - EIGENVALUES.sum()) < 4.5 * error
    assert 0 < error < 0.5


def test_the_norm_is_the_largest_absolute_eigenvalue(loss, params):
    assert curvature.spectral_norm(loss, params, jax.random.key(0)) == pytest.approx(3, rel=1e-4)
    negative = lambda params: -loss(params)  # noqa: E731
    found = curvature.spectral_norm(negative, params, jax.random.key(0))
    assert found == pytest.approx(3, rel=1e-4)


def test_rank_and_learning_rate_of_equal_eigenvalues_are_those_of_the_dimension():
    loss = lambda params: 2.0 * jnp.sum(params**2)  # noqa: E731
    found = curvature.measure(loss, jnp.ones(6), jax.random.key(0), probes=2, steps=3)
    np.testing.assert_allclose(found[:4], [24, 0, 4, 6], atol=1e-4)
    assert found.sgd_learning_rate == pytest.approx(0.25)


def test_a_rank_that_negative_eigenvalues_cancel_counts_as_one():
    loss = lambda params: params[0] ** 2 - params[1] ** 2  # noqa: E731
    found = curvature.measure(loss, jnp.ones(2), jax.random.key(0), probes=2, steps=20)
    assert (found.trace, found.rank) == (0, 1)


@pytest.mark.parametrize(("rank", "d", "n", "gamma"), [(1, 2, 1, 1.5), (3, 8, 2, 2.5)])
def test_the_slow_down_is_that_of_the_theorem(rank, d, n, gamma):
    # (2 * 1 + 2 - 2) / (1 * 4) + 1 and (8 * 3 + 8 - 2) / (2 * 10) + 1
    assert curvature.slow_down(rank, d, n) == pytest.approx(gamma)
