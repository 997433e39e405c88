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
# # Choosing training data by its gradients
#
# A step of training on an example moves the parameters along its gradient, or along what Adam makes
# of that. If this is the way that a target's loss falls, too, then the example helps the target.
# LESS scores every training example so, and trains on the best few per cent. This notebook computes
# such scores on real text, looks at what they choose, and checks the parts they are made of.
#
# [docs/selection.md](../docs/selection.md) has the formulas,
# [docs/results/selection.md](../docs/results/selection.md) the measured tables.

# %%
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxlm
from jaxlm import influence, peft
from jaxlm.data import PaddedRows, task_config
from jaxlm.studies.less import SelectionConfig, read_sides
from jaxlm.studies.less_rows import Source, Target
from jaxlm.studies.less_training import Recipe, load_epoch, train
from jaxlm.train.losses import row_losses
from jaxlm.train.optimizers import Adam

QUICK = os.environ.get("JAXLM_QUICK") == "1"
EACH, TARGETS, EPOCHS = (16, 8, 2) if QUICK else (200, 100, 4)

# %% [markdown]
# ## Rows and a target
#
# Three sources: sentences of film reviews with their sentiment, sentences that tell a story or
# judge, and more of the latter, half of whose labels are wrong since they were shuffled. The target
# is to tell a story from a judgement, by a hundred examples that are in none of them.


# %%
def task(name):
    return task_config({"name": name, "max_length": 48})


config = SelectionConfig(
    sources={
        "sentiment": Source(task=task("mr"), rows=EACH),
        "subjectivity": Source(task=task("subj"), rows=EACH),
        "shuffled": Source(task=task("subj"), rows=EACH, skip=EACH, labels="shuffled"),
    },
    target=Target(task=task("subj"), rows=TARGETS),
    recipe=Recipe(
        peft=peft.Lora(rank=8, alpha=16.0, targets=r"attention\.(q|k|v|o)_proj"),
        optimizer=Adam(name="adam", learning_rate=1e-3, schedule="linear"),
        epochs=EPOCHS,
        batch_size=8,
    ),
    output="unused",
)
lm = jaxlm.from_pretrained()
pool, target = read_sides(config, lm)
for row in (pool.rows[0], pool.rows[EACH], target.rows[0]):
    print(row.id, row.text)

# %% [markdown]
# ## A short training
#
# Adapters are trained on a random part of the rows. What is kept at the end of each epoch is the
# parameters, Adam's moments, and the mean learning rate, which weighs the epoch in the score.

