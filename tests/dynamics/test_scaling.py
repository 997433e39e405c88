"""Scaling rules: their maps, and that Adam trains alike under the right one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
