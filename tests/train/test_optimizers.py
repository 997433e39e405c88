"""The optimizers that a configuration names, against optax's own."""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import zo
from jaxlm.core.errors import UserError
from jaxlm.train.first_order import Group
from jaxlm.train.optimizers import OPTIMIZERS, Adam, Mezo, Muon, ScheduleFree, Sgd, decay_mask
from jaxlm.train.state import Program, first_order, method
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


BITWISE = {
    "lion": optax.lion(0.125, weight_decay=0.0),
    "lion decayed": optax.lion(0.125, weight_decay=0.25, mask=decay_mask),
    "adafactor": optax.adafactor(
        0.125, min_dim_size_to_factor=2, momentum=0.5, clipping_threshold=None
    ),
    "rmsprop": optax.rmsprop(0.125, centered=True, momentum=0.5),
}
OWN = {
    "lion decayed": {"weight_decay": 0.25},
    "adafactor": {"min_dim_size_to_factor": 2, "momentum": 0.5, "clipping_threshold": None},
    "rmsprop": {"centered": True, "momentum": 0.5},
}


@pytest.mark.parametrize("row", BITWISE)
def test_derived_optimizers_are_bitwise_those_of_optax(row):
    """The rate is a power of 2: it multiplies at another place, which then rounds nothing."""
    name = row.split()[0]
    ours = OPTIMIZERS[name](name=name, learning_rate=0.125, **OWN.get(row, {})).transform(4)
    for a, b in zip(*map(jax.tree.leaves, (descend(ours), descend(BITWISE[row]))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_schedule_free_is_evaluated_at_the_average():
    config = ScheduleFree(learning_rate=0.05, warmup=2, clip=2.0)
    theirs = optax.chain(
        optax.clip_by_global_norm(2.0), optax.contrib.schedule_free_adamw(0.05, warmup_steps=2)
    )

    def loss_fn(params, batch):
        return batch * sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(params)), {}

    ours = method(config, loss_fn, 6)
    state = ours.start(PARAMS, jax.random.key(0))
    y, opt_state = PARAMS, theirs.init(PARAMS)
    for _ in range(6):
        params, inner, info = ours.step(*state, jnp.float32(1.0))
        state = type(state)(params, inner)
        loss, grads = jax.value_and_grad(lambda p: loss_fn(p, 1.0)[0])(y)
        np.testing.assert_allclose(info["loss"], loss, rtol=1e-5)
        updates, opt_state = theirs.update(grads, opt_state, y)
        y = optax.apply_updates(y, updates)
    wanted = optax.contrib.schedule_free_eval_params(opt_state[1], y)
    for a, b in zip(*map(jax.tree.leaves, (state.params, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_groups_have_rates_and_decays_of_their_own():
    groups = (
        Group(select="^embed", learning_rate=0.02),
        Group(select="bias$|scale$", weight_decay=0.0),
        Group(select="norm", learning_rate=0.0),  # the group before has it all
    )
    config = Adam(
        learning_rate=0.1, schedule="cosine", weight_decay=0.3, clip=0.5, groups=groups[:2]
    )
    rates = [optax.cosine_decay_schedule(peak, 4) for peak in (0.02, 0.1)]
    labels = {
        "embed": {"tokens": {"embedding": "slow"}},
        "layers": {"attention": {"q_proj": {"kernel": "usual", "bias": "bare"}}},
        "final_norm": {"scale": "bare"},
    }
    parts = {
        "slow": optax.adamw(rates[0], weight_decay=0.3),
        "usual": optax.adamw(rates[1], weight_decay=0.3),
        "bare": optax.adam(rates[1]),
    }
    theirs = optax.chain(optax.clip_by_global_norm(0.5), optax.partition(parts, labels))
    for a, b in zip(
        *map(jax.tree.leaves, (descend(config.transform(4)), descend(theirs))), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    with pytest.raises(UserError, match=r"^optimizer\.groups\[2\]\.select: selects none"):
        dataclasses.replace(config, groups=groups).labels(PARAMS)
    with pytest.raises(UserError, match=r"^optimizer\.groups: a scaling rule changes one"):
        config.hparams(4)
    frozen = descend(Adam(groups=(Group(select="embed", learning_rate=0.0),)).transform(4))
    np.testing.assert_array_equal(
        frozen["embed"]["tokens"]["embedding"], PARAMS["embed"]["tokens"]["embedding"]
    )


PEAK, FLOOR, STEPS = 0.5, 0.1, 40


def closed(schedule, step, warmup):
    """The learning rates of 40 steps, of which wsd takes the last 8 to fall."""
    if step < warmup:
        return PEAK * step / warmup
    done = (step - warmup) / (STEPS - warmup)
    return (
        PEAK
        * {
            "constant": 1.0,
            "linear": 1 - (1 - FLOOR) * done,
            "cosine": FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2,
            "wsd": 1 - (1 - FLOOR) * max(0.0, (step - 32) / 8),
            "inverse_sqrt": max(
                FLOOR, math.sqrt(max(warmup, 1) / (max(warmup, 1) + step - warmup))
            ),
        }[schedule]
    )


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (6, 6), (0.1, 4)])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
def test_schedules_are_their_closed_forms(schedule, warmup, steps):
    config = Mezo(learning_rate=PEAK, schedule=schedule, warmup=warmup, floor=FLOOR)
    places = [0, 1, 3, 4, 6, 20, 31, 33, 36, 39]
    wanted = [closed(schedule, step, steps) for step in places]
    rate = config.rate(STEPS)
    found = [rate(step) if callable(rate) else rate for step in places]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(config.rates(STEPS)[places], wanted, rtol=1e-12)
    assert config.needs_steps == (schedule not in ("constant", "inverse_sqrt") or warmup == 0.1)


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
        ("adamw", "warmup", 2.5),
        ("mezo", "floor", 1.5),
        ("lion", "b2", 1.0),
        ("adafactor", "clipping_threshold", -1.0),
        ("rmsprop", "momentum", 1.0),
        ("schedule_free_adamw", "b1", 0.0),
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
