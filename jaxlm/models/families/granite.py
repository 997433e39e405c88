"""Granite: Llama with scaling factors for embeddings, scores, sublayers and logits.

References: Granite 3.0, https://github.com/ibm-granite/granite-3.0-language-models.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import llama

PREFIX = llama.PREFIX
names = llama.names
FACTORS = {
    "embedding_scale": "embedding_multiplier",
    "attention_scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_divisor": "logits_scaling",
}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF Granite config."""
    factors = {ours: hf.get(theirs, 1.0) for ours, theirs in FACTORS.items()}
    return llama.read_config(hf).replace(family="granite", **factors)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the HF Granite config for ours."""
    factors = {theirs: getattr(config, ours) for ours, theirs in FACTORS.items()}
    return llama.write_config(config, "GraniteForCausalLM", **factors)
