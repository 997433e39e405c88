"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values.

References: Qwen2, arXiv:2407.10671.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import Name, llama, read_windows, write_layer_types

PREFIX = llama.PREFIX


def windows(hf: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """The windows of Qwen2 and Qwen3: none, or that of the layers from `max_window_layers` on."""
    if not hf.get("use_sliding_window", False):
        return {}
    first = hf.get("max_window_layers", 28)
    default = tuple(layer >= first for layer in range(num_layers))
    return read_windows({"sliding_window": 4096, **hf}, default)


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The HF keys of the windows."""
    return {
        "use_sliding_window": any(config.windowed),
        "sliding_window": config.window,
        "layer_types": write_layer_types(config),
    }


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Our configuration from a HF Qwen2 config."""
    config = llama.read_config({"max_position_embeddings": 32768, **hf})
    return config.replace(
        family="qwen2", attention_bias=True, output_bias=False, **windows(hf, config.num_layers)
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The HF Qwen2 config of ours."""
    return (
        llama.write_config(config)
        | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
        | write_windows(config)
    )


def names(config: ModelConfig) -> list[Name]:
    """Our paths and their HF names."""
    return llama.names(config)
