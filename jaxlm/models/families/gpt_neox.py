"""GPT-NeoX and Pythia: partial rotary positions, parallel sublayers, LayerNorm.

References: GPT-NeoX-20B, arXiv:2204.06745; Pythia, arXiv:2304.01373.
"""

from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import (
    SIZES,
    Name,
    layer_norm,
    linear,
    read_fields,
    read_rope,
    write_fields,
    write_rope,
)

PREFIX = "gpt_neox."
KEYS = SIZES | {
    "norm_eps": "layer_norm_eps",
    "parallel": "use_parallel_residual",
    "attention_bias": "attention_bias",
}
DEFAULTS = {
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "attention_bias": True,
    "tie_word_embeddings": False,
}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF GPT-NeoX config."""
    rope = hf.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", hf.get("rotary_pct", 0.25))
    fields = read_fields({**DEFAULTS, **hf}, KEYS)
    return ModelConfig(
        **fields,
        family="gpt_neox",
        positions="rotary",
        rotary_size=int(fields["head_size"] * share),
        output_bias=fields["attention_bias"],
        **read_rope({"rope_theta": hf.get("rotary_emb_base", 10000.0), **hf}),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the HF GPT-NeoX config for ours."""
    assert config.rotary_size is not None
    share = config.rotary_size / config.head_size
    return write_fields(config, KEYS, "GPTNeoXForCausalLM") | {
        "rope_parameters": write_rope(config) | {"partial_rotary_factor": share},
    }


def names(config: ModelConfig) -> list[Name]:
    """Return our paths with their HF names."""
    block = PREFIX + "layers.{layer}."
    rows = [
        Name("embed.tokens.embedding", PREFIX + "embed_in.weight"),
        Name("lm_head.embedding", "embed_out.weight"),
    ]
    for part, name in enumerate("qkv"):
        fused, ours = block + "attention.query_key_value", f"layers.attention.{name}_proj"
        rows += linear(ours, fused, part=(part, 3), groups=config.num_heads)
    rows += linear("layers.attention.o_proj", block + "attention.dense")
    rows += linear("layers.mlp.up_proj", block + "mlp.dense_h_to_4h")
    rows += linear("layers.mlp.down_proj", block + "mlp.dense_4h_to_h")
    rows += layer_norm("layers.attention_norm", block + "input_layernorm")
    rows += layer_norm("layers.mlp_norm", block + "post_attention_layernorm")
    return rows + layer_norm("final_norm", PREFIX + "final_layer_norm")
