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
# # What a preference loss does to both responses
#
# DPO raises the difference of two log-probabilities, and says nothing about either of them alone.
# This notebook trains the small model that comes with jaxlm on preference pairs and watches the
# log-probability of the chosen response, that of the rejected one, and the order of the two.
#
# It runs on a laptop CPU without a network. `pip install 'jaxlm[notebooks]'` brings what it
# needs.

# %%
import json
import os
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxlm
from jaxlm import preference
from jaxlm.data import PairsConfig, load_task, shipped_task
from jaxlm.train.objectives.preference import response_scorer

QUICK = os.environ.get("JAXLM_QUICK") == "1"
STEPS, PAIRS = (8, 64) if QUICK else (60, 300)

# %% [markdown]
# ## Losses are functions of numbers
#
# `chosen` and `rejected` are the log-probabilities of the two responses, c and l in the equations;
# `ref_chosen` and `ref_rejected` are those of the reference model. When training begins, both
# models are the same, and DPO is log 2 for every pair.

# %%
begin = preference.PairScores(
    chosen=jnp.array([-12.0, -20.0]),
    rejected=jnp.array([-15.0, -14.0]),
    ref_chosen=jnp.array([-12.0, -20.0]),
    ref_rejected=jnp.array([-15.0, -14.0]),
)
print("DPO:", preference.loss(begin, "dpo"), " log 2:", np.log(2.0))
print("ranking accuracy:", float(preference.ranking_accuracy(begin)))
print("losses:", ", ".join(preference.LOSSES))

# %% [markdown]
# The first pair is ranked correctly and the second is not, with the same loss. For the second one,
# the rejected response is likelier by k = 6 nats. The trained model ranks it correctly if and only
# if its loss is at most $-\log\sigma(\beta k)$.

# %%
preference.flip_threshold(begin, beta=0.1)

# %% [markdown]
# ## Pairs
#
# The task `subj` labels sentences about films as review or story. The right label is the chosen
# response. Both labels are one token, so length does not tell them apart.

# %%
task = load_task(shipped_task("subj"), seed=0)
words = [" review", " story"]
rows = [
    {
        "prompt": f"{example.fields['text']} this is a",
        "chosen": words[example.label],
        "rejected": words[1 - example.label],
    }
    for example in task.train[:PAIRS]
]
Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
rows[0]

# %% [markdown]
# ## Train, and watch both
#
# Every evaluation of a run on `pairs` measures how the held-out pairs have changed since the start.

# %%
pairs = {"train": "pairs.jsonl", "validation": "hold_out", "num_validation": PAIRS // 4}
run = jaxlm.finetune(
    pairs={**pairs, "max_length": 48},
    objective={"name": "preference", "loss": "dpo", "beta": 0.1},
    optimizer={"name": "adam", "learning_rate": 5e-4},
    peft={"name": "lora", "rank": 8},
    steps=STEPS,
    batch_size=16,
    eval_every=STEPS // 4,
    output="runs/pairs",
)


def curve(name):
    """Return the steps and values of a validation metric."""
    values = run.metrics[f"validation_{name}"]
    measured = ~np.isnan(values)
    return run.metrics["step"][measured], values[measured]


figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for name in ("chosen_change", "rejected_change"):
    left.plot(*curve(name), marker="o", label=name.replace("_", " "))
for name in ("ranking_accuracy", "reward_accuracy", "displaced"):
    right.plot(*curve(name), marker="o", label=name.replace("_", " "))
left.set(xlabel="step", ylabel="nats")
right.set(xlabel="step", ylim=(0, 1))
for axes in (left, right):
    axes.legend()
figure.tight_layout()

# %% [markdown]
# Reward accuracy, which most trainers log, is the share of pairs for which c - l grew. Ranking
# accuracy is the share of pairs whose chosen response is the likelier one. Displaced pairs are
# those whose chosen response is less likely than at the start. Compare how early the first two
# rise, and look for displaced pairs where the mean of the chosen response rises.
#
# To train without gradients, use `optimizer={"name": "mezo", "learning_rate": 2e-4}`.

# %% [markdown]
# ## Which pairs are at risk
#
# CHES compares the sums of the hidden states that predict the two responses. It needs no
# training. Here the responses are one token each, which the same state predicts, so CHES is 0 for
# every pair. With the token that ends a text, the state after the word counts, too.

# %%
lm = jaxlm.from_pretrained()


def ches(config):
    """Return CHES of the first pair."""
    example = config.load(seed=0).encode(lm).train[0]
    (prompt,) = example.input_ids
    sides = []
    for response in example.targets:
        ids = np.array([[*prompt, *response]])
        predicting = np.arange(ids.shape[1] - 1)[None] >= len(prompt) - 1
        sides += [lm.hidden(lm.params, ids)[:, :-1], predicting]
    return float(preference.ches(*sides)[0])


for end in (False, True):
    config = PairsConfig(train="pairs.jsonl", max_length=48, append_eos=end)
    print("with the token that ends a text:" if end else "one token:", ches(config))

# %% [markdown]
# ## Further
#
# `response_scorer(lm)` returns the log-probabilities that all of this is made of, for batches of
# your own loop. [The page](../docs/preference.md) has the studies: displacement on SmolLM2, CHES
# quantiles, and idealized ranking accuracy.

# %%
batch = config.load(seed=0).encode(lm).batch(0, batch_size=4, seed=0)
log_probs, tokens = response_scorer(lm)(lm.params, batch)
log_probs
