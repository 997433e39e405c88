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
# # Models: load, look inside, score, generate, shard
#
# A model is a configuration, a nested dict of arrays and a tokenizer; what it does are functions of
# that dict. This notebook shows them on the small model that comes with jaxlm, and at its end on a
# folder of your own.
#
# It runs on a laptop CPU without a network. `pip install 'jaxlm[notebooks]'` brings what it
# needs. The first cell simulates eight devices, which the model is divided among further below.

# %%
import tempfile

import jax

jax.config.update("jax_num_cpu_devices", 8)

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

import jaxlm
from jaxlm.core.paths import flatten
from jaxlm.evaluation import generate_text, stream_text
from jaxlm.models.generation import Sampling
from jaxlm.models.scoring import reduce_log_probs
from jaxlm.sharding import batch_sharding, make_mesh, param_shardings

# %% [markdown]
# ## Load
#
# `from_pretrained` takes a folder in the Hugging Face layout or a hub id; without a name it takes
# the shipped model. Every family has the same configuration class, so that its choices can be read
# side by side.

# %%
lm = jaxlm.from_pretrained()
config = lm.config
print(config.family, config.kind, config.head, config.norm, config.positions, config.activation)
print(f"{config.num_layers} layers of width {config.hidden_size}, {config.num_heads} heads")

# %% [markdown]
# ## The tree of parameters
#
# Every parameter has a path. Leaves under `layers` hold all layers, stacked on the first axis: the
# forward pass is one `lax.scan` over them.

# %%
leaves = flatten(lm.params)[0]
for leaf in leaves:
    print(f"{leaf.path:<34}{leaf.value.shape!s:<16}{leaf.value.size:>10,}")
print(f"{'total':<50}{sum(leaf.value.size for leaf in leaves):>10,}")

# %% [markdown]
# Since the parameters are plain arrays, JAX does the rest: here the size of the weights, layer by
# layer.

# %%
kernels = [leaf for leaf in leaves if leaf.path.endswith("kernel")]
figure, axis = plt.subplots(figsize=(6, 2.4))
for leaf in kernels:
    scale = np.sqrt(np.mean(np.square(leaf.value), axis=(1, 2)))
    axis.plot(scale, "o-", markersize=3, label=leaf.path.split(".")[-2])
axis.set(xlabel="layer", ylabel="root mean square", xticks=range(config.num_layers))
axis.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()

# %% [markdown]
# ## Score
#
# `lm.log_probs` gives the log-probability of every token but the first. Logits exist for a block of
# tokens at a time, never for the whole batch. The tokenizer puts `<eos>` first, so that every token
# of a sentence has a score.

# %%
sentences = [
    "the film is one of the best of the year .",
    "the film is one of the year of the best .",
    "film the one is of best the year of the .",
]
batch = lm.tokenizer(sentences, padding=True, padding_side="right", return_tensors="np")
ids, mask = batch["input_ids"], batch["attention_mask"]
log_probs = jax.jit(lm.log_probs)(lm.params, ids, mask)
for sentence, score in zip(sentences, reduce_log_probs(log_probs, mask[:, 1:]), strict=True):
    print(f"{score:8.2f}  {sentence}")

# %%
figure, axis = plt.subplots(figsize=(9, 1.8))
image = axis.imshow(np.where(mask[:, 1:], log_probs, np.nan), cmap="viridis", aspect="auto")
for (row, column), token in np.ndenumerate(ids[:, 1:]):
    word = lm.tokenizer.decode([token]).strip()
    pale = log_probs[row, column] < -5
    axis.text(
        column, row, word, ha="center", va="center", fontsize=8, color="white" if pale else "black"
    )
axis.set(xticks=[], yticks=[])
figure.colorbar(image, label="log-probability")
figure.tight_layout()

# %% [markdown]
# ## Generate
#
# `generate_text` reads a batch of prompts once and then draws token after token in a compiled
# loop. The most likely tokens first, then samples; each carries its tokens and their
# log-probabilities.

# %%
prompts = ["the film is", "an actor who", "i have never"]
for prompt, (sample,) in zip(prompts, generate_text(lm, prompts, max_new_tokens=24), strict=True):
    print(f"{prompt} |{sample.text}  [{sample.finish}, {sample.log_probs.sum():.1f}]")

# %%
sampling = Sampling(temperature=0.8, top_p=0.95)
samples = generate_text(
    lm, prompts, max_new_tokens=24, sampling=sampling, num_samples=2, key=jax.random.key(0)
)
for prompt, row in zip(prompts, samples, strict=True):
    for sample in row:
        print(f"{prompt} |{sample.text}  [{sample.finish}, {sample.log_probs.sum():.1f}]")

