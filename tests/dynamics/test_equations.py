"""Equations and their solvers against optimizers, closed forms and exact moments."""

import functools
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from jaxlm.dynamics import run_optimizer, sgd_sde, simulate
from jaxlm.dynamics.sde import (
    SDE,
    AdamState,
    AdaptiveConstants,
    MomentumState,
    NoiseOperator,
    RMSpropState,
    adam_sde,
    example_noise,
    local_drift_factor,
    local_sgd_sde,
    rmsprop_sde,
    sgdm_sde,
)
from jaxlm.dynamics.simulation import is_additive, ou_moments, weak_error
from tests.helpers.sentences import refused

KEY = jax.random.key(11)
MATRIX = jnp.array([[1.0, 0.0], [0.5, 2.0], [0.0, -1.0]])
needs_diffrax = pytest.mark.skipif(
    importlib.util.find_spec("diffrax") is None, reason="needs diffrax: pip install 'jaxlm[sde]'"
)


def run(function=simulate, **static):
    """A compiled `simulate` or `run_optimizer`."""
    return jax.jit(functools.partial(function, **static))(KEY)


def assert_moments(x, mean, variance, slack=0.0):
    """Of normal numbers, within 4.5 standard errors."""
    x = np.asarray(x, np.float64)
    n = len(x)
    assert (np.abs(x.mean(0) - mean) <= 4.5 * np.sqrt(variance / n) + slack).all()
    assert (np.abs(x.var(0) - variance) <= 4.5 * variance * np.sqrt(2 / n) + slack).all()


# Every equation is the mean of one step of its optimizer, and its noise.

THETA = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
ROOT = {"a": jnp.array([0.4, 1.2]), "b": jnp.array(0.9)}
COV = jax.tree.map(jnp.square, ROOT)
M, U = jax.tree.map(lambda x: 0.3 * x, THETA), jax.tree.map(lambda s: 0.8 * s, COV)
ETA = 1e-2


def gradient(x):
    return jax.tree.map(lambda leaf: 3 * leaf, x)


def combine(a, x, b, y):
    return jax.tree.map(lambda x, y: a * x + b * y, x, y)


def lagged_rms(eta, decay, eps, first):
    """RMSprop as the theory has it: a step divides by the v from before its gradient."""

    def init(params):
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, first), params)

    def update(grads, v, params=None):
        del params
        updates = jax.tree.map(lambda g, v: -eta * g / (jnp.sqrt(v) + eps), grads, v)
        return updates, jax.tree.map(lambda g, v: decay * v + (1 - decay) * g**2, grads, v)

    return optax.GradientTransformation(init, update)


def sgd_case():
    sde = sgd_sde(gradient, lambda x: ROOT, ETA)
    return sde, THETA, 1.0, lambda g: combine(1, THETA, -ETA, g), (1e-4,)


def sgdm_case():
    beta = 1 - ETA
    sde = sgdm_sde(gradient, lambda x: ROOT, ETA, beta)

    def step(g):
        m = combine(beta, M, 1 - beta, g)
        return MomentumState(combine(1, THETA, -ETA, m), m)

    return sde, MomentumState(THETA, M), 1.0, step, (0.1, 1e-4)  # θ moves by the m of after


def rmsprop_case():
    c = AdaptiveConstants(eta=ETA, sigma0=0.7, eps0=0.2, c2=2.0)
    sde = rmsprop_sde(gradient, lambda x: COV, lambda x: ROOT, c)

    def step(g):
        v = jax.tree.map(lambda u: c.sigma**2 * u, U)
        updates, v = lagged_rms(c.eta, c.b2, c.eps, None).update(g, v)
        return RMSpropState(
            combine(1, THETA, 1, updates), jax.tree.map(lambda v: v / c.sigma**2, v)
        )

    return sde, RMSpropState(THETA, U), c.sigma, step, (1e-3, 0.1)


def adam_case():
    c = AdaptiveConstants(eta=ETA, sigma0=0.7, eps0=0.2, c2=2.0, c1=5.0)
    sde = adam_sde(gradient, lambda x: COV, lambda x: ROOT, c)
    adam = optax.scale_by_adam(c.b1, c.b2, c.eps)

    def step(g):
        v = jax.tree.map(lambda u: c.sigma**2 * u, U)
        updates, after = adam.update(g, optax.ScaleByAdamState(jnp.int32(STEP - 1), M, v))
        u = jax.tree.map(lambda v: v / c.sigma**2, after.nu)
        return AdamState(combine(1, THETA, -c.eta, updates), after.mu, u)

    return sde, AdamState(THETA, M, U), c.sigma, step, (0.02, 0.002, 0.1)


