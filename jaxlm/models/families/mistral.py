"""Mistral: Llama with a sliding window.

References: Mistral, arXiv:2310.06825.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import llama, read_windows

PREFIX = llama.PREFIX
names = llama.names


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF Mistral config."""
    config = llama.read_config({"sliding_window": 4096, "num_key_value_heads": 8, **hf})
    windows = read_windows(
        {"sliding_window": 4096, **hf, "layer_types": None}, (True,) * config.num_layers
    )
    return config.replace(family="mistral", **windows)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the HF Mistral config for ours."""
    return llama.write_config(config, "MistralForCausalLM", sliding_window=config.window)
