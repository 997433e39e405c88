"""RoBERTa: BERT with positions that start after the padding id, and its own heads.

References: RoBERTa, arXiv:1907.11692.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import Name, bert, layer_norm, linear, require

PREFIX = "roberta."


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF RoBERTa config; the checkpoint decides about the head."""
    require(hf, "hidden_act", "gelu")
    config = bert.read_config(hf)
    pad = 1 if config.pad_id is None else config.pad_id
    return config.replace(
        family="roberta",
        max_positions=config.max_positions - pad - 1,
        position_offset=pad + 1,
        pad_id=pad,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the HF RoBERTa config for ours."""
    return bert.write_config(config, name="Roberta") | {
        "max_position_embeddings": config.max_positions + config.position_offset,
        "pad_token_id": config.position_offset - 1,
    }


def names(config: ModelConfig) -> list[Name]:
    """Return our paths with their HF names; the classifier on one token has its own pooler."""
    pooler, classifier = PREFIX + "pooler.dense", "classifier"
    if config.head == "classifier":
        pooler, classifier = "classifier.dense", "classifier.out_proj"
    return [
        *bert.encoder_names(PREFIX),
        *linear("mlm.dense", "lm_head.dense"),
        *layer_norm("mlm.norm", "lm_head.layer_norm"),
        Name("lm_head.embedding", "lm_head.decoder.weight"),
        Name("lm_head.bias", "lm_head.decoder.bias"),
        Name("lm_head.bias", "lm_head.bias"),
        *linear("pooler", pooler),
        *linear("classifier", classifier),
    ]
