"""Log-probabilities of tokens, sequences and continuations: the only ones of the library.

Logits exist for a block of tokens at a time, in the backward pass too, so that [B, T, V] is never
formed. Shapes: B batch, T length, V vocabulary, C continuations of one prompt, K their length.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from jaxlm.models.config import ModelConfig
from jaxlm.models.transformer import Cache, check_ids, empty_cache, extend, hidden, logits

LOGITS = 2**26
"""Logits in a block, where the caller does not say how many tokens."""


def log_probs_of(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    r"""$z_y - \log \sum_v e^{z_v}$: log-probabilities of targets, in at least float32."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def head_log_probs(
    config: ModelConfig,
    params: Any,
    x: Float[Array, "*B D"],
    targets: Int[Array, "*B"],
    *,
    view: Any = None,
    block: int | None = None,
) -> Float[Array, "*B"]:
    """Log-probabilities of targets from hidden states, a block of tokens at a time.

    Where there are several blocks, the backward pass computes the logits of each again.

    Args:
      config: the model.
      params: its parameters.
      x: hidden states at the places that predict the targets.
      targets: token ids.
      view: see `jaxlm.core.views`.
      block: tokens in a block; None for as many as have 2**26 logits.
    """
    count = targets.size
    block = max(1, LOGITS // config.vocab_size) if block is None else block
    flat_x, flat_targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)

    def score(params, view, x, targets):
        return log_probs_of(logits(config, params, x, view=view), targets)

    if count <= block:
        return score(params, view, flat_x, flat_targets).reshape(targets.shape)
    excess = -count % block
    blocks_x = jnp.pad(flat_x, ((0, excess), (0, 0))).reshape(-1, block, x.shape[-1])
    blocks_targets = jnp.pad(flat_targets, (0, excess)).reshape(-1, block)
    score = jax.checkpoint(score)
    scored = lax.map(lambda pair: score(params, view, *pair), (blocks_x, blocks_targets))
    return scored.reshape(-1)[:count].reshape(targets.shape)


def next_token_log_probs(
    config: ModelConfig,
    params: Any,
    input_ids: Int[ArrayLike, "B T"],
    attention_mask: Int[ArrayLike, "B T"] | None = None,
    *,
    view: Any = None,
    block: int | None = None,
) -> Float[Array, "B T-1"]:
    r"""$\log p(x_{t+1} \mid x_{\le t})$ of every token but the first.

    Args:
      config: a decoder.
      params: its parameters.
      input_ids: token ids.
      attention_mask: 1 for tokens, 0 for padding; None means no padding.
      view: see `jaxlm.core.views`.
      block: see `head_log_probs`.

    Returns:
      In at least float32; what is at padding means nothing.

    Raises:
      UserError: concrete ids are out of range, see `jaxlm.models.transformer.check_ids`.
    """
    check_ids("input_ids", input_ids, config.vocab_size)
    ids = jnp.asarray(input_ids)
    seen = None if attention_mask is None else jnp.asarray(attention_mask)
    targets, length = jnp.roll(ids, -1, axis=1), ids.shape[1]
    # The last token is read for nothing where that makes a round length, since others are slow.
    read = length - 1 if length % 8 or length > config.max_positions else length
    x = hidden(config, params, ids[:, :read], None if seen is None else seen[:, :read], view=view)
    scored = head_log_probs(config, params, x, targets[:, :read], view=view, block=block)
    return scored[:, : length - 1]


def reduce_log_probs(
    log_probs: Float[Array, "*B T"],
    mask: Num[ArrayLike, "*B T"],
    reduction: Literal["sum", "mean"] = "sum",
) -> Float[Array, "*B"]:
    """Sum or mean over the tokens of a mask; 0 where it has none.

    >>> reduce_log_probs(jnp.array([[-1.0, -2.0, -3.0]]), jnp.array([[0, 1, 1]]), "mean").tolist()
    [-2.5]
    """
    chosen = jnp.asarray(mask) > 0
    total = jnp.sum(jnp.where(chosen, log_probs, 0), axis=-1)
    if reduction == "sum":
        return total
    return total / jnp.maximum(chosen.sum(axis=-1), 1)


