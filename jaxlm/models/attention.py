"""Multi-head attention with grouped queries, written out so that every autodiff mode applies.

Shapes: B batch, T queries, S keys, G key-value heads, M queries per group, K head size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def rotate(x_BxTxHxK: Array, position_ids: Int[Array, "B T"], theta: float) -> Array:
    """Rotary position embedding: pairs (k, k + K/2) turn by `position * theta**(-2k/K)`.

    References: RoFormer, arXiv:2104.09864; the half-split layout is that of Llama.
    """
    half = x_BxTxHxK.shape[-1] // 2
    wide = jnp.promote_types(x_BxTxHxK.dtype, jnp.float32)
    frequency = theta ** (-np.arange(half, dtype=np.float64) / half)
    angle = (
        position_ids[:, :, None, None].astype(wide) * jnp.asarray(frequency, wide)[None, None, None]
    )
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BxTxHxK.astype(wide), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxTxHxK.dtype)


def mask(attention_mask: Int[Array, "B S"], causal: bool) -> Bool[Array, "B T S"]:
    """True where a query may look: at real tokens and, if causal, not ahead of itself.

    Every query may look at itself, so that rows of padding stay finite.
    """
    length = attention_mask.shape[1]
    seen = jnp.broadcast_to(
        attention_mask[:, None, :] > 0, (attention_mask.shape[0], length, length)
    )
    if causal:
        seen = seen & jnp.tril(jnp.ones((length, length), bool))[None]
    return seen | jnp.eye(length, dtype=bool)[None]


def attend(
    q_BxTxHxK: Float[Array, "B T H K"],
    k_BxSxGxK: Float[Array, "B S G K"],
    v_BxSxGxK: Float[Array, "B S G K"],
    mask_BxTxS: Bool[Array, "B T S"],
) -> Float[Array, "B T H K"]:
    """`softmax(q k^T / sqrt(K)) v`, softmax in at least float32; H is a multiple of G."""
    batch, length, heads, size = q_BxTxHxK.shape
    groups = k_BxSxGxK.shape[2]
    q = q_BxTxHxK.reshape(batch, length, groups, heads // groups, size) * size**-0.5
    scores = jnp.einsum("btgmk,bsgk->bgmts", q, k_BxSxGxK)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    scores = jnp.where(mask_BxTxS[:, None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BxSxGxK.dtype)
    out = jnp.einsum("bgmts,bsgk->btgmk", weights, v_BxSxGxK)
    return out.reshape(batch, length, heads, size)
