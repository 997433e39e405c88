"""OLMo: Llama with LayerNorm without parameters, and bounded queries, keys and values.

References: OLMo, arXiv:2402.00838.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import Name, llama

PREFIX = llama.PREFIX


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Our configuration from a HF OLMo config."""
    return llama.read_config(hf).replace(
        family="olmo",
        norm="layernorm",
        norm_affine=False,
        norm_eps=1e-5,
        clip_qkv=hf.get("clip_qkv"),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The HF OLMo config of ours."""
    return llama.write_config(config) | {
        "model_type": "olmo",
        "architectures": ["OlmoForCausalLM"],
        "clip_qkv": config.clip_qkv,
    }


def names(config: ModelConfig) -> list[Name]:
    """Our paths and their HF names."""
    return llama.names(config)
