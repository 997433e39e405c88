"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values.

References: Qwen2, arXiv:2407.10671.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import llama, read_windows, write_windows

PREFIX = llama.PREFIX
names = llama.names


def windows(hf: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Return the windows of Qwen2 and Qwen3: layers from `max_window_layers` on have one."""
    if not hf.get("use_sliding_window", False):
        return {}
    first = hf.get("max_window_layers", 28)
    default = tuple(layer >= first for layer in range(num_layers))
    return read_windows({"sliding_window": 4096, **hf}, default)


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF Qwen2 config."""
    config = llama.read_config({"max_position_embeddings": 32768, **hf})
    return config.replace(
        family="qwen2", attention_bias=True, output_bias=False, **windows(hf, config.num_layers)
    )


def write_config(
    config: ModelConfig, architecture: str = "Qwen2ForCausalLM", **more: Any
) -> dict[str, Any]:
    """Return the HF Qwen2 config for ours; families with these windows add `more` keys."""
    more |= {"use_sliding_window": any(config.windowed), **write_windows(config)}
    return llama.write_config(config, architecture, **more)
