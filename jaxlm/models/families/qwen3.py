"""Qwen3: Llama with an RMSNorm of each head's queries and keys.

References: Qwen3, arXiv:2505.09388.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import Name, llama, query_key_norms, qwen2

PREFIX = llama.PREFIX


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF Qwen3 config."""
    config = llama.read_config({"max_position_embeddings": 32768, "head_dim": 128, **hf})
    return config.replace(
        family="qwen3", query_key_norm="head", **qwen2.windows(hf, config.num_layers)
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the HF Qwen3 config for ours."""
    return llama.write_config(config, "Qwen3ForCausalLM", **qwen2.write_windows(config))


def names(config: ModelConfig) -> list[Name]:
    """Return our paths with their HF names."""
    return llama.names(config) + query_key_norms(PREFIX + "layers.{layer}.self_attn.")
