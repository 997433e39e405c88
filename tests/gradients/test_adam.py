"""Adam's step against optax, and against NumPy for the variant of the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.gradients import adam


def drawn(dtype):
    rng = np.random.default_rng(0)
    g, m = (rng.standard_normal((2, 400)) * 10.0 ** rng.uniform(-9, 2, 400)).astype(dtype)
    return g, m, np.square(m) * rng.uniform(0, 5, 400).astype(dtype)


@pytest.mark.parametrize("eps", [1e-8, 1e-3, 0.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_the_step_is_the_update_of_optax(dtype, tolerance: float, eps: float):
    with jax.enable_x64(dtype == np.float64):
        g, m, v = (jnp.asarray(a) for a in drawn(dtype))
        for b1, b2 in ((0.9, 0.999), (0.0, 0.95), (0.5, 0.0)):
            for count in (0, 5, 3000):
                state = optax.ScaleByAdamState(jnp.int32(count), m, v)
                update = optax.scale_by_adam(b1, b2, eps).update
                expected = update(g, state)[0]
                # What the step would be if the two parts of m' did not cancel.
                size = update(jnp.abs(g), state._replace(mu=jnp.abs(m)))[0]
                constants = adam.Constants(b1, b2, eps)
                # Powers are rounded otherwise where nothing is compiled; optax compiles them.
                run = jax.jit(lambda *a, c=constants: adam.step(*a, c)[0])
                found = run(g, m, v, state.count)
                assert found.dtype == dtype
                assert np.all(np.abs(found - expected) <= tolerance * size)


def test_the_variant_of_the_authors_and_where_eps_is_felt():
    with jax.enable_x64(True):
        g, m, v = drawn(np.float64)
        constants = adam.Constants(0.9, 0.999, 1e-8, "reference")
        found, small = adam.step(*map(jnp.asarray, (g, m, v)), 7, constants)
        below = 0.999 * v + 0.001 * g**2
        np.testing.assert_allclose(found, (0.9 * m + 0.1 * g) / np.sqrt(below + 1e-8), rtol=1e-12)
        np.testing.assert_array_equal(small, below < 1e-8)
        _, small = adam.step(*map(jnp.asarray, (g, m, v)), 7, adam.Constants(eps=1e-3))
        np.testing.assert_array_equal(small, np.sqrt(below / (1 - 0.999**8)) < 1e-3)
        assert 0.1 < np.mean(small) < 0.9


def test_no_momentum_and_no_gradient_is_no_step():
    zero = jnp.zeros(3)
    for variant in ("paper", "reference"):
        found, _ = adam.step(zero, zero, zero, 0, adam.Constants(eps=0.0, variant=variant))
        assert found.tolist() == [0, 0, 0]