STEP = 2_000
CASES = {"sgd": sgd_case, "sgdm": sgdm_case, "rmsprop": rmsprop_case, "adam": adam_case}


@pytest.mark.parametrize("name", CASES)
def test_an_equation_is_the_mean_of_one_step_and_its_noise(name):
    """At any state, up to η and the squares of gradients beside those of noise."""
    sde, state, sigma, step, rtol = CASES[name]()
    time = sde.time_per_step
    up, down = (step(combine(1.0, gradient(THETA), sign * sigma, ROOT)) for sign in (1, -1))
    drift = sde.drift(STEP * time, state)
    kick = sde.diffusion(STEP * time, state).mv(jax.tree.map(jnp.ones_like, THETA))
    mean = jax.tree.map(lambda a, b, x: ((a + b) / 2 - x) / time, up, down, state)
    half = jax.tree.map(lambda a, b: (a - b) / 2 / time**0.5, up, down)
    parts = (mean, drift, half, kick) if len(rtol) > 1 else ([mean], [drift], [half], [kick])
    for found, expected, moved, noise, tolerance in zip(*parts, rtol, strict=True):
        for leaf in THETA:
            np.testing.assert_allclose(found[leaf], expected[leaf], rtol=tolerance)
            # The sign of noise is free; what has none in the equation has little in a step.
            a, b = np.abs(moved[leaf]), np.abs(noise[leaf])
            assert (np.abs(a - b) <= np.where(b == 0, 5e-3, 0.002 * b)).all(), (a, b)


# Laws of equations, in closed form or beside their optimizers.


def test_rmsprop_goes_to_its_equation_with_the_square_of_eta():
    """With Σ = 1 and u = 1 the equation is an Ornstein-Uhlenbeck process."""
    end, widths = 0.96, (0.4, 0.2)
    first = AdaptiveConstants(eta=0.4, sigma0=1.0, eps0=0.1, c2=2.0)
    mean, variance = ou_moments(1 / 1.1, (1.0 / 1.1) ** 2, end, 1.0)
    errors = []
    for eta in widths:
        c = first.at(eta)
        x = run(
            run_optimizer,
            optimizer=lagged_rms(eta, c.b2, c.eps, c.sigma**2),
            grad=lambda x: x,
            sqrt_cov=lambda x: 1.0,
            x0=1.0,
            steps=round(end / eta**2),
            sigma=c.sigma,
            n_paths=400_000,
        )
        centred = [lambda x: x, lambda x: (x - float(mean)) ** 2]
        errors.append(weak_error(x[:, 0], [mean, variance], centred).error)
    for moment in np.transpose(errors):
        assert 1.5 <= np.polyfit(np.log(widths), np.log(moment), 1)[0] <= 2.5


def test_the_equation_of_rmsprop_is_that_process():
    c = AdaptiveConstants(eta=0.1, sigma0=1.0, eps0=0.1, c2=2.0)
    sde = rmsprop_sde(lambda x: x, lambda x: 1.0, lambda x: 1.0, c)
    assert sde.time_per_step == pytest.approx(0.01)
    state = sde.init(jnp.ones(()))
    x = run(sde=sde, x0=state, t1=1.0, dt0=0.02, n_paths=40_000)
    np.testing.assert_allclose(x.u, 1.0, rtol=1e-6)
    # Euler's own moments in 50 steps.
    r, n = 1 - 0.02 / 1.1, 50
    mean, variance = r**n, 0.02 / 1.1**2 * (1 - r ** (2 * n)) / (1 - r**2)
    assert_moments(x.params[:, 0], mean, variance)


