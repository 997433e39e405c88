"""The optimizers that a configuration names, against optax's own."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import zo
from jaxlm.core.errors import UserError
from jaxlm.train.optimizers import OPTIMIZERS, Adam, Mezo, Muon, Sgd, decay_mask
from jaxlm.train.state import Program, first_order
from jaxlm.train.zeroth_order import ZEROTH_ORDER, configuration

PARAMS = {
    "embed": {"tokens": {"embedding": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)}},
    "layers": {
        "attention": {
            "q_proj": {
                "kernel": jnp.linspace(-2.0, 1.0, 18).reshape(2, 3, 3) ** 3,
                "bias": jnp.full((2, 3), 0.5),
            }
        }
    },
    "final_norm": {"scale": jnp.ones(3)},
}
MATRICES = {
    "embed": {"tokens": {"embedding": None}},
    "layers": {
        "attention": {"q_proj": {"kernel": optax.contrib.MuonDimensionNumbers(1, 2), "bias": None}}
    },
    "final_norm": {"scale": None},
}


def descend(transform, steps=4):
    params, state = PARAMS, transform.init(PARAMS)
    for _ in range(steps):
        grads = jax.grad(lambda p: sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(p)))(params)
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Sgd(learning_rate=0.1), optax.sgd(0.1)),
        (Sgd(learning_rate=0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)),
        (Adam(learning_rate=0.1), optax.adam(0.1)),
        (
            Adam(learning_rate=0.1, weight_decay=0.3),
            optax.adamw(0.1, weight_decay=0.3, mask=decay_mask),
        ),
        (
            Adam(learning_rate=0.1, clip=0.5),
            optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1)),
        ),
        (
            Muon(learning_rate=0.1, adam_learning_rate=0.02),
            optax.contrib.muon(
                0.1, adam_learning_rate=0.02, muon_weight_dimension_numbers=MATRICES
            ),
        ),
    ],
    ids=["sgd", "momentum", "adam", "adamw", "clip", "muon"],
)  # fmt: skip
def test_transform_is_that_of_optax(ours, theirs):
    for a, b in zip(
        *map(jax.tree.leaves, (descend(ours.transform(4)), descend(theirs))), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_rates_rise_in_warmup_and_fall_linearly():
    rate = Adam(learning_rate=1.0, schedule="linear", warmup=4).rate(10)
    np.testing.assert_allclose([rate(t) for t in (0, 2, 4, 7, 10)], [0, 0.5, 1, 0.5, 0], atol=1e-6)
    rate = Adam(learning_rate=1.0, warmup=4).rate(10)
    np.testing.assert_allclose([rate(t) for t in (0, 2, 4, 10)], [0, 0.5, 1, 1], atol=1e-6)
    assert Mezo(learning_rate=0.5).rate(10) == 0.5


def test_weight_decay_spares_biases_and_norms():
    mask = decay_mask(PARAMS)
    assert mask["embed"]["tokens"]["embedding"]
    assert mask["layers"]["attention"]["q_proj"] == {"kernel": True, "bias": False}
    assert not mask["final_norm"]["scale"]


def test_a_sampler_is_refused_by_name():
    with pytest.raises(UserError, match=r"^optimizer\.sampler: not known"):
        OPTIMIZERS["mezo"](sampler="normal")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("mezo", "eps", 0.0),
        ("mezo", "eps", float("nan")),
        ("mezo", "num_directions", 0),
        ("mezo", "learning_rate", -1.0),
        ("mezo_momentum", "momentum", 1.0),
        ("mezo_adam", "horizon", 10**9),
        ("fzoo", "num_directions", 1),
        ("lozo", "rank", 0),
        ("zo_muon", "vector_scale", -1.0),
        ("adam", "b1", 1.0),
        ("sgd", "momentum", -0.1),
        ("muon", "warmup", -1),
        ("adamw", "clip", 0.0),
    ],
)
def test_a_bad_number_is_refused_by_name(name, field, value):
    with pytest.raises(UserError, match=rf"^optimizer\.{field}: must be "):
        OPTIMIZERS[name](name=name, **{field: value})


def test_a_configuration_is_that_of_its_method():
    assert {*ZEROTH_ORDER} <= {*zo.__all__}
    for name, kind in ZEROTH_ORDER.items():
        keys = inspect.signature(getattr(zo, name)).parameters
        config = kind()
        for key in keys.keys() - {"learning_rate", "sampler", "decay", "mesh", "floor"}:
            assert getattr(config, key) == keys[key].default
        assert config.build(10).settings == config.build(10).settings
        assert config.build(10).settings["learning_rate"][0] == np.float32(config.learning_rate)

    def lacking(learning_rate, *, eps=1e-3): ...

    with pytest.raises(TypeError, match="lacking lacks the arguments num_directions, rounding"):
        configuration(lacking, 1e-3)

    def unnamed(
        learning_rate,
        *,
        eps=1e-3,
        num_directions=1,
        select=None,
        weight_decay=0.0,
        rounding="nearest",
        sampler=dataclasses,
    ):
        """The default of a sampler must have a name that a file can give."""

    with pytest.raises(TypeError, match="unnamed: sampler must default to one of"):
        configuration(unnamed, 1e-3)


def test_first_order_gives_state_to_what_is_selected_only():
    def loss_fn(params, batch):
        return jnp.sum(params["a"] ** 2 + params["b"] ** 2) * batch, {}

    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    method = first_order(optax.adam(0.1), loss_fn, select="a")
    state = method.init(params, jax.random.key(0))
    assert len(jax.tree.leaves(state)) == 3
    moved, state, info = method.step(params, state, jnp.ones(()))
    np.testing.assert_allclose(moved["a"], 0.9 * jnp.ones(3), rtol=1e-5)
    np.testing.assert_array_equal(moved["b"], params["b"])
    assert info["loss"] == 6.0


def test_a_program_counts_what_it_keeps():
    program = Program(lambda x, y: (x + y, x @ y.T @ x), moves=True)
    x = jnp.ones((64, 64))
    program(x, jnp.ones((64, 64)))
    size = 64 * 64 * 4
    assert 3 * size <= program.peak_bytes <= 6 * size
    with pytest.raises(RuntimeError, match="deleted"):
        x.block_until_ready()
    small = program.peak_bytes
    program(jnp.ones((8, 8)), jnp.ones((8, 8)))
    assert program.peak_bytes == small
