# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Training as a stochastic process
#
# A step of training is a small move with noise on it, and many of them look like a stochastic
# differential equation. Where they do, the equation says how learning rate, batch size and
# momentum trade. This page shows where they do: each cell begins with the numbers to move.
#
# [docs/dynamics.md](../docs/dynamics.md) has the equations, and what came out on language models.

# %%
import dataclasses
import os
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxlm import dynamics
from jaxlm.core.errors import UserError

QUICK = os.environ.get("JAXLM_QUICK") == "1"
PATHS = 500 if QUICK else 20_000

# %% [markdown]
# ## SVAG: from the optimizer to its equation
#
# SGD on $f(x) = x^2 / 2$ with gradients $x + \xi$. SVAG takes l steps in place of one, of size
# $\eta / l$ and with noise of l times the variance: the equation is the limit, and l = 1 is SGD.
# With a large η they differ; move it down, and they agree.

# %%
ETA, L, STEPS, SIGMA = 0.8, (1, 2, 8), 6, 1.0

steps = np.arange(1, STEPS + 1)
figure, axis = plt.subplots(figsize=(5, 3.2))
for l in L:
    svag = dynamics.svag(l)
    x = dynamics.run_optimizer(
        jax.random.key(0),
        optax.sgd(ETA * svag.lr_mult),
        lambda x: x,
        jnp.ones_like,
        jnp.zeros(()),
        l * STEPS,
        sigma=SIGMA * svag.amplification**0.5,
        n_paths=PATHS,
        save_at=l * steps,
    )
    axis.plot(ETA * steps, jnp.var(x, axis=0), "o-", label=f"l = {l}")
_, variance = dynamics.simulation.ou_moments(1.0, ETA * SIGMA**2, ETA * steps, 0.0)
axis.plot(ETA * steps, variance, "k--", label="equation")
axis.set(xlabel="time, steps times learning rate", ylabel="variance of x")
axis.legend()
# %% [markdown]
# ## Scaling rules: a batch k times as large
#
# Adam on a quadratic whose gradients are mostly noise, over the same number of examples. The
# square-root rule follows from the equation of Adam: it changes the learning rate, both betas and
# ε together.

# %%
K, B1, B2, RATE, STEPS, NOISE = 16, 0.99, 0.999, 1e-2, 1600, 10.0

curvature = jnp.linspace(0.5, 1.5, 4)
base = dynamics.OptHParams(RATE, b1=B1, b2=B2, steps=STEPS)
runs = {"k = 1": (1, base)}
runs |= {f"{rule}, k = {K}": (K, dynamics.scale_rule(rule, K, base)) for rule in ("sqrt", "linear")}
runs[f"unchanged, k = {K}"] = (K, dynamics.scale_rule("none", K, base))
figure, axis = plt.subplots(figsize=(5, 3.2))
for name, (k, hp) in runs.items():
    steps = np.linspace(hp.steps / 20, hp.steps, 20).astype(int)
    x = dynamics.run_optimizer(
        jax.random.key(0),
        optax.adam(hp.lr, hp.b1, hp.b2, hp.eps),
        lambda x: curvature * x,
        jnp.ones_like,
        jnp.ones(4),
        hp.steps,
        sigma=NOISE / k**0.5,
        n_paths=PATHS // 20,
        save_at=steps,
    )
    axis.plot(k * steps, jnp.sum(curvature * x**2 / 2, -1).mean(0), label=name)
axis.set(xlabel="batches of k = 1", ylabel="loss")
axis.legend()
# %% [markdown]
# A rule that leaves the range of a beta says so, and where it ends:

# %%
try:
    dynamics.scale_rule("sqrt", 16, dataclasses.replace(base, b1=0.9))
except UserError as error:
    print(error)

# %% [markdown]
# ## Momentum
#
# At a small learning rate SGD with momentum β does what SGD does: the noise of old gradients is not
# averaged away, it arrives later. Where the learning rate is large, it follows the equation for
# longer, as SVAG with $l = (1 + \beta) / (1 - \beta)$ would.

# %%
BETAS, RATES, STEPS = (0.0, 0.5, 0.9), np.linspace(0.05, 1.2, 6), 300


@jax.jit
def variance_at(eta, beta):
    x = dynamics.run_optimizer(
        jax.random.key(0),
        dynamics.momentum.sgdm(lambda step: eta, lambda step: beta),
        lambda x: x,
        jnp.ones_like,
        jnp.zeros(()),
        STEPS,
        n_paths=PATHS,
    )
    return jnp.var(x)


figure, axis = plt.subplots(figsize=(5, 3.2))
for beta in BETAS:
    axis.plot(RATES, [variance_at(eta, beta) for eta in RATES], "o-", label=f"β = {beta}")
axis.plot(RATES, RATES / 2, "k--", label="equation")
axis.set(xlabel="learning rate", ylabel="variance of x in the end")
axis.legend()
# %% [markdown]
# ## Workers that average more and more seldom
#
# The quadratic synchronisation rule lets workers step alone for $H = (\alpha / \eta)^2$ steps, so
# that communication falls as the learning rate does.

# %%
ALPHA, H, PEAK, STEPS = 0.0175, 4, 8e-3, 20_000

rate = optax.cosine_decay_schedule(PEAK, STEPS)
figure, axis = plt.subplots(figsize=(5, 3.2))
rules = {"QSR": dynamics.qsr(ALPHA, H), "linear": dynamics.local.linear_h(ALPHA, H)}
rules[f"H = {H}"] = dynamics.local.constant_h(H)
for name, rule in rules.items():
    ends = dynamics.local.sync_steps(rule, rate, STEPS)
    share = dynamics.local.comm_fraction(rule, rate, STEPS)
    axis.semilogy(ends, np.diff(ends, prepend=0), label=f"{name}: {100 * share:.1f} % of averages")
axis.set(xlabel="step", ylabel="H")
axis.legend()
# %% [markdown]
# ## On a language model
#
# All of this is a key of a run. Here the shipped model is fine-tuned on movie reviews, and the
# noise of its gradients is measured on the way: N/G is above 1 where noise is larger than the
# gradient, as scaling rules ask. Here it is below: this batch is large for this task.

# %%
from jaxlm.data import task_config
from jaxlm.train.dynamics import Noise
from jaxlm.train.finetuning import FinetuneConfig, finetune
from jaxlm.train.optimizers import Adam

with tempfile.TemporaryDirectory() as folder:
    summary = finetune(
        FinetuneConfig(
            task=task_config({"name": "mr", "validation": None, "num_test": 100, "max_length": 40}),
            optimizer=Adam(learning_rate=3e-4),
            dynamics=Noise(parts=4),
            steps=4 if QUICK else 100,
            batch_size=16,
            output=f"{folder}/run",
        )
    )
summary["dynamics"]

# %% [markdown]
# On the command line, and for a whole study with its table and figure:
#
# ```bash
# jaxlm finetune --task.name=mr --optimizer.name=adam --dynamics.name=noise --output=runs/noise
# jaxlm finetune --task.name=mr --optimizer.name=adam --dynamics.name=svag --dynamics.l=4 \
#     --output=runs/svag
# jaxlm study configs/studies/svag.yaml
# ```
#
# In a training loop of your own, `dynamics.svag_value_and_grad(loss_fn, amplification)` takes the
# place of `jax.value_and_grad(loss_fn)`, and `dynamics.svag(l, kind).hparams(hp)` says what the
# optimizer is to be.
