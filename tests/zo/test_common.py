"""What every zeroth-order method must do; a new method is one row of `METHODS`.

Each method learns on two targets, compiles once and gives the same under `jit` as without, follows
a schedule, replays bit for bit, is unaffected by a step without a finite slope, computes in the
width of its parameters, and trains any pytree.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import zo
from tests.zo.problems import (
    METHODS,
    flat,
    method,
    network_batch,
    network_loss,
    network_params,
    quadratic,
    small_params,
)

pytestmark = pytest.mark.optimized

KEY = jax.random.key(7)
LEARNING = {"lozo_momentum": 3e-2, "residual_feedback": 3e-3}
"""Learning rates that are not 1e-2."""


def rows(*quick):
    """All methods, of which the default run has some: one for each way to go about it."""
    marks = {name: () if name in quick else pytest.mark.slow for name in METHODS}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


# test_golden knows every step of the others, or what they add is rounding, which is nothing here.
each_method = pytest.mark.parametrize(
    "name",
    rows("adam", "fzoo", "lozo_momentum", "lozo_residual", "zo_muon", "residual_feedback"),
)


class Run(NamedTuple):
    """A run of `jit_step` and its trajectory file.

    Attributes:
      params: parameters before and after each step, with what `finalize` adds.
      state: the last state.
      infos: diagnostics of each step.
      step: `step(params, state, scale)`, which copies what the program donates.
      compiled: number of programs.
      path: the file.
    """

    params: list[Any]
    state: Any
    infos: list[Any]
    step: Any
    compiled: int
    path: Any


def scheduled(name):
    """The method of a row: from twice its rate to 0 at step 3, and then at the rate of learning."""
    rate = np.float32(METHODS[name][0])
    rates = np.append(rate * np.float32([2, 4 / 3, 2 / 3, 0]), LEARNING.get(name, 1e-2))
    rates = rates.astype(np.float32)  # the same bits where JAX has 64 of them
    return method(name, lambda rate: lambda step: jnp.take(rates, step, mode="clip"))


def scaled_loss(params, batch, *, view=None):
    return batch["scale"] * network_loss(params, batch, view=view)


@functools.cache
def scaled_batch(scale=1.0):
    return network_batch() | {"scale": jnp.float32(scale)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(name, dtype, x64)`: four steps under a schedule that ends at 0."""

    @functools.cache
    def made(name, dtype, x64):
        params, batch = (jax.tree.map(np.asarray, x) for x in (network_params(), scaled_batch()))
        with jax.enable_x64(x64):
            params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
            measured = jnp.promote_types(dtype, jnp.float32)
            return steps(name, params, jax.tree.map(lambda x: jnp.asarray(x, measured), batch))

    def steps(name, params, batch):
        opt = scheduled(name)
        path = tmp_path_factory.mktemp(name) / "run.zo"
        log = zo.Trajectory.create(
            path,
            params,
            key=KEY,
            num_directions=opt.settings["num_directions"],
            settings=opt.settings,
        )
        step, state, infos = zo.jit_step(opt, scaled_loss), opt.init(params, KEY), []
        seen, params = [params], jax.tree.map(jnp.copy, params)
        for t in range(4):
            donated = params, state
            params, state, info = step(params, state, batch)
            assert all(x.is_deleted() for x in jax.tree.leaves(donated))
            log.append(t, info.projected_grad[None], info.learning_rate)
            infos.append(info)
            seen.append(jax.tree.map(jnp.copy, opt.finalize(params, state)))
        log.finish(seen[-1])

        def kept(params, state, scale):
            return step(*jax.tree.map(jnp.copy, (params, state)), scaled_batch(scale))

        return Run(seen, state, infos, kept, step._cache_size(), path)

    return lambda name, dtype="float32", x64=False: made(name, dtype, x64)


@each_method
def test_the_loss_of_a_network_falls(name, run):
    made, opt, params = run(name), scheduled(name), network_params()
    before, state = network_loss(params, network_batch()), opt.init(params, KEY)
    for _ in range(500):
        params, state, _ = made.step(params, state, 1.0)
    assert network_loss(opt.finalize(params, state), network_batch()) < 0.7 * before


