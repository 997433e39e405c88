"""OLMo 2: Llama with norms after the sublayers, and norms over the queries and keys of all heads.

References: OLMo 2, arXiv:2501.00656.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import Name, layer_norm, llama, query_key_norms

PREFIX = llama.PREFIX


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF OLMo 2 config."""
    config = llama.read_config({"rms_norm_eps": 1e-5, **hf})
    return config.replace(family="olmo2", norm_position="after", query_key_norm="all")


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the HF OLMo 2 config for ours."""
    return llama.write_config(config, "Olmo2ForCausalLM")


def names(config: ModelConfig) -> list[Name]:
    """Return our paths with their HF names."""
    block = PREFIX + "layers.{layer}."
    rows = [row for row in llama.names(config) if "_norm." not in row.path]
    rows += query_key_norms(block + "self_attn.")
    rows += layer_norm("layers.attention_norm", block + "post_attention_layernorm")
    rows += layer_norm("layers.mlp_norm", block + "post_feedforward_layernorm")
    return rows + layer_norm("final_norm", PREFIX + "norm")