def test_adam_follows_its_equation():
    c = AdaptiveConstants(eta=0.05, sigma0=1.0, eps0=0.1, c2=2.0, c1=20.0)
    sde = adam_sde(lambda x: x, lambda x: 1.0, lambda x: 1.0, c)
    assert sde.t0 == sde.time_per_step == pytest.approx(0.0025)
    n = 20_000
    x = run(sde=sde, x0=sde.init(jnp.ones(())), t1=1.0, dt0=0.01, n_paths=n).params
    y = run(
        run_optimizer,
        optimizer=optax.adam(0.05, c.b1, c.b2, c.eps),
        grad=lambda x: x,
        sqrt_cov=lambda x: 1.0,
        x0=1.0,
        steps=400,
        sigma=c.sigma,
        n_paths=n,
    )
    mean = float(np.mean(y))
    found = weak_error(x, y, [lambda x: x, lambda x: (x - mean) ** 2])
    assert (found.error <= 4 * found.standard_error + 0.02).all()
    assert (found.standard_error < 0.01).all()
    # Both have moved far from where they began.
    assert mean < 0.5
    assert np.var(y) > 0.3


def test_constants_are_the_optimizers():
    c = AdaptiveConstants.of(0.05, sigma=20, b1=0.95, b2=0.995, eps=2)
    np.testing.assert_allclose([*c], [0.05, 1.0, 0.1, 2.0, 20.0], rtol=1e-6)
    half = c.at(0.025)
    np.testing.assert_allclose(
        [half.sigma, half.b1, half.b2, half.eps], [40, 0.9875, 0.99875, 4], rtol=1e-6
    )


def test_momentum_has_the_stationary_law_of_its_optimizer():
    """Linear, so that both covariances solve equations: none is sampled."""
    a, s, eta, beta = 1.0, 0.7, 0.01, 0.95
    sde = sgdm_sde(lambda x: a * x, lambda x: s, eta, beta)
    zero = MomentumState(jnp.zeros(()), jnp.zeros(()))
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
    found = local_drift_factor(workers, h, eta, curvature)
    np.testing.assert_allclose(found, drift_by_covariances(workers, h, eta, curvature), rtol=1e-6)


def test_the_drift_factor_of_a_simulated_problem():
    """-(d log D / dτ)/s² of a label-noise problem with K = 8 and η = .02, by other code."""
    measured = {1: 0.130, 20: 0.735, 50: 0.907, 400: 1.020}
    for h, rate in measured.items():
        assert local_drift_factor(8, h, 0.02, 4.25) / 8 == pytest.approx(rate, rel=0.05)
    sde = local_sgd_sde(lambda x: -x, lambda x: 0.5, 0.1, factor=8.0)
    assert sde.drift(0.0, jnp.float32(2.0)) == -16
    assert sde.time_per_step == pytest.approx(0.01)
    assert sde.diffusion(0.0, jnp.float32(2.0)) == 0.5


# Solvers, by exact moments of their own steps.


def geometric():
    return SDE(lambda t, x: 0.1 * x, lambda t, x: 0.4 * x, 1.0)


def sgd_with_growing_noise():
    """dX = -aX dt + sqrt(η) b X dW."""
    return sgd_sde(lambda x: x, lambda x: 0.8 * x, 0.5)


SOLVERS = {
    # (equation, x0, step, saved, factor of E X² in a step)
    "euler": (sgd_with_growing_noise, 2.0, 0.1, [0.0, 0.5, 1.0], 0.9**2 + 0.1 * 0.5 * 0.8**2),
    "ito_milstein": (
        *(geometric, 1.0, 0.125, [0.5, 1.0]),
        (1 + 0.1 * 0.125) ** 2 + 0.4**2 * 0.125 + 0.4**4 * 0.125**2 / 2,
    ),
}


@pytest.mark.parametrize("exact", [list, tuple, np.array])
def test_exact_values_are_any_sequence(exact):
    x = np.arange(12.0).reshape(6, 2)
    found = weak_error(x, exact([1.0, 2.0]), [lambda x: x[0], lambda x: x[1]])
    np.testing.assert_allclose(found.error, [4.0, 4.0])


@pytest.mark.parametrize("solver", ["euler", pytest.param("ito_milstein", marks=needs_diffrax)])
def test_noise_that_grows_with_x_has_its_second_moment(solver):
    make, x0, h, saved, factor = SOLVERS[solver]
    n = 100_000 if solver == "euler" else 20_000
    x = run(sde=make(), x0=x0, t1=1.0, dt0=h, n_paths=n, solver=solver, save_at=saved)
    assert x.shape == (n, len(saved))
    exact = x0**2 * factor ** np.round(np.array(saved) / h)
    found = weak_error(x, np.zeros((2, len(saved))), [lambda x: x**2])
    assert (np.abs(found.error - exact) <= 4.5 * found.standard_error + 1e-5).all()
    if solver == "euler":
        # Euler is within its own error of the equation: h times half the square of the exponent.
        exponent = -2 + 0.5 * 0.8**2
        np.testing.assert_allclose(
            exact, 4 * np.exp(exponent * np.array(saved)), rtol=0.1 * exponent**2 / 2
        )


