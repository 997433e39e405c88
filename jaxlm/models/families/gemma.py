"""Gemma: Llama with scaled embeddings, gated GELU, and norms that store scale - 1.

References: Gemma, arXiv:2403.08295.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import llama, require

PREFIX = llama.PREFIX
names = llama.names
DEFAULTS = {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF Gemma config."""
    if hf.get("use_bidirectional_attention"):
        require(hf, "use_bidirectional_attention", False)
    # The first release names the exact GELU but uses the tanh approximation.
    named = hf.get("hidden_act") or "gelu"
    meant = "gelu_pytorch_tanh" if named == "gelu" else named
    config = llama.read_config({**DEFAULTS, **hf, "hidden_act": meant})
    return config.replace(family="gemma", norm_offset=1.0, embedding_scale=config.hidden_size**0.5)


def write_config(
    config: ModelConfig, architecture: str = "GemmaForCausalLM", **more: Any
) -> dict[str, Any]:
    """Return the HF Gemma config for ours; Gemma 2 adds `more` keys."""
    hf = llama.write_config(config, architecture, **more)
    return hf | ({"hidden_act": "gelu_pytorch_tanh"} if config.activation == "gelu_tanh" else {})
