"""Paths: their shapes, their noise in every form, their solvers, and what is refused."""

import functools
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import dynamics
from jaxlm.core.errors import UserError

KEY = jax.random.key(5)
ROOT = jnp.array([[1.0, 0.0], [0.5, 2.0], [0.0, -1.0]])
needs_diffrax = pytest.mark.skipif(
    importlib.util.find_spec("diffrax") is None, reason="needs diffrax: pip install 'jaxlm[sde]'"
)


def compiled(**static):
    return jax.jit(functools.partial(dynamics.simulate, **static))(KEY)


def brownian(noise):
    return dynamics.SDE(lambda t, x: jax.tree.map(jnp.zeros_like, x), lambda t, x: noise, 1.0)


def test_a_diagonal_a_matrix_and_an_operator_are_one_noise():
    diagonal = jnp.array([1.0, 2.0, 3.0])
    white = jax.ShapeDtypeStruct((3,), jnp.float32)
    forms = [diagonal, jnp.diag(diagonal), dynamics.NoiseOperator(lambda z: diagonal * z, white)]
    paths = [
        compiled(sde=brownian(form), x0=jnp.zeros(3), t1=1.0, dt0=0.25, n_paths=4) for form in forms
    ]
    for other in paths[1:]:
        np.testing.assert_allclose(other, paths[0], rtol=1e-5)
    assert np.unique(paths[0]).size == 12


def test_noise_has_the_covariance_of_its_matrix():
    n, t1 = 50_000, 2.0
    x = compiled(sde=brownian(ROOT), x0=jnp.ones(3), t1=t1, dt0=0.5, n_paths=n)[:, 0]
    x = np.asarray(x, np.float64) - 1
    expected = t1 * np.asarray(ROOT @ ROOT.T, np.float64)
    spread = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / n)
    assert (np.abs(x.T @ x / n - expected) <= 4.5 * spread).all()
    assert (np.abs(x.mean(0)) <= 4.5 * np.sqrt(np.diag(expected) / n)).all()


def test_paths_have_the_shape_of_the_state_and_do_not_depend_on_their_number():
    x0 = {"w": jnp.ones((2, 3)), "layers": {"b": jnp.zeros(4)}, "c": 1.0}
    sde = dynamics.sgd_sde(lambda x: x, lambda x: jax.tree.map(lambda leaf: 0.3, x), 0.1)
    run = functools.partial(compiled, sde=sde, x0=x0, t1=1.0, dt0=0.3, save_at=[0.0, 0.7, 1.0])
    few, many = run(n_paths=3), run(n_paths=5)
    for name, leaf in {"w": many["w"], "b": many["layers"]["b"], "c": many["c"]}.items():
        assert leaf.shape == (5, 3, *{"w": (2, 3), "b": (4,), "c": ()}[name])
        assert leaf.dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b[:3])
    np.testing.assert_array_equal(many["w"][:, 0], np.ones((5, 2, 3)))
    # Noise differs between leaves, elements, paths and steps.
    moves = np.concatenate([np.ravel(leaf[:, 1:]) for leaf in jax.tree.leaves(many)])
    assert np.unique(moves).size == moves.size


def test_time_is_that_of_the_steps():
    """x' = t, from t0, in Euler's steps; two stretches of unequal steps."""
    sde = dynamics.SDE(lambda t, x: t, lambda t, x: 0.0, 1.0, t0=0.5)
    x = compiled(sde=sde, x0=0.0, t1=2.0, dt0=0.2, n_paths=2, save_at=[1.0, 2.0])
    first = (0.5 / 3) * (3 * 0.5 + (0.5 / 3) * 3)  # three steps of 1/6
    second = 0.2 * (5 * 1.0 + 0.2 * 10)  # five of 1/5
    np.testing.assert_allclose(x, [[first, first + second]] * 2, rtol=1e-6)


def test_an_optimizer_without_noise_is_that_optimizer():
    tx, x = optax.adam(0.1), jnp.array([1.0, -2.0])
    paths = jax.jit(
        lambda key: dynamics.run_optimizer(
            key, tx, lambda x: 2 * x, lambda x: 1.0, x, 3, sigma=0, n_paths=2, save_at=[1, 3]
        )
    )(KEY)
    state, seen = tx.init(x), []
    for _ in range(3):
        updates, state = tx.update(2 * x, state, x)
        x = optax.apply_updates(x, updates)
        seen.append(x)
    np.testing.assert_allclose(paths, [[seen[0], seen[2]]] * 2, rtol=1e-5)


