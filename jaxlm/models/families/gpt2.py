"""GPT-2: learned positions, pre-norm, fused query-key-value weights kept as [in, out].

References: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import (
    Name,
    layer_norm,
    read_activation,
    read_fields,
    require,
    write_activation,
    write_fields,
)

PREFIX = "transformer."
KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_positions": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
DEFAULTS = {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF GPT-2 config."""
    require(hf, "scale_attn_weights", True)
    require(hf, "scale_attn_by_inverse_layer_idx", False)
    require(hf, "reorder_and_upcast_attn", False)
    require(hf, "add_cross_attention", False)
    inner = hf.get("n_inner") or 4 * hf["n_embd"]
    return ModelConfig(
        **read_fields({**DEFAULTS, **hf, "n_inner": inner}, KEYS),
        family="gpt2",
        activation=read_activation(hf, "activation_function", "gelu_new"),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the HF GPT-2 config for ours."""
    hf = write_fields(config, KEYS, "GPT2LMHeadModel")
    return hf | {"activation_function": write_activation(config.activation)}


def names(config: ModelConfig) -> list[Name]:
    """Return our paths with their HF names."""
    block = PREFIX + "h.{layer}."
    rows = [
        Name("embed.tokens.embedding", PREFIX + "wte.weight"),
        Name("embed.positions.embedding", PREFIX + "wpe.weight"),
        Name("lm_head.embedding", "lm_head.weight"),
    ]
    for i, part in enumerate("qkv"):
        path, hf = f"layers.attention.{part}_proj.", block + "attn.c_attn."
        rows += [Name(path + "kernel", hf + "weight", part=(i, 3))]
        rows += [Name(path + "bias", hf + "bias", part=(i, 3))]
    for path, hf in (
        ("layers.attention.o_proj.", "attn.c_proj."),
        ("layers.mlp.up_proj.", "mlp.c_fc."),
        ("layers.mlp.down_proj.", "mlp.c_proj."),
    ):
        rows += [Name(path + "kernel", block + hf + "weight")]
        rows += [Name(path + "bias", block + hf + "bias")]
    rows += layer_norm("layers.attention_norm", block + "ln_1")
    rows += layer_norm("layers.mlp_norm", block + "ln_2")
    return rows + layer_norm("final_norm", PREFIX + "ln_f")
