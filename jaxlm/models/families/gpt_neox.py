"""GPT-NeoX and Pythia: partial rotary positions, parallel sublayers, LayerNorm.

References: GPT-NeoX-20B, arXiv:2204.06745; Pythia, arXiv:2304.01373.
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
    write_activation,
    write_rope,
    write_special_ids,
)

PREFIX = "gpt_neox."


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Our configuration from a HF GPT-NeoX config."""
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    rope = hf.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", hf.get("rotary_pct", 0.25))
    bias = hf.get("attention_bias", True)
    return ModelConfig(
        family="gpt_neox",
        kind="decoder",
        head="lm",
        vocab_size=hf["vocab_size"],
        hidden_size=width,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_size=width // heads,
        intermediate_size=hf["intermediate_size"],
        max_positions=hf.get("max_position_embeddings", 2048),
        embedding_size=width,
        activation=read_activation(hf, "hidden_act", "gelu"),
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        parallel=hf.get("use_parallel_residual", True),
        positions="rotary",
        rotary_size=int(width // heads * share),
        attention_bias=bias,
        output_bias=bias,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        **read_rope({"rope_theta": hf.get("rotary_emb_base", 10000.0), **hf}),
        **read_special_ids(hf),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The HF GPT-NeoX config of ours."""
    assert config.rotary_size is not None
    share = config.rotary_size / config.head_size
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "hidden_act": write_activation(config.activation),
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel,
        "rope_parameters": write_rope(config) | {"partial_rotary_factor": share},
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": config.tie_embeddings,
        **write_special_ids(config),
    }


def names(config: ModelConfig) -> list[Name]:
    """Our paths and their HF names."""
    block = PREFIX + "layers.{layer}."
    rows = [
        Name("embed.tokens.embedding", PREFIX + "embed_in.weight"),
        Name("lm_head.embedding", "embed_out.weight"),
    ]
    for part, name in enumerate("qkv"):
        fused, ours = block + "attention.query_key_value", f"layers.attention.{name}_proj"
        place: dict[str, Any] = {"part": (part, 3), "groups": config.num_heads}
        rows.append(Name(ours + ".kernel", fused + ".weight", transpose=True, **place))
        rows.append(Name(ours + ".bias", fused + ".bias", **place))
    rows += linear("layers.attention.o_proj", block + "attention.dense")
    rows += linear("layers.mlp.up_proj", block + "mlp.dense_h_to_4h")
    rows += linear("layers.mlp.down_proj", block + "mlp.dense_4h_to_h")
    rows += layer_norm("layers.attention_norm", block + "input_layernorm")
    rows += layer_norm("layers.mlp_norm", block + "post_attention_layernorm")
    return rows + layer_norm("final_norm", PREFIX + "final_layer_norm")
