"""Sizes of well-known models, for benchmarks and tests on random weights, and a batch for them."""

import jax
import numpy as np

from jaxlm.models import LanguageModel, ModelConfig, init_params

OPT_125M = ModelConfig(
    family="opt",
    kind="decoder",
    head="lm",
    vocab_size=50272,
    hidden_size=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
    head_size=64,
    intermediate_size=3072,
    max_positions=2048,
    embedding_size=768,
    activation="relu",
    position_offset=2,
    bos_id=2,
    eos_id=2,
    pad_id=1,
)
OPT_1_3B = OPT_125M.replace(
    hidden_size=2048,
    num_layers=24,
    num_heads=32,
    num_kv_heads=32,
    intermediate_size=8192,
    embedding_size=2048,
)
PYTHIA_160M = OPT_125M.replace(
    family="gpt_neox",
    vocab_size=50304,
    activation="gelu",
    parallel=True,
    positions="rotary",
    rotary_size=16,
    position_offset=0,
    tie_embeddings=False,
    bos_id=0,
    eos_id=0,
    pad_id=None,
)
ROBERTA_BASE = OPT_125M.replace(
    family="roberta",
    kind="encoder",
    head="mlm",
    vocab_size=50265,
    max_positions=512,
    activation="gelu",
    norm_position="post",
    embedding_norm=True,
    final_norm=False,
    token_types=1,
    bos_id=0,
    eos_id=2,
)
SHIPPED = ModelConfig(
    family="llama",
    kind="decoder",
    head="lm",
    vocab_size=6144,
    hidden_size=192,
    num_layers=4,
    num_heads=6,
    num_kv_heads=6,
    head_size=32,
    intermediate_size=512,
    max_positions=512,
    embedding_size=192,
    activation="silu",
    gated_mlp=True,
    norm="rmsnorm",
    positions="rotary",
    attention_bias=False,
    output_bias=False,
    mlp_bias=False,
    bos_id=0,
    eos_id=0,
)
LABEL_WORDS = (5, 9)


def random_model(config: ModelConfig, dtype: str = "float32") -> LanguageModel:
    """Return a model with random parameters."""
    return LanguageModel(config, init_params(config, jax.random.key(0), dtype))


def make_batch(config: ModelConfig, rows: int, length: int) -> dict[str, np.ndarray]:
    """Draw random rows without padding, whose last position predicts one of two label words."""
    numbers = np.random.default_rng(0)
    return {
        "input_ids": numbers.integers(10, config.vocab_size, (rows, length), np.int32),
        "attention_mask": np.ones((rows, length), np.int32),
        "positions": np.full((rows,), length - 1, np.int32),
        "labels": (np.arange(rows) % 2).astype(np.int32),
        "weights": np.ones((rows,), np.float32),
    }