def losses(x):
    """Of five examples."""
    features = jnp.arange(15.0).reshape(5, 3) % 7 - 3
    return jnp.tanh(features @ x["w"] + x["b"]) ** 2 + features[:, 0] * x["b"]


def test_noise_of_examples_has_their_covariance():
    x, batch_size = {"w": jnp.array([0.3, -0.2, 0.5]), "b": jnp.array(0.1)}, 2
    noise = dynamics.example_noise(losses, x, batch_size)
    assert noise.in_structure().shape == (5,)
    columns = jax.vmap(noise.mv)(jnp.eye(5))
    M = np.concatenate([columns["w"], columns["b"][:, None]], 1).T
    rows = jax.jacrev(losses)(x)
    g = np.concatenate([rows["w"], rows["b"][:, None]], 1)
    expected = np.cov(g.T, bias=True) / batch_size
    np.testing.assert_allclose(M @ M.T, expected, rtol=1e-4, atol=1e-6)


def test_a_million_parameters_need_no_matrix():
    x0 = {"w": jnp.full((1000, 1000), 1e-3), "b": jnp.zeros(1000)}
    data = jax.random.normal(jax.random.key(1), (4, 1000))

    def losses(x):
        return jnp.mean((data @ x["w"] + x["b"][None] - 1) ** 2, axis=1)

    sde = dynamics.sgd_sde(
        jax.grad(lambda x: losses(x).mean()), lambda x: dynamics.example_noise(losses, x, 1), 0.1
    )
    run = jax.jit(lambda x0: dynamics.simulate(KEY, sde, x0, 0.2, 0.1, n_paths=2))
    program = run.lower(x0).compile()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 20 * 4 * 1_001_000 * 2
    paths = program(x0)
    assert paths["w"].shape == (2, 1, 1000, 1000)
    assert np.isfinite(paths["w"]).all()
    assert not np.array_equal(paths["w"][0], paths["w"][1])


def scale(x):
    return 0.5 * x


@pytest.mark.parametrize(
    ("diffusion", "additive"),
    [
        (lambda x: jnp.full_like(x, 0.3), True),
        (jax.jit(lambda x: jnp.ones_like(x)), True),
        (lambda x: ROOT, True),
        (scale, False),
        (jax.jit(scale), False),
        (lambda x: ROOT * x[0], False),
    ],
)
def test_noise_that_depends_on_the_state_is_told_apart(diffusion, additive):
    assert dynamics.is_additive(lambda t, x: diffusion(x), 0.0, jnp.zeros(3)) is additive


def test_adam_with_constant_covariance_is_additive_and_with_another_is_not():
    c = dynamics.AdaptiveConstants(eta=0.1, sigma0=1.0, eps0=0.1, c2=2.0, c1=5.0)
    for root, additive in ((jnp.ones_like, True), (scale, False)):
        sde = dynamics.adam_sde(lambda x: x, jnp.square, root, c)
        state = sde.init(jnp.ones(2))
        assert dynamics.is_additive(sde.diffusion, sde.t0, state) is additive


def geometric():
    return dynamics.SDE(lambda t, x: 0.1 * x, lambda t, x: 0.4 * x, 1.0)


@pytest.mark.parametrize("solver", ["heun", "euler_heun", "shark", "sra1", "sea"])
def test_a_stratonovich_solver_is_refused_where_noise_depends_on_the_state(solver):
    with pytest.raises(UserError, match="Stratonovich sense that it takes differs from Itô's"):
        dynamics.simulate(KEY, geometric(), 1.0, 1.0, 0.1, n_paths=2, solver=solver)