@pytest.mark.slow
@each_method
def test_a_quadratic_falls(name):
    params, batch = small_params(), jnp.float32(0.25)
    opt = method(name, lambda rate: LEARNING.get(name, 1e-2))

    def body(carry, _):
        params, state, info = opt.step(quadratic, *carry, batch)
        return (params, state), info.loss

    state = opt.init(params, KEY)
    (end, state), _ = jax.jit(lambda *x: jax.lax.scan(body, x, length=500))(params, state)
    before, after = (quadratic(x, batch) for x in (params, opt.finalize(end, state)))
    assert after < 0.7 * before


@each_method
def test_steps_compile_once_and_follow_a_schedule(name, run):
    made = run(name)
    rate = METHODS[name][0]
    assert made.compiled == 1
    rates = [info.learning_rate for info in made.infos]
    np.testing.assert_allclose(rates, np.array([2, 4 / 3, 2 / 3, 0]) * rate, rtol=1e-6, atol=1e-8)
    assert not np.array_equal(flat(made.params[2]), flat(made.params[1]))
    np.testing.assert_allclose(flat(made.params[4]), flat(made.params[3]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(pytest.param(*row.values, "float32", marks=row.marks) for row in each_method.args[1]),
        ("stochastic", "bfloat16"),
        ("master", "bfloat16"),
    ],
)
def test_a_replay_ends_where_the_run_ended_bit_for_bit(name, dtype, run):
    made = run(name, dtype)
    again = zo.replay(scheduled(name), made.params[0], made.path)
    assert_same_bits(again, made.params[-1])


@pytest.mark.parametrize("name", rows("fzoo"))
def test_jit_equals_eager_and_no_number_is_infinite_or_nan(name, run):
    """`JAX_DEBUG_NANS=1` and `JAX_DEBUG_INFS=1` find nothing, and arguments are kept."""
    made, opt = run(name), scheduled(name)
    params = made.params[0]
    state = opt.init(params, KEY)
    with jax.debug_nans(True), jax.debug_infs(True):
        moved, after, info = opt.step(network_loss, params, state, network_batch())
    assert_same_bits(params, network_params())
    np.testing.assert_allclose(info.loss_plus, made.infos[0].loss_plus, rtol=1e-6)
    change = flat(opt.finalize(moved, after)) - flat(params)
    expected = flat(made.params[1]) - flat(params)
    np.testing.assert_allclose(change, expected, atol=2e-3 * np.abs(expected).max())


@each_method
def test_a_step_without_a_finite_slope_changes_nothing_but_its_number(name, run):
    """A run that has such a step continues as one that never saw its batch."""
    made, opt, params = run(name), scheduled(name), network_params()
    state = opt.init(params, KEY)
    for scale in (np.inf, 1.0, 1.0, np.nan, np.inf):
        before = opt.finalize(params, state), state
        params, state, info = made.step(params, state, scale)
        if scale == 1:
            # The first loss of residual feedback has none to be compared with.
            first = name == "residual_feedback" and not before[1].known.any()
            same = np.array_equal(flat(opt.finalize(params, state)), flat(before[0]))
            assert same == first
            continue
        assert not np.isfinite(info.projected_grad).any()
        kept = before[1]._replace(step=state.step)
        if name == "lozo_residual":  # an interval may have ended, which folds the residual in
            np.testing.assert_allclose(
                flat(opt.finalize(params, state)), flat(before[0]), rtol=1e-6
            )
            continue
        assert info.moved_fraction == 0
        assert_same_bits(opt.finalize(params, state), before[0])
        assert jax.tree.structure(state) == jax.tree.structure(kept)
        for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(kept), strict=True):
            assert jnp.array_equal(new, old)


