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
# # Gradients from forward passes, in pictures
#
# MeZO moves all parameters of a model along a random direction, forth and back, and looks at the
# loss. This notebook shows what such a measurement is worth, what it costs in memory, how its
# successors use it, and how to put the same pieces together for a loss of your own.
#
# [docs/mezo.md](../docs/mezo.md) has the mathematics and a table of all methods.

# %%
import dataclasses
import functools
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxlm
from jaxlm import zo
from jaxlm.data import load_task, prepare_for, shipped_task
from jaxlm.evaluation import accuracy, calibration_offsets, option_scores, score_split
from jaxlm.train.losses import classification_objective

QUICK = os.environ.get("JAXLM_QUICK") == "1"
DIRECTIONS = 16 if QUICK else 256
FORWARDS, POINTS = (18, 1) if QUICK else (1200, 5)

# %% [markdown]
# ## A model, a task, a loss
#
# The shipped model says whether a sentence is subjective or objective. Its preference for one of
# the two label words, seen on unlabelled text, is taken off from the start.

# %%
lm = jaxlm.from_pretrained()
encoded = prepare_for(lm, load_task(shipped_task("subj"), seed=0), max_length=64)
if QUICK:
    encoded = dataclasses.replace(encoded, validation=encoded.validation[:50])
scorer = jax.jit(functools.partial(option_scores, lm.apply, encoded.token_ids))
scores, labels = score_split(scorer, lm.params, encoded, "validation", batch_size=50)
offsets = calibration_offsets(scores)
print(f"zero-shot: {accuracy(scores, labels):.3f}")
print(f"calibrated: {accuracy(scores - offsets, labels):.3f}")

loss_fn = classification_objective(lm.apply, encoded.token_ids, offsets=offsets)
batch = encoded.batch(0, batch_size=32, seed=0)
gradient, _ = jax.jit(jax.grad(loss_fn, has_aux=True))(lm.params, batch)

# %% [markdown]
# ## One direction, one number
#
# Along a direction $z$ the loss has the slope
#
# $$g = \frac{L(\theta + \epsilon z) - L(\theta - \epsilon z)}{2 \epsilon}
# \approx z \cdot \nabla L.$$
#
# For Gaussian $z$ that is a Gaussian number whose standard deviation is the norm of the gradient.

# %%
estimate = jax.jit(
    lambda params, key: zo.spsa(loss_fn, params, batch, key=key, num_directions=DIRECTIONS)
)
est = estimate(lm.params, jax.random.key(0))
slopes = np.array(est.projected_grad)
norm = float(optax.global_norm(gradient))

x = np.linspace(-4 * norm, 4 * norm, 200)
figure, axis = plt.subplots(figsize=(5, 2.6))
axis.hist(slopes, bins=24, density=True, color="0.8")
axis.plot(x, np.exp(-((x / norm) ** 2) / 2) / (norm * np.sqrt(2 * np.pi)))
axis.set(xlabel="projected gradient", yticks=[], title=f"norm of the gradient: {norm:.2f}")
figure.tight_layout()

# %% [markdown]
# ## Many directions, a gradient
#
# `materialize` makes the estimate $\frac1n \sum_j g_j z_j$ of those numbers; the directions are
# drawn again from the key. It points along the gradient only a little: in $d$ dimensions the
# expected cosine is $\sqrt{n / (n + d + 1)}$. Small layers come out no better for being small: the
# slope sees all of them at once. What makes descent work is that every step is right on average.


# %%
def norms(tree):
    """Squared norm of each layer of a tree, and of what is outside of the layers."""
    inside = sum((x**2).reshape(len(x), -1).sum(1) for x in jax.tree.leaves(tree["layers"]))
    rest = {name: part for name, part in tree.items() if name != "layers"}
    return jnp.append(inside, optax.tree.norm(rest, squared=True))


@jax.jit
def cosines(params, est, n):
    """Cosine to the gradient by layer, of the mean of the first n directions."""
    used = jnp.where(jnp.arange(DIRECTIONS) < n, est.projected_grad, 0)
    mean = zo.materialize(dataclasses.replace(est, projected_grad=used), params)
    product = (norms(jax.tree.map(jnp.add, mean, gradient)) - norms(mean) - norms(gradient)) / 2
    return product / jnp.sqrt(norms(mean) * norms(gradient))


figure, axis = plt.subplots(figsize=(6, 2.8))
counts = [1, 4, 16] if QUICK else [1, 16, 256]
for i, n in enumerate(counts):
    found = np.array(cosines(lm.params, est, n))
    places = np.arange(len(found)) + 0.25 * (i - 1)
    axis.bar(places, found, 0.25, label=f"{n} direction{'s' * (n > 1)}")
names = [f"layer {i}" for i in range(lm.config.num_layers)] + ["the rest"]
axis.set_xticks(range(len(names)), names)
axis.axhline(0, color="black", linewidth=0.5)
axis.set(ylabel="cosine to the gradient")
axis.legend()
figure.tight_layout()