# %% [markdown]
# `stream_text` gives the text as it comes, whole characters at a time, and stops at a string. In a
# shell: `jaxlm generate --prompt="the film is" --temperature=0.8`.

# %%
pieces = stream_text(
    lm, "the film is", max_new_tokens=40, sampling=sampling, stop=["."], key=jax.random.key(3)
)
print(*pieces, sep="|")

# %% [markdown]
# With token ids in place of text, `lm.generate` does the same and gives arrays.

# %%
prompt_ids = lm.tokenizer(["the film is"], return_tensors="np")["input_ids"]
found = lm.generate(lm.params, prompt_ids, max_new_tokens=8)
print(found.tokens, found.lengths)

# %% [markdown]
# ## Fewer bits
#
# `bits=8` or `bits=4` keeps matrices as integers with scales, which become floats one layer at a
# time. Every function takes such parameters as they are; MeZO and gradients train their scales,
# biases and norms.

# %%
for bits in (None, 8, 4):
    packed = jaxlm.from_pretrained(bits=bits)
    size = sum(x.nbytes for x in jax.tree.leaves(packed.params)) / 2**20
    scored = jax.jit(packed.log_probs)(packed.params, ids, mask)
    (sample,) = generate_text(packed, ["the film is"], max_new_tokens=12)[0]
    mean = np.mean(scored, where=mask[:, 1:] > 0)
    print(f"{bits or 32!s:>2} bits {size:5.1f} MiB {mean:7.3f} nats a token |{sample.text}")

# %% [markdown]
# ## Shard
#
# A mesh has three axes: `data` copies the model, `fsdp` divides its parameters among devices that
# read different examples, `model` divides each matrix product. Rules place every parameter by its
# path. The functions stay the same: the compiler adds the communication.

# %%
mesh = make_mesh(fsdp=4, model=2, devices=jax.devices("cpu"))
sharded = jax.device_put(lm.params, param_shardings(lm.params, mesh))
for leaf in flatten(sharded)[0]:
    print(f"{leaf.path:<34}{leaf.value.sharding.spec}")


# %%
def draw_sharding(axis, value, title):
    """Each device's part of the last two axes, at its place."""
    height, width = value.shape[-2:]
    for shard in value.addressable_shards:
        rows, columns = (
            s.indices(n) for s, n in zip(shard.index[-2:], (height, width), strict=True)
        )
        corner, size = (columns[0], rows[0]), (columns[1] - columns[0], rows[1] - rows[0])
        color = plt.get_cmap("tab10")(shard.device.id)
        axis.add_patch(Rectangle(corner, *size, facecolor=color, edgecolor="white"))
        middle = (corner[0] + size[0] / 2, corner[1] + size[1] / 2)
        axis.text(*middle, shard.device.id, ha="center", va="center", color="white")
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[0, width], yticks=[0, height])
    axis.set_title(title, fontsize=9)


layers = sharded["layers"]
figure, axes = plt.subplots(1, 4, figsize=(11, 2.6))
draw_sharding(axes[0], sharded["embed"]["tokens"]["embedding"], "embed.tokens.embedding")
draw_sharding(axes[1], layers["attention"]["q_proj"]["kernel"], "layers.attention.q_proj.kernel")
draw_sharding(axes[2], layers["mlp"]["up_proj"]["kernel"], "layers.mlp.up_proj.kernel")
draw_sharding(axes[3], layers["mlp"]["down_proj"]["kernel"], "layers.mlp.down_proj.kernel")
figure.tight_layout()

# %%
rows = jax.device_put(np.tile(ids[:1], (4, 1)), batch_sharding(mesh))
there = jax.jit(lm.log_probs)(sharded, rows)
here = jax.jit(lm.log_probs)(lm.params, ids[:1])
print("largest difference to one device:", np.abs(there - np.asarray(here)).max())
(sample,) = generate_text(lm.replace(params=sharded), ["the film is"], max_new_tokens=12)[0]
print(sample.text)

# %% [markdown]
# ## The same with your own model
#
# A folder with `config.json`, safetensors and a tokenizer is all it takes: one of yours, or one
# from the hub by its id. Given a mesh, each device loads its own part. Below, a folder is written
# first; put your own in its place. [The table](../docs/models.md) lists the families.

# %%
folder = tempfile.mkdtemp()
jaxlm.save_pretrained(lm, folder)
mine = jaxlm.from_pretrained(folder, param_dtype="bfloat16", mesh=mesh)
print(mine.config.family, mine.params["embed"]["tokens"]["embedding"].sharding.spec)
(sample,) = generate_text(mine, ["the film is"], max_new_tokens=12)[0]
print(sample.text)
