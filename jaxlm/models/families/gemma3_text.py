"""Gemma 3, the text models: Gemma 2 with norms of queries and keys, and two rotary bases.

References: Gemma 3, arXiv:2503.19786.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import gemma2, local_layers, require, split_rope, write_both_ropes

PREFIX = gemma2.PREFIX
names = gemma2.names


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF Gemma 3 text config."""
    require(hf, "attn_logit_softcapping", None)
    kinds = hf.get("layer_types") or local_layers(hf, hf.get("sliding_window_pattern", 6))
    theta, local = hf.get("rope_theta", 1e6), hf.get("rope_local_base_freq", 1e4)
    hf, local = split_rope(hf, theta, local)
    defaults = {"final_logit_softcapping": None, "max_position_embeddings": 131072}
    config = gemma2.read_config(
        {**defaults, **hf, "attn_logit_softcapping": None, "layer_types": kinds}
    )
    return config.replace(family="gemma3_text", query_key_norm="head", local_rope_theta=local)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the HF Gemma 3 text config for ours."""
    rope = write_both_ropes(config)
    return gemma2.write_config(config, "Gemma3ForCausalLM", rope_parameters=rope)
