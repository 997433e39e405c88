"""SVAG next to its equation: exact moments, maps of hyperparameters, models."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import dynamics
from jaxlm.dynamics import OptHParams
from tests.helpers.frameworks import equinox, linen, nnx, plain_dict, regression

POWERS = (1, 2, 4, 8, 16, 32, 64)
# Errors of mean and variance at time 2 for L = x^2 / 2, noise of variance 1, η = 0.5, x0 = 2.
ADDITIVE = (
    (1.46e-1, 8.66e-2),
    (7.04e-2, 3.74e-2),
    (3.45e-2, 1.75e-2),
    (1.71e-2, 8.49e-3),
    (8.50e-3, 4.18e-3),
    (4.24e-3, 2.08e-3),
    (2.12e-3, 1.03e-3),
)
TIME, START = 2.0, 2.0


def moments_of_a_step(loss_fn, eta):
    """E x' and E x'^2 of a step from 0 and from 1, for each l: over all signs of the noise."""
    signs = jnp.array(list(itertools.product([-1.0, 1.0], repeat=2)))[..., None]

    def step(method, x, halves):
        tx = optax.sgd(method.hparams(OptHParams(eta)).lr)
        _, grad = method.value_and_grad(loss_fn)(x, *halves)
        return optax.apply_updates(x, tx.update(grad, tx.init(x))[0])

    def moments(method, x):
        new = jax.vmap(lambda halves: step(method, x, halves))(signs)
        return jnp.stack([new.mean(), (new**2).mean()])

    methods = [dynamics.svag(l) for l in POWERS]
    found = jax.jit(
        lambda xs: jnp.stack([jnp.stack([moments(m, x) for x in xs]) for m in methods])
    )(jnp.array([0.0, 1.0]))
    return np.asarray(found)


def test_the_error_halves_with_each_doubling_of_l():
    eta = 0.5
    with jax.enable_x64(True):
        moments = moments_of_a_step(lambda x, z: x**2 / 2 + x * z.mean(), eta)
    errors = []
    for l, ((mean_of_0, added), (decay, square)) in zip(POWERS, moments, strict=True):
        assert abs(mean_of_0) < 1e-15
        np.testing.assert_allclose(square, decay**2 + added, rtol=1e-12)
        steps = round(l * TIME / eta)
        variance = added * (1 - decay ** (2 * steps)) / (1 - decay**2)
        exact = START * math.exp(-TIME), eta / 2 * (1 - math.exp(-2 * TIME))
        errors.append([abs(START * decay**steps - exact[0]), abs(variance - exact[1])])
    errors = np.array(errors)
    np.testing.assert_allclose(errors, ADDITIVE, rtol=6e-3)  # three digits
    ratios = errors[1:-1] / errors[2:]
    assert (ratios > 1.9).all()
    assert (ratios < 2.3).all()


def test_the_error_halves_where_noise_depends_on_x():
    eta, b = 0.25, 0.8
    with jax.enable_x64(True):
        moments = moments_of_a_step(lambda x, z: (1 + b * z.mean()) * x**2 / 2, eta)
    factors = moments[:, 1, 1]
    found = factors ** (np.array(POWERS) * TIME / eta)
    errors = np.abs(found - math.exp((-2 + eta * b**2) * TIME))
    slope = np.polyfit(np.log(POWERS[2:]), np.log(errors[2:]), 1)[0]
    assert abs(slope + 1) < 0.1


def test_coefficients_keep_the_mean_and_amplify_the_covariance():
    assert dynamics.svag_coefficients(1) == (1.0, 0.0)
    for amplification in (1, 1.5, 2, 16, 1024):
        first, second = dynamics.svag_coefficients(amplification)
        np.testing.assert_allclose(first + second, 1, rtol=1e-14)
        np.testing.assert_allclose(first**2 + second**2, amplification, rtol=1e-14)


# As of `jax.value_and_grad`, all leaves are arrays.
@pytest.mark.parametrize(
    "make",
    [plain_dict] + [pytest.param(make, marks=pytest.mark.slow) for make in (linen, nnx, equinox)],
)
def test_one_pass_is_the_weighted_sum_of_two_gradients(make):
    model = make()
    loss_fn, batch = regression(model)
    halves = dynamics.split_halves(batch)
    loss, grads = jax.jit(dynamics.svag(8).value_and_grad(loss_fn))(model.params, *halves)
    each = jax.jit(jax.value_and_grad(loss_fn))
    (loss_a, a), (loss_b, b) = (each(model.params, half) for half in halves)
    np.testing.assert_allclose(loss, (loss_a + loss_b) / 2, rtol=1e-6)
    c1, c2 = dynamics.svag_coefficients(8)
    jax.tree.map(
        lambda g, a, b: np.testing.assert_allclose(g, c1 * a + c2 * b, rtol=2e-5, atol=2e-6),
        grads,
        a,
        b,
    )


def test_halves_have_their_own_keys_and_auxiliary_values():
    def loss_fn(w, x, power, *, key, scale):
        drawn = jax.random.normal(key)
        return scale * jnp.mean(w * x**power) + w * drawn, {"drawn": drawn, "mean": x.mean()}

    fn = dynamics.svag_value_and_grad(loss_fn, 5, has_aux=True)
    a, b = jnp.array([1.0, 2.0]), jnp.array([3.0, 5.0])
    (loss, aux), grad = fn(2.0, a, b, 2, key=jax.random.key(0), scale=0.5)
    assert aux["mean"].tolist() == [1.5, 4.0]
    assert aux["drawn"][0] != aux["drawn"][1]
    slopes = 0.5 * np.array([2.5, 17.0]) + aux["drawn"]
    np.testing.assert_allclose(grad, 2 * slopes[0] - slopes[1], rtol=1e-6)
    np.testing.assert_allclose(loss, 2 * slopes.mean(), rtol=1e-6)


OPTIMIZERS = {
    "sgd": ("sgd", lambda hp: optax.sgd(hp.lr)),
    "sgdm": ("sgdm", lambda hp: dynamics.momentum.sgdm(hp.lr, hp.b1)),
    "adam": ("adaptive", lambda hp: optax.adam(hp.lr, hp.b1, hp.b2, hp.eps)),
    "adamw": (
        "adaptive",
        lambda hp: optax.adamw(hp.lr, hp.b1, hp.b2, hp.eps, weight_decay=hp.weight_decay),
    ),
    "rmsprop": ("adaptive", lambda hp: optax.rmsprop(hp.lr, hp.b2, hp.eps, eps_in_sqrt=False)),
    "lion": ("adaptive", lambda hp: optax.lion(hp.lr, hp.b1, hp.b2)),
}


@pytest.mark.parametrize(
    "name",
    ["sgdm", "adamw", "rmsprop"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", "adam", "lion")],
)
def test_with_l_of_1_it_is_the_optimizer_itself(name):
    kind, make = OPTIMIZERS[name]
    hp = OptHParams(0.1, b1=0.9, b2=0.99, eps=1e-3, weight_decay=0.1, steps=4)
    x = jax.random.normal(jax.random.key(0), (4, 2, 8, 3))

    def loss_fn(params, x):
        return jnp.mean((x @ params["w"] + params["b"] - 1) ** 2)

    def run(value_and_grad, hp):
        tx = make(hp)

        def step(carry, x):
            params, state = carry
            updates, state = tx.update(value_and_grad(params, x)[1], state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.float32(0.1)}
        return jax.lax.scan(step, (params, tx.init(params)), x)[0][0]

    method = dynamics.svag(1, kind)
    assert method.hparams(hp) == hp
    amplified = method.value_and_grad(loss_fn)
    plain = jax.value_and_grad(loss_fn)
    found, expected = jax.jit(
        lambda: (
            run(lambda params, x: amplified(params, x[0], x[1]), method.hparams(hp)),
            run(lambda params, x: plain(params, x[0]), hp),
        )
    )()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_adam_tends_to_its_equation():
    """All l see one Brownian path: halves are drawn so that their weighted sum is its increment."""
    runs, sigma = 4096, 2.0
    curvature = jnp.linspace(0.5, 1.5, 4)[:, None]
    hp = OptHParams(0.2, b1=0.2, b2=0.5, eps=1e-8, steps=12)  # far from the equation

    def loss_fn(x, z):
        return jnp.sum(curvature * x**2 / 2 + sigma * x * z)

    def final_loss(noise, l):
        method = dynamics.svag(l, "adaptive")
        own = method.hparams(hp)
        c1, c2 = dynamics.svag_coefficients(l**2)
        fn = method.value_and_grad(loss_fn)
        tx = optax.adam(own.lr, own.b1, own.b2, own.eps)

        def step(carry, z):
            x, state = carry
            path, other = z  # both of variance 1, so the halves are independent and have it too
            halves = (c1 * path + c2 * other) / l, (c2 * path - c1 * other) / l
            updates, state = tx.update(fn(x, *halves)[1], state)
            return (x + updates, state), None

        # The second part of the noise may be any: [effective steps, 16, 2, 4, runs].
        grouped = noise.reshape(own.steps, 16 // l**2, 2, 4, runs)
        increments = grouped.sum(1) / math.sqrt(16 // l**2)
        x = jnp.ones((4, runs))
        (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), (increments[:, 0], increments[:, 1]))
        return jnp.sum(curvature * x**2 / 2, 0)

    noise = jax.jit(lambda key: jax.random.normal(key, (192, 2, 4, runs)))(jax.random.key(0))
    losses = np.array(jax.jit(lambda noise: [final_loss(noise, l) for l in (1, 2, 4)])(noise))
    differences = np.diff(losses, axis=0)
    gaps = np.abs(differences.mean(1))
    error = 4.5 * np.linalg.norm(differences.std(1)) / math.sqrt(runs)
    assert gaps[1] + error < gaps[0]


def test_maps_of_hyperparameters():
    hp = OptHParams(
        0.8, b1=0.9, b2=0.99, eps=1e-6, weight_decay=0.1, steps=90, warmup=5, decay=(30, 60)
    )
    for kind in ("sgd", "sgdm"):
        method = dynamics.svag(4, kind)
        expected = OptHParams(0.2, 0.9, 0.99, 1e-6, 0.1, 360, 20, (120, 240))
        assert method.hparams(hp) == expected
        assert (method.amplification, method.steps_mult, method.lr_mult) == (4, 4, 0.25)
    method = dynamics.svag(4, "adaptive")
    found = method.hparams(hp)
    numbers = [found.lr, found.b1, found.b2, found.eps, found.weight_decay]
    np.testing.assert_allclose(numbers, [0.2, 1 - 0.1 / 16, 1 - 0.01 / 16, 4e-6, 0.025], rtol=1e-14)
    assert (found.steps, found.warmup, found.decay) == (1440, 80, (480, 960))
    assert (method.amplification, method.steps_mult) == (16, 16)


@pytest.mark.parametrize(
    ("l", "kind", "each"), [(4, "sgd", 4), (3, "adaptive", 9), (1, "sgdm", 1), (1.5, "sgd", 1.5)]
)
def test_a_schedule_over_effective_steps(l, kind, each):
    wrapped = dynamics.svag(l, kind).wrap_schedule(lambda step: 0.5 + step)
    steps = np.arange(40)
    expected = (0.5 + np.floor(steps / each)) / l
    np.testing.assert_allclose(jax.vmap(wrapped)(jnp.asarray(steps)), expected, rtol=1e-6)
    np.testing.assert_allclose([float(wrapped(k)) for k in range(6)], expected[:6], rtol=1e-6)


def test_a_stretched_step_is_exact_where_float32_is_not():
    step = jnp.int32(7 * (2**24 + 1))
    assert dynamics.svag(7).wrap_schedule(lambda step: step % 2)(step) > 0
