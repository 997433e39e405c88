"""Updates below half precision: what rounding loses, and what is kept at random or in a copy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import zo
from tests.zo.problems import (
    assert_mean,
    directions,
    flat,
    network_batch,
    network_loss,
    network_params,
    over_keys,
)

pytestmark = pytest.mark.optimized

KEY = jax.random.key(7)


def constant_slope(params, batch):
    return flat(params).astype(jnp.float32).sum()


def test_stochastic_rounding_has_the_mean_of_the_exact_update():
    rng = np.random.default_rng(0)
    # Both signs, powers of two, where the gaps below and above differ, and steps of many gaps.
    w = np.concatenate([rng.normal(size=40) * 0.02, [1.0, -1.0, 0.5, 2.0, 0.0, 1e-3]])
    params = {"w": jnp.asarray(w, jnp.bfloat16)}
    u = rng.normal(size=w.size).astype(np.float32) * np.repeat([1e-5, 1e-2], w.size // 2)

    def moved(key):
        new, _ = zo.descend(
            lambda site: jnp.asarray(u), params, jnp.float32(0.5), rounding="stochastic", key=key
        )
        return new["w"].astype(jnp.float32)

    exact = np.asarray(params["w"], np.float64) - 0.5 * u.astype(np.float64)
    samples = np.asarray(over_keys(moved, 8192))
    assert all(len(np.unique(column)) <= 2 for column in samples.T)
    assert_mean(samples, exact, rounding=1e-7)


def fraction_that_moves(w, step):
    """Of numbers with 8 bits, under a normal step and rounding to nearest: beyond half a gap."""
    gap = 2.0 ** (np.floor(np.log2(np.abs(w))) - 7)
    return np.mean([math.erfc(half / step / math.sqrt(2)) for half in gap / 2])


@pytest.mark.parametrize(("step", "kept"), [(1e-6, 0.029), (1e-5, 0.28), (1e-4, 0.99)])
def test_rounding_to_nearest_loses_small_steps(step, kept):
    """Weights of size 0.02: of a step of 1e-6 three parts in a hundred remain."""
    w = (0.02 * jax.random.normal(jax.random.key(1), (8, 4096))).astype(jnp.bfloat16)
    opt, params = zo.mezo(step), {"w": w}
    moved, _, found = jax.jit(opt.update)(params, opt.init(params, KEY), jnp.ones(1))
    assert float(found) == np.mean(np.asarray(moved["w"] != w))
    expected = fraction_that_moves(np.asarray(w, np.float64).ravel(), step)
    error = math.sqrt(expected * (1 - expected) / w.size)
    assert abs(float(found) - expected) < 4.5 * error
    z = np.asarray(jax.jit(directions)(params, jax.random.fold_in(KEY, 0))["w"], np.float64)
    done = np.asarray(moved["w"], np.float64) - np.asarray(w, np.float64)
    # The part of the step that is taken; the numbers are known to two digits.
    assert_mean((-done * z / step).ravel(), kept, rounding=0.02 * kept)


def test_moved_fraction_is_counted_in_proportion_to_the_leaves():
    params = {"a": jnp.ones(8, jnp.bfloat16), "b": jnp.ones((4, 6), jnp.float32)}
    opt = zo.mezo(2.0**-20, sampler=zo.rademacher())
    _, _, moved = jax.jit(opt.update)(params, opt.init(params, KEY), jnp.ones(1))
    assert float(moved) == 24 / 32


def test_the_copy_in_float32_is_moved_and_the_parameters_are_its_rounding():
    """Against NumPy: losses at the rounded parameters, steps from those that were not rounded."""
    params, batch = network_params(jnp.bfloat16), network_batch()
    opt = zo.float32_master(zo.mezo(1e-4, eps=2.0**-5, weight_decay=0.5))
    state = opt.init(params, jnp.copy(KEY))
    step = zo.jit_step(opt, network_loss)
    measure = jax.jit(
        lambda params, key: zo.spsa(network_loss, params, batch, key=key, eps=2.0**-5)
    )
    draw = jax.jit(directions)
    master = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    start = np.asarray(flat(params))
    for t in range(4):
        key = jax.random.fold_in(KEY, t)
        slope = measure(params, key).projected_grad[0]
        z = draw(state.memory.params, key)  # in float32
        decay = {"layers": {"kernel": 0.5}, "head": {"kernel": 0.5, "bias": 0.0}}
        params, state, info = step(params, state, batch)
        np.testing.assert_allclose(info.projected_grad[0], slope, atol=2e-4)
        slope = info.projected_grad[0]
        master = jax.tree.map(
            lambda w, z, rate, slope=slope: w - np.float32(1e-4) * (slope * z + rate * w),
            master,
            z,
            decay,
        )
        np.testing.assert_allclose(flat(state.memory.params), flat(master), rtol=1e-6, atol=1e-8)
        assert info.moved_fraction == 1
        for low, wide in zip(
            jax.tree.leaves(params), jax.tree.leaves(state.memory.params), strict=True
        ):
            assert low.dtype == jnp.bfloat16
            np.testing.assert_array_equal(low, wide.astype(jnp.bfloat16))
    assert int(state.step) == 4
    assert (flat(params) != start).any()


def test_small_steps_add_up_in_the_copy_alone():
    params = {"w": jnp.ones(32, jnp.bfloat16)}
    plain = zo.mezo(2.0**-10)
    ends = []
    for opt in (plain, zo.float32_master(plain)):
        current, state = params, opt.init(params, KEY)
        update = jax.jit(opt.update)
        for _ in range(40):
            # One direction, again and again.
            current, new, _ = update(current, state._replace(step=jnp.int32(0)), jnp.ones(1))
            state = new
        ends.append(np.asarray(current["w"], np.float32))
    z = np.asarray(directions(params, jax.random.fold_in(KEY, 0))["w"])
    exact = 1 - 40 * 2.0**-10 * z
    assert np.abs(ends[0] - exact).max() > 0.02
    np.testing.assert_allclose(ends[1], exact, rtol=2.0**-8)
    assert zo.float32_master(plain).settings == plain.settings | {"master": "float32"}
    assert zo.float32_master(plain).forwards == plain.forwards


def test_the_copy_holds_what_is_selected_alone():
    params = {"a": jnp.ones(8, jnp.bfloat16), "b": {"c": jnp.ones(6, jnp.bfloat16)}}
    options = {"select": "a", "weight_decay": 0.5}
    opt = zo.float32_master(zo.mezo(2.0**-12, **options))
    state = opt.init(params, jnp.copy(KEY))
    assert {x.shape: x.dtype for x in jax.tree.leaves(state.memory.params)} == {(8,): jnp.float32}
    plain, wide = zo.mezo(2.0**-12, **options), {"a": jnp.ones(8), "b": {"c": jnp.ones(6)}}
    wide_state, update = plain.init(wide, KEY), jax.jit(plain.update)
    step = zo.jit_step(opt, constant_slope)
    for _ in range(3):
        params, state, info = step(params, state, None)
        wide, wide_state, _ = update(wide, wide_state, info.projected_grad)
        np.testing.assert_array_equal(state.memory.params["a"], wide["a"])
        np.testing.assert_array_equal(params["a"], wide["a"].astype(jnp.bfloat16))
        assert info.moved_fraction == 1
    assert state.memory.params["b"] == {"c": None}
    np.testing.assert_array_equal(params["b"]["c"], np.ones(6))


def test_a_loss_that_is_no_number_is_left_out_of_the_spread():
    params = {"w": jnp.zeros(6)}
    opt = zo.fzoo(0.1, num_directions=4)
    state, update = opt.init(params, KEY), jax.jit(opt.update)
    slopes = np.array([3.0, np.nan, -1.0, 2.5], np.float32)
    moved, _, _ = update(params, state, jnp.asarray(slopes))
    z = zo.perturbation.directions(jax.random.fold_in(KEY, 0), zo.rademacher(), params, None, 4)
    site = zo.Site("w", (6,))
    scores = np.array([3.0, 0, -1.0, 2.5]) / np.std([3.0, -1.0, 2.5])
    signs = [np.asarray(zo.rademacher().sample(z.at(j)[0], site)) for j in range(4)]
    expected = -0.1 * np.mean(scores[:, None] * signs, 0)
    np.testing.assert_allclose(moved["w"], expected, rtol=1e-5)
    for nothing in ([3.0, np.nan, np.inf, -np.inf], [np.nan] * 4):
        moved, _, _ = update(params, state, jnp.asarray(nothing))
        np.testing.assert_array_equal(moved["w"], params["w"])


@pytest.mark.parametrize("estimator", [zo.central, zo.one_sided])
def test_a_loss_that_is_no_number_along_one_sign_moves_nothing(estimator):
    params = {"w": jnp.ones(4)}
    opt = zo.zeroth_order(0.1, estimator=estimator, num_directions=2)
    state = opt.init(params, KEY)
    z = jax.jit(directions)(params, jax.random.fold_in(KEY, 0))
    plus_of_first = params["w"] + 1e-3 * z["w"]

    def loss_fn(params, batch):
        bad = jnp.abs(params["w"] - plus_of_first).max() < 1e-5
        return jnp.where(bad, jnp.nan, params["w"].sum())

    step = jax.jit(lambda params, state: opt.step(loss_fn, params, state, None))
    moved, _, info = step(params, state)
    assert np.isnan(info.loss_plus[0])
    assert np.isfinite(info.loss_minus).all()
    assert np.isnan(info.projected_grad[0])
    assert np.isfinite(info.projected_grad[1])
    expected, _, _ = jax.jit(opt.update)(params, state, info.projected_grad.at[0].set(0))
    np.testing.assert_array_equal(moved["w"], expected["w"])
    assert np.isfinite(moved["w"]).all()
