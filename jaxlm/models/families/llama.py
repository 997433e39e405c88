"""Llama 1 to 3: rotary positions, RMSNorm, gated SiLU, grouped queries.

References: Llama, arXiv:2302.13971; Llama 3, arXiv:2407.21783.
"""

from collections.abc import Mapping
from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import (
    SIZES,
    Name,
    layer_norm,
    linear,
    read_fields,
    read_rope,
    require,
    write_fields,
    write_rope,
)

PREFIX = "model."
KEYS = SIZES | {
    "norm_eps": "rms_norm_eps",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}
DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF Llama config."""
    require(hf, "pretraining_tp", 1)
    fields = read_fields({**DEFAULTS, **hf}, KEYS)
    fields["num_kv_heads"] = hf.get("num_key_value_heads") or fields["num_heads"]
    fields["head_size"] = hf.get("head_dim") or fields["head_size"]
    return ModelConfig(
        **fields,
        family="llama",
        gated_mlp=True,
        norm="rmsnorm",
        positions="rotary",
        output_bias=fields["attention_bias"],
        **read_rope(hf),
    )


def write_config(
    config: ModelConfig, architecture: str = "LlamaForCausalLM", **more: Any
) -> dict[str, Any]:
    """Return the HF Llama config for ours; families like Llama add `more` keys."""
    return write_fields(config, KEYS, architecture) | {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "rope_parameters": write_rope(config),
        **more,
    }


def names(config: ModelConfig, norms: Mapping[str, str] = NORMS) -> list[Name]:
    """Return our paths with their HF names; families like Llama have other `norms` in a layer."""
    block = PREFIX + "layers.{layer}."
    rows = [
        Name("embed.tokens.embedding", PREFIX + "embed_tokens.weight"),
        Name("lm_head.embedding", "lm_head.weight"),
        *linear("classifier", "score"),
    ]
    for part in "qkvo":
        rows += linear(f"layers.attention.{part}_proj", f"{block}self_attn.{part}_proj")
    for part in "qk":
        rows += layer_norm(f"layers.attention.{part}_norm", f"{block}self_attn.{part}_norm")
    for part in ("gate", "up", "down"):
        rows += linear(f"layers.mlp.{part}_proj", f"{block}mlp.{part}_proj")
    for ours, theirs in norms.items():
        rows += layer_norm(f"layers.{ours}", block + theirs)
    return rows + layer_norm("final_norm", PREFIX + "norm")
