"""Gemma: Llama with scaled embeddings, gated GELU, and norms that store scale - 1.

References: Gemma, arXiv:2403.08295.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import llama, read_activation, require, write_activation

PREFIX = llama.PREFIX
names = llama.names
DEFAULTS = {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF Gemma config."""
    require(
        {**hf, "use_bidirectional_attention": hf.get("use_bidirectional_attention") or False},
        "use_bidirectional_attention",
        False,
    )
    hf = {**DEFAULTS, **hf}
    # The first release names the exact GELU but uses the tanh approximation.
    named = hf.get("hidden_act") or "gelu"
    meant = "gelu_pytorch_tanh" if named == "gelu" else named
    config = llama.read_config({**hf, "hidden_act": "silu"})
    return config.replace(
        family="gemma",
        activation=read_activation({"hidden_act": meant}, "hidden_act", meant),
        norm_offset=1.0,
        embedding_scale=config.hidden_size**0.5,
    )


def write_config(
    config: ModelConfig, architecture: str = "GemmaForCausalLM", **more: Any
) -> dict[str, Any]:
    """Return the HF Gemma config for ours; Gemma 2 adds `more` keys."""
    named = write_activation(config.activation)
    meant = "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else named
    return llama.write_config(config, architecture, **{"hidden_act": meant, **more})
