"""The key `dynamics` of a run, against loops written out and against runs without it."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import dynamics as theory
from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.train.dynamics import Local, Noise, Svag, method_and_batches
from jaxlm.train.first_order import Adam, Muon, Sgd
from jaxlm.train.load import load_model
from jaxlm.train.loop import LoopConfig, fit
from jaxlm.train.zeroth_order import Mezo
from tests.helpers.tiny import write_run

STEPS, SIZE = 5, 8


def loss_fn(params, batch, *, key=None, view=None):
    residual = batch["x"] @ params["w"] + params["bias"] - batch["y"]
    loss = jnp.mean(residual**2)
    return loss, {"largest": jnp.max(jnp.abs(residual))}


def params():
    return {"w": jnp.array([0.5, -1.0, 2.0]), "bias": jnp.zeros(())}


def source(batch_size, seeds):
    """A stream for each seed, whose step is a function of both."""

    def batches(first, count):
        def rows(step, seed):
            numbers = np.random.default_rng([seed, step])
            x = numbers.standard_normal((batch_size, 3)).astype(np.float32)
            return {"x": x, "y": numbers.standard_normal(batch_size).astype(np.float32)}

        steps = [[rows(step, seed) for seed in seeds] for step in range(first, first + count)]
        return {key: np.array([[each[key] for each in row] for row in steps]) for key in "xy"}

    return batches


def run(optimizer, dynamics=None, *, steps=STEPS, log_every=STEPS):
    method, batches = method_and_batches(
        optimizer, dynamics, loss_fn, source, steps=steps, batch_size=SIZE, seed=3
    )
    config = LoopConfig(steps=steps, log_every=log_every)
    return fit(method, params(), batches, config, key=jax.random.key(0))


def close(found, expected, rtol=2e-6):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-7)


SGD = Sgd(learning_rate=0.05, momentum=0.8, schedule="linear", warmup=2, weight_decay=0.1)
ADAM = Adam(learning_rate=0.05, b1=0.8, b2=0.9, eps=1e-2, weight_decay=0.1)


@pytest.mark.parametrize(
    ("optimizer", "pairing"), [(SGD, "independent"), (ADAM, "consecutive")], ids=["sgd", "adam"]
)
def test_svag_is_the_optimizer_on_weighted_pairs_of_batches(optimizer, pairing):
    """Against optax with the hyperparameters of the paper's table, written out."""
    l = 2
    found = run(optimizer, Svag(l=l, pairing=pairing), log_every=2)
    adaptive = optimizer is ADAM
    updates = l**2 if adaptive else l
    plus, minus = theory.svag_coefficients(updates)
    if adaptive:
        inner = optax.scale_by_adam(1 - 0.2 / l**2, 1 - 0.1 / l**2, eps=1e-2 * l)
        decay, rate = 0.1 / l, lambda step: 0.05 / l
    else:
        inner, decay = optax.trace(0.8), 0.1
        rise, fall = updates * 2, updates * (STEPS - 2)

        def rate(step):
            return 0.05 / l * (step / rise if step < rise else 1 - (step - rise) / fall)

    def pairs(step):
        """Leaves [updates, 2, B, ...]."""
        if pairing == "consecutive":
            both = source(2 * updates * SIZE, (3,))(step, 1)
            return jax.tree.map(lambda x: x.reshape(updates, 2, SIZE, *x.shape[3:]), both)
        halves = [source(updates * SIZE, (seed,))(step, 1) for seed in (3, 3 + 2**64)]
        return jax.tree.map(
            lambda *x: np.stack([each.reshape(updates, SIZE, *each.shape[3:]) for each in x], 1),
            *halves,
        )

    @jax.jit
    def update(now, own, pair, eta):
        a, b = (
            jax.grad(lambda p: loss_fn(p, jax.tree.map(lambda x: x[i], pair))[0])(now)  # noqa: B023
            for i in (0, 1)
        )
        g = jax.tree.map(lambda a, b: plus * a + minus * b, a, b)
        direction, own = inner.update(g, own, now)
        decayed = {"w": decay * now["w"], "bias": 0.0}
        return jax.tree.map(lambda p, d, w: p - eta * (d + w), now, direction, decayed), own

    own, now = inner.init(params()), params()
    for step in range(STEPS):
        for place in range(updates):
            pair = jax.tree.map(lambda x: x[place], pairs(step))  # noqa: B023
            now, own = update(now, own, pair, rate(step * updates + place))
    close(found.state.params, now, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_svag_of_one_is_the_run_itself(optimizer):
    plain, one = run(optimizer), run(optimizer, Svag(l=1))
    close(one.state.params, plain.state.params)
    assert len(one.infos) == STEPS


def test_noise_leaves_the_run_and_tells_G_and_N():
    plain, measured = run(ADAM), run(ADAM, Noise(parts=4))
    close(measured.state.params, plain.state.params, rtol=1e-5)
    first = source(SIZE, (3,))(0, 1)
    parts = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[3:]), first)
    grads = jax.vmap(jax.grad(lambda p, b: loss_fn(p, b)[0]), (None, 0))(params(), parts)
    stats = theory.noise.grad_noise_stats(grads)
    info = measured.infos[0]
    assert info["grad_square"] == pytest.approx(float(stats.G), rel=1e-5)
    assert info["grad_noise"] == pytest.approx(float(stats.N) / 4, rel=1e-5)
    report = Noise(parts=4).report(ADAM, STEPS, measured.state.opt_state)["gradient_noise"]
    assert report["ratio"] == pytest.approx(report["N"] / report["G"])
    assert report["G"] == pytest.approx(measured.infos[-1]["grad_square"])


