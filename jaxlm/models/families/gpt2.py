"""GPT-2: learned positions, pre-norm, fused query-key-value weights kept as [in, out].

References: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import (
    Name,
    layer_norm,
    read_activation,
    read_special_ids,
    take,
    write_activation,
    write_special_ids,
)

PREFIX = "transformer."


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Our configuration from a HF GPT-2 config."""
    take(hf, "scale_attn_weights", True)
    take(hf, "scale_attn_by_inverse_layer_idx", False)
    take(hf, "reorder_and_upcast_attn", False)
    take(hf, "add_cross_attention", False)
    width, heads = hf["n_embd"], hf["n_head"]
    return ModelConfig(
        family="gpt2",
        kind="decoder",
        head="lm",
        vocab_size=hf["vocab_size"],
        hidden_size=width,
        num_layers=hf["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_size=width // heads,
        intermediate_size=hf.get("n_inner") or 4 * width,
        max_positions=hf["n_positions"],
        embedding_size=width,
        activation=read_activation(hf, "activation_function", "gelu_new"),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        **read_special_ids(hf),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The HF GPT-2 config of ours."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "n_positions": config.max_positions,
        "activation_function": write_activation(config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **write_special_ids(config),
    }


def names(config: ModelConfig) -> list[Name]:
    """Our paths and their HF names."""
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
