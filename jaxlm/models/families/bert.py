"""BERT: bidirectional, norms after each sublayer, segment embeddings.

References: BERT, arXiv:1810.04805.
"""

from collections.abc import Mapping
from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import (
    CLASSIFIERS,
    SIZES,
    Name,
    layer_norm,
    linear,
    read_fields,
    require,
    write_fields,
)

PREFIX = "bert."
KEYS = SIZES | {"norm_eps": "layer_norm_eps", "token_types": "type_vocab_size"}
DEFAULTS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    "tie_word_embeddings": True,
}
_CLASSES = {"mlm": "ForMaskedLM", "none": "Model", **CLASSIFIERS}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF BERT config; the checkpoint decides about the head."""
    require(hf, "position_embedding_type", "absolute")
    require(hf, "is_decoder", False)
    require(hf, "add_cross_attention", False)
    fields = read_fields({**DEFAULTS, **hf}, KEYS)
    return ModelConfig(
        **fields | {"kind": "encoder", "head": "none"},
        family="bert",
        norm_position="post",
        embedding_norm=True,
        final_norm=False,
    )


def write_config(
    config: ModelConfig, keys: Mapping[str, str] = KEYS, name: str = "Bert"
) -> dict[str, Any]:
    """Return the HF BERT config for ours, or that of another encoder and its prefix of classes."""
    return write_fields(config, keys, name + _CLASSES[config.head])


def encoder_names(prefix: str) -> list[Name]:
    """Return the names of everything below the head, which RoBERTa shares."""
    embeddings, block = prefix + "embeddings.", prefix + "encoder.layer.{layer}."
    rows = [
        Name("embed.tokens.embedding", embeddings + "word_embeddings.weight"),
        Name("embed.positions.embedding", embeddings + "position_embeddings.weight"),
        Name("embed.token_types.embedding", embeddings + "token_type_embeddings.weight"),
    ]
    rows += layer_norm("embed.norm", embeddings + "LayerNorm")
    for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
        rows += linear(f"layers.attention.{ours}_proj", f"{block}attention.self.{theirs}")
    rows += linear("layers.attention.o_proj", block + "attention.output.dense")
    rows += layer_norm("layers.attention_norm", block + "attention.output.LayerNorm")
    rows += linear("layers.mlp.up_proj", block + "intermediate.dense")
    rows += linear("layers.mlp.down_proj", block + "output.dense")
    return rows + layer_norm("layers.mlp_norm", block + "output.LayerNorm")


def names(config: ModelConfig) -> list[Name]:
    """Return our paths with their HF names."""
    head = "cls.predictions."
    return [
        *encoder_names(PREFIX),
        *linear("mlm.dense", head + "transform.dense"),
        *layer_norm("mlm.norm", head + "transform.LayerNorm"),
        Name("lm_head.embedding", head + "decoder.weight"),
        Name("lm_head.bias", head + "decoder.bias"),
        Name("lm_head.bias", head + "bias"),
        *linear("pooler", PREFIX + "pooler.dense"),
        *linear("classifier", "classifier"),
    ]
