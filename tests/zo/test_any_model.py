"""MeZO trains any JAX model: one regression for Linen, NNX, Equinox and a plain dict."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import zo
from jaxlm.core import paths

WIDTH = 8


class Model(NamedTuple):
    """Parameters and `predict(params, x) -> y`."""

    params: Any
    predict: Callable[[Any, Any], Any]


def linen() -> Model:
    from flax import linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.tanh(nn.LayerNorm()(nn.Dense(WIDTH)(x))))

    network = Network()
    return Model(network.init(jax.random.key(0), jnp.ones((1, 2))), network.apply)


def nnx() -> Model:
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(2, WIDTH, rngs=rngs)
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.outer = nnx.Linear(WIDTH, 1, rngs=rngs)

        def __call__(self, x):
            return self.outer(nnx.tanh(self.norm(self.inner(x))))

    graph, params = nnx.split(Network(nnx.Rngs(0)))
    return Model(params, lambda params, x: nnx.merge(graph, params)(x))


def equinox() -> Model:
    import equinox as eqx

    network = eqx.nn.MLP(2, 1, WIDTH, 1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)
    return Model(params, lambda params, x: jax.vmap(eqx.combine(params, static))(x))


def plain_dict() -> Model:
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "inner": {"kernel": jax.random.normal(keys[0], (2, WIDTH)), "bias": jnp.zeros(WIDTH)},
        "outer": {"kernel": jax.random.normal(keys[1], (WIDTH, 1)) / 3, "bias": jnp.zeros(1)},
    }

    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"][None]

    return Model(
        params, lambda params, x: dense(params["outer"], jnp.tanh(dense(params["inner"], x)))
    )


MODELS = (linen, nnx, equinox, plain_dict)


def regression(model: Model):
    def loss_fn(params, batch):
        return jnp.mean((model.predict(params, batch["x"]) - batch["y"]) ** 2)

    x = jax.random.normal(jax.random.key(1), (32, 2))
    return loss_fn, {"x": x, "y": jnp.sin(x[:, :1]) + 0.5 * x[:, 1:]}


@pytest.mark.parametrize("make", MODELS)
def test_mezo_lowers_the_loss(make):
    model = make()
    loss_fn, batch = regression(model)
    opt = zo.mezo(0.02, num_directions=4, weight_decay=1e-4)
    start = loss_fn(model.params, batch)
    step = zo.jit_step(opt, loss_fn)
    params, state = jax.tree.map(jnp.copy, model.params), opt.init(model.params, jax.random.key(2))
    for _ in range(300):
        params, state, info = step(params, state, batch)
    assert jax.tree.structure(params) == jax.tree.structure(model.params)
    assert loss_fn(params, batch) < 0.2 * start
    assert np.isfinite(info.loss)


@pytest.mark.parametrize("make", [nnx, equinox])
def test_the_estimate_points_along_the_gradient(make):
    model = make()
    loss_fn, batch = regression(model)
    gradient = jax.grad(loss_fn)(model.params, batch)
    estimate = jax.jit(zo.value_and_grad(loss_fn, num_directions=2000, sampler=zo.rademacher()))
    value, found = estimate(model.params, batch, key=jax.random.key(3))
    a, b = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (gradient, found)
    )
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98
    np.testing.assert_allclose(value, loss_fn(model.params, batch), rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "kernel", "bias"),
    [
        (linen, "params.Dense_0.kernel", "params.LayerNorm_0.scale"),
        (nnx, "inner.kernel.value", "norm.bias.value"),
        (equinox, "layers.weight", "layers.bias"),
        (plain_dict, "inner.kernel", "outer.bias"),
    ],
)
def test_parameters_have_the_paths_that_selections_speak_of(make, kernel, bias):
    found = {leaf.path for leaf in paths.flatten(make().params)[0]}
    assert {kernel, bias} <= found
