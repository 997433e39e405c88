"""Llama 1 to 3: rotary positions, RMSNorm, gated SiLU, grouped queries.

References: Llama, arXiv:2302.13971; Llama 3, arXiv:2407.21783.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import (
    Name,
    layer_norm,
    linear,
    read_activation,
    read_rope,
    read_special_ids,
    take,
    write_activation,
    write_rope,
    write_special_ids,
)

PREFIX = "model."


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Our configuration from a HF Llama config."""
    take(hf, "pretraining_tp", 1)
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    return ModelConfig(
        family="llama",
        kind="decoder",
        head="lm",
        vocab_size=hf["vocab_size"],
        hidden_size=width,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_size=hf.get("head_dim") or width // heads,
        intermediate_size=hf["intermediate_size"],
        max_positions=hf.get("max_position_embeddings", 2048),
        embedding_size=width,
        activation=read_activation(hf, "hidden_act", "silu"),
        gated_mlp=True,
        norm="rmsnorm",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        positions="rotary",
        attention_bias=hf.get("attention_bias", False),
        output_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        **read_rope(hf),
        **read_special_ids(hf),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The HF Llama config of ours."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "hidden_act": write_activation(config.activation),
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": write_rope(config),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        **write_special_ids(config),
    }


def names(config: ModelConfig) -> list[Name]:
    """Our paths and their HF names."""
    block = PREFIX + "layers.{layer}."
    rows = [
        Name("embed.tokens.embedding", PREFIX + "embed_tokens.weight"),
        Name("lm_head.embedding", "lm_head.weight"),
    ]
    for part in "qkvo":
        rows += linear(f"layers.attention.{part}_proj", f"{block}self_attn.{part}_proj")
    for part in ("gate", "up", "down"):
        rows += linear(f"layers.mlp.{part}_proj", f"{block}mlp.{part}_proj")
    rows += layer_norm("layers.attention_norm", block + "input_layernorm")
    rows += layer_norm("layers.mlp_norm", block + "post_attention_layernorm")
    return rows + layer_norm("final_norm", PREFIX + "norm")
