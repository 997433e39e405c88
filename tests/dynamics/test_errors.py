"""Mistakes, each named by its key."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import dynamics
from jaxlm.dynamics import OptHParams, laws, local, momentum, noise, scale_rule, sde, simulation
from tests.helpers.sentences import refused

KEY = jax.random.key(0)
HP = OptHParams(1e-3, b1=0.9, b2=0.99)
TWO = laws.PowerLaw(1.69, np.array([406.4, 410.7]), np.array([0.34, 0.28]))
ONE = laws.PowerLaw(1.0, np.ones(1), np.ones(1))
POINTS = np.arange(1.0, 9.0)
CONSTANTS = sde.AdaptiveConstants.of(0.05, sigma=20, b2=0.995, eps=2)
X = jnp.ones((4, 2))


def simulate(**changed):
    equation = dynamics.sgd_sde(lambda x: x, jnp.ones_like, 0.1)
    given = {"t1": 1.0, "dt0": 0.1, "n_paths": 2, **changed}
    return dynamics.simulate(KEY, equation, 1.0, **given)


def amplified(a, b):
    fn = dynamics.svag_value_and_grad(lambda w, batch: jnp.mean(w * batch["x"]), 2)
    return fn(1.0, a, b)


def local_update(**options):
    sgd, h = optax.sgd(0.1), local.constant_h(1)
    return dynamics.local_update(sgd, h, lambda step: 0.1, total_steps=4, **options)


MISTAKES = {
    "steps": ("dt0", lambda: simulate(dt0=0.0)),
    "too many steps": ("dt0", lambda: simulate(dt0=1e-12)),
    "no time": ("t1", lambda: simulate(t1=0.0)),
    "times that fall": ("save_at", lambda: simulate(save_at=[0.5, 0.2])),
    "a late time": ("save_at", lambda: simulate(save_at=[2.0])),
    "no times": ("save_at", lambda: simulate(save_at=[])),
    "paths": ("n_paths", lambda: simulate(n_paths=0)),
    "solver": ("solver", lambda: simulate(solver="rk4")),
    "noise": ("noise", lambda: sde.as_operator(jnp.ones(2), jnp.ones(3))),
    "noise of a tree": ("noise", lambda: sde.as_operator({"a": 1.0}, {"b": jnp.ones(3)})),
    "a decay below 0": ("c2", lambda: CONSTANTS.at(5.0).b2),
    "no decay": ("c1", lambda: CONSTANTS.b1),
    "Adam's constants": ("c1", lambda: sde.adam_sde(abs, abs, abs, CONSTANTS)),
    "references": ("reference", lambda: simulation.weak_error(X, [1.0], [abs, abs])),
    "l": ("l", lambda: dynamics.svag(0.5)),
    "kind": ("kind", lambda: dynamics.svag(2, "lion")),
    "amplification": ("amplification", lambda: dynamics.svag_coefficients(0)),
    "infinite": ("amplification", lambda: dynamics.svag_value_and_grad(jnp.sum, np.inf)),
    "sizes of halves": ("batch_b", lambda: amplified({"x": X}, {"x": X[:3]})),
    "fields of halves": ("batch_b", lambda: amplified({"x": X}, {"x": X, "y": X})),
    "an odd batch": ("batch.x", lambda: dynamics.split_halves({"x": X[:3]})),
    "rule": ("rule", lambda: scale_rule("cubic", 2, HP)),
    "k": ("k", lambda: scale_rule("linear", 0, HP)),
    "b1": ("b1", lambda: OptHParams(0.1, b1=1.0)),
    "b2": ("b2", lambda: OptHParams(0.1, b2=-0.1)),
    "lr": ("lr", lambda: OptHParams(-1)),
    "step law": ("N", lambda: laws.step_law(0, 1e9)),
    "few points": ("loss", lambda: laws.fit_chinchilla(POINTS[:4], POINTS[:4], POINTS[:4])),
    "x of 0": ("x", lambda: laws.fit_power_law(POINTS - 1, POINTS)),
    "a loss of nan": ("loss", lambda: laws.fit_power_law(POINTS, POINTS * np.nan)),
    "lengths": ("x", lambda: laws.fit_power_law(POINTS, POINTS[:3])),
    "delta": ("delta", lambda: laws.fit_power_law(POINTS, POINTS, delta=0.0)),
    "two variables": ("second", lambda: laws.crossover(ONE, TWO)),
    "ends": ("high", lambda: laws.crossover(ONE, ONE, low=2.0, high=1.0)),
    "knots": ("tokens", lambda: laws.average_params([0, 1, 0.5], [1.0, 1.0, 1.0])),
    "sizes": ("params", lambda: laws.average_params([0, 1], [1.0, 0.0])),
    "beta": ("beta", lambda: momentum.sgdm(0.1, 1.0)),
    "form": ("form", lambda: momentum.sgdm(0.1, 0.9, "nesterov")),
    "betas": ("beta", lambda: momentum.effective_lr_schedule(0.1, lambda step: step / 2, 3)),
    "one gradient": ("per_batch_grads", lambda: noise.grad_noise_stats({"w": X[:1]})),
    "gradients": ("per_batch_grads", lambda: noise.grad_noise_stats([X, X[:3]])),
    "alpha": ("alpha", lambda: dynamics.qsr(0, 4)),
    "negative": ("beta", lambda: local.linear_h(-1.0)),
    "h_base": ("h_base", lambda: dynamics.qsr(0.1, 0)),
    "h": ("h", lambda: local.constant_h(0)),
    "rate": ("learning rate", lambda: dynamics.qsr(0.1, 1)(0, float("nan"))),
    "a round of 0": ("h_schedule", lambda: local.sync_steps(lambda *_: 0, lambda step: 0.1, 5)),
    "average": ("average", lambda: local_update(average=("state",))),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name):
    key, call = MISTAKES[name]
    with refused(key):
        call()


def test_the_end_of_the_square_root_rule_is_named():
    for k, hp, name, end in ((16, HP, "b1", 10), (10, HP, "b1", 10)):
        with refused("k", f"{name}=", f"(got {k})", f"below {end}"):
            scale_rule("sqrt", k, hp)
    with refused("k", "b2=0.99 fall to 0,", "below 100"):
        scale_rule("sqrt", 100, OptHParams(0.1, b2=0.99))