@pytest.mark.parametrize("on", ["one device", "a device each"])
@pytest.mark.multidevice
def test_workers_that_average_always_are_the_run_on_the_joint_batch(on, monkeypatch):
    plain = run(SGD)
    if on == "one device":
        one = jax.devices()[:1]
        monkeypatch.setattr(jax, "devices", lambda *args: one)
    local = run(SGD, Local(workers=4, rule="constant", h=1))
    close(local.state.params, plain.state.params)
    spread = jax.tree.leaves(local.state.opt_state.params)[0].sharding
    assert len(spread.device_set) == (1 if on == "one device" else 4)


def test_workers_step_apart_and_the_model_is_their_last_average():
    """SGD of two workers with H = 3 in five steps, written out."""
    sgd = Sgd(learning_rate=0.05)
    found = run(sgd, Local(workers=2, rule="constant", h=3), log_every=2)
    grad = jax.grad(lambda p, b: loss_fn(p, b)[0])
    workers, averages = [params(), params()], []
    for step in range(STEPS):
        batch = jax.tree.map(lambda x: x[0, 0], source(SIZE, (3,))(step, 1))
        for i, each in enumerate(workers):
            part = jax.tree.map(lambda x, i=i: x[i * SIZE // 2 : (i + 1) * SIZE // 2], batch)
            workers[i] = jax.tree.map(lambda p, g: p - 0.05 * g, each, grad(each, part))
        if step in (2, 4):
            mean = jax.tree.map(lambda a, b: (a + b) / 2, *workers)
            workers, averages = [mean, mean], [*averages, mean]
    close(found.state.params, averages[-1])
    report = Local(workers=2, h=3).report(sgd, 5, None)
    assert report == {"averages": 2, "communication": 0.4}


def test_the_quadratic_rule_in_a_run():
    """H of the paper's schedule, (α/η)², from the run's own learning rate."""
    adam = Adam(learning_rate=0.008, schedule="linear")
    local = Local(workers=2, rule="qsr", h=4, alpha=0.0175)
    steps = 100
    ends, step = [], 0
    while step < steps:
        step = min(steps, step + max(4, int((0.0175 / (0.008 * (1 - step / steps))) ** 2)))
        ends.append(step)
    assert local.report(adam, steps, None)["averages"] == len(ends)


def test_h_in_warm_up_is_that_of_the_rule_at_the_peak():
    """0.03 / 0.003 is 10, and less in float32."""
    adam = Adam(learning_rate=3e-3, warmup=100)
    local = Local(workers=2, rule="linear", h=1, alpha=3e-2)
    assert local.report(adam, 1000, None)["averages"] == 100


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_rates_on_the_host_are_those_of_optax(schedule, warmup):
    sgd = Sgd(learning_rate=0.1, schedule=schedule, warmup=warmup)
    rate = sgd.rate(10)
    expected = [rate(step) if callable(rate) else rate for step in range(10)]
    np.testing.assert_allclose(sgd.rates(10), expected, rtol=1e-6, atol=1e-8)


def test_the_two_streams_of_svag_are_different_orders():
    from jaxlm.data.rows import _permutation
    from jaxlm.train.dynamics import SECOND_STREAM

    orders = {
        tuple(_permutation(seed, epoch, 50))
        for seed in (0, 1, 7, SECOND_STREAM, 1 + SECOND_STREAM, 7 + SECOND_STREAM)
        for epoch in range(4)
    }
    assert len(orders) == 6 * 4


@pytest.mark.multidevice
def test_workers_train_what_is_selected():
    sgd = Sgd(learning_rate=0.05, select="w")
    found, plain = run(sgd, Local(workers=4, h=1)), run(sgd)
    close(found.state.params, plain.state.params)
    assert float(found.state.params["bias"]) == 0
    assert found.infos[0].keys() == plain.infos[0].keys()


@pytest.mark.parametrize(
    ("optimizer", "dynamics", "message"),
    [
        (Mezo(), Svag(l=2), "dynamics: svag needs gradients, .* .got mezo.. Give sgd or"),
        (Muon(), Svag(l=2), "optimizer.name: no scaling rule is known for it .got muon.. Give sgd"),
        (
            Adam(clip=1.0),
            Svag(l=2),
            "optimizer.clip: acts more .* .got 1.0.. Leave",
        ),
        (SGD, Noise(parts=3), "dynamics.parts: must divide the batch size, 8 .got 3."),
        (SGD, Local(workers=3), "dynamics.workers: must divide the batch size, 8 .got 3."),
    ],
)
def test_what_cannot_be_is_refused(optimizer, dynamics, message):
    with pytest.raises(UserError, match=message):
        dynamics.check(optimizer, SIZE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Svag(l=0), "dynamics.l: must be from 1 to .* .got 0."),
        (lambda: Noise(parts=1), "dynamics.parts: must be from 2 to .* .got 1."),
        (lambda: Local(workers=1), "dynamics.workers: must be from 2 to .* .got 1."),
        (lambda: Local(h=0), "dynamics.h: must be from 1 to .* .got 0."),
        (lambda: Local(alpha=0.1), "dynamics.alpha: is not used by the rule constant .got 0.1"),
        (lambda: Local(rule="qsr"), "dynamics.alpha: must be above 0 for the rule qsr .got None"),
        (
            lambda: Local(rule="qsr", alpha=0.0),
            "dynamics.alpha: must be above 0 for .* .got 0.0",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_scaling_rules_carry_a_whole_optimizer():
    """The square-root rule on Adam, the linear rule on SGD with a sum of gradients."""
    root = ADAM.with_hparams(theory.scale_rule("sqrt", 2, ADAM.hparams(10)))
    found, first = dataclasses.asdict(root), dataclasses.asdict(ADAM)
    assert found.pop("groups") == first.pop("groups") == ()  # no number for approx
    assert found == pytest.approx(
        first
        | {"learning_rate": 0.05 * 2**0.5, "b1": 0.6, "b2": 0.8, "eps": 1e-2 / 2**0.5}
        | {"weight_decay": 0.1 * 2**0.5}
    )
    linear = SGD.with_hparams(theory.scale_rule("linear", 2, SGD.hparams(10)))
    assert linear.learning_rate == pytest.approx(0.1)
    assert (linear.momentum, linear.warmup) == (0.8, 1)
    assert linear.weight_decay == pytest.approx(0.1)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("svag", marks=pytest.mark.slow),
        pytest.param("noise", marks=pytest.mark.slow),
        pytest.param("local", marks=pytest.mark.slow),  # `tests/dynamics/test_local.py` resumes one
    ],
)
@pytest.mark.multidevice
def test_a_run_on_text_goes_on_to_the_same_bytes(tmp_path, tiny_model, name, capsys):
    """`jaxlm finetune` with `dynamics`, whole, and stopped inside a round."""
    extra = {
        "svag": ["--dynamics.l=2"],
        "noise": ["--dynamics.parts=2"],
        "local": ["--dynamics.workers=4", "--dynamics.h=4"],
    }
    flags = [
        "--optimizer.name=adamw",
        "--optimizer.learning_rate=1e-2",
        f"--dynamics.name={name}",
        *extra[name],
        "--eval-every=2",
        "--checkpoint-every=2",
        "--log-every=2",
    ]
    metrics, summaries = [], []
    for kind in ("whole", "stopped"):
        folder = tmp_path / kind
        folder.mkdir()
        path = write_run(folder, tiny_model)
        if kind == "stopped":
            stop(path, flags)
        assert main(["finetune", str(path), "--steps=6", *flags]) == 0, capsys.readouterr().err
        metrics.append((folder / "run" / "metrics.jsonl").read_bytes())
        summaries.append(json.loads((folder / "run" / "summary.json").read_text()))
    assert metrics[0] == metrics[1]
    found = summaries[0]["dynamics"]
    if name == "svag":
        assert found == {"updates": 24}
        assert summaries[0]["forwards"] == 6 * 8
    elif name == "local":
        assert found == {"averages": 2, "communication": 1 / 3}
    else:
        assert found["gradient_noise"]["N"] > 0


@pytest.mark.slow
@pytest.mark.multidevice
def test_a_model_of_workers_on_devices_is_loaded_by_a_process_with_one(tmp_path, tiny_model):
    """What the run tested is what `jaxlm evaluate` finds, on one device."""
    path = write_run(tmp_path, tiny_model)
    flags = ["--optimizer.name=adamw", "--optimizer.learning_rate=0.1", "--dynamics.name=local"]
    flags += ["--dynamics.workers=4", "--steps=4"]
    assert main(["finetune", str(path), *flags]) == 0
    code = (
        "import jax, json, sys; from jaxlm.train.load import load_model; "
        "leaves = jax.tree.leaves(load_model(sys.argv[1]).params); "
        "print(jax.device_count(), sum(float(abs(leaf).sum()) for leaf in leaves))"
    )
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr[-2000:]
    devices, total = shown.stdout.split()
    expected = sum(
        float(abs(leaf).sum()) for leaf in jax.tree.leaves(load_model(tmp_path / "run").params)
    )
    assert devices == "1"
    assert float(total) == pytest.approx(expected, rel=1e-6)


def stop(path, flags):
    """Runs until after the checkpoint of step 2, which is inside a round of four."""
    from jaxlm.train import loop

    save = loop.Checkpoints.save

    def stopping(self, step, *rest):
        save(self, step, *rest)
        if step == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Checkpoints, "save", stopping)
        with contextlib.suppress(KeyboardInterrupt):
            main(["finetune", str(path), "--steps=6", *flags])
