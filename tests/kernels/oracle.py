"""Kernels by the definition: an explicit Jacobian in float64, and sums in NumPy.

Written without `jaxlm.kernels`. Gradients are dictionaries from (path, layer) to arrays [N, C, p],
the layers of a stack apart.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm import kernels
from jaxlm.core import paths, taps
from jaxlm.models import LanguageModel, ModelConfig, init_params

ADAM = (3, 0.9, 0.99, 1e-3)
"""Steps made, b1, b2, eps."""
KINDS = ("sgd", "signgd", "asymmetric_signgd", "adam")
LABELS = (3, 7, 11)
PAD = 0
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}


def entries(tree, path=()):
    """(path, array) of every leaf of nested dicts."""
    if not isinstance(tree, dict):
        yield ".".join(path), tree
        return
    for name, below in tree.items():
        yield from entries(below, (*path, name))


def jacobian(f, params, x, keep=lambda path: True):
    """(path, layer) -> [N, C, p] in float64, by reverse mode over the whole batch."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), params)
        kept = {path: value for path, value in entries(params) if keep(path)}

        def at(kept, params):
            return f(
                jax.tree_util.tree_map_with_path(
                    lambda path, value: kept.get(".".join(str(key.key) for key in path), value),
                    params,
                ),
                x,
            )

        lowered = jax.jit(jax.jacrev(at)).lower(kept, params)
        found = lowered.compile(compiler_options=FAST_TO_COMPILE)(kept, params)
        result = {}
        for path, value in found.items():
            value = np.asarray(value)
            shape = value.shape[:2]
            if path.startswith("layers."):
                for layer in range(value.shape[2]):
                    result[path, layer] = value[:, :, layer].reshape(*shape, -1)
            else:
                result[path, None] = value.reshape(*shape, -1)
    return result


def signs(gradients, tau):
    """sign(g) of what is above tau max|g| of its leaf, in leaves above tau max|g| of all."""
    result = {}
    largest = {place: np.abs(g).max(-1) for place, g in gradients.items()}
    of_all = np.max(list(largest.values()), axis=0)
    for place, g in gradients.items():
        here = np.abs(g) > tau * largest[place][..., None]
        here &= (largest[place] > tau * of_all)[..., None]
        result[place] = np.sign(g) * here
    return result


def adam(gradients, moments, count, b1, b2, eps):
    """The update of Kingma and Ba at step count + 1, from {(path, layer): (m, v)}."""
    result = {}
    for place, g in gradients.items():
        m, v = (np.asarray(a, np.float64).ravel() for a in moments[place])
        m_hat = (b1 * m + (1 - b1) * g) / (1 - b1 ** (count + 1))
        v_hat = (b2 * v + (1 - b2) * g**2) / (1 - b2 ** (count + 1))
        result[place] = m_hat / (np.sqrt(v_hat) + eps)
    return result


def kernel(first, second, kind, *, tau=1e-12, adam_state=None, trace=False, diagonal=False):
    """[N1, C, N2, C] from gradients; [N1, N2] or [N1, N2, C].

    Args:
      adam_state: (moments, count, b1, b2, eps).
    """
    left = signs(first, tau) if kind == "signgd" else first
    right = {
        "sgd": lambda: second,
        "signgd": lambda: signs(second, tau),
        "asymmetric_signgd": lambda: signs(second, tau),
        "adam": lambda: adam(second, *adam_state),
    }[kind]()
    full = sum(np.einsum("ncp,mdp->ncmd", left[place], right[place]) for place in first)
    if trace:
        return np.einsum("ncmc->nm", full) / full.shape[1]
    return np.einsum("ncmc->nmc", full) if diagonal else full


BASE = {
    "vocab_size": 19,
    "hidden_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_size": 4,
    "intermediate_size": 12,
    "max_positions": 12,
    "embedding_size": 8,
}
CONFIGS = {
    "encoder": ModelConfig(
        family="bert",
        kind="encoder",
        head="mlm",
        activation="gelu",
        positions="learned",
        norm_position="post",
        embedding_norm=True,
        final_norm=False,
        token_types=2,
        **BASE,
    ),
    "decoder": ModelConfig(
        family="gpt2",
        kind="decoder",
        head="lm",
        activation="gelu_tanh",
        positions="learned",
        **BASE,
    ),
    "rotary decoder": ModelConfig(
        family="llama",
        kind="decoder",
        head="lm",
        activation="silu",
        gated_mlp=True,
        norm="rmsnorm",
        positions="rotary",
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        **{**BASE, "num_kv_heads": 1},
    ),
}


@functools.cache
def model(name: str, *, tied: bool = True) -> LanguageModel:
    """A random model whose weights, biases and norms all count; parameters in NumPy, float64."""
    config = dataclasses.replace(CONFIGS[name], tie_embeddings=tied)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: np.asarray(a, np.float64) + 0.3 * rng.standard_normal(a.shape),
        init_params(config, jax.random.key(0)),
    )
    return LanguageModel(config, params, None)


