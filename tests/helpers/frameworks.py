"""One small regression in each framework whose parameters jaxlm should train."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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


def whole_equinox() -> Model:
    """With its static leaves: the activation is a function, among the arrays."""
    import equinox as eqx

    network = eqx.nn.MLP(2, 1, WIDTH, 1, activation=jnp.tanh, key=jax.random.key(0))
    return Model(network, lambda params, x: jax.vmap(params)(x))


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


MODELS = (linen, nnx, equinox, whole_equinox, plain_dict)


def regression(model: Model):
    def loss_fn(params, batch):
        return jnp.mean((model.predict(params, batch["x"]) - batch["y"]) ** 2)

    x = jax.random.normal(jax.random.key(1), (32, 2))
    return loss_fn, {"x": x, "y": jnp.sin(x[:, :1]) + 0.5 * x[:, 1:]}
