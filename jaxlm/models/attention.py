"""Multi-head attention with grouped queries, in several implementations.

Shapes: B batch, T queries, S keys, H heads, G key-value heads, M = H / G queries per group, K head
size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core.errors import UserError

BLOCK = 256
"""Number of queries, and of keys, in a block of `blockwise`."""
AHEAD = 2**30
"""A position so late that its key is inside every window."""
ANY = -1
"""The segment of a key that every query sees."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query sees, stored so that any block of the mask can be computed.

    Attributes:
      keys: [B, S], above 0 at tokens that are not padding.
      query_positions: [B, T], positions of the queries.
      key_positions: [B, S], positions of the keys.
      first: index of the first query among the keys; the others follow it.
      window: number of last tokens that a query sees, itself included, and of next ones if the mask
        is not causal; None for all.
      causal: whether keys after the query are hidden.
      segments: [B, S], segments of the keys. A query sees keys of its own segment and of segment
        `ANY`. None for one segment.
    """

    keys: Int[Array, "B S"]
    query_positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    first: Any = 0
    window: int | Array | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    segments: Int[Array, "B S"] | None = None

    def block(self, query: Any, queries: int, key: Any, keys: int) -> Bool[Array, "B t s"]:
        """Return the mask of `queries` queries from `query` on and `keys` keys from `key` on."""
        row = self.first + query + jnp.arange(queries)[:, None]
        column = key + jnp.arange(keys)[None, :]
        seen = lax.dynamic_slice_in_dim(self.keys, key, keys, axis=1)[:, None, :] > 0
        if self.causal:
            seen = seen & (column <= row)[None]
        if self.window is not None:
            here = lax.dynamic_slice_in_dim(self.query_positions, query, queries, axis=1)
            there = lax.dynamic_slice_in_dim(self.key_positions, key, keys, axis=1)
            distance = here[:, :, None] - there[:, None, :]
            seen = seen & (distance < self.window)
            if not self.causal:
                seen = seen & ((distance > -self.window) | (there == AHEAD)[:, None, :])
        if self.segments is not None:
            own = lax.dynamic_slice_in_dim(self.segments, self.first + query, queries, axis=1)
            there = lax.dynamic_slice_in_dim(self.segments, key, keys, axis=1)[:, None, :]
            seen = seen & ((own[:, :, None] == there) | (there == ANY))
        return seen | (column == row)[None]  # padding sees itself, so that its softmax is finite

    def prefixed(self, count: int) -> "Mask":
        """Return the mask with `count` more keys in front, which every query sees."""

        def before(x, value):
            return jnp.pad(x, [(0, 0), (count, 0)], constant_values=value)

        return dataclasses.replace(
            self,
            keys=before(self.keys, 1),
            key_positions=before(self.key_positions, AHEAD),
            segments=None if self.segments is None else before(self.segments, ANY),
            first=self.first + count,
        )

    def dense(self) -> Bool[Array, "B T S"]:
        """Return the whole mask."""
        return self.block(0, self.query_positions.shape[1], 0, self.keys.shape[1])


def _scores(q_BxGxMTxK, k_BxGxSxK, seen_BxTxS, scale, cap):
    """Return masked scores [B, G, M, T, S] in at least float32."""
    wide = jnp.promote_types(q_BxGxMTxK.dtype, jnp.float32)
    product = jnp.einsum("bgik,bgsk->bgis", q_BxGxMTxK, k_BxGxSxK, preferred_element_type=wide)
    batch, length, keys = seen_BxTxS.shape
    scores = scale * product.reshape(batch, product.shape[1], -1, length, keys)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    return jnp.where(seen_BxTxS[:, None, None], scores, jnp.finfo(wide).min)


def _mix(weights_BxGxMxTxS, v_BxGxSxK):
    """Return weighted sums of the values, [B, G, M * T, K], in at least float32."""
    batch, groups, _, _, keys = weights_BxGxMxTxS.shape
    weights = weights_BxGxMxTxS.reshape(batch, groups, -1, keys)
    return jnp.einsum(
        "bgis,bgsk->bgik",
        weights.astype(v_BxGxSxK.dtype),
        v_BxGxSxK,
        preferred_element_type=weights.dtype,
    )


def _by_group(q_BxTxHxK, groups):
    """Return queries as [B, G, M * T, K], for one matrix product with the keys of each group."""
    batch, length, heads, size = q_BxTxHxK.shape
    q = q_BxTxHxK.reshape(batch, length, groups, heads // groups, size)
    return q.transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, size)


def _by_head(x_BxGxMTxK, length):
    """Undo `_by_group`."""
    batch, groups, rows, size = x_BxGxMTxK.shape
    x = x_BxGxMTxK.reshape(batch, groups, rows // length, length, size)
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, size)


def xla(
    q_BxTxHxK: Float[Array, "B T H K"],
    k_BxSxGxK: Float[Array, "B S G K"],
    v_BxSxGxK: Float[Array, "B S G K"],
    mask: Mask | Bool[Array, "B T S"],
    *,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T H K"]:
    r"""Return $\mathrm{softmax}(\mathrm{cap}(s\, q k^\top))\, v$, softmax in at least float32.

    It is plain JAX, so forward and reverse mode of any order apply. H is a multiple of G.

    Args:
      q_BxTxHxK: queries.
      k_BxSxGxK: keys.
      v_BxSxGxK: values.
      mask: what each query sees.
      scale: factor s of the scores.
      cap: c of the soft cap `c tanh(x / c)` of the scores; None for no cap.
    """
    seen = mask.dense() if isinstance(mask, Mask) else mask
    k, v = jnp.swapaxes(k_BxSxGxK, 1, 2), jnp.swapaxes(v_BxSxGxK, 1, 2)
    scores = _scores(_by_group(q_BxTxHxK, k.shape[1]), k, seen, scale, cap)
    # The maximum cancels in the quotient below, so it needs no gradient.
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1).reshape(*k.shape[:2], -1, 1)
    out = (_mix(weights, v) / total).astype(v.dtype)
    return _by_head(out, q_BxTxHxK.shape[1])


def blockwise(
    q_BxTxHxK: Float[Array, "B T H K"],
    k_BxSxGxK: Float[Array, "B S G K"],
    v_BxSxGxK: Float[Array, "B S G K"],
    mask: Mask,
    *,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T H K"]:
    """Return the same as `xla`, in memory that grows with T + S instead of T * S.

    Blocks of queries and keys keep a running maximum and sum (arXiv:2112.05682); the backward pass
    recomputes the blocks. It is plain JAX too.
    """
    length, keys = q_BxTxHxK.shape[1], k_BxSxGxK.shape[1]
    q = _pad(q_BxTxHxK)
    k, v = (jnp.swapaxes(_pad(x), 1, 2) for x in (k_BxSxGxK, v_BxSxGxK))
    mask = dataclasses.replace(
        mask,
        keys=_pad(mask.keys),
        query_positions=_pad(mask.query_positions),
        key_positions=_pad(mask.key_positions),
        segments=None if mask.segments is None else _pad(mask.segments),
    )
    rows, columns = min(BLOCK, length), min(BLOCK, keys)
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def block_of_queries(query):
        here = _by_group(lax.dynamic_slice_in_dim(q, query, rows, axis=1), k.shape[1])

        @jax.checkpoint
        def block_of_keys(carry, key):
            top, total, out = carry
            there, value = (lax.dynamic_slice_in_dim(x, key, columns, axis=2) for x in (k, v))
            scores = _scores(here, there, mask.block(query, rows, key, columns), scale, cap)
            new = jnp.maximum(top, lax.stop_gradient(scores.max(axis=-1)))
            weights = jnp.exp(scores - new[..., None])
            shrink = jnp.exp(top - new)
            out = out * shrink.reshape(*out.shape[:3], 1) + _mix(weights, value)
            return (new, total * shrink + weights.sum(axis=-1), out), None

        shape = (*here.shape[:2], here.shape[2] // rows, rows)
        start = (
            jnp.full(shape, jnp.finfo(wide).min, wide),
            jnp.zeros(shape, wide),
            jnp.zeros(here.shape, wide),
        )
        starts = jnp.arange(0, k.shape[2], columns)
        (_, total, out), _ = lax.scan(block_of_keys, start, starts)
        return _by_head(out / total.reshape(*out.shape[:3], 1), rows)

    blocks = lax.map(jax.checkpoint(block_of_queries), jnp.arange(0, q.shape[1], rows))
    out = jnp.moveaxis(blocks, 0, 1).reshape(q.shape)
    return out[:, :length].astype(v.dtype)


def _pad(x):
    """Pad axis 1 with zeros to a multiple of `BLOCK`, if it is longer than `BLOCK`."""
    excess = -x.shape[1] % BLOCK if x.shape[1] > BLOCK else 0
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
    """Return the same as `xla` with NVIDIA's fused kernel: float16 and bfloat16, reverse mode only.

    Raises:
      UserError: a soft cap is given, which the kernel does not have.
    """
    if cap is not None:
        raise UserError(
            f"attention: 'cudnn' has no soft cap (got {cap}). Choose 'xla' or 'blockwise'."
        )
    seen = mask.dense() if isinstance(mask, Mask) else mask
    return jax.nn.dot_product_attention(
        q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask=seen[:, None], scale=scale, implementation="cudnn"
    )


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "xla": xla,
    "blockwise": blockwise,
    "cudnn": cudnn,
}