SHORT = ("mezo", "adam", "meazo", "momentum", "lozo_momentum", "zo_muon", "residual_feedback")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        # test_golden has those of 64 bits.
        *(pytest.param("float64", *row.values, marks=row.marks) for row in rows()),
        *(pytest.param("float32", *row.values, marks=row.marks) for row in rows("adam")),
        *(pytest.param("bfloat16", name, marks=pytest.mark.slow) for name in SHORT),
    ],
)
def test_the_width_of_numbers_is_that_of_the_leaves_and_not_of_the_process(dtype, name, run):
    """Under 64 bits, methods do what they do without; leaves of 64 bits have states of 64."""
    made = run(name, "float32" if dtype == "float64" else dtype)
    params, plain = made.params[0], made.params[-1]
    made = run(name, dtype, x64=True)
    wide, leaves = made.params[-1], jax.tree.leaves(made.state)
    assert made.compiled == 1  # so the state keeps its types
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype(dtype)}
    floats = {x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}
    if name != "lozo_residual":
        assert floats == {jnp.dtype("float64" if dtype == "float64" else "float32")}
    if dtype != "float64":
        return assert_same_bits(wide, plain)
    moved = flat(plain) - flat(params)
    found = np.asarray(flat(wide), np.float64) - flat(params)
    np.testing.assert_allclose(found, moved, atol=0.02 * float(np.abs(moved).max()))


def odd_params():
    """Only the kernel moves; beside it stands whatever else a tree can hold."""
    return {
        "kernel": jnp.ones((2, 3)),
        "empty": jnp.zeros((0, 4)),
        "empty_rows": jnp.zeros((3, 0)),
        "count": jnp.int32(3),
        "flags": jnp.array([True, False]),
        "rate": 0.5,
        "depth": 4,
        "name": "odd",
        "function": jnp.tanh,
        "nothing": None,
    }


def odd_loss(params, batch):
    assert params["name"] == "odd"
    assert params["empty"].shape == (0, 4)
    y = params["function"](batch @ params["kernel"]) * params["rate"] * params["depth"]
    return (y**2).sum() + params["count"]


@pytest.mark.parametrize("name", rows("lozo_residual", "master"))
def test_leaves_that_are_not_arrays_of_real_floats_stay_fixed(name, tmp_path):
    """In steps, in the copy of `float32_master`, and in a replay."""
    opt, params, batch = method(name), odd_params(), jnp.ones((4, 2))
    log = zo.Trajectory.create(
        tmp_path / "run.zo",
        params,
        key=KEY,
        num_directions=opt.settings["num_directions"],
        settings=opt.settings,
    )
    step, state = zo.jit_step(opt, odd_loss), opt.init(params, KEY)
    for t in range(3):
        params, state, info = step(params, state, batch)
        log.append(t, np.asarray(info.projected_grad)[None])
    end, start = opt.finalize(params, state), odd_params()
    log.finish(end)
    again = zo.replay(opt, start, tmp_path / "run.zo")
    np.testing.assert_array_equal(again["kernel"], end["kernel"])
    assert (end["kernel"] != start["kernel"]).any()
    for key, value in start.items():
        if key != "kernel":
            same = value is end[key] if not hasattr(value, "dtype") else None
            assert same or jnp.array_equal(value, end[key])


def test_an_estimate_of_an_odd_tree_is_that_of_its_kernel():
    params, batch, sampler = odd_params(), jnp.ones((4, 2)), zo.sphere()
    alone, options = {"kernel": params["kernel"]}, {"num_directions": 2, "sampler": sampler}

    @jax.jit
    def gradient(alone):
        est = zo.spsa(odd_loss, params | alone, batch, key=KEY, **options)
        return zo.materialize(est, params | alone)

    @jax.jit
    def expected(alone):
        est = zo.spsa(lambda alone: odd_loss(params | alone, batch), alone, key=KEY, **options)
        return zo.materialize(est, alone)

    grads = gradient(alone)
    np.testing.assert_array_equal(grads["kernel"], expected(alone)["kernel"])
    assert grads["function"] is grads["name"] is None
    assert grads["count"] == grads["rate"] == grads["depth"] == 0
    assert grads["empty"].shape == (0, 4)


def assert_same_bits(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        bits = (np.asarray(value).view(f"u{value.dtype.itemsize}") for value in (x, y))
        np.testing.assert_array_equal(*bits)
