"""OLMo 3: OLMo 2 with a window in three of four layers, whose rotary positions are not scaled.

References: OLMo 3, arXiv:2512.13961.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import (
    llama,
    local_layers,
    olmo2,
    read_windows,
    split_rope,
    write_both_ropes,
    write_windows,
)

PREFIX = llama.PREFIX
WINDOW = 4096
names = olmo2.names


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF OLMo 3 config."""
    theta = hf.get("rope_theta", 5e5)
    hf, local = split_rope(hf, theta, theta)
    kinds = hf.get("layer_types") or local_layers(hf, 4)
    windows = read_windows({"sliding_window": WINDOW, **hf, "layer_types": kinds}, ())
    config = olmo2.read_config(hf)
    return config.replace(family="olmo3", local_rope_theta=local, **windows)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the HF OLMo 3 config for ours."""
    return llama.write_config(
        config,
        "Olmo3ForCausalLM",
        rope_parameters=write_both_ropes(config),
        **write_windows(config, unused=WINDOW),  # transformers needs the size in any case
    )
