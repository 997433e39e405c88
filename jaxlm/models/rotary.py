"""Rotary position embeddings, with scaled frequencies for long contexts.

References: RoFormer, arXiv:2104.09864; the half-split layout is that of Llama. YaRN,
arXiv:2309.00071.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.core.dtypes import wide_dtype
from jaxlm.models.config import ModelConfig, RopeScaling


def frequencies(config: ModelConfig) -> Float[np.ndarray, " R"]:
    r"""Return radians per position of each pair r, $\theta^{-2r/(2R)}$ of 2R elements, scaled."""
    size = config.rotary_size or config.head_size
    plain = config.rope_theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    kept = (_yarn_kept if scaling.kind == "yarn" else _llama3_kept)(scaling, config, plain)
    return plain * kept + plain / scaling.factor * (1 - kept)


def _llama3_kept(scaling: RopeScaling, config: ModelConfig, plain: np.ndarray) -> np.ndarray:
    """Return each frequency's unscaled share, linear in its turns between `slow` and `fast`."""
    turns = scaling.original_positions * plain / (2 * np.pi)
    return np.clip((turns - scaling.slow) / (scaling.fast - scaling.slow), 0, 1)


def _yarn_kept(scaling: RopeScaling, config: ModelConfig, plain: np.ndarray) -> np.ndarray:
    """Return each frequency's unscaled share, linear in its index between those of the bounds."""
    size = 2 * len(plain)

    def pair(turns: float) -> float:
        wanted = scaling.original_positions / (turns * 2 * math.pi)
        return size * math.log(wanted) / (2 * math.log(config.rope_theta))

    low, high = pair(scaling.fast), pair(scaling.slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    return 1 - np.clip((np.arange(size // 2) - low) / (max(high - low, 1e-3)), 0, 1)


def table(
    config: ModelConfig, position_ids: Int[Array, "B T"], dtype: jnp.dtype
) -> tuple[Float[Array, "B T 1 R"], Float[Array, "B T 1 R"]]:
    """Return cosines and sines of every position, in at least float32."""
    wide = wide_dtype(dtype)
    turns = jnp.asarray(frequencies(config), wide)[None, None, None]
    angles = position_ids[:, :, None, None].astype(wide) * turns
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def tables(
    config: ModelConfig, position_ids: Int[Array, "B T"], dtype: jnp.dtype
) -> tuple[Any, Int[Array, " L"] | None]:
    """Return the table of all layers and None; or two, stacked, and the index for each layer."""
    usual = table(config, position_ids, dtype)
    others = config.windowed if config.local_rope_theta is not None else config.unrotated
    if not any(others):
        return usual, None
    if config.local_rope_theta is None:  # a rotation by nothing, so that one program does for all
        other = jnp.ones_like(usual[0]), jnp.zeros_like(usual[1])
    else:
        local = config.replace(rope_theta=config.local_rope_theta, rope_scaling=None)
        other = table(local, position_ids, dtype)
    both = jax.tree.map(lambda *pair: jnp.stack(pair), usual, other)
    return both, jnp.asarray(others, jnp.int32)


def rotate(
    x_BxTxHxK: Float[Array, "B T H K"],
    cos: Float[Array, "B T 1 R"],
    sin: Float[Array, "B T 1 R"],
) -> Float[Array, "B T H K"]:
    """Rotate the pairs (r, r + R) of the first 2R elements of each head."""
    half = cos.shape[-1]
    wide = x_BxTxHxK.astype(cos.dtype)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x_BxTxHxK.dtype)
