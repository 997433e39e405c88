"""Gemma: Llama with scaled embeddings, gated GELU, and norms that store scale - 1.

References: Gemma, arXiv:2403.08295.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import Name, llama, read_activation, take, write_activation

PREFIX = llama.PREFIX
DEFAULTS = {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Our configuration from a HF Gemma config."""
    take(
        {**hf, "use_bidirectional_attention": hf.get("use_bidirectional_attention") or False},
        "use_bidirectional_attention",
        False,
    )
    hf = {**DEFAULTS, **hf}
    # The first release named the exact GELU and meant the approximation.
    named = hf.get("hidden_act") or "gelu"
    meant = "gelu_pytorch_tanh" if named == "gelu" else named
    config = llama.read_config({**hf, "hidden_act": "silu"})
    return config.replace(
        family="gemma",
        activation=read_activation({"hidden_act": meant}, "hidden_act", meant),
        norm_offset=1.0,
        embedding_scale=config.hidden_size**0.5,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The HF Gemma config of ours."""
    return llama.write_config(config) | {
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        "hidden_act": _activation(config),
    }


def _activation(config: ModelConfig) -> str:
    named = write_activation(config.activation)
    return "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else named


def names(config: ModelConfig) -> list[Name]:
    """Our paths and their HF names."""
    return llama.names(config)
