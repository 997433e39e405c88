"""A run rebuilt from its trajectory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import zo
from jaxlm.core.errors import UserError
from tests.zo.problems import network_batch, network_loss, network_params

pytestmark = [pytest.mark.optimized, pytest.mark.default_flags]


def run(opt, params, path, steps=5, loss_fn=network_loss, length=None, ended=True):
    """A run of `jit_step` that keeps its trajectory; where it ends."""
    key, settings = jax.random.key(3), opt.settings | ({"steps": length} if length else {})
    log = zo.Trajectory.create(
        path, params, key=key, num_directions=settings["num_directions"], settings=settings
    )
    step, state = zo.jit_step(opt, loss_fn), opt.init(params, key)
    batch = network_batch()
    params = jax.tree.map(jnp.copy, params)
    for t in range(steps):
        params, state, info = step(params, state, batch)
        log.append(t, np.asarray(info.projected_grad)[None], info.learning_rate)
    end = opt.finalize(params, state)
    if ended:
        log.finish(end)
    return end


def test_another_optimizer_or_start_is_refused(tmp_path):
    start = network_params()
    run(zo.mezo(1e-2), start, tmp_path / "run.zo", steps=1)
    with pytest.raises(UserError, match=r"made with eps = 0\.001 \(got 0\.01\)"):
        zo.replay(zo.mezo(1e-2, eps=1e-2), start, tmp_path / "run.zo")
    with pytest.raises(UserError, match="made with rule"):
        zo.replay(zo.meazo(1e-2), start, tmp_path / "run.zo")
    moved = jax.tree.map(lambda x: x + 1, start)
    with pytest.raises(UserError, match="other values of"):
        zo.replay(zo.mezo(1e-2), moved, tmp_path / "run.zo")


def kernels_alone(path):
    return path.endswith("kernel")


def everything(path):
    return True


def linear(last):
    return optax.linear_schedule(1e-2, last, 5)


def bent(step):
    """Equal to `linear(0.0)` at steps 0, 1, 10, 100 and 1000, and at no other."""
    probes = jnp.array([0, 1, 10, 100, 1000])
    return linear(0.0)(step) + jnp.where((step == probes).any(), 0.0, 1e-3)


def magnitude(fraction):
    return zo.mezo(1e-2, sampler=zo.magnitude({"w": jnp.arange(2000.0)}, fraction))


@pytest.mark.parametrize(
    ("own", "other", "reason"),
    [
        (
            lambda: zo.mezo(1e-2, weight_decay=0.1, decay=everything),
            lambda: zo.mezo(1e-2, weight_decay=0.1, decay=kernels_alone),
            "made with decay",
        ),
        pytest.param(
            lambda: zo.mezo(1e-2, weight_decay=0.1),
            lambda: zo.mezo(1e-2, weight_decay=0.1, decay=everything),
            "made with decay",
            marks=pytest.mark.slow,
        ),
        (
            lambda: zo.mezo(1e-2, select=everything),
            lambda: zo.mezo(1e-2, select=kernels_alone),
            "made with select",
        ),
        (
            lambda: zo.mezo(linear(0.0)),
            lambda: zo.mezo(bent),
            r"rate of step 2 was 0\.006",
        ),
        (lambda: magnitude(0.25), lambda: magnitude(0.251), "made with sampler"),
    ],
    ids=["decay", "default_decay", "select", "schedule", "thresholds"],
)
def test_all_that_a_replay_depends_on_is_in_the_file(tmp_path, own, other, reason):
    """What differs in functions, in a schedule between its probes, in the arrays of a sampler."""
    start = (
        {"w": jnp.arange(2000.0)}
        if "sampler" in reason
        else {"w": jnp.ones(4), "kernel": jnp.ones((2, 2)), "bias": jnp.ones(3)}
    )
    end = run(own(), start, tmp_path / "run.zo", loss_fn=slope)
    again = zo.replay(own(), start, tmp_path / "run.zo")
    np.testing.assert_array_equal(again["w"], end["w"])
    with pytest.raises(UserError, match=reason):
        zo.replay(other(), start, tmp_path / "run.zo")


def slope(params, batch):
    return sum(x.sum() for x in jax.tree.leaves(params))


def test_a_replay_that_ends_elsewhere_is_refused(tmp_path):
    """By a rule of the same name that does something else, which no setting tells."""
    start, file = {"w": jnp.arange(5.0)}, tmp_path / "run.zo"
    end = run(zo.mezo(1e-2), start, file, loss_fn=slope)

    def twice():
        rule = zo.rules.sgd()

        def update(drawn, params, state):
            state, block = rule.update(drawn, params, state)
            return state, lambda site: 2 * block(site)

        return zo.zeroth_order(1e-2, rule=rule._replace(update=update))

    with pytest.raises(UserError, match="must end at the parameters"):
        zo.replay(twice(), start, file)
    moved = zo.replay(twice(), start, file, verify=False)
    np.testing.assert_allclose(
        moved["w"] - start["w"], 2 * (end["w"] - start["w"]), rtol=1e-4, atol=1e-6
    )


def test_other_rounding_is_no_other_run(tmp_path):
    start = network_params()
    end = run(zo.mezo(1e-2), start, tmp_path / "run.zo")
    log = zo.Trajectory.open(tmp_path / "run.zo")
    log.check_end(start, jax.tree.map(lambda x: jnp.nextafter(x, jnp.inf), end))
    with pytest.raises(UserError, match="must end at the parameters"):
        log.check_end(start, jax.tree.map(lambda x, y: x + 0.1 * (x - y), end, start))


def test_a_part_of_a_run_is_not_taken_for_the_whole(tmp_path):
    start, file, opt = network_params(), tmp_path / "run.zo", zo.mezo(1e-2)
    run(opt, start, file, length=8, ended=False)
    with pytest.raises(UserError, match=r"has 5 of the 8 steps of its run\. Resume"):
        zo.replay(opt, start, file)
    first, last = zo.replay(opt, start, file, steps=0), zo.replay(opt, start, file, steps=5)
    np.testing.assert_array_equal(first["head"]["kernel"], start["head"]["kernel"])
    assert not np.array_equal(last["head"]["kernel"], start["head"]["kernel"])
    for steps in (-1, 6):
        with pytest.raises(UserError, match=rf"has 5 steps \(got steps={steps}\)"):
            zo.replay(opt, start, file, steps=steps)


def test_a_run_that_stopped_early_is_whole(tmp_path):
    start, opt = network_params(), zo.mezo(1e-2)
    end = run(opt, start, tmp_path / "run.zo", length=8)
    again = zo.replay(opt, start, tmp_path / "run.zo")
    jax.tree.map(np.testing.assert_array_equal, end, again)


def test_a_run_is_replayed_under_another_width_of_numbers(tmp_path):
    """Made without 64 bits; read where they are JAX's default, schedule included."""
    start, make = network_params(), lambda: zo.mezo(optax.cosine_decay_schedule(1e-3, 7))
    end = run(make(), start, tmp_path / "run.zo")
    with jax.enable_x64(True):
        again = zo.replay(make(), start, tmp_path / "run.zo")
    for old, new in zip(*map(jax.tree.leaves, (end, again)), strict=True):
        np.testing.assert_array_equal(np.asarray(old), np.asarray(new))


def test_parameters_of_64_bits_are_replayed_bit_for_bit(tmp_path):
    with jax.enable_x64(True):
        start = jax.tree.map(lambda x: x.astype(jnp.float64), network_params())
        end = run(zo.mezo(1e-2), start, tmp_path / "run.zo")
        again = zo.replay(zo.mezo(1e-2), start, tmp_path / "run.zo")
        for old, new in zip(*map(jax.tree.leaves, (end, again)), strict=True):
            np.testing.assert_array_equal(np.asarray(old), np.asarray(new))
            assert new.dtype == jnp.float64
