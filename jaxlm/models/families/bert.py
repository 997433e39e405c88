"""BERT: bidirectional, norms after each sublayer, segment embeddings.

References: BERT, arXiv:1810.04805.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import (
    Name,
    layer_norm,
    linear,
    read_activation,
    read_special_ids,
    take,
    write_activation,
    write_special_ids,
)

PREFIX = "bert."
_ARCHITECTURES = {
    "mlm": "BertForMaskedLM",
    "classifier": "BertForSequenceClassification",
    "none": "BertModel",
}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Our configuration from a HF BERT config; the checkpoint settles the head."""
    take(hf, "position_embedding_type", "absolute")
    take(hf, "is_decoder", False)
    take(hf, "add_cross_attention", False)
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    return ModelConfig(
        family="bert",
        kind="encoder",
        head="none",
        vocab_size=hf["vocab_size"],
        hidden_size=width,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_size=width // heads,
        intermediate_size=hf["intermediate_size"],
        max_positions=hf["max_position_embeddings"],
        embedding_size=width,
        activation=read_activation(hf, "hidden_act", "gelu"),
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        norm_position="post",
        embedding_norm=True,
        final_norm=False,
        token_types=hf.get("type_vocab_size", 2),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        **read_special_ids(hf),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The HF BERT config of ours."""
    hf: dict[str, Any] = {
        "model_type": "bert",
        "architectures": [_ARCHITECTURES[config.head]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.token_types,
        "hidden_act": write_activation(config.activation),
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **write_special_ids(config),
    }
    if config.head == "classifier":
        names = config.label_names or [f"LABEL_{i}" for i in range(config.num_labels)]
        hf["id2label"] = dict(enumerate(names))
        hf["label2id"] = {name: i for i, name in enumerate(names)}
    return hf


def encoder_names(prefix: str) -> list[Name]:
    """The names of everything below the head, which RoBERTa shares."""
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
    """Our paths and their HF names."""
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
