"""Multi-head attention with grouped queries, by any of several implementations.

Shapes: B batch, T queries, S keys, H heads, G key-value heads, M = H / G queries per group, K head
size.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

BLOCK = 256


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "query_positions", "key_positions", "first", "window"),
    meta_fields=("causal",),
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query may see, in a form that is made block by block.

    Attributes:
      keys: [B, S], above 0 at real tokens.
      query_positions: [B, T], positions of the queries.
      key_positions: [B, S], positions of the keys.
      first: index among the keys of the first query; the others follow it.
      window: tokens back that are seen, itself included; None for all.
      causal: whether keys after the query are hidden.
    """

    keys: Int[Array, "B S"]
    query_positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    first: Any = 0
    window: int | Array | None = None
    causal: bool = True

    def block(self, query: Any, queries: int, key: Any, keys: int) -> Bool[Array, "B t s"]:
        """The part of `queries` queries from `query` on and `keys` keys from `key` on.

        Every query sees itself, so that rows of padding stay finite.
        """
        row = self.first + query + jnp.arange(queries)[:, None]
        column = key + jnp.arange(keys)[None, :]
        seen = lax.dynamic_slice_in_dim(self.keys, key, keys, axis=1)[:, None, :] > 0
        if self.causal:
            seen = seen & (column <= row)[None]
        if self.window is not None:
            here = lax.dynamic_slice_in_dim(self.query_positions, query, queries, axis=1)
            there = lax.dynamic_slice_in_dim(self.key_positions, key, keys, axis=1)
            seen = seen & (here[:, :, None] - there[:, None, :] < self.window)
        return seen | (column == row)[None]

    def dense(self) -> Bool[Array, "B T S"]:
        """The whole mask."""
        return self.block(0, self.query_positions.shape[1], 0, self.keys.shape[1])


def _scores(q, k, seen, scale, cap):
    """Masked scores [B, G, M, T, S] in at least float32."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = scale * jnp.einsum("btgmk,bsgk->bgmts", q, k, preferred_element_type=wide)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    return jnp.where(seen[:, None, None], scores, jnp.finfo(scores.dtype).min)


def _grouped(q, k):
    batch, length, heads, size = q.shape
    return q.reshape(batch, length, k.shape[2], heads // k.shape[2], size)


def xla(
    q_BxTxHxK: Float[Array, "B T H K"],
    k_BxSxGxK: Float[Array, "B S G K"],
    v_BxSxGxK: Float[Array, "B S G K"],
    mask: Mask | Bool[Array, "B T S"],
    *,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T H K"]:
    r"""$\mathrm{softmax}(\mathrm{cap}(s\, q k^\top))\, v$, softmax in at least float32.

    Written out, so that every mode of differentiation applies. H is a multiple of G.

    Args:
      q_BxTxHxK: queries.
      k_BxSxGxK: keys.
      v_BxSxGxK: values.
      mask: what each query sees.
      scale: s, of the scores.
      cap: c of the soft cap `c tanh(x / c)`; None for no cap.
    """
    seen = mask.dense() if isinstance(mask, Mask) else mask
    scores = _scores(_grouped(q_BxTxHxK, k_BxSxGxK), k_BxSxGxK, seen, scale, cap)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BxSxGxK.dtype)
    out = jnp.einsum("bgmts,bsgk->btgmk", weights, v_BxSxGxK)
    return out.reshape(q_BxTxHxK.shape)


def blockwise(
    q_BxTxHxK: Float[Array, "B T H K"],
    k_BxSxGxK: Float[Array, "B S G K"],
    v_BxSxGxK: Float[Array, "B S G K"],
    mask: Mask,
    *,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T H K"]:
    """The same as `xla` in memory that grows with T + S instead of T * S.

    Blocks of queries and keys with a running maximum and sum (arXiv:2112.05682); the backward pass
    computes the blocks again. Plain JAX, so every mode of differentiation applies.
    """
    length, keys = q_BxTxHxK.shape[1], k_BxSxGxK.shape[1]
    q = _pad(_grouped(q_BxTxHxK, k_BxSxGxK), BLOCK)
    k, v = _pad(k_BxSxGxK, BLOCK), _pad(v_BxSxGxK, BLOCK)
    mask = dataclasses.replace(
        mask,
        keys=_pad(mask.keys, BLOCK),
        query_positions=_pad(mask.query_positions, BLOCK),
        key_positions=_pad(mask.key_positions, BLOCK),
    )
    rows, columns = min(BLOCK, length), min(BLOCK, keys)
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def block_of_queries(query):
        here = lax.dynamic_slice_in_dim(q, query, rows, axis=1)

        @jax.checkpoint
        def block_of_keys(carry, key):
            top, total, out = carry
            there, value = (lax.dynamic_slice_in_dim(x, key, columns, axis=1) for x in (k, v))
            seen = mask.block(query, rows, key, columns)
            scores = _scores(here, there, seen, scale, cap)
            new = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new[..., None])
            shrink = jnp.exp(top - new)
            total = total * shrink + weights.sum(-1)
            step = jnp.einsum("bgmts,bsgk->bgmtk", weights, value.astype(wide))
            return (new, total, out * shrink[..., None] + step), None

        batch, _, groups, members, size = here.shape
        shape = (batch, groups, members, rows)
        start = (
            jnp.full(shape, jnp.finfo(wide).min, wide),
            jnp.zeros(shape, wide),
            jnp.zeros((*shape, size), wide),
        )
        starts = jnp.arange(0, k.shape[1], columns)
        (_, total, out), _ = lax.scan(block_of_keys, start, starts)
        return jnp.moveaxis(out / total[..., None], 3, 1)

    blocks = lax.map(jax.checkpoint(block_of_queries), jnp.arange(0, q.shape[1], rows))
    out = jnp.moveaxis(blocks, 0, 1).reshape(q.shape[0], q.shape[1], *q_BxTxHxK.shape[2:])
    return out[:, :length].astype(v_BxSxGxK.dtype)


def _pad(x, multiple):
    """`x` with axis 1 padded by zeros to a multiple of `multiple`, if it is longer than that."""
    excess = -x.shape[1] % multiple if x.shape[1] > multiple else 0
    return jnp.pad(x, [(0, 0), (0, excess)] + [(0, 0)] * (x.ndim - 2)) if excess else x


def cudnn(
    q_BxTxHxK: Float[Array, "B T H K"],
    k_BxSxGxK: Float[Array, "B S G K"],
    v_BxSxGxK: Float[Array, "B S G K"],
    mask: Mask | Bool[Array, "B T S"],
    *,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T H K"]:
    """The same by NVIDIA's fused kernel: float16 and bfloat16 only, and no forward-mode.

    Raises:
      ValueError: for a soft cap, which the kernel does not have.
    """
    if cap is not None:
        raise ValueError("attention 'cudnn' has no soft cap; use 'xla' or 'blockwise'")
    seen = mask.dense() if isinstance(mask, Mask) else mask
    return jax.nn.dot_product_attention(
        q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask=seen[:, None], scale=scale, implementation="cudnn"
    )


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "xla": xla,
    "blockwise": blockwise,
    "cudnn": cudnn,
}
