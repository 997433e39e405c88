"""OPT: learned positions that start at row 2, ReLU, norms before or after, projected embeddings.

References: OPT, arXiv:2205.01068.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import (
    SIZES,
    Name,
    layer_norm,
    linear,
    read_fields,
    write_fields,
)

PREFIX = "model."
KEYS = SIZES | {
    "activation": "activation_function",
    "intermediate_size": "ffn_dim",
    "norm_affine": "layer_norm_elementwise_affine",
    "attention_bias": "enable_bias",
}
DEFAULTS = {
    "activation_function": "relu",
    "layer_norm_elementwise_affine": True,
    "enable_bias": True,
    "tie_word_embeddings": True,
}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF OPT config."""
    pre_norm = hf.get("do_layer_norm_before", True)
    fields = read_fields({**DEFAULTS, **hf}, KEYS)
    fields["embedding_size"] = hf.get("word_embed_proj_dim") or fields["hidden_size"]
    return ModelConfig(
        **fields,
        family="opt",
        norm_position="pre" if pre_norm else "post",
        final_norm=pre_norm and not hf.get("_remove_final_layer_norm", False),
        position_offset=2,
        output_bias=fields["attention_bias"],
        mlp_bias=fields["attention_bias"],
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the HF OPT config for ours."""
    pre_norm = config.norm_position == "pre"
    return write_fields(config, KEYS, "OPTForCausalLM") | {
        "word_embed_proj_dim": config.embedding_size,
        "do_layer_norm_before": pre_norm,
        "_remove_final_layer_norm": pre_norm and not config.final_norm,
    }


def names(config: ModelConfig) -> list[Name]:
    """Return our paths with their HF names."""
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
