"""Steps that add up in float32 factors beside parameters in few bits."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import zo
from jaxlm.core import views
from jaxlm.models.transformer import unstack
from tests.zo.problems import (
    flat,
    label_word_loss,
    network_batch,
    network_loss,
    network_params,
    small_decoder,
    token_batch,
)

pytestmark = pytest.mark.optimized

KEY = jax.random.key(1)


def run(opt, params, loss_fn, steps):
    state, batch = opt.init(params, KEY), network_batch()
    step = jax.jit(lambda params, state, batch: opt.step(loss_fn, params, state, batch))
    for _ in range(steps):
        params, state, info = step(params, state, batch)
    return opt.finalize(params, state), info


LONG = zo.lozo_residual(0.1, interval=5, num_directions=2, eps=2.0**-3)
"""Of whose steps seven fill one interval and begin another."""


@functools.cache
def long_run():
    return run(LONG, network_params(), network_loss, 7)


def test_a_view_sees_the_residual_that_is_added_in_the_end():
    params = network_params()
    plain = lambda params, batch: network_loss(params, batch)  # noqa: E731
    seen, info = long_run()
    copied, expected = run(LONG, params, plain, 7)
    np.testing.assert_allclose(info.loss_plus, expected.loss_plus, rtol=2e-5)
    np.testing.assert_allclose(flat(seen), flat(copied), atol=2e-4)
    assert np.abs(flat(seen) - flat(params)).max() > 1e-2


def test_steps_too_small_for_bfloat16_are_kept():
    params = network_params(jnp.bfloat16)
    small = {"eps": 2.0**-6, "select": "layers.*kernel"}

    def drift(opt):
        moved, _ = run(opt, params, network_loss, 30)
        change = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b, moved, params)
        return np.asarray(flat(change["layers"]))

    exact = drift(zo.lozo_residual(1e-4, interval=100, **small))
    lost = drift(zo.lozo(1e-4, interval=100, **small))
    assert np.mean(lost != 0) < np.mean(exact != 0)


def listed(params):
    layers = [{"kernel": kernel} for kernel in params["layers"]["kernel"]]
    return params | {"layers": layers}


def list_loss(params, batch, *, view=None):
    """`network_loss` over a list of layers, which asks a view by path and index."""
    x = batch["x"]
    for i, layer in enumerate(params["layers"]):
        seen = views.apply(view, "layers.kernel", layer["kernel"], i)
        x = jnp.tanh(seen.dot(x) if isinstance(seen, views.LowRankSum) else x @ seen)
    head = params["head"]
    seen = views.apply(view, "head.kernel", head["kernel"], None)
    y = seen.dot(x) if isinstance(seen, views.LowRankSum) else x @ seen
    y = y + views.apply(view, "head.bias", head["bias"], None)[None]
    return jnp.mean((y - batch["y"]) ** 2)


@pytest.mark.parametrize("lean", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_list_of_layers_trains_as_a_stack_does(lean):
    """Within an interval too, where what was added is in the factors alone."""
    params = network_params()
    plain = (lambda params, batch: list_loss(params, batch)) if not lean else list_loss
    stacked, wanted = long_run()
    found, info = run(LONG, listed(params), plain, 7)
    np.testing.assert_allclose(info.loss_plus, wanted.loss_plus, rtol=2e-5)
    kernels = jnp.stack([layer["kernel"] for layer in found["layers"]])
    np.testing.assert_allclose(kernels, stacked["layers"]["kernel"], atol=2e-4)


@pytest.mark.slow
def test_a_model_of_jaxlm_with_a_list_of_layers_trains_as_with_a_stack():
    lm, batch = small_decoder(), token_batch(4, 6, 50)
    loss_fn = label_word_loss(lm, [5, 9])
    opt = zo.lozo_residual(0.3, interval=4, eps=2.0**-5)
    step = jax.jit(lambda params, state: opt.step(loss_fn, params, state, batch))

    def losses(params):
        state, seen = opt.init(params, KEY), []
        for _ in range(3):
            params, state, info = step(params, state)
            seen.append(info.loss)
        return seen

    layers = unstack(lm.params["layers"])
    found = losses({**lm.params, "layers": layers})
    np.testing.assert_allclose(found, losses(lm.params), rtol=1e-5)
    assert abs(found[2] - found[0]) > 1e-4


@pytest.mark.slow
def test_an_equinox_model_trains_as_by_lozo():
    """Whose residual is not added in the end alone: the losses within an interval are those."""
    network = eqx.nn.MLP(2, 1, 8, 2, activation=jnp.tanh, key=KEY)
    params, static = eqx.partition(network, eqx.is_inexact_array)
    x = jax.random.normal(KEY, (16, 2))

    def loss(params, batch):
        y = jax.vmap(eqx.combine(params, static))(batch)
        return jnp.mean((y - jnp.sin(batch[:, :1])) ** 2)

    def losses(opt):
        state, seen, moving = opt.init(params, KEY), [], params
        step = jax.jit(lambda params, state: opt.step(loss, params, state, x))
        for _ in range(6):
            moving, state, info = step(moving, state)
            seen.append(info.loss)
        return seen

    options = {"interval": 50, "eps": 2.0**-4, "num_directions": 2}
    found = losses(zo.lozo_residual(0.05, **options))
    np.testing.assert_allclose(found, losses(zo.lozo(0.05, **options)), rtol=1e-5)
    assert found[-1] < found[0]


def test_the_moved_fraction_is_that_of_parameters_with_another_value():
    params = network_params()
    total = sum(x.size for x in jax.tree.leaves(params))

    def fractions(opt):
        update = jax.jit(opt.update)

        def fraction(params, slope, rate):
            slope, rate = jnp.float32([slope]), jnp.float32(rate)
            return float(update(params, opt.init(params, KEY), slope, rate)[2])

        return fraction

    fraction = fractions(zo.lozo_residual(0.1))
    assert fraction(params, 2.0, 0.1) == 1
    assert fraction(params, 2.0, 0.0) == 0
    assert fraction(params, jnp.nan, 0.1) == 0
    assert fractions(zo.lozo_residual(0.1, select="layers"))(params, 2.0, 0.1) == 1
    # A step so small that it is lost in the biases, which are large, and not in the factors.
    large = params | {"head": params["head"] | {"bias": jnp.full(8, 1e8)}}
    np.testing.assert_allclose(fraction(large, 2.0, 1e-9), (total - 8) / total, rtol=1e-6)
