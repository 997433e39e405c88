"""Losses of a language model: choice among options, and the next token.

Both are `loss_fn(params, batch, *, key=None, view=None) -> (loss, aux)`, so every optimizer takes
them; `view` reaches the model and spares a copy of the parameters.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxlm.evaluation.classification import Apply, LogProbs, option_scores
from jaxlm.models.scoring import log_probs_of
from jaxlm.typing import Batch, LossFn, Params


def classification_objective(
    apply: Apply,
    token_ids: Int[Any, " C"] | None = None,
    *,
    offsets: Float[Any, " C"] | None = None,
    log_probs: LogProbs | None = None,
) -> LossFn:
    r"""Cross-entropy over options, $-\log \mathrm{softmax}(s)_y$, averaged over the batch.

    Args:
        apply: the model's forward pass, `lm.apply`.
        token_ids: the label words' tokens, `encoded.token_ids`; None for options of several tokens.
        offsets: taken from the scores; see `jaxlm.evaluation.calibration_offsets`.
        log_probs: `lm.continuation_log_probs`, for options of several tokens after one prompt.

    Returns:
        `loss_fn(params, batch, *, key=None, view=None) -> (loss, {"accuracy"})`. Rows with
        weight 0 count in neither.
    """

    def loss_fn(params: Params, batch: Batch, *, key: Any = None, view: Any = None) -> Any:
        del key
        scores_BxC = option_scores(
            apply, token_ids, params, batch, offsets=offsets, log_probs=log_probs, view=view
        )
        labels, weights = jnp.asarray(batch["labels"]), batch["weights"]
        losses = -log_probs_of(scores_BxC, labels)
        count = jnp.sum(weights)
        hits = (jnp.argmax(scores_BxC, axis=-1) == labels) * weights
        loss = jnp.sum(losses * weights) / count
        return loss, {"accuracy": jnp.sum(hits) / count}

    return loss_fn


def lm_objective(log_probs: Callable[..., Any]) -> LossFn:
    r"""Cross-entropy of the next token, in nats a token.

    Args:
        log_probs: those of every token but the first, `lm.log_probs`.

    Returns:
        `loss_fn(params, batch, *, key=None, view=None) -> (loss, {"tokens"})` on a batch of
        `input_ids` [B, T] and, optionally, `attention_mask` [B, T] and `weights` [B, T]: the weight
        of a token as a target. The first token is never a target.
    """

    def loss_fn(params: Params, batch: Batch, *, key: Any = None, view: Any = None) -> Any:
        del key
        ids = jnp.asarray(batch["input_ids"])
        mask = batch.get("attention_mask")
        weights = batch.get("weights", jnp.ones(ids.shape) if mask is None else mask)[:, 1:]
        losses = -log_probs(params, ids, mask, view=view)
        tokens = jnp.sum(weights)
        return jnp.sum(losses * weights) / tokens, {"tokens": tokens}

    return loss_fn
