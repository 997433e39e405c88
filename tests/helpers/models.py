"""A random decoder of a few thousand parameters, prompts for it, and the golden models."""

from pathlib import Path

import jax
import numpy as np

from jaxlm.models import LanguageModel, ModelConfig, init_params

GOLDEN = Path(__file__).parents[1] / "models" / "golden"
CONFIG = ModelConfig(
    family="llama", kind="decoder", head="lm", vocab_size=29, hidden_size=16, num_layers=2,
    num_heads=2, num_kv_heads=1, head_size=8, intermediate_size=12, max_positions=32,
    embedding_size=16, activation="silu", gated_mlp=True, norm="rmsnorm", positions="rotary",
    attention_bias=False, output_bias=False, mlp_bias=False,
)  # fmt: skip
PROMPTS = np.array([[3, 4, 5, 6], [7, 8, 0, 0], [0, 0, 0, 9]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]])


def small_model(dtype: str = "float32") -> LanguageModel:
    """The decoder; its matrices are large, so that its choices are clear."""
    params = init_params(CONFIG, jax.random.key(1), dtype)
    return LanguageModel(CONFIG, jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, params))
