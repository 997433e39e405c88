"""GPT-2: learned positions, pre-norm, fused query-key-value weights kept as [in, out].

References: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from functools import partial
from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import Name, layer_norm, linear, read_fields, require, write_fields

PREFIX = "transformer."
KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "activation": "activation_function",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_positions": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
DEFAULTS = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
write_config = partial(write_fields, keys=KEYS, architecture="GPT2LMHeadModel")


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF GPT-2 config."""
    require(hf, "scale_attn_weights", True)
    require(hf, "scale_attn_by_inverse_layer_idx", False)
    require(hf, "reorder_and_upcast_attn", False)
    require(hf, "add_cross_attention", False)
    inner = hf.get("n_inner") or 4 * hf["n_embd"]
    return ModelConfig(**read_fields({**DEFAULTS, **hf, "n_inner": inner}, KEYS), family="gpt2")


def names(config: ModelConfig) -> list[Name]:
    """Return our paths with their HF names."""
    block = PREFIX + "h.{layer}."
    rows = [
        Name("embed.tokens.embedding", PREFIX + "wte.weight"),
        Name("embed.positions.embedding", PREFIX + "wpe.weight"),
        Name("lm_head.embedding", "lm_head.weight"),
    ]
    matrices = [(f"layers.attention.{x}_proj", "attn.c_attn", (i, 3)) for i, x in enumerate("qkv")]
    matrices += [
        ("layers.attention.o_proj", "attn.c_proj", (0, 1)),
        ("layers.mlp.up_proj", "mlp.c_fc", (0, 1)),
        ("layers.mlp.down_proj", "mlp.c_proj", (0, 1)),
    ]
    for path, hf, part in matrices:
        rows += linear(path, block + hf, part, transpose=False)
    rows += layer_norm("layers.attention_norm", block + "ln_1")
    rows += layer_norm("layers.mlp_norm", block + "ln_2")
    return rows + layer_norm("final_norm", PREFIX + "ln_f")
