"""Rounds: when workers average, what they average, and that nothing depends on where they run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.dynamics import local as rounds
from jaxlm.sharding import make_mesh
from jaxlm.train.checkpoint import Checkpoints
from tests.helpers.sentences import refused

pytestmark = [pytest.mark.optimized, pytest.mark.default_flags]

WORKERS = 8


def cosine(peak, warmup, total, last=1e-6):
    """The learning rate of the published runs."""

    def rate(step):
        if step < warmup:
            return last + step * (peak - last) / warmup
        angle = (step - warmup) / (total - warmup) * math.pi
        return last + 0.5 * (peak - last) * (1 + math.cos(angle))

    return rate


def test_h_at_published_learning_rates():
    rates = [0.008, 0.006, 0.004, 0.002, 0.001, 5e-4, 1e-4]
    rule = rounds.qsr(0.0175, 4)
    assert [rule(0, rate) for rate in rates] == [4, 8, 19, 76, 306, 1225, 30625]
    assert rounds.qsr(0.0175, 4, 1.0)(0, 1e-4) == rounds.linear_h(0.0175, 4)(0, 1e-4) == 175
    assert rounds.qsr(0.0175, 4, total_steps=1000)(900, 1e-4) == 100
    assert rounds.qsr(0.0175, 4, total_steps=1000)(1000, 1e-4) == 1
    assert rounds.qsr(0.0175, 4, warmup_steps=10)(9, 1e-4) == 4
    assert rounds.qsr(0.0175, 4, warmup_steps=10, warmup_h=2)(9, 1e-4) == 2
    assert rounds.qsr(0.0175, 4, warmup_steps=10, warmup_h=2)(10, 0.008) == 4


VIT = (cosine(0.008, 10_000, 93_600), 93_600)
RESNET = (cosine(0.8, 5 * 312, 200 * 312), 200 * 312)


@pytest.mark.parametrize(
    ("schedule", "run", "percent"),
    [
        (rounds.qsr(0.0175, 8, warmup_steps=10_000), VIT, 6.90),
        pytest.param(rounds.constant_h(4), VIT, 25.00, marks=pytest.mark.slow),
        pytest.param(
            *(rounds.qsr(0.2, 2, warmup_steps=5 * 312), RESNET, 39.73), marks=pytest.mark.slow
        ),
        (rounds.qsr(0.25, 4, warmup_steps=5 * 312), RESNET, 20.09),
    ],
)
def test_communication_of_published_runs(schedule, run, percent):
    assert rounds.comm_fraction(schedule, *run) == pytest.approx(percent / 100, abs=0.5001e-4)


def test_rounds_of_a_published_run():
    steps = rounds.sync_steps(rounds.qsr(0.0175, 4, warmup_steps=10_000), *VIT)
    assert len(steps) == 9711
    assert steps[:2].tolist() == [4, 8]
    assert steps[-1] == 93_600
    assert np.diff(steps)[-5:].tolist() == [894, 1145, 1612, 2769, 8142]


def test_a_learning_rate_of_zero_ends_the_run_in_one_round():
    assert rounds.sync_steps(rounds.qsr(0.1, 2), lambda step: 0.0, 50).tolist() == [50]
    assert rounds.sync_steps(rounds.linear_h(0.1), lambda step: 1e-300, 50).tolist() == [50]


def local(inner, h=1, total=12, **options):
    rate = lambda step: 0.05  # noqa: E731
    return rounds.local_update(inner, rounds.constant_h(h), rate, total_steps=total, **options)


def loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] + params["b"] - y) ** 2)


def problem(steps=12):
    numbers = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(numbers.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"w": draw(5, 6) / 2, "v": draw(6) / 2, "b": jnp.zeros(())}
    x = draw(WORKERS, steps, 4, 5)
    return params, (x, jnp.sin(x.sum(-1)))


def trained(optimizer, mesh=None, steps=12):
    params, batches = problem(steps)
    workers = rounds.start_workers(optimizer, params, WORKERS, mesh=mesh)
    step = jax.value_and_grad(loss)
    run = jax.jit(lambda w, b: rounds.run_workers(optimizer, step, w, b, mesh=mesh))
    return run(workers, batches)


@pytest.mark.parametrize(
    "inner", [pytest.param(optax.sgd(0.05), marks=pytest.mark.slow), optax.sgd(0.05, 0.9)]
)
def test_averaging_at_every_step_is_data_parallel(inner):
    workers, losses = trained(local(inner))
    params, (x, y) = problem()
    joint = jnp.swapaxes(x, 0, 1).reshape(12, -1, 5), jnp.swapaxes(y, 0, 1).reshape(12, -1)

    @jax.jit
    def parallel(params):
        def step(carry, batch):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = inner.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, inner.init(params)), joint)

    (expected, _), values = parallel(params)
    for name in params:
        for own in workers.params[name]:
            np.testing.assert_allclose(own, expected[name], rtol=1e-6, atol=1e-6)
    assert not np.allclose(params["w"], expected["w"], atol=1e-2)
    np.testing.assert_allclose(losses.mean(0), values, rtol=1e-5)


@pytest.mark.multidevice
@pytest.mark.parametrize("average", [("params",), ("params", "state")])
def test_workers_on_one_device_and_on_eight_end_alike(average):
    """Twelve steps in rounds of five: the last one is cut, and none ends with the first call."""
    optimizer = local(optax.adam(0.05), h=5, average=average)
    assert optimizer.sync_steps.tolist() == [5, 10, 12]
    mesh = make_mesh(data=WORKERS)
    (one, losses), (eight, others) = trained(optimizer), trained(optimizer, mesh)
    assert len(eight.params["w"].sharding.device_set) == WORKERS
    assert one.state.step == eight.state.step == 12
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(losses, others, rtol=1e-5)
    mu = np.asarray(one.state.inner[0].mu["w"])
    assert np.array_equal(mu, np.broadcast_to(mu[0], mu.shape)) is ("state" in average)


@pytest.mark.multidevice
def test_workers_that_do_not_fit_the_mesh_are_refused():
    optimizer = local(optax.sgd(0.05))
    workers = rounds.start_workers(optimizer, {"w": jnp.zeros(2)}, 3)
    with refused("mesh", "3 workers", "got 2"):
        rounds.run_workers(optimizer, jax.value_and_grad(loss), workers, (), mesh=make_mesh(data=2))


def test_a_run_that_resumes_inside_a_round_ends_as_if_it_had_not_stopped(tmp_path):
    """Inside a round workers differ, and after it they do not."""
    optimizer = local(optax.sgd(0.05), h=5)
    params, (x, y) = problem()
    step = jax.value_and_grad(loss)
    run = jax.jit(lambda w, b: rounds.run_workers(optimizer, step, w, b))
    workers = rounds.start_workers(optimizer, params, WORKERS)
    checkpoints = Checkpoints(tmp_path)
    whole, _ = run(workers, (x, y))
    for part, differ in ((slice(0, 4), True), (slice(4, 5), False), (slice(5, 12), False)):
        workers, _ = run(workers, (x[:, part], y[:, part]))
        checkpoints.save(part.stop, workers, {})
        _, workers, _ = checkpoints.restore(workers)
        w = np.asarray(workers.params["w"])
        assert (np.ptp(w, axis=0) > 0).all() == differ
        if part.stop == 4:
            mean = w.mean(0)
        if part.stop == 5:
            assert not np.allclose(w[0], mean, atol=1e-4)  # a fifth step came before the average
    for a, b in zip(jax.tree.leaves(workers), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_longer_rounds_are_the_same_program():
    params, batches = problem()

    def text(h):
        optimizer = local(optax.sgd(0.05), h=h, total=800)
        workers = rounds.start_workers(optimizer, params, WORKERS)
        step = jax.value_and_grad(loss)
        return str(
            jax.make_jaxpr(lambda w, b: rounds.run_workers(optimizer, step, w, b))(workers, batches)
        )

    assert text(4) == text(400)


@pytest.mark.parametrize(("h", "expected"), [(1, 1 / 8), (400, 1.0)])
def test_long_rounds_make_the_drift_to_flat_minima_k_times_as_strong(h, expected):
    """L = (uv - 1 - ζ)²/2, ζ = ±s: D = u² - v² obeys d log D / dτ = -s² F/K in slow time."""
    eta, s, steps, seeds = 0.02, 0.5, 5000, 32
    optimizer = local(optax.sgd(eta), h=h, total=steps)
    step = jax.value_and_grad(lambda x, sign: (x[0] * x[1] - 1 - s * sign) ** 2 / 2)

    def run(key):
        signs = jax.random.rademacher(key, (WORKERS, steps), jnp.int8)
        workers = rounds.start_workers(optimizer, jnp.array([2.0, 0.5]), WORKERS)
        workers, _ = rounds.run_workers(optimizer, step, workers, signs.astype(jnp.float32))
        return workers.params[0]

    u, v = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(2), seeds)).T)
    rate = -np.log((u**2 - v**2) / 3.75).mean() / (s**2 * eta**2 * steps)
    assert rate == pytest.approx(expected, rel=0.1)
