"""SmolLM3: Llama without positions in every fourth layer.

References: https://huggingface.co/blog/smollm3; layers without positions, arXiv:2501.18795.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import llama, qwen2, read_windows

PREFIX = llama.PREFIX
names = llama.names
DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 4,
    "rope_theta": 2e6,
    "tie_word_embeddings": True,
}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF SmolLM3 config."""
    config = llama.read_config({**DEFAULTS, **hf})
    layers, every = range(config.num_layers), hf.get("no_rope_layer_interval", 4)
    rotated = hf.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in layers]
    if len(rotated) < config.num_layers:
        raise ValueError(
            f"no_rope_layers must name {config.num_layers} layers (got {len(rotated)}). Correct "
            "it, or download the file again."
        )
    unrotated = tuple(not rotated[layer] for layer in layers)
    windows = read_windows(hf, unrotated) if hf.get("use_sliding_window", False) else {}
    return config.replace(
        family="smollm3", unrotated=unrotated if any(unrotated) else (), **windows
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the HF SmolLM3 config for ours."""
    unrotated = config.unrotated or (False,) * config.num_layers
    rotated = [int(not layer) for layer in unrotated]
    return qwen2.write_config(config, "SmolLM3ForCausalLM", no_rope_layers=rotated)
