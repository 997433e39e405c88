"""Qwen3: Llama with an RMSNorm of each head's queries and keys.

References: Qwen3, arXiv:2505.09388.
"""

from functools import partial
from typing import Any

from jaxlm.models.config import ModelConfig
from jaxlm.models.families import llama, qwen2

PREFIX = llama.PREFIX
names = llama.names
write_config = partial(qwen2.write_config, architecture="Qwen3ForCausalLM")


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return our configuration for a HF Qwen3 config."""
    config = llama.read_config({"max_position_embeddings": 32768, "head_dim": 128, **hf})
    return config.replace(
        family="qwen3", query_key_norm="head", **qwen2.windows(hf, config.num_layers)
    )
