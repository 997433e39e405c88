"""Log-probabilities of tokens, sequences and continuations.

Logits are computed for a block of tokens at a time, in the backward pass too, so an array [B, T, V]
never exists. Shapes: B batch, T length, V vocabulary, S segments of a row, C continuations of one
prompt, K their length.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Num

from jaxlm.core import checks
from jaxlm.core.errors import UserError
from jaxlm.models.config import ModelConfig
from jaxlm.models.transformer import Cache, check_ids, empty_cache, extend, hidden, logits

LOGITS = 2**26
"""Default number of logits in a block."""


def log_probs_of(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    r"""Return $z_y - \log \sum_v e^{z_v}$ of the targets y, in at least float32."""
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
    """Return log-probabilities of targets from hidden states, a block of tokens at a time.

    With several blocks, the backward pass recomputes the logits of each.

    Args:
      config: the model.
      params: its parameters.
      x: hidden states at the tokens that predict the targets.
      targets: token ids.
      view: see `jaxlm.core.views`.
      block: number of tokens in a block; None for as many as make 2**26 logits.
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
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    view: Any = None,
    block: int | None = None,
) -> Float[Array, "B T-1"]:
    r"""Return $\log p(x_{t+1} \mid x_{\le t})$ of every token but the first.

    Args:
      config: a decoder.
      params: its parameters.
      input_ids: token ids.
      attention_mask: 1 for tokens, 0 for padding; None for no padding.
      segment_ids: for packed rows, see `jaxlm.models.transformer.apply`.
      view: see `jaxlm.core.views`.
      block: see `head_log_probs`.

    Returns:
      In at least float32. Values at padding are meaningless without `segment_ids`. With them, they
      are 0, and so are those at the first token of each segment, which nothing predicts.

    Raises:
      UserError: concrete ids are out of range, see `jaxlm.models.transformer.check_ids`.
    """
    check_ids("input_ids", input_ids, config.vocab_size)
    ids = jnp.asarray(input_ids)
    targets, length = jnp.roll(ids, -1, axis=1), ids.shape[1]
    # The last token predicts nothing. It is still read if that makes the length a multiple of 8,
    # since other lengths are slow.
    read = length - 1 if length % 8 or length > config.max_positions else length
    seen, segments = (
        None if ids is None else jnp.asarray(ids)[:, :read] for ids in (attention_mask, segment_ids)
    )
    x = hidden(config, params, ids[:, :read], seen, segment_ids=segments, view=view)
    scored = head_log_probs(config, params, x, targets[:, :read], view=view, block=block)
    scored = scored[:, : length - 1]
    return scored if segment_ids is None else jnp.where(_same_segment(segment_ids), scored, 0)


def _same_segment(segment_ids: Int[ArrayLike, "B T"]) -> Bool[Array, "B T-1"]:
    """Return whether each token but the first is in the segment of the token before it."""
    ids = jnp.asarray(segment_ids)
    return (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)


def reduce_log_probs(
    log_probs: Float[Array, "*B T"],
    mask: Num[ArrayLike, "*B T"],
    reduction: Literal["sum", "mean"] = "sum",
) -> Float[Array, "*B"]:
    """Return the sum or mean over the tokens where the mask is 1; 0 for an empty mask.

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
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    num_segments: int | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    view: Any = None,
    block: int | None = None,
) -> Float[Array, " B"] | Float[Array, "B S"]:
    """Return the sum or mean of the log-probabilities of tokens, each given those before it.

    Args:
      config: a decoder.
      params: its parameters.
      input_ids: token ids.
      attention_mask: 1 for tokens, 0 for padding; None for no padding.
      completion_mask: 1 for the tokens to score; None for all tokens but the first of each text.
      segment_ids: for packed rows, see `jaxlm.models.transformer.apply`.
      num_segments: S, the largest number of segments of a row; required with `segment_ids`.
      reduction: "sum", or "mean" over the scored tokens.
      view: see `jaxlm.core.views`.
      block: see `head_log_probs`.

    Returns:
      [B], or [B, S] with `segment_ids`, where column s belongs to segment s + 1; in at least
      float32, and 0 where no token is scored.

    Raises:
      UserError: only one of `segment_ids` and `num_segments` is given.
    """
    if (segment_ids is None) != (num_segments is None):
        raise UserError(
            f"num_segments: belongs to segment_ids (got {num_segments}). Give both or neither."
        )
    checks.integer("num_segments", num_segments)
    scored = next_token_log_probs(
        config, params, input_ids, attention_mask, segment_ids=segment_ids, view=view, block=block
    )
    counted = jnp.ones(jnp.shape(input_ids), jnp.int32)
    for mask in (attention_mask, completion_mask):
        counted = counted if mask is None else counted * jnp.asarray(mask)
    counted = counted[:, 1:]
    if segment_ids is None or num_segments is None:
        return reduce_log_probs(scored, counted, reduction)
    numbers = jnp.where(_same_segment(segment_ids), jnp.asarray(segment_ids)[:, 1:], 0)
    of_segment = numbers[:, None] == jnp.arange(1, num_segments + 1)[None, :, None]
    scored = jnp.broadcast_to(scored[:, None], of_segment.shape)
    return reduce_log_probs(scored, of_segment * counted[:, None], reduction)


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
    """Return log-probabilities of the tokens of several continuations; the prompt is read once.

    Args:
      config: a decoder.
      params: its parameters.
      prompt_ids: token ids of the prompts, at least one in a row.
      prompt_mask: 1 for tokens, 0 for padding on either side.
      continuation_ids: token ids of the continuations, padded on the right with any ids.
      view: see `jaxlm.core.views`.
      block: see `head_log_probs`.

    Returns:
      In at least float32, padding included; sum them with `reduce_log_probs` and a mask.

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
    """Return the hidden state at the last token of each row; padding may be on either side."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1] > 0, axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def repeat(cache: Cache, times: int) -> Cache:
    """Return the cache with every row repeated, copies side by side."""

    def rows(store):
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=x.ndim - 4), store)

    return dataclasses.replace(
        cache,
        keys=rows(cache.keys),
        values=rows(cache.values),
        mask=jnp.repeat(cache.mask, times, axis=0),
        positions=jnp.repeat(cache.positions, times, axis=0),
    )