# %% [markdown]
# ## Memory
#
# The loss takes a keyword `view`, through which the model reads $W + \epsilon z$ one layer at a
# time, and the update runs in place. So a step lives in the memory of a forward pass. Adam keeps
# activations, a gradient and two moments.


# %%
def peak(step, *args):
    memory = step.lower(*args).compile().memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return (held + memory.temp_size_in_bytes - memory.alias_size_in_bytes) / 2**20


def adam_step(params, state, batch):
    grads, _ = jax.grad(loss_fn, has_aux=True)(params, batch)
    updates, state = adam.update(grads, state, params)
    return optax.apply_updates(params, updates), state


SELECT = "layers|final_norm"
mezo = zo.mezo(1e-4, sampler=zo.rademacher(), select=SELECT)
state, adam = mezo.init(lm.params, jax.random.key(0)), optax.adam(1e-3)
peaks = {
    "forward": peak(jax.jit(loss_fn), lm.params, batch),
    "MeZO": peak(zo.jit_step(mezo, loss_fn), lm.params, state, batch),
    "Adam": peak(jax.jit(adam_step, donate_argnums=(0, 1)), lm.params, adam.init(lm.params), batch),
}
figure, axis = plt.subplots(figsize=(5, 1.6))
axis.barh(list(peaks), list(peaks.values()))
axis.set(xlabel="MiB")
axis.invert_yaxis()
figure.tight_layout()

# %% [markdown]
# ## Methods
#
# Every method is a choice of three pieces: where directions come from, how slopes are measured, and
# what is made of them. LOZO draws matrices of rank 2; FZOO measures one-sided along eight sign
# vectors and divides by the spread of the losses; normalised MeZO (`meazo`) divides by a running
# mean of the slopes' size. They are compared at equal numbers of forward passes.

# %%
METHODS = {
    "MeZO": mezo,
    "LOZO": zo.lozo(1e-4, rank=2, select=SELECT),
    "FZOO": zo.fzoo(1e-3, num_directions=8, select=SELECT),
    "normalised MeZO": zo.meazo(5e-4, sampler=zo.rademacher(), select=SELECT),
}


def train(opt):
    """Forward passes and validation accuracies along a run."""
    step, curve = zo.jit_step(opt, loss_fn), [(0, accuracy(scores - offsets, labels))]
    params, steps = jax.tree.map(jnp.copy, lm.params), FORWARDS // opt.forwards
    state = opt.init(params, jax.random.key(0))
    for i in range(1, steps + 1):
        params, state, _ = step(params, state, encoded.batch(i, batch_size=32, seed=0))
        if i % (steps // POINTS) == 0:
            found, _ = score_split(scorer, params, encoded, "validation", batch_size=50)
            curve.append((i * opt.forwards, accuracy(found - offsets, labels)))
    return curve


figure, axis = plt.subplots(figsize=(6, 3))
for name, opt in METHODS.items():
    begin = time.perf_counter()
    curve = train(opt)
    print(f"{name}: {curve[-1][1]:.3f}, {time.perf_counter() - begin:.0f} seconds")
    axis.plot(*zip(*curve, strict=True), "o-", label=name)
axis.set(xlabel="forward passes", ylabel="validation accuracy")
axis.legend()
figure.tight_layout()

# %% [markdown]
# One run of each with one learning rate says little about which is best; `docs/mezo.md` says what
# each is for.
#
# ## Use it on your own loss
#
# Any `loss_fn(params, batch)` of a pytree will do.


# %%
def my_loss(params, batch):
    x, y = batch
    hidden = jax.nn.tanh(x @ params["first"])
    return jnp.mean((hidden @ params["second"] - y) ** 2)


keys = jax.random.split(jax.random.key(1), 3)
mine = {
    "first": jax.random.normal(keys[0], (4, 16)) / 2,
    "second": jax.random.normal(keys[1], (16,)) / 4,
}
x = jax.random.normal(keys[2], (256, 4))
data = (x, jnp.sin(x[:, 0]))

# %% [markdown]
# `zeroth_order` takes the three pieces, and each is swapped by one line.

# %%
pieces = {"estimator": zo.central, "sampler": zo.gaussian(), "rule": zo.rules.sgd()}
choices = {
    "MeZO": pieces,
    "signs": pieces | {"sampler": zo.rademacher()},
    "low rank": pieces | {"sampler": zo.low_rank(2)},
    "one-sided": pieces | {"estimator": zo.one_sided},
    "exact slopes": pieces | {"estimator": zo.forward_gradient},
    "momentum": pieces | {"rule": zo.rules.replayed_momentum(0.9)},
}

for name, chosen in choices.items():
    opt = zo.zeroth_order(2e-2, num_directions=4, **chosen)
    step = zo.jit_step(opt, my_loss)
    params, state = jax.tree.map(jnp.copy, mine), opt.init(mine, jax.random.key(2))
    for _ in range(5 if QUICK else 500):
        params, state, info = step(params, state, data)
    print(f"{name:<13} loss {info.loss:.3f}, {opt.forwards} forward passes a step")
