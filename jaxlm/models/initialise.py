"""The shapes of a model's parameters, and their random initialisation."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlm.core.prng import leaf_key
from jaxlm.models.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def _linear(path: str, size_in: int, size_out: int, bias: bool) -> Shapes:
    shapes: Shapes = {path + ".kernel": (size_in, size_out)}
    return shapes | ({path + ".bias": (size_out,)} if bias else {})


def _norm(path: str, config: ModelConfig, size: int | None = None) -> Shapes:
    shape = (config.hidden_size if size is None else size,)
    has_bias = config.norm == "layernorm" and config.norm_bias
    leaves = (".scale", ".bias") if has_bias else (".scale",)
    return {path + leaf: shape for leaf in leaves} if config.norm_affine else {}


def _embed_shapes(config: ModelConfig) -> Shapes:
    width = config.hidden_size
    shapes: Shapes = {"embed.tokens.embedding": (config.vocab_size, config.embedding_size)}
    if config.positions == "learned":
        table = config.max_positions + config.position_offset
        shapes["embed.positions.embedding"] = (table, width)
    if config.token_types:
        shapes["embed.token_types.embedding"] = (config.token_types, width)
    if config.embedding_norm:
        shapes |= _norm("embed.norm", config)
    if config.embedding_size != width:
        shapes |= _linear("embed.project_in", config.embedding_size, width, False)
        shapes |= _linear("embed.project_out", width, config.embedding_size, False)
    return shapes


def _layer_shapes(config: ModelConfig) -> Shapes:
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_size
    keys = config.num_kv_heads * config.head_size
    shapes = _norm("layers.attention_norm", config) | _norm("layers.mlp_norm", config)
    if config.norm_position == "both":
        shapes |= _norm("layers.attention_out_norm", config) | _norm("layers.mlp_out_norm", config)
    if config.query_key_norm is not None:
        whole = config.query_key_norm == "all"
        for name, size in (("q", queries), ("k", keys)):
            path = f"layers.attention.{name}_norm"
            shapes |= _norm(path, config, size if whole else config.head_size)
    for name, size in (("q", queries), ("k", keys), ("v", keys)):
        shapes |= _linear(f"layers.attention.{name}_proj", width, size, config.attention_bias)
    shapes |= _linear("layers.attention.o_proj", queries, width, config.output_bias)
    if config.gated_mlp:
        shapes |= _linear("layers.mlp.gate_proj", width, inner, config.mlp_bias)
    shapes |= _linear("layers.mlp.up_proj", width, inner, config.mlp_bias)
    shapes |= _linear("layers.mlp.down_proj", inner, width, config.mlp_bias)
    return {path: (config.num_layers, *shape) for path, shape in shapes.items()}


def _head_shapes(config: ModelConfig) -> Shapes:
    width = config.hidden_size
    shapes: Shapes = {}
    shared = config.pooled and config.pooler == "mlm"
    if config.transforms or shared:
        shapes |= _linear("mlm.dense", width, width, config.head_bias) | _norm("mlm.norm", config)
    if config.head == "mlm":
        shapes["lm_head.bias"] = (config.vocab_size,)
    if config.head in ("lm", "mlm") and not config.tie_embeddings:
        shapes["lm_head.embedding"] = (config.vocab_size, config.embedding_size)
    if config.pooled and not shared:
        shapes |= _linear("pooler", width, width, True)
    if config.head in ("classifier", "token_classifier"):
        bias = config.kind == "encoder" or config.head == "token_classifier"
        shapes |= _linear("classifier", width, config.num_labels, bias)
    return shapes


def param_shapes(config: ModelConfig) -> Shapes:
    """Return the shape of every parameter of a model by its path."""
    final = _norm("final_norm", config) if config.final_norm else {}
    return _embed_shapes(config) | _layer_shapes(config) | final | _head_shapes(config)


def nest(flat: dict[str, Any]) -> dict:
    """Return the nested dict of a flat one: `{"a.b": x}` gives `{"a": {"b": x}}`."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def unnest(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Return the flat dict of a nested one; a packed leaf is one leaf."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = prefix + name
        flat |= unnest(value, path + ".") if isinstance(value, dict) else {path: value}
    return flat


def init_leaf(
    path: str, shape: tuple[int, ...], config: ModelConfig, key: Array, dtype="float32"
) -> Array:
    """Return one leaf of `init_params`."""
    name = path.rsplit(".", 1)[1]
    if name in ("scale", "bias"):
        return jnp.full(shape, 1 - config.norm_offset if name == "scale" else 0.0, dtype)
    is_output = path.endswith(("o_proj.kernel", "down_proj.kernel"))
    depth = math.sqrt(2 * config.num_layers) if is_output else 1
    return (0.02 / depth * jax.random.normal(leaf_key(key, path), shape, jnp.float32)).astype(dtype)


def init_params(config: ModelConfig, key: Array, dtype="float32") -> dict:
    """Return random parameters.

    Matrices are N(0, 0.02^2), divided by sqrt(2 L) at residual outputs; scales are 1, biases are 0.

    Args:
      config: the model.
      key: typed PRNG key; each leaf draws from `leaf_key(key, path)`.
      dtype: dtype of every leaf.
    """
    shapes = param_shapes(config)
    return nest({p: init_leaf(p, shape, config, key, dtype) for p, shape in shapes.items()})
