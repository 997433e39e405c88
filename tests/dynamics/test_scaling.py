"""Scaling rules: their maps, what they refuse, and that Adam trains alike under the right one."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import dynamics
from jaxlm.core.errors import UserError
from jaxlm.dynamics import OptHParams, scale_rule

HP = OptHParams(
    1e-3, b1=0.9, b2=0.99, eps=1e-6, weight_decay=0.1, steps=900, warmup=50, decay=(300, 600)
)


def test_the_maps():
    found = scale_rule("sqrt", 4, HP)
    np.testing.assert_allclose(
        dataclasses.astuple(found)[:5], [2e-3, 0.6, 0.96, 5e-7, 0.2], rtol=1e-13
    )
    assert (found.steps, found.warmup, found.decay) == (225, 12, (75, 150))
    stretched = dataclasses.replace(HP, steps=225, warmup=12, decay=(75, 150))
    assert scale_rule("none", 4, HP) == stretched
    assert scale_rule("linear", 4, HP) == dataclasses.replace(stretched, lr=4e-3)
    for rule in ("linear", "sqrt", "none"):
        assert scale_rule(rule, 1, HP) == HP


def test_a_smaller_batch_undoes_a_larger():
    back = scale_rule("sqrt", 1 / 8, scale_rule("sqrt", 8, HP))
    np.testing.assert_allclose(
        dataclasses.astuple(back)[:5], dataclasses.astuple(HP)[:5], rtol=1e-12
    )


def test_what_is_absent_stays_absent():
    plain = scale_rule("sqrt", 16, OptHParams(0.1, b1=0.0, b2=0.999))
    assert (plain.b1, plain.steps) == (0.0, None)
    assert scale_rule("sqrt", 16, OptHParams(0.1)).b1 is None
    assert dynamics.max_scale(OptHParams(0.1)) == math.inf
    np.testing.assert_allclose(dynamics.max_scale(OptHParams(0.1, 0.0, 0.999)), 1000)
    np.testing.assert_allclose(dynamics.max_scale(HP), 10)


def test_schedules_keep_their_epochs():
    schedule = optax.linear_schedule(0.0, 1.0, 100)
    larger = dynamics.scale_schedule(schedule, 4, 2)
    assert [float(larger(k)) for k in (0, 10, 25)] == pytest.approx([0, 0.8, 2])
    smaller = dynamics.scale_schedule(schedule, 1 / 3, 1 / 3)
    assert [float(smaller(k)) for k in (2, 3, 5)] == pytest.approx([0, 0.01 / 3, 0.01 / 3])
    odd = dynamics.scale_schedule(schedule, 2.5, 1)
    assert float(odd(3)) == pytest.approx(0.07)


RUNS, SIGMA, BATCHES = 1024, 10.0, 2000


@functools.partial(jax.jit, static_argnames="k")
def final_losses(noise, settings, k):
    """Loss of Adam after all batches, averaged over runs, k batches in one: for each setting."""
    curvature = jnp.linspace(0.5, 1.5, 4)[:, None]

    def final_loss(setting):
        tx = optax.adam(*setting)

        def step(carry, z):
            x, state = carry
            updates, state = tx.update(curvature * x + SIGMA * z.mean(0), state)
            return (x + updates, state), None

        x = jnp.ones((4, RUNS))
        (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), noise.reshape(-1, k, 4, RUNS))
        return jnp.sum(curvature * x**2 / 2, 0).mean()

    return jax.vmap(final_loss)(settings)


def test_adam_trains_alike_under_the_square_root_rule_alone():
    hp = OptHParams(1e-2, b1=0.99, b2=0.999, eps=1e-8, steps=BATCHES)
    noise = jax.jit(lambda key: jax.random.normal(key, (BATCHES, 4, RUNS)))(jax.random.key(0))

    def losses(k, *variants):
        assert all(each.steps == BATCHES // k for each in variants)
        rows = np.array([[each.lr, each.b1, each.b2, each.eps] for each in variants], np.float32)
        return np.asarray(final_losses(noise, tuple(rows.T), k))

    root, none = scale_rule("sqrt", 16, hp), scale_rule("none", 16, hp)
    by_root, *others = losses(
        16,
        root,
        dataclasses.replace(none, lr=root.lr),
        none,
        dataclasses.replace(root, lr=16 * hp.lr),
        scale_rule("linear", 16, hp),
    )
    flat = np.array([*losses(1, hp), *losses(4, scale_rule("sqrt", 4, hp)), by_root])
    # Another run of the same problem. Standard errors on both sides are 2 % of the loss.
    np.testing.assert_allclose(flat, [0.1436, 0.1464, 0.1479], rtol=4.5 * 0.02 * 2**0.5)
    np.testing.assert_allclose(others[:3], [0.2229, 0.6670, 0.4127], rtol=4.5 * 0.02 * 2**0.5)
    np.testing.assert_allclose(flat, flat[0], rtol=0.04)
    assert min(others) > 1.5 * flat[0]


@pytest.mark.parametrize(
    ("params", "tokens", "lr", "batch"),
    [
        (6e7, 1e9, 2.951e-3, 79_878),
        (4e8, 4e10, 2.368e-3, 656_454),
        (1e9, 1e11, 1.632e-3, 1_107_715),
        (7e9, 1.4e12, 9.166e-4, 4_998_815),
    ],
)
def test_step_law(params, tokens, lr, batch):
    found = dynamics.step_law(params, tokens)
    np.testing.assert_allclose(found, [lr, batch], rtol=5e-4)  # four digits


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: scale_rule("sqrt", 16, HP),
            "k=16 sends b1=0.9 to -0.6, and the square-root rule ends at 0; give k below 10",
        ),
        (
            lambda: scale_rule("sqrt", 10, HP),
            "k=10 sends b1=0.9 to 0, and the square-root rule ends at 0; give k below 10",
        ),
        (
            lambda: scale_rule("sqrt", 100, OptHParams(0.1, b2=0.99)),
            "k=100 sends b2=0.99 to 0, and the square-root rule ends at 0; give k below 100",
        ),
        (
            lambda: scale_rule("cubic", 2, HP),
            "rule='cubic' is not known; give one of linear, sqrt, none",
        ),
        (
            lambda: scale_rule("linear", 0, HP),
            "k=0 is no ratio of batch sizes; give a number above 0",
        ),
        (
            lambda: OptHParams(0.1, b1=1.0),
            "b1=1 is impossible; give 0 <= b1 < 1 or None",
        ),
        (
            lambda: OptHParams(0.1, b2=-0.1),
            "b2=-0.1 is impossible; give 0 <= b2 < 1 or None",
        ),
        (
            lambda: OptHParams(-1),
            "lr=-1 is impossible; give 0 or more",
        ),
        (
            lambda: dynamics.step_law(0, 1e9),
            "N=0 and D=1e+09 must be counts above 0; give parameters and tokens",
        ),
    ],
)
def test_sentences(call, sentence):
    with pytest.raises(UserError) as found:
        call()
    assert str(found.value) == sentence
