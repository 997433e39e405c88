"""Small losses with parameters of every kind: stacked, unstacked, scalar, biases and norms."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import zo
from jaxlm.core import paths, views
from jaxlm.models import LanguageModel, ModelConfig, init_params

METHODS = {
    "mezo": (1e-2, partial(zo.mezo, weight_decay=0.1)),
    "stochastic": (1e-2, partial(zo.mezo, num_directions=2, rounding="stochastic")),
    "momentum": (1e-2, partial(zo.mezo_momentum, horizon=3, weight_decay=0.1)),
    "adam": (1e-3, partial(zo.mezo_adam, horizon=3)),
    "meazo": (1e-3, partial(zo.meazo, weight_decay=0.1)),
    "sphere": (1e-3, partial(zo.meazo, sampler=zo.sphere())),
    "fzoo": (1e-3, partial(zo.fzoo, num_directions=3)),
    "lozo": (1e-2, partial(zo.lozo, interval=2, weight_decay=0.1)),
    "lozo_momentum": (1e-2, partial(zo.lozo_momentum, interval=2)),
    "lozo_residual": (1e-2, partial(zo.lozo_residual, interval=2)),
    "zo_muon": (1e-2, partial(zo.zo_muon, rank=4, interval=2, num_directions=2, vector_scale=0.1)),
    "residual_feedback": (3e-3, partial(zo.zeroth_order, estimator=zo.residual_feedback, eps=0.1)),
    "population": (1e-3, partial(zo.zeroth_order, estimator=zo.population, num_directions=4)),
    "master": (1e-2, lambda rate: zo.float32_master(zo.mezo(rate, weight_decay=0.1))),
}
"""Rows of the battery: a learning rate and `make(learning_rate) -> optimizer`."""


def method(name, schedule=lambda rate: rate):
    """The optimizer of a row, at its learning rate or a schedule made of it."""
    rate, make = METHODS[name]
    return make(schedule(rate))


# Models of tests, whose layers are the first axis.
paths.declare_stacked({"layers.w": 1, "layers.norm.scale": 1, "layers.kernel": 2})
SHAPES = {"layers": {"w": (2, 3), "norm": {"scale": (2, 1)}}, "head": {"w": (2, 2), "bias": (2,)}}


def small_params(dtype=jnp.float32):
    """14 numbers of size one."""
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(99), len(leaves))
    drawn = [jax.random.normal(key, shape) for key, shape in zip(keys, leaves, strict=True)]
    return structure.unflatten([x.astype(dtype) for x in drawn])


def flat(params):
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(params)])


def quadratic(params, batch):
    """A quadratic form that mixes all coordinates."""
    x = flat(params)
    shifted = x - batch
    mixed = shifted + 0.5 * jnp.roll(shifted, 1)
    return 0.5 * jnp.sum(jnp.arange(1, x.size + 1) / x.size * mixed**2)


def nonlinear(params, batch):
    """Third and higher derivatives everywhere."""
    x = flat(params)
    return jnp.log1p(jnp.exp(jnp.sin(x) @ jnp.cos(jnp.roll(x, 1)))) + 0.1 * jnp.sum(
        (x - batch) ** 4
    )


def directions(params, key, **options):
    """z of one direction, as a tree like params."""
    est = zo.spsa(lambda params: jnp.float32(0), params, key=key, **options)
    return zo.materialize(dataclasses.replace(est, projected_grad=jnp.ones(1)), params)


@functools.cache
def small_decoder(dtype: str = "float32") -> LanguageModel:
    config = ModelConfig(
        family="gpt2",
        kind="decoder",
        head="lm",
        vocab_size=50,
        hidden_size=12,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_size=6,
        intermediate_size=20,
        max_positions=16,
        embedding_size=12,
        activation="gelu_tanh",
        norm="rmsnorm",
        attention_bias=False,
        output_bias=False,
    )
    return LanguageModel(config, init_params(config, jax.random.key(0), dtype))


def label_word_loss(lm: LanguageModel, token_ids):
    """Cross-entropy over label words at the last token; takes a view."""

    def loss_fn(params, batch, *, view=None):
        logits = lm.apply(
            params,
            batch["input_ids"],
            batch["attention_mask"],
            positions=batch["positions"],
            token_ids=jnp.asarray(token_ids),
            view=view,
        )
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        return -jnp.take_along_axis(log_probs, batch["labels"][:, None], 1).mean()

    return loss_fn


def token_batch(rows: int, length: int, vocabulary: int):
    ids = jax.random.randint(jax.random.key(4), (rows, length), 0, vocabulary)
    return {
        "input_ids": ids,
        "attention_mask": jnp.ones_like(ids),
        "positions": jnp.full((rows,), length - 1),
        "labels": jnp.arange(rows) % 2,
    }


def network_params(dtype=jnp.float32):
    """Two layers of 16 and a head of 8, as `network_loss` reads them."""
    keys = jax.random.split(jax.random.key(8), 2)
    return {
        "layers": {"kernel": (jax.random.normal(keys[0], (2, 16, 16)) / 4).astype(dtype)},
        "head": {
            "kernel": (jax.random.normal(keys[1], (16, 8)) / 4).astype(dtype),
            "bias": jnp.zeros(8, dtype),
        },
    }


def network_loss(params, batch, *, view=None):
    """Mean square error of a small network; takes a view."""

    def times(x, path, kernel, layer=None):
        seen = views.apply(view, path, kernel, layer)
        return seen.dot(x) if isinstance(seen, views.LowRankSum) else x @ seen

    def body(x, item):
        layer, kernel = item
        return jnp.tanh(times(x, "layers.kernel", kernel, layer)), None

    x, _ = jax.lax.scan(body, batch["x"], (jnp.arange(2), params["layers"]["kernel"]))
    bias = views.apply(view, "head.bias", params["head"]["bias"], None)
    y = times(x, "head.kernel", params["head"]["kernel"]) + bias[None]
    return jnp.mean((y - batch["y"]) ** 2)


def network_batch():
    x = jax.random.normal(jax.random.key(9), (8, 16))
    return {"x": x, "y": jnp.sin(x[:, :8])}


def over_keys(function, count: int):
    return jax.jit(jax.vmap(function))(jax.random.split(jax.random.key(2026), count))


def assert_mean(samples, expected, rounding=0.0):
    """Every mean over axis 0 is within 4.5 standard errors, and `rounding`."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    assert (np.abs(samples.mean(0) - np.asarray(expected)) <= 4.5 * error + rounding).all()