# %%
order = np.random.default_rng(0).permutation(len(pool.rows))
part = [pool.rows[place] for place in order[: len(pool.rows) // 2]]
folder = Path(tempfile.mkdtemp())
train(folder, lm, part, config.recipe, seed=0, keep=True)
epochs = [
    load_epoch(folder, lm, len(part), config.recipe, number, seed=0)
    for number in range(1, EPOCHS + 1)
]
print([f"{epoch.weight:.1e}" for epoch in epochs])

# %% [markdown]
# ## Gradient features
#
# The gradient of a row has as many numbers as the adapters, 65,536. A random projection to 2,048
# numbers keeps inner products, and is drawn again from its seed wherever it is needed. Of training
# rows it is Adam's next step that is projected, of targets the gradient.

# %%
losses = row_losses(config.recipe.prepare(lm, 0))
projector = influence.projector("countsketch", 2048)


def features(rows, epoch, *, adam, projector=projector):
    batch = PaddedRows(rows, lm.config.pad_id or 0, "targets").batch(range(len(rows)))
    return influence.gradient_features(
        losses,
        epoch.params,
        batch,
        projector=projector,
        select=peft.LORA,
        adam_state=epoch.opt_state if adam else None,
    )


train_rows = jnp.stack([features(pool.rows, epoch, adam=True) for epoch in epochs])
target_rows = jnp.stack([features(target.rows, epoch, adam=False) for epoch in epochs])
print("checkpoints, rows, numbers:", train_rows.shape, target_rows.shape)

# %% [markdown]
# How well does the projection keep angles? Against cosines of the whole gradients of a few rows:

# %%
few = pool.rows[:16]
whole = np.asarray(features(few, epochs[0], adam=True, projector=None))


def cosines(rows):
    rows = np.asarray(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows @ rows.T)[np.triu_indices(len(rows), 1)]


exact = cosines(whole)
figure, axis = plt.subplots(figsize=(4, 3))
for dim in (128, 2048):
    smaller = influence.projector("countsketch", dim)
    projected = cosines(features(few, epochs[0], adam=True, projector=smaller))
    error = np.sqrt(np.mean((projected - exact) ** 2))
    axis.plot(exact, projected, ".", label=f"{dim} numbers")
    print(f"{dim}: root mean square error {error:.4f}, expected about {dim**-0.5:.4f}")
axis.axline((0, 0), slope=1, color="black", linewidth=0.5)
axis.set(xlabel="cosine of whole gradients", ylabel="of projected ones")
axis.legend()
figure.tight_layout()

# %% [markdown]
# ## Scores, and what they choose
#
# $\mathrm{score}(z) = \sum_E \bar\eta_E \cos(\Gamma(\nabla \ell(z)), \nabla \ell(\text{target}))$,
# with the mean gradient of the targets.

# %%
weights = [epoch.weight for epoch in epochs]
scores = influence.score(train_rows, target_rows, weights)
sources = np.array([row.source for row in pool.rows])
wrong = np.array([row.noise for row in pool.rows])

figure, axis = plt.subplots(figsize=(6, 3))
groups = {name: sources == name for name in ("sentiment", "subjectivity")}
groups |= {"shuffled, right": (sources == "shuffled") & ~wrong, "shuffled, wrong": wrong}
axis.boxplot([scores[chosen] for chosen in groups.values()], orientation="horizontal")
axis.set_yticks(range(1, len(groups) + 1), groups)
axis.set(xlabel="score")
figure.tight_layout()

# %%
documents, queries = ([row.ids for row in side.rows] for side in (pool, target))
ways = {
    "LESS": scores,
    "TracIn": influence.tracin(train_rows, target_rows, weights),
    "BM25": influence.bm25(documents, queries),
    "random": influence.random_scores(jax.random.key(0), len(pool.rows)),
}
print(f"{'of the best tenth':20}" + "".join(f"{name:>16}" for name in groups))
for name, each in ways.items():
    best = influence.select(np.asarray(each), fraction=0.1)
    shares = [chosen[best].mean() for chosen in groups.values()]
    print(f"{name:20}" + "".join(f"{share:16.0%}" for share in shares))

# %% [markdown]
# The best rows have one label, since the mean gradient of a classification task is first of all to
# say a label word more often; `match_answers` of a study takes the best of each label. The best and
# the worst of one label:

# %%
story = np.array([row.text["completion"] == " story" for row in pool.rows])
ranked = [place for place in influence.select(scores, fraction=1) if story[place]]
for place in [*ranked[:3], *ranked[-3:]]:
    row = pool.rows[place]
    print(f"{scores[place]:+.2e} {'WRONG ' if row.noise else ''}{row.text}")

# %% [markdown]
# `jaxlm study study.yaml` does all of this with stores on disk, over several seeds, then trains on
# each choice and measures the target; it goes on where it was stopped.
#
# ## A store
#
# Rows of many examples and checkpoints live on disk, in shards with checksums, and are scored in
# blocks. Eight bits a number are enough for cosines.

# %%
spec = influence.StoreSpec(
    dim=2048, dtype="int8", projection=influence.projection_name(projector), weight=weights[-1]
)
with influence.GradientStore.create(folder / "train", spec) as writer:
    writer.append(np.asarray(train_rows[-1]), [row.id for row in pool.rows])
    writer.commit()
store = influence.GradientStore.open(folder / "train")
last = influence.score(train_rows[-1:], target_rows[-1:], weights[-1:])
coarse = influence.score([np.asarray(store[: len(store)])], target_rows[-1:], weights[-1:])
print(f"{len(store)} rows, correlation with float32 {np.corrcoef(last, coarse)[0, 1]:.6f}")

# %% [markdown]
# ## A model of your own
#
# `gradient_features` takes any loss of one example. For least squares, influence is known: what
# leaving an example out does to the prediction for a target. The inner product of gradients, after
# the inverse of their second moment (TRAK's linear model), foresees it.

# %%
rng = np.random.default_rng(0)
x, noise = rng.normal(size=(40, 3)), rng.normal(size=40)
y = x @ np.array([1.0, -2.0, 0.5]) + 0.3 * noise
question = np.array([[1.0, 1.0, 1.0]])


def fitted(mask):
    return np.linalg.lstsq(x[mask], y[mask], rcond=None)[0]


def output(params, example):
    return jnp.dot(params, example["x"])


theta = jnp.asarray(fitted(np.ones(40, bool)), jnp.float32)
rows = np.asarray(influence.gradient_features(output, theta, {"x": jnp.asarray(x, jnp.float32)}))
asked = np.asarray(
    influence.gradient_features(output, theta, {"x": jnp.asarray(question, jnp.float32)})
)
residual = y - x @ np.asarray(theta)
foreseen = rows @ np.linalg.solve(rows.T @ rows, asked[0]) * residual
true = influence.leave_one_out(lambda mask: question @ fitted(mask), count=40)[:, 0]

figure, axis = plt.subplots(figsize=(4, 3))
axis.plot(true, foreseen, ".")
axis.axline((0, 0), slope=1, color="black", linewidth=0.5)
axis.set(xlabel="what is lost without the example", ylabel="foreseen from gradients")
figure.tight_layout()
print(f"correlation {np.corrcoef(true, foreseen)[0, 1]:.3f}")