def test_a_missing_extra_names_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(UserError, match=r"diffrax is not installed: pip install 'jaxlm\[sde\]'"):
        dynamics.simulate(KEY, geometric(), 1.0, 1.0, 0.1, n_paths=2, solver="ito_milstein")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"solver": "rk4"}, "solver is 'rk4': give one of euler, ito_milstein, "),
        ({"dt0": 0.0}, "dt0 is 0: give a positive step"),
        ({"t1": 0.0}, "from 0 to 0"),
        ({"save_at": [0.5, 0.2]}, r"saved at \[0.5, 0.2\]: give a later end"),
        ({"save_at": [2.0]}, r"saved at \[2.0\]"),
        ({"save_at": []}, r"saved at \[\]"),
    ],
)
def test_mistakes_are_named(arguments, says):
    given = {"t1": 1.0, "dt0": 0.1, "n_paths": 2, **arguments}
    with pytest.raises(UserError, match=says):
        dynamics.simulate(KEY, geometric(), 1.0, **given)


def test_noise_of_a_wrong_shape_is_named():
    with pytest.raises(UserError, match=r"shapes \(2,\) where the state has \(3,\): give a tree"):
        dynamics.as_operator(jnp.ones(2), jnp.ones(3))
    with pytest.raises(UserError, match="give a tree like the state"):
        dynamics.as_operator({"a": 1.0}, {"b": jnp.ones(3)})


@needs_diffrax
def test_milstein_of_diffrax_has_its_second_moment():
    """dX = μX dt + sX dW: a step multiplies E X² by (1 + μh)² + s²h + s⁴h²/2."""
    mu, s, h, n = 0.1, 0.4, 0.125, 20_000
    x = compiled(
        sde=geometric(), x0=1.0, t1=1.0, dt0=h, n_paths=n, solver="ito_milstein", save_at=[0.5, 1]
    )
    assert x.shape == (n, 2)
    found = dynamics.weak_error(x, np.zeros((2, 2)), [lambda x: x**2])
    factor = (1 + mu * h) ** 2 + s**2 * h + s**4 * h**2 / 2
    exact = factor ** np.array([4, 8])
    assert (np.abs(found.error - exact) <= 4.5 * found.standard_error).all()


@needs_diffrax
def test_shark_of_diffrax_follows_an_ornstein_uhlenbeck_process():
    sde, h = dynamics.sgd_sde(lambda x: x, lambda x: {"a": 1.0}, 0.1), 0.1
    n, x0 = 20_000, {"a": jnp.array([1.0, -2.0])}
    x = compiled(sde=sde, x0=x0, t1=2.0, dt0=h, n_paths=n, solver="shark")["a"][:, 0]
    mean, variance = dynamics.ou_moments(1.0, 0.1, 2.0, np.array([1.0, -2.0]))
    x = np.asarray(x, np.float64)
    # Beside sampling errors, those of a solver of second order.
    assert (np.abs(x.mean(0) - mean) <= 4.5 * np.sqrt(variance / n) + h**2 * np.abs(mean)).all()
    assert (np.abs(x.var(0) / variance - 1) <= 4.5 * np.sqrt(2 / n) + h**2).all()


def test_a_state_in_bfloat16_moves():
    sde = dynamics.sgd_sde(lambda x: x, lambda x: 0.0, 0.1)
    x0 = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.float16(2.0)}
    found = dynamics.simulate(jax.random.key(0), sde_of_trees(), x0, 1.0, 1e-3, n_paths=2)
    assert (found["a"].dtype, found["b"].dtype) == (jnp.bfloat16, jnp.float16)
    np.testing.assert_allclose(found["a"].astype(np.float32), np.exp(-1), atol=2e-3)
    np.testing.assert_allclose(found["b"].astype(np.float32), 2 * np.exp(-1), atol=1e-3)
    one = dynamics.simulate(jax.random.key(0), sde, jnp.bfloat16(1), 1.0, 1e-3, n_paths=1)
    np.testing.assert_allclose(one.astype(np.float32), np.exp(-1), atol=2e-3)
    descent = optax.sgd(1e-3)
    chain = dynamics.run_optimizer(
        jax.random.key(0), descent, lambda x: x, lambda x: 0 * x, jnp.bfloat16(1), 1000, n_paths=1
    )
    assert chain.dtype == jnp.bfloat16
    np.testing.assert_allclose(chain.astype(np.float32), 0.999**1000, atol=2e-3)


def sde_of_trees():
    """dX = -X dt."""
    zeros = lambda x: jax.tree.map(jnp.zeros_like, x)  # noqa: E731
    return dynamics.sgd_sde(lambda x: x, zeros, 0.1)
