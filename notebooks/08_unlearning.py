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
# # What unlearning costs
#
# A model learns facts about fictional people and is then asked to forget some of them. The measure
# of success is a second model that was never told. This notebook makes both from the small model
# that comes with jaxlm, unlearns by NPO, and compares.
#
# It runs on a laptop CPU without a network. `pip install 'jaxlm[notebooks]'` brings what it needs.

# %%
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import jaxlm
from jaxlm import unlearning
from jaxlm.data import ForgetConfig
from jaxlm.data.facts import people
from jaxlm.evaluation import UnlearningData, unlearning_report

QUICK = os.environ.get("JAXLM_QUICK") == "1"
COUNT, STEPS, UNLEARN = (6, 6, 4) if QUICK else (30, 250, 30)

# %% [markdown]
# ## People
#
# Each person has a text and four questions. Nobody has heard of them, so a model knows about them
# what it reads here.

# %%
drawn = people(4 * COUNT, seed=0)
print(drawn[0].text)
print(*drawn[0].questions[0])
parts = {"forget": drawn[:COUNT], "retain": drawn[COUNT : 3 * COUNT], "holdout": drawn[3 * COUNT :]}
parts["all"] = parts["forget"] + parts["retain"]
for name, persons in parts.items():
    rows = [row for person in persons for row in person.rows]
    Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

# %% [markdown]
# ## A model that knows them all, and one that was never told
#
# Both train in the same way; the second one without the people to forget.

# %%
form = {"template": "plain", "max_length": 64}
models = {}
for name, file in (("target", "all"), ("retrained", "retain")):
    models[name] = jaxlm.finetune(
        messages={"train": f"{file}.jsonl", "packing": True, **form},
        optimizer={"name": "adam", "learning_rate": 1e-3, "schedule": "linear"},
        steps=STEPS,
        batch_size=8,
        output=f"runs/{name}",
    ).model

# %% [markdown]
# ## Unlearn
#
# NPO pushes the answers below their log-probability at the start, with a force that fades; the term
# `nll` keeps the others. Each step reads as many rows to keep as it forgets.

# %%
run = jaxlm.finetune(
    model="runs/target",
    forget={"train": "forget.jsonl", "retain": "retain.jsonl", **form},
    objective={"name": "unlearn", "loss": "npo", "retain": "nll"},
    optimizer={"name": "adam", "learning_rate": 3e-4},
    steps=UNLEARN,
    batch_size=16,
    eval_every=UNLEARN // 2,
    output="runs/unlearned",
)
models["unlearned"] = run.model
for name in ("forget_loss", "retain_loss"):
    values = run.metrics[f"validation_{name}"]
    measured = ~np.isnan(values)
    plt.plot(run.metrics["step"][measured], values[measured], "o-", label=name.replace("_", " "))
plt.xlabel("step")
plt.ylabel("nats a token")
plt.legend()

# %% [markdown]
# The loss of what is forgotten rises; that of what is kept should not.
#
# ## Measure
#
# VerbMem and KnowMem are ROUGE-L of continuations and of answers, in per cent. PrivLeak compares
# how well the forgotten texts can be told from texts that no model has seen: 0 is the retrained
# model, and -100 means that a model knows them.


# %%
def rows(name, question):
    """Return the texts of a file, or its questions."""
    encoded = ForgetConfig(train=f"{name}.jsonl", **form).load(seed=0).encode(models["target"])
    kept = [row for row in encoded.train.rows if (row.subtask == "question") == question]
    return type(encoded.train)(kept, encoded.train.pad_id)


data = UnlearningData(
    forget=rows("forget", False),
    holdout=rows("holdout", False),
    retain=rows("retain", False),
    forget_questions=rows("forget", True),
    retain_questions=rows("retain", True),
)
base = unlearning_report(models["retrained"], data, max_new_tokens=40)
for name, lm in models.items():
    report = unlearning_report(lm, data, retrain_auc=base["auc_min_k"], max_new_tokens=40)
    shown = ("verbmem", "knowmem_forget", "utility", "privleak")
    print(f"{name:10}", "  ".join(f"{key} {report[key]:6.1f}" for key in shown))

# %% [markdown]
# Look for the price: how much lower is *utility* than that of the target, and is *privleak* nearer
# to 0, or already beyond it?
#
# ## By subtraction
#
# A task vector needs no loss of its own: a model that is trained further on the people to forget
# says what to subtract.

# %%
reinforced = jaxlm.finetune(
    model="runs/target",
    messages={"train": "forget.jsonl", "packing": True, **form},
    optimizer={"name": "adam", "learning_rate": 1e-3},
    steps=UNLEARN,
    batch_size=8,
    output="runs/reinforced",
).model
target = jaxlm.from_pretrained("runs/target")
for alpha in (1, 4):
    moved = unlearning.task_vector(target.params, target.params, reinforced.params, alpha)
    report = unlearning_report(
        target, data, params=moved, retrain_auc=base["auc_min_k"], max_new_tokens=40
    )
    print(f"alpha {alpha}", "  ".join(f"{key} {report[key]:6.1f}" for key in shown))

# %% [markdown]
# ## Further
#
# [The page](../docs/unlearning.md) has all losses and measures. The study `muse` compares sixteen
# methods at the same amount of forgetting, and `jaxlm.topics` removes documents exactly.
