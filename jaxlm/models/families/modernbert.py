"""ModernBERT: an encoder with rotary positions, gated MLPs, and a window in two of three layers.

References: ModernBERT, arXiv:2412.13663.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import (
    SIZES,
    Name,
    bert,
    layer_norm,
    linear,
    read_fields,
    read_rope,
    read_windows,
    require,
    split_rope,
    write_both_ropes,
    write_windows,
)

PREFIX = "model."
KEYS = SIZES | {
    "activation": "hidden_activation",
    "norm_eps": "norm_eps",
    "norm_bias": "norm_bias",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "head_bias": "classifier_bias",
}
DEFAULTS = {
    "hidden_activation": "gelu",
    "max_position_embeddings": 8192,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    **dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), False),
}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF config; the checkpoint decides about the head."""
    require(hf, "decoder_bias", True)
    require(hf, "rope_scaling", None)
    require(hf, "classifier_activation", hf.get("hidden_activation", "gelu"))
    if hf.get("classifier_pooling") != "mean":
        require(hf, "classifier_pooling", "cls")
    theta, local = hf.get("global_rope_theta", 1.6e5), hf.get("local_rope_theta", 1e4)
    hf, local = split_rope(hf, theta, local)
    fields = read_fields({**DEFAULTS, **hf}, KEYS)
    window, every = hf.get("local_attention", 128) // 2 + 1, hf.get("global_attn_every_n_layers", 3)
    windowed = tuple(layer % every != 0 for layer in range(fields["num_layers"]))
    return ModelConfig(
        **fields | {"kind": "encoder", "head": "none"},
        family="modernbert",
        gated_mlp=True,
        first_norm=False,
        embedding_norm=True,
        positions="rotary",
        local_rope_theta=local,
        output_bias=fields["attention_bias"],
        pooler="mlm",
        pooling="mean" if hf.get("classifier_pooling") == "mean" else "first",
        **read_windows({**hf, "sliding_window": window}, windowed),
        **read_rope(hf),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the HF ModernBERT config for ours."""
    hf = bert.write_config(config, KEYS, "ModernBert")
    return hf | {
        "classifier_activation": hf["hidden_activation"],
        "classifier_pooling": "mean" if config.pooling == "mean" else "cls",
        "local_attention": 2 * (config.window - 1) if config.window else 128,
        "layer_types": write_windows(config)["layer_types"],
        "rope_parameters": write_both_ropes(config),
    }


def names(config: ModelConfig) -> list[Name]:
    """Return our paths with their HF names."""
    block = PREFIX + "layers.{layer}."
    rows = [
        Name("embed.tokens.embedding", PREFIX + "embeddings.tok_embeddings.weight"),
        Name("lm_head.embedding", "decoder.weight"),
        Name("lm_head.bias", "decoder.bias"),
    ]
    for i, name in enumerate("qkv"):
        rows += linear(f"layers.attention.{name}_proj", block + "attn.Wqkv", (i, 3))
    for i, name in enumerate(("gate", "up")):
        rows += linear(f"layers.mlp.{name}_proj", block + "mlp.Wi", (i, 2))
    rows += linear("layers.attention.o_proj", block + "attn.Wo")
    rows += linear("layers.mlp.down_proj", block + "mlp.Wo")
    rows += layer_norm("layers.attention_norm", block + "attn_norm")
    rows += layer_norm("layers.mlp_norm", block + "mlp_norm")
    rows += layer_norm("embed.norm", PREFIX + "embeddings.norm")
    rows += layer_norm("final_norm", PREFIX + "final_norm")
    rows += linear("mlm.dense", "head.dense") + layer_norm("mlm.norm", "head.norm")
    return rows + linear("classifier", "classifier")