@needs_diffrax
def test_shark_of_diffrax_follows_an_ornstein_uhlenbeck_process():
    sde, h = sgd_sde(lambda x: x, lambda x: {"a": 1.0}, 0.1), 0.1
    n, x0 = 20_000, {"a": jnp.array([1.0, -2.0])}
    x = run(sde=sde, x0=x0, t1=2.0, dt0=h, n_paths=n, solver="shark")["a"][:, 0]
    mean, variance = ou_moments(1.0, 0.1, 2.0, np.array([1.0, -2.0]))
    x = np.asarray(x, np.float64)
    # Beside sampling errors, those of a solver of second order.
    assert (np.abs(x.mean(0) - mean) <= 4.5 * np.sqrt(variance / n) + h**2 * np.abs(mean)).all()
    assert (np.abs(x.var(0) / variance - 1) <= 4.5 * np.sqrt(2 / n) + h**2).all()


@pytest.mark.parametrize("solver", ["heun", "euler_heun", "shark", "sra1", "sea"])
def test_a_stratonovich_solver_is_refused_where_noise_depends_on_the_state(solver):
    with refused("solver", "Stratonovich"):
        simulate(KEY, geometric(), 1.0, 1.0, 0.1, n_paths=2, solver=solver)


def test_a_missing_extra_names_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with refused("solver", "pip install 'jaxlm[sde]'"):
        simulate(KEY, geometric(), 1.0, 1.0, 0.1, n_paths=2, solver="ito_milstein")


def scale(x):
    return 0.5 * x


@pytest.mark.parametrize(
    ("diffusion", "additive"),
    [
        (lambda x: jnp.full_like(x, 0.3), True),
        (jax.jit(lambda x: jnp.ones_like(x)), True),
        (lambda x: MATRIX, True),
        (scale, False),
        (jax.jit(scale), False),
        (lambda x: MATRIX * x[0], False),
    ],
)
def test_noise_that_depends_on_the_state_is_told_apart(diffusion, additive):
    assert is_additive(lambda t, x: diffusion(x), 0.0, jnp.zeros(3)) is additive


def test_adam_with_constant_covariance_is_additive_and_with_another_is_not():
    c = AdaptiveConstants(eta=0.1, sigma0=1.0, eps0=0.1, c2=2.0, c1=5.0)
    for root, additive in ((jnp.ones_like, True), (scale, False)):
        sde = adam_sde(lambda x: x, jnp.square, root, c)
        assert is_additive(sde.diffusion, sde.t0, sde.init(jnp.ones(2))) is additive


# Paths: shapes, times, and noise in every form.


def brownian(noise):
    return SDE(lambda t, x: jax.tree.map(jnp.zeros_like, x), lambda t, x: noise, 1.0)


def test_a_diagonal_a_matrix_and_an_operator_are_one_noise():
    diagonal = jnp.array([1.0, 2.0, 3.0])
    white = jax.ShapeDtypeStruct((3,), jnp.float32)
    forms = [diagonal, jnp.diag(diagonal), NoiseOperator(lambda z: diagonal * z, white)]
    simulated = functools.partial(simulate, x0=jnp.zeros(3), t1=1.0, dt0=0.25, n_paths=4)
    paths = jax.jit(lambda key: [simulated(key, brownian(form)) for form in forms])(KEY)
    for other in paths[1:]:
        np.testing.assert_allclose(other, paths[0], rtol=1e-5)
    assert np.unique(paths[0]).size == 12


def test_noise_has_the_covariance_of_its_matrix():
    n, t1 = 50_000, 2.0
    x = run(sde=brownian(MATRIX), x0=jnp.ones(3), t1=t1, dt0=0.5, n_paths=n)[:, 0]
    x = np.asarray(x, np.float64) - 1
    expected = t1 * np.asarray(MATRIX @ MATRIX.T, np.float64)
    spread = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / n)
    assert (np.abs(x.T @ x / n - expected) <= 4.5 * spread).all()
    assert (np.abs(x.mean(0)) <= 4.5 * np.sqrt(np.diag(expected) / n)).all()


