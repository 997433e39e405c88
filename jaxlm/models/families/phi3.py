"""Phi-3: Llama whose checkpoints fuse queries, keys and values, and gates with up projections.

References: Phi-3, arXiv:2404.14219.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import Name, linear, llama, read_windows, require

PREFIX = llama.PREFIX
DEFAULTS = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF Phi-3 config."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    # transformers takes "yarn" and "su" for "longrope", which depends on the length of the text.
    require(rope, "rope_type", "default")
    require(rope, "type", "default")
    config = llama.read_config({**DEFAULTS, **hf})
    share = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    windows = read_windows({**hf, "layer_types": None}, (True,) * config.num_layers)
    size = None if share == 1 else int(config.head_size * share)
    return config.replace(family="phi3", rotary_size=size, **windows)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the HF Phi-3 config for ours."""
    hf = llama.write_config(config, "Phi3ForCausalLM", sliding_window=config.window)
    share = (config.rotary_size or config.head_size) / config.head_size
    hf["rope_parameters"]["partial_rotary_factor"] = share
    return hf


def names(config: ModelConfig) -> list[Name]:
    """Return our paths with their HF names."""
    heads, groups = config.num_heads, config.num_kv_heads
    block = PREFIX + "layers.{layer}."
    fused = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    rows = [row for row in llama.names(config) if row.path.split(".")[-2] not in fused]
    for name, first, span in (("q", 0, heads), ("k", heads, groups), ("v", heads + groups, groups)):
        part = (first, heads + 2 * groups)
        rows += linear(f"layers.attention.{name}_proj", block + "self_attn.qkv_proj", part, span)
    for i, name in enumerate(("gate", "up")):
        rows += linear(f"layers.mlp.{name}_proj", block + "mlp.gate_up_proj", (i, 2))
    return rows