def sequence_log_probs(
    config: ModelConfig,
    params: Any,
    input_ids: Int[ArrayLike, "B T"],
    attention_mask: Int[ArrayLike, "B T"] | None = None,
    completion_mask: Int[ArrayLike, "B T"] | None = None,
    *,
    reduction: Literal["sum", "mean"] = "sum",
    view: Any = None,
    block: int | None = None,
) -> Float[Array, " B"]:
    """Log-probability of the tokens of a mask given those before them, summed or averaged.

    Args:
      config: a decoder.
      params: its parameters.
      input_ids: token ids.
      attention_mask: 1 for tokens, 0 for padding; None means no padding.
      completion_mask: 1 for the tokens that count; None for all tokens but the first.
      reduction: "sum", or "mean" over the tokens that count.
      view: see `jaxlm.core.views`.
      block: see `head_log_probs`.

    Returns:
      In at least float32; 0 where no token counts.
    """
    scored = next_token_log_probs(config, params, input_ids, attention_mask, view=view, block=block)
    real = jnp.ones(jnp.shape(input_ids), jnp.int32) if attention_mask is None else attention_mask
    counted = jnp.asarray(real) * (1 if completion_mask is None else jnp.asarray(completion_mask))
    return reduce_log_probs(scored, counted[:, 1:], reduction)


def continuation_log_probs(
    config: ModelConfig,
    params: Any,
    prompt_ids: Int[ArrayLike, "B T"],
    prompt_mask: Int[ArrayLike, "B T"],
    continuation_ids: Int[ArrayLike, "B C K"],
    *,
    view: Any = None,
    block: int | None = None,
) -> Float[Array, "B C K"]:
    """Log-probabilities of the tokens of several continuations; the prompt is read once.

    Args:
      config: a decoder.
      params: its parameters.
      prompt_ids: token ids of the prompts, at least one a row.
      prompt_mask: 1 for tokens, 0 for padding on either side.
      continuation_ids: token ids of the continuations, padded on the right with any id of the
        vocabulary.
      view: see `jaxlm.core.views`.
      block: see `head_log_probs`.

    Returns:
      In at least float32; `reduce_log_probs` sums those that count.

    Raises:
      UserError: concrete ids are out of range, see `jaxlm.models.transformer.check_ids`.
    """
    check_ids("continuation_ids", continuation_ids, config.vocab_size)
    ids = jnp.asarray(continuation_ids)
    batch, options, length = ids.shape
    prompt_mask = jnp.asarray(prompt_mask)
    size = prompt_mask.shape[1] + length - 1
    dtype = params["embed"]["tokens"]["embedding"].dtype
    cache = empty_cache(config, batch, size, config.compute_dtype or dtype)
    x, cache = extend(config, params, prompt_ids, prompt_mask, cache, view=view)
    last = last_token(x, prompt_mask)[:, None]
    states = jnp.repeat(last, options, axis=0)
    if length > 1:
        rest = ids.reshape(-1, length)[:, :-1]
        x, _ = extend(config, params, rest, None, repeat(cache, options), view=view)
        states = jnp.concatenate([states, x], axis=1)
    states = states.reshape(batch, options, length, -1)
    return head_log_probs(config, params, states, ids, view=view, block=block)


def last_token(x: Float[Array, "B T D"], mask: Int[Array, "B T"]) -> Float[Array, "B D"]:
    """Hidden states at the last token of each row, wherever the padding stands."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1] > 0, axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def repeat(cache: Cache, times: int) -> Cache:
    """The cache with every row so many times, copies side by side."""

    def rows(store):
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=x.ndim - 4), store)

    return dataclasses.replace(
        cache,
        keys=rows(cache.keys),
        values=rows(cache.values),
        mask=jnp.repeat(cache.mask, times, axis=0),
        positions=jnp.repeat(cache.positions, times, axis=0),
    )
