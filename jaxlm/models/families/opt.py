"""OPT: learned positions that start at row 2, ReLU, norms before or after, projected embeddings.

References: OPT, arXiv:2205.01068.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import (
    Name,
    layer_norm,
    linear,
    read_activation,
    read_special_ids,
    write_activation,
    write_special_ids,
)

PREFIX = "model."


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Our configuration from a HF OPT config."""
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    bias = hf.get("enable_bias", True)
    pre_norm = hf.get("do_layer_norm_before", True)
    return ModelConfig(
        family="opt",
        kind="decoder",
        head="lm",
        vocab_size=hf["vocab_size"],
        hidden_size=width,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_size=width // heads,
        intermediate_size=hf["ffn_dim"],
        max_positions=hf["max_position_embeddings"],
        embedding_size=hf.get("word_embed_proj_dim") or width,
        activation=read_activation(hf, "activation_function", "relu"),
        norm_affine=hf.get("layer_norm_elementwise_affine", True),
        norm_position="pre" if pre_norm else "post",
        final_norm=pre_norm and not hf.get("_remove_final_layer_norm", False),
        position_offset=2,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        **read_special_ids(hf),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The HF OPT config of ours."""
    pre_norm = config.norm_position == "pre"
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "ffn_dim": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "word_embed_proj_dim": config.embedding_size,
        "activation_function": write_activation(config.activation),
        "layer_norm_elementwise_affine": config.norm_affine,
        "do_layer_norm_before": pre_norm,
        "_remove_final_layer_norm": pre_norm and not config.final_norm,
        "enable_bias": config.attention_bias,
        "tie_word_embeddings": config.tie_embeddings,
        **write_special_ids(config),
    }


def names(config: ModelConfig) -> list[Name]:
    """Our paths and their HF names."""
    decoder = PREFIX + "decoder."
    block = decoder + "layers.{layer}."
    rows = [
        Name("embed.tokens.embedding", decoder + "embed_tokens.weight"),
        Name("embed.positions.embedding", decoder + "embed_positions.weight"),
        Name("lm_head.embedding", "lm_head.weight"),
    ]
    rows += linear("embed.project_in", decoder + "project_in")
    rows += linear("embed.project_out", decoder + "project_out")
    for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out")):
        rows += linear(f"layers.attention.{ours}_proj", f"{block}self_attn.{theirs}_proj")
    rows += linear("layers.mlp.up_proj", block + "fc1")
    rows += linear("layers.mlp.down_proj", block + "fc2")
    rows += layer_norm("layers.attention_norm", block + "self_attn_layer_norm")
    rows += layer_norm("layers.mlp_norm", block + "final_layer_norm")
    return rows + layer_norm("final_norm", decoder + "final_layer_norm")
