"""OLMo: Llama with LayerNorm without parameters, and bounded queries, keys and values.

References: OLMo, arXiv:2402.00838.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import llama

PREFIX = llama.PREFIX
names = llama.names


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF OLMo config."""
    return llama.read_config(hf).replace(
        family="olmo",
        norm="layernorm",
        norm_affine=False,
        norm_eps=1e-5,
        clip_qkv=hf.get("clip_qkv"),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the HF OLMo config for ours."""
    return llama.write_config(config, "OlmoForCausalLM", clip_qkv=config.clip_qkv)
