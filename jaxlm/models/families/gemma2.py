"""Gemma 2: Gemma with norms on both sides, soft caps, and a window in every other layer.

References: Gemma 2, arXiv:2408.00118.
"""

from functools import partial
from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import gemma, llama, read_activation, read_windows, write_windows

PREFIX = llama.PREFIX
WINDOW = 4096
NORMS = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
names = partial(llama.names, norms=NORMS)


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF Gemma 2 config."""
    config = gemma.read_config(hf)
    # Unlike Gemma's `hidden_act`, this key names the function that the model uses.
    named = hf.get("hidden_activation") or "gelu_pytorch_tanh"
    alternate = tuple(layer % 2 == 0 for layer in range(config.num_layers))
    return config.replace(
        family="gemma2",
        activation=read_activation({"hidden_activation": named}, "hidden_activation"),
        norm_position="both",
        attention_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_cap=hf.get("attn_logit_softcapping", 50.0),
        logit_cap=hf.get("final_logit_softcapping", 30.0),
        **read_windows({"sliding_window": WINDOW, **hf}, alternate),
    )


def write_config(
    config: ModelConfig, architecture: str = "Gemma2ForCausalLM", **more: Any
) -> dict[str, Any]:
    """Return the HF Gemma 2 config for ours; Gemma 3 adds `more` keys."""
    assert config.attention_scale is not None
    hf = gemma.write_config(
        config,
        architecture,
        query_pre_attn_scalar=round(config.attention_scale**-2),
        attn_logit_softcapping=config.attention_cap,
        final_logit_softcapping=config.logit_cap,
        **write_windows(config, unused=WINDOW),  # transformers needs the size in any case
        **more,
    )
    hf["hidden_activation"] = hf.pop("hidden_act")
    return hf
