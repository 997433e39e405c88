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
# # Fine-tuning with forward passes alone
#
# MeZO estimates the gradient of a language model from two forward passes along a random
# direction, and never stores the direction. This notebook loads the small model that comes with
# jaxlm, asks it a question by a prompt, trains it with MeZO, and looks at the scalars that
# training consists of.
#
# It runs on a laptop CPU without a network. `pip install 'jaxlm[notebooks]'` brings what it
# needs.

# %%
import functools
import os

import jax
import matplotlib.pyplot as plt

import jaxlm
from jaxlm import zo
from jaxlm.data import load_task, prepare_for, shipped_task
from jaxlm.train.losses import classification_objective

QUICK = os.environ.get("JAXLM_QUICK") == "1"
STEPS, NUM_TEST = (12, 100) if QUICK else (600, None)

# %% [markdown]
# ## Load
#
# A model is a configuration, a nested dict of parameters and a tokenizer. `from_pretrained`
# takes a folder in the Hugging Face layout or a hub id; without a name it takes the shipped
# model.

# %%
lm = jaxlm.from_pretrained()
count = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
print(f"{lm.config.family}: {lm.config.num_layers} layers, {count / 1e6:.2f} M parameters")
jax.tree.map(lambda leaf: leaf.shape, lm.params)["layers"]["attention"]

# %% [markdown]
# ## Prompt
#
# A task is sentences, a template and label words. The model's answer is the label word that it
# finds more likely at the end of the prompt.

# %%
task = load_task(shipped_task("subj"), seed=0)
example = task.train[0]
print(task.config.template, list(task.config.labels))
print(example.fields["text"], "->", task.config.labels[example.label])

jaxlm.evaluate(task="subj", split="validation")

# %% [markdown]
# ## MeZO
#
# `jaxlm.finetune` takes the keys of the command `jaxlm finetune`, and returns the summary of the
# run, its metrics and its model. The same call again returns the same result without training.

# %%
run = jaxlm.finetune(
    task={"name": "subj", "max_length": 64, "num_test": NUM_TEST},
    optimizer={
        "name": "mezo",
        "learning_rate": 1e-4,
        "eps": 1e-3,
        "sampler": "rademacher",
        "select": "layers|final_norm",
    },
    steps=STEPS,
    batch_size=32,
    eval_every=STEPS // 4,
)
run.summary["zero_shot"], run.summary["test"]

# %% [markdown]
# Training is two columns of numbers: with the key of the run, the projected gradients determine
# every update.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
run.plot(left)
right.plot(run.metrics["step"], run.metrics["projected_grad"], ".", markersize=2)
right.axhline(0, color="black", linewidth=0.5)
right.set(xlabel="step", ylabel="projected gradient")
figure.tight_layout()

# %% [markdown]
# ## Memory
#
# What the compiled step needs, beside one forward pass and beside one step of backpropagation. The
# objective takes a keyword `view`: through it the model reads `W + eps z` one layer at a time, so
# that no perturbed copy of the parameters exists. The step updates in place.


# %%
def peak_bytes(function, *args, donate=()):
    memory = jax.jit(function, donate_argnums=donate).lower(*args).compile().memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return used + memory.temp_size_in_bytes - memory.alias_size_in_bytes


encoded = prepare_for(lm, task, max_length=64)
batch = encoded.batch(0, batch_size=32, seed=0)
loss_fn = classification_objective(lm.apply, encoded.token_ids)
opt = zo.mezo(learning_rate=1e-4, sampler=zo.rademacher(), select="layers|final_norm")
mezo_step, state = functools.partial(opt.step, loss_fn), opt.init(lm.params, jax.random.key(0))
peaks = {
    "forward": peak_bytes(loss_fn, lm.params, batch),
    "MeZO step": peak_bytes(mezo_step, lm.params, state, batch, donate=(0, 1)),
    "gradient": peak_bytes(jax.grad(loss_fn, has_aux=True), lm.params, batch),
}
figure, axis = plt.subplots(figsize=(5, 1.6))
axis.barh(list(peaks), [value / 2**20 for value in peaks.values()])
axis.set(xlabel="MiB")
axis.invert_yaxis()
figure.tight_layout()

# %% [markdown]
# ## Your own model, your own loss
#
# `zo` knows functions, not models: any `loss_fn(params, batch)` will do. Without a keyword
# `view` it is called on a perturbed copy of the parameters.


# %%
def my_loss(params, batch):
    x, y = batch
    hidden = jax.nn.tanh(x @ params["first"])
    return jax.numpy.mean((hidden @ params["second"] - y) ** 2)


keys = jax.random.split(jax.random.key(1), 3)
mine = {
    "first": jax.random.normal(keys[0], (4, 16)) / 2,
    "second": jax.random.normal(keys[1], (16,)) / 4,
}
x = jax.random.normal(keys[2], (256, 4))
my_opt = zo.mezo(learning_rate=1e-2, num_directions=4)
my_step = zo.jit_step(my_opt, my_loss)
my_state = my_opt.init(mine, jax.random.key(2))
for i in range(50 if QUICK else 500):
    mine, my_state, info = my_step(mine, my_state, (x, jax.numpy.sin(x[:, 0])))
    if i % (10 if QUICK else 100) == 0:
        print(f"step {i}: loss {info.loss:.4f}")
