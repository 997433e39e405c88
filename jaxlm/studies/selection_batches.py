"""The loss of each row, and their mean."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxlm.models.scoring import head_log_probs
from jaxlm.typing import Batch, LossFn


def row_losses(lm: Any) -> Callable[..., Array]:
    r"""`losses(params, batch, *, tap=None) -> [B]`: of each row $-\frac1K \sum_k \log p(y_k)$.

    The head gives logits at the tokens that are learnt alone.
    """

    def losses(params: Any, batch: Batch, *, tap: Any = None) -> Array:
        x = lm.hidden(params, batch["input_ids"], batch["attention_mask"], tap=tap)
        positions = jnp.asarray(batch["positions"])
        x = jnp.take_along_axis(x, positions[..., None], axis=1)
        scored = head_log_probs(lm.config, params, x, jnp.asarray(batch["targets"]))
        mask = jnp.asarray(batch["target_mask"])
        return -jnp.sum(scored * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)

    return losses


def mean_loss(lm: Any) -> LossFn:
    """The mean over the rows of a batch, whatever the lengths of their answers."""
    losses = row_losses(lm)

    def loss_fn(params: Any, batch: Batch, *, key: Any = None) -> Any:
        del key
        return jnp.mean(losses(params, batch)), {}

    return loss_fn