def test_paths_have_the_shape_of_the_state_and_do_not_depend_on_their_number():
    x0 = {"w": jnp.ones((2, 3)), "layers": {"b": jnp.zeros(4)}, "c": 1.0}
    sde = sgd_sde(lambda x: x, lambda x: jax.tree.map(lambda leaf: 0.3, x), 0.1)
    paths = functools.partial(run, sde=sde, x0=x0, t1=1.0, dt0=0.3, save_at=[0.0, 0.7, 1.0])
    few, many = paths(n_paths=3), paths(n_paths=5)
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
    """x' = t, from t0, in Euler's steps; two intervals of unequal steps."""
    sde = SDE(lambda t, x: t, lambda t, x: 0.0, 1.0, t0=0.5)
    x = run(sde=sde, x0=0.0, t1=2.0, dt0=0.2, n_paths=2, save_at=[1.0, 2.0])
    first = (0.5 / 3) * (3 * 0.5 + (0.5 / 3) * 3)  # three steps of 1/6
    second = 0.2 * (5 * 1.0 + 0.2 * 10)  # five of 1/5
    np.testing.assert_allclose(x, [[first, first + second]] * 2, rtol=1e-6)


def test_an_optimizer_without_noise_is_that_optimizer():
    tx, x = optax.adam(0.1), jnp.array([1.0, -2.0])
    paths = jax.jit(
        lambda key: run_optimizer(
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
    noise = example_noise(losses, x, batch_size)
    assert noise.in_structure().shape == (5,)
    columns = jax.jit(jax.vmap(noise.mv))(jnp.eye(5))
    root = np.concatenate([columns["w"], columns["b"][:, None]], 1).T
    rows = jax.jacrev(losses)(x)
    g = np.concatenate([rows["w"], rows["b"][:, None]], 1)
    expected = np.cov(g.T, bias=True) / batch_size
    np.testing.assert_allclose(root @ root.T, expected, rtol=1e-4, atol=1e-6)


def test_many_parameters_need_no_matrix():
    n = 300
    x0 = {"w": jnp.full((n, n), 1e-3), "b": jnp.zeros(n)}
    data = jax.random.normal(jax.random.key(1), (4, n))

    def losses(x):
        return jnp.mean((data @ x["w"] + x["b"][None] - 1) ** 2, axis=1)

    sde = sgd_sde(jax.grad(lambda x: losses(x).mean()), lambda x: example_noise(losses, x, 1), 0.1)
    program = jax.jit(lambda x0: simulate(KEY, sde, x0, 0.2, 0.1, n_paths=2)).lower(x0).compile()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 20 * 4 * n * (n + 1) * 2
    paths = program(x0)
    assert paths["w"].shape == (2, 1, n, n)
    assert np.isfinite(paths["w"]).all()
    assert not np.array_equal(paths["w"][0], paths["w"][1])


def test_a_state_in_bfloat16_moves():
    """dX = -X dt."""
    sde = sgd_sde(lambda x: x, lambda x: jax.tree.map(jnp.zeros_like, x), 0.1)
    x0 = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.float16(2.0)}

    @jax.jit
    def both(key):
        chain = (optax.sgd(1e-3), lambda x: x, lambda x: 0 * x, jnp.bfloat16(1), 1000)
        return simulate(key, sde, x0, 1.0, 1e-3, n_paths=2), run_optimizer(key, *chain, n_paths=1)

    found, chain = both(KEY)
    assert (found["a"].dtype, found["b"].dtype) == (jnp.bfloat16, jnp.float16)
    np.testing.assert_allclose(found["a"].astype(np.float32), np.exp(-1), atol=2e-3)
    np.testing.assert_allclose(found["b"].astype(np.float32), 2 * np.exp(-1), atol=1e-3)
    assert chain.dtype == jnp.bfloat16
    np.testing.assert_allclose(chain.astype(np.float32), 0.999**1000, atol=2e-3)


def test_errors_of_means():
    x, y = jnp.array([0.0, 2.0, 4.0]), jnp.array([1.0, 1.0])
    found = weak_error(x, y, [lambda x: x, lambda x: x**2])
    np.testing.assert_allclose(found.error, [1, 20 / 3 - 1], rtol=1e-6)
    np.testing.assert_allclose(found.standard_error[0], np.sqrt(4 / 3), rtol=1e-6)
