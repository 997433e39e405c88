"""MeZO trains any JAX model: one regression for Linen, NNX, Equinox and a plain dict."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import zo
from jaxlm.core import paths
from tests.zo.problems import METHODS

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


@pytest.mark.parametrize("make", MODELS)
def test_mezo_lowers_the_loss(make):
    model = make()
    loss_fn, batch = regression(model)
    opt = zo.mezo(0.02, num_directions=4, weight_decay=1e-4)
    start = loss_fn(model.params, batch)
    step = zo.jit_step(opt, loss_fn)
    params = jax.tree.map(lambda x: jnp.copy(x) if hasattr(x, "dtype") else x, model.params)
    state = opt.init(params, jax.random.key(2))
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
        (equinox, "layers.0.weight", "layers.1.bias"),
        (plain_dict, "inner.kernel", "outer.bias"),
    ],
)
def test_parameters_have_the_paths_that_selections_speak_of(make, kernel, bias, monkeypatch):
    # What other modules of the tests have declared is not, as in a process of its own.
    own = {path: {count} for path, count in paths._own_models().items()}
    monkeypatch.setattr(paths, "_AXES", own)
    found = {leaf.path for leaf in paths.flatten(make().params)[0]}
    assert {kernel, bias} <= found


def odd_params():
    """What moves is the kernel alone; whatever else a tree can hold stands beside it."""
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


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_array_of_real_floats_is_held_fixed(name, tmp_path):
    """Steps, the copy of `float32_master`, the estimate and its replay."""
    if name == "zo_muon":
        opt = zo.zo_muon(1e-2, rank=2, interval=2, num_directions=2)
    else:
        opt = METHODS[name]()
    params, batch, key = odd_params(), jnp.ones((4, 2)), jax.random.key(3)
    log = zo.Trajectory.create(
        tmp_path / "run.zo",
        params,
        key=key,
        num_directions=opt.settings["num_directions"],
        settings=opt.settings,
    )
    step, state = zo.jit_step(opt, odd_loss), opt.init(params, key)
    for t in range(3):
        params, state, info = step(params, state, batch)
        log.append(t, np.asarray(info.projected_grad)[None])
    end, start = opt.finalize(params, state), odd_params()
    log.finish(end)
    again = zo.replay(opt, start, tmp_path / "run.zo")
    np.testing.assert_array_equal(again["kernel"], end["kernel"])
    assert (end["kernel"] != start["kernel"]).any()
    for name, value in start.items():
        if name != "kernel":
            same = value is end[name] if not hasattr(value, "dtype") else None
            assert same or jnp.array_equal(value, end[name])


def test_an_estimate_of_an_odd_tree_is_that_of_its_kernel():
    params, batch, key = odd_params(), jnp.ones((4, 2)), jax.random.key(3)
    est = zo.spsa(odd_loss, params, batch, key=key, num_directions=2, sampler=zo.sphere())
    grads = zo.materialize(est, params)
    alone = {"kernel": params["kernel"]}
    other = zo.spsa(
        lambda alone: odd_loss(params | alone, batch),
        alone,
        key=key,
        num_directions=2,
        sampler=zo.sphere(),
    )
    np.testing.assert_array_equal(grads["kernel"], zo.materialize(other, alone)["kernel"])
    assert grads["function"] is grads["name"] is None
    assert grads["count"] == grads["rate"] == grads["depth"] == 0
    assert grads["empty"].shape == (0, 4)


def test_complex_parameters_are_refused_by_path():
    params = {"real": jnp.ones(2), "inner": {"phase": jnp.ones(2, jnp.complex64)}}

    def loss(params, batch=None):
        return params["real"].sum() + jnp.abs(params["inner"]["phase"]).sum()

    for call in (
        lambda **o: zo.spsa(loss, params, key=jax.random.key(0), **o),
        lambda **o: zo.mezo(0.1, **o).init(params, jax.random.key(0)),
        lambda **o: zo.scale_by_spsa(**o).init(params),
    ):
        with pytest.raises(ValueError, match=r"inner\.phase: .*complex64"):
            call()
        call(select="real")
