"""DistilBERT: BERT without segments, with another pooler.

References: DistilBERT, arXiv:1910.01108.
"""

from functools import partial
from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import SIZES, Name, bert, layer_norm, linear, read_fields

PREFIX = "distilbert."
KEYS = SIZES | {
    "hidden_size": "dim",
    "activation": "activation",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}
DEFAULTS = {"activation": "gelu", "tie_word_embeddings": True}
write_config = partial(bert.write_config, keys=KEYS, name="DistilBert")


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF config; the checkpoint decides about the head."""
    return ModelConfig(
        **read_fields({**DEFAULTS, **hf}, KEYS) | {"kind": "encoder", "head": "none"},
        family="distilbert",
        norm_eps=1e-12,
        norm_position="post",
        embedding_norm=True,
        final_norm=False,
        pooler="relu",
    )


def names(config: ModelConfig) -> list[Name]:
    """Return our paths with their HF names."""
    embeddings, block = PREFIX + "embeddings.", PREFIX + "transformer.layer.{layer}."
    rows = [
        Name("embed.tokens.embedding", embeddings + "word_embeddings.weight"),
        Name("embed.positions.embedding", embeddings + "position_embeddings.weight"),
        Name("lm_head.embedding", "vocab_projector.weight"),
        Name("lm_head.bias", "vocab_projector.bias"),
    ]
    rows += layer_norm("embed.norm", embeddings + "LayerNorm")
    for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out")):
        rows += linear(f"layers.attention.{ours}_proj", f"{block}attention.{theirs}_lin")
    rows += layer_norm("layers.attention_norm", block + "sa_layer_norm")
    rows += linear("layers.mlp.up_proj", block + "ffn.lin1")
    rows += linear("layers.mlp.down_proj", block + "ffn.lin2")
    rows += layer_norm("layers.mlp_norm", block + "output_layer_norm")
    rows += linear("mlm.dense", "vocab_transform") + layer_norm("mlm.norm", "vocab_layer_norm")
    return rows + linear("pooler", "pre_classifier") + linear("classifier", "classifier")
