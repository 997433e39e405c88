"""Perplexity of a causal language model on a text, in nats per token and bits per byte."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlm.core.errors import UserError
from jaxlm.sharding import mesh_of, place_batch
from jaxlm.typing import Params


def perplexity(
    log_probs: Callable[..., Any], windows: Mapping[str, np.ndarray], size: int, *, batch_size: int
) -> Callable[[Params], dict[str, float]]:
    """Return a function that evaluates parameters on a text cut into windows.

    Args:
        log_probs: `lm.log_probs`, the log-probabilities of all tokens but the first.
        windows: `input_ids` int [W, T + 1] and `weights` [W, T] of the targets, see
            `jaxlm.data.corpus.all_windows`.
        size: bytes of the text.
        batch_size: windows in a forward pass.

    Returns:
        `params -> {"loss": nats per token, "bits_per_byte": bits per byte}`, compiled at its first
        call. It raises a UserError if the loss is not finite.

    Raises:
        UserError: if the text has no token to predict.
    """
    spare = -len(windows["weights"]) % batch_size
    # The last batch is padded with windows of weight 0, so that one shape is compiled.
    batches = {
        name: np.pad(value, ((0, spare), (0, 0))).reshape(-1, batch_size, value.shape[1])
        for name, value in windows.items()
    }
    tokens = float(windows["weights"].sum())
    if not tokens or not size:
        raise UserError("held-out text: has no token to predict (got 0). Give a longer text.")
    total = jax.jit(total_nats(log_probs))

    def measure(params: Params) -> dict[str, float]:
        mesh = mesh_of(params)
        placed = batches if mesh is None else place_batch(batches, mesh, axis=1)
        nats = float(total(params, placed))
        if not math.isfinite(nats):
            raise UserError(
                f"held-out text: the loss is not finite (got {nats}). Check that the model's "
                "weights are finite, and lower the learning rate of the run that made them."
            )
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / size}

    return measure


def total_nats(log_probs: Callable[..., Any]) -> Callable[[Params, Mapping[str, Array]], Array]:
    """Return `(params, batches) -> nats` for windows [N, B, T + 1] and weights [N, B, T]."""

    def total(params: Params, batches: Mapping[str, Array]) -> Array:
        def nats(batch: Mapping[str, Array]) -> Array:
            return -jnp.sum(log_probs(params, batch["input_ids"]) * batch["weights"])

        return jnp.sum(jax.lax.map(nats, batches))

    return total
