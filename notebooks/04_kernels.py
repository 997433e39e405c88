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
# # Fine-tuning as a kernel method
#
# Near its pretrained parameters a model is almost linear in them. If fine-tuning stays near, it
# does what a kernel method does with the kernel of the model's gradients. This notebook computes
# such kernels, solves a task with them, and looks whether fine-tuning really stays near.
#
# [docs/kernels.md](../docs/kernels.md) has the mathematics, the solvers and the measured tables.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxlm import kernels
from jaxlm.data import task_config
from jaxlm.kernels import behaviour, ridge, solve
from jaxlm.studies.kernel_plots import heat_map, spectrum
from jaxlm.studies.kernel_task import Kernels, kernel_task
from jaxlm.studies.kernel_training import Training, fine_tune
from jaxlm.train.optimizers import Adam

QUICK = os.environ.get("JAXLM_QUICK") == "1"
K, TEST = (4, 16) if QUICK else (16, 500)

# %% [markdown]
# ## A function and a few examples
#
# The shipped model says whether a sentence of a review is about the film or tells its story. The
# function is the difference of two logits: those of the label words after the prompt.

# %%
config = task_config(
    {"name": "subj", "k": K, "validation": "hold_out", "num_test": TEST, "max_length": 40}
)
task = kernel_task(None, config, seed=0)
f, theta_0 = task.f, task.lm.params
scores = task.values(jax.jit(f), "test", theta_0)
print(f"{len(task.encoded.train)} training examples, zero-shot {task.accuracy(scores, 'test'):.3f}")

# %% [markdown]
# ## Kernels
#
# $K(x, x') = \langle \nabla f(x), \nabla f(x') \rangle$ is how far a step of gradient descent on
# $x'$ moves $f(x)$. Adam's first steps go along signs, so its kernel is $\langle \nabla f(x),
# \mathrm{sign} \nabla f(x') \rangle$, and the one of two signs its symmetric stand-in. A class
# that the kernel knows is a block on the diagonal.

# %%
x = task.whole("train")
labels = task.labels("train")
found = {kind: kernels.ntk(f, theta_0, x, kind=kind) for kind in ("sgd", "signgd")}

figure, axes = plt.subplots(1, 3, figsize=(11, 3))
for axis, (kind, kernel) in zip(axes, found.items(), strict=False):
    heat_map(kernel, labels, names=task.encoded.labels, axes=axis).set_title(kind)
spectrum(found, axes=axes[2])
figure.tight_layout()

# %% [markdown]
# ## Solving the task
#
# One eigendecomposition gives ridge regression for every ridge, and what each example would be
# predicted to be if it were left out.

# %%
ridges = np.logspace(-5, 1, 13).tolist()
path = ridge.ridge_path(found["sgd"], solve.targets(labels, 1), ridges=ridges)
held_out = (solve.classes(path.leave_one_out[:, 0]) == labels).mean(axis=1)

known = Kernels(task)
on_test = path.predict(known.of("sgd", "test"))[:, 0]
tested = [task.accuracy(values, "test") for values in on_test]

figure, axis = plt.subplots(figsize=(5, 2.8))
axis.semilogx(ridges, held_out, "o-", label="left out")
axis.semilogx(ridges, tested, "o-", label="test")
axis.set(xlabel="ridge, relative to the largest eigenvalue", ylabel="accuracy")
axis.legend()
figure.tight_layout()

# %% [markdown]
# `solve.fit` tries a grid and keeps what is best on validation: ridge regression, logistic
# regression by Newton's method, and a machine for kernels that are not symmetric.


# %%
def split(kind, name):
    return solve.Examples(known.of(kind, name), task.labels(name), known.f0(name))


solvers = {"sgd": solve.Ridge(), "signgd": solve.Logistic()}
solvers["asymmetric_signgd"] = solve.AsymmetricSvm()
for kind, solver in solvers.items():
    fit = solve.fit(split(kind, "train"), split(kind, "validation"), solver)
    print(f"{kind}: {fit.accuracy(split(kind, 'test')):.3f} with {fit.settings}")

# %% [markdown]
# ## Does fine-tuning stay near?
#
# Adam fine-tunes all parameters on the same examples. On the way from $\theta_0$ to where it ends,
# the function and its linearization at $\theta_0$ part; how soon says how far the kernel view
# reaches.

# %%
training = Training(
    optimizer=Adam(name="adam", schedule="linear"),
    learning_rates=(3e-4,) if QUICK else (1e-4, 3e-4),
    steps=8 if QUICK else 200,
    eval_every=4 if QUICK else 50,
    batch_size=4 if QUICK else 8,
)
tuned = fine_tune(task, training, seed=0)


def between(t):
    return jax.tree.map(lambda a, b: a + t * (b - a), theta_0, tuned.params)


f_jit, f_lin = jax.jit(f), jax.jit(behaviour.linearize(f, theta_0))
curves = {"f": f_jit, "linearized": f_lin}
times = np.linspace(0, 1, 2 if QUICK else 6)
values = {
    name: [task.values(function, "test", between(t)) for t in times]
    for name, function in curves.items()
}
accuracies = {name: [task.accuracy(v, "test") for v in each] for name, each in values.items()}

figure, (first, second) = plt.subplots(1, 2, figsize=(8, 3))
for name, each in accuracies.items():
    first.plot(times, each, "o-", label=name)
first.set(xlabel="way from pretrained to fine-tuned", ylabel="test accuracy")
first.legend()
second.plot(values["f"][-1], values["linearized"][-1], ".")
second.axline((0, 0), slope=1, color="black", linewidth=0.5)
second.set(xlabel="f, fine-tuned", ylabel="linearized")
figure.tight_layout()
score = behaviour.linearization_score(
    accuracies["f"][0], accuracies["f"][-1], accuracies["linearized"][-1]
)
print(f"share of the improvement that is recovered: {score}")

# %% [markdown]
# And do features stay? `kernel_drift` follows the kernel along any parameters, here along the same
# way.

# %%
few = jax.tree.map(lambda a: a[:8], x)
drift = behaviour.kernel_drift(lambda p: kernels.ntk(f, p, few), map(between, times))
for t, change in zip(times, drift.from_first, strict=True):
    print(
        f"{t:.1f}: relative change {change.mean:.2f}, in the Frobenius norm "
        f"{change.frobenius:.2f}, cosine {change.alignment:.3f}"
    )

# %% [markdown]
# `kernel_behaviour_report` does all of this and judges it; the study `kernel` does so over
# optimizers, numbers of examples and seeds, and writes the table.
#
# ## A function of your own
#
# `ntk` takes any function with a row for each example. Here the two parameters of a product trade
# places, and the kernel $(a^2 + w^2)\, x x'$ moves with them.


# %%
def product(params, x):
    return params["a"] * params["w"] * x[:, None]


points = [{"a": jnp.array(1.0), "w": jnp.array(1.0 + t)} for t in (0.0, 0.5, 1.0)]
inputs = jnp.arange(1.0, 4.0)
print(kernels.ntk(product, points[0], inputs)[:, 0, :, 0])
moved = behaviour.kernel_drift(lambda p: kernels.ntk(product, p, inputs), points)
print([round(change.frobenius, 3) for change in moved.from_first])  # (a² + w²) / 2 - 1