def examples(count: int, length: int = 6, seed: int = 0):
    """Ids with padding on the right, and the position of the last token."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(length - 3, length + 1, count)
    lengths[0] = length
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    ids = rng.integers(1, BASE["vocab_size"], (count, length)).astype(np.int32)
    return {
        "input_ids": np.where(mask, ids, PAD).astype(np.int32),
        "attention_mask": mask,
        "positions": (lengths - 1).astype(np.int32),
    }


def label_logits(lm: LanguageModel, classes: int):
    """f(params, x) -> [N, C]: logits of label words, or for C = 1 a difference of two."""
    words = np.asarray(LABELS[: max(classes, 2)], np.int32)

    def f(params, x, *, tap=None):
        logits = lm.apply(
            params,
            x["input_ids"],
            x["attention_mask"],
            positions=x["positions"],
            token_ids=words,
            tap=tap,
        )
        return logits[:, 1:] - logits[:, :1] if classes == 1 else logits

    return f


def of_dtype(tree, dtype):
    """The tree as arrays of a dtype."""
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a), dtype), tree)


def moments_like(params, seed: int = 5):
    """A tree of first and one of second moments, of the sizes that gradients have."""
    rng = np.random.default_rng(seed)
    draw = lambda a: 0.1 * rng.standard_normal(a.shape)  # noqa: E731
    first = jax.tree.map(draw, params)
    return first, jax.tree.map(lambda a: np.square(draw(a)), params)


def by_place(first, second):
    """{(path, layer): (m, v)} of two trees."""
    result = {}
    for (path, m), (_, v) in zip(entries(first), entries(second), strict=True):
        if path.startswith("layers."):
            result |= {(path, layer): (m[layer], v[layer]) for layer in range(len(m))}
        else:
            result[path, None] = (m, v)
    return result


def kind_of(name: str, params, dtype):
    """A kind as `ntk` takes it; of Adam with its moments somewhere in the state of a chain."""
    if name != "adam":
        return name
    moments = of_dtype(moments_like(params), dtype)
    adam = optax.ScaleByAdamState(jnp.int32(ADAM[0]), *moments)
    return kernels.Adam((optax.EmptyState(), (adam, optax.EmptyState())), *ADAM[1:])


def adam_state(params):
    """The same state as `kernel` takes it."""
    return (by_place(*moments_like(params)), *ADAM)


paths.declare_stacked(
    {
        f"layers.{name}.{part}": 1 + (part == "kernel")
        for name in ("key", "up")
        for part in ("kernel", "bias")
    }
)


def toy(classes: int):
    """Parameters and f of a network with a stack, a shared table, and keys whose bias is useless.

    Compiles in a second; x is {"ids": [N, T], "mask": [N, T]}. Every parameter passes a tap.
    """
    rng = np.random.default_rng(3)
    draw = lambda *shape: 0.7 * rng.standard_normal(shape)  # noqa: E731
    params = {
        "embed": {"table": draw(7, 4)},
        "layers": {
            "key": {"kernel": draw(2, 4, 4), "bias": draw(2, 4)},
            "up": {"kernel": draw(2, 4, 4), "bias": draw(2, 4)},
        },
        "head": {"scale": draw(4), "bias": draw(7)},
    }
    words = np.arange(classes, dtype=np.int32)

    def f(params, x, *, tap=None):
        table, mask = params["embed"]["table"], x["mask"][..., None]
        ids = jnp.asarray(x["ids"])

        def body(h, scanned):
            weights, layer, slices = scanned
            seen = tap if slices is None else dataclasses.replace(tap, layers=slices)

            def dense(name, h):
                path = f"layers.{name}"
                y = h @ weights[name]["kernel"]
                y = taps.apply(seen, f"{path}.kernel", "dense", h, y, layer)
                z = y + weights[name]["bias"][None, None]
                return taps.apply(seen, f"{path}.bias", "bias", y, z, layer)

            scores = jnp.einsum("ntk,nsk->nts", h, dense("key", h)) / 4
            attention = jax.nn.softmax(jnp.where(mask.swapaxes(1, 2) > 0, scores, -1e9), -1)
            return jnp.tanh(dense("up", h + jnp.einsum("nts,nsk->ntk", attention, h))), None

        h = taps.apply(tap, "embed.table", "embed", ids, table[ids], None)
        rest = (jnp.arange(2), None if tap is None else tap.layers)
        h = (jax.lax.scan(body, h, (params["layers"], *rest))[0] * mask).sum(1)
        y = taps.apply(tap, "head.scale", "scale", h, h * params["head"]["scale"][None], None)
        z = taps.apply(
            tap, "embed.table", "head", y, y @ table[words].T, None, rows=jnp.asarray(words)
        )
        logits = z + params["head"]["bias"][words][None]
        return taps.apply(tap, "head.bias", "bias", z, logits, None, rows=jnp.asarray(words))

    return f, params


def toy_examples(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 5, count)
    return {
        "ids": rng.integers(0, 6, (count, 4)).astype(np.int32),
        "mask": (np.arange(4) < lengths[:, None]).astype(np.int32),
    }
