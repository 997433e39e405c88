"""OLMo 2: Llama with norms after the sublayers, and norms over the queries and keys of all heads.

References: OLMo 2, arXiv:2501.00656.
"""

from functools import partial
from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import llama

PREFIX = llama.PREFIX
write_config = partial(llama.write_config, architecture="Olmo2ForCausalLM")
NORMS = {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}
names = partial(llama.names, norms=NORMS)


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF OLMo 2 config."""
    config = llama.read_config({"rms_norm_eps": 1e-5, **hf})
    return config.replace(family="olmo2", norm_position="after", query_key_norm="all")
