"""How well a causal language model predicts running text, in nats a token and bits a byte."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.typing import Params

Apply = Callable[..., Any]
"""The forward pass of a `LanguageModel`: `lm.apply`."""


def next_token_losses(
    apply: Apply, params: Params, input_ids: Int[Any, "B T1"]
) -> Float[Array, "B T"]:
    r"""Cross-entropy of each token after the first, $-\log p(x_{t+1} \mid x_{\le t})$, in nats.

    No array of log-probabilities is made beside the logits: on a CPU that would take a fifth of a
    whole training step of a small model.

    Args:
        apply: the model's forward pass.
        params: its parameters.
        input_ids: sequences without padding, T1 = T + 1.
    """
    ids = jnp.asarray(input_ids)
    logits_BxTxV = apply(params, ids[:, :-1])
    logits_BxTxV = logits_BxTxV.astype(jnp.promote_types(logits_BxTxV.dtype, jnp.float32))
    chosen_BxT = jnp.take_along_axis(logits_BxTxV, ids[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BxTxV, axis=-1) - chosen_BxT


def perplexity(
    apply: Apply, windows: Mapping[str, np.ndarray], size: int, *, batch_size: int
) -> Callable[[Params], dict[str, float]]:
    """Makes a function that measures parameters on a text cut into windows.

    Args:
        apply: the model's forward pass.
        windows: `input_ids` int [W, T + 1] and `weights` [W, T] of the targets, as
            `jaxlm.data.corpus.all_windows` makes them.
        size: bytes of the text.
        batch_size: windows in a forward pass.

    Returns:
        `params -> {"loss": nats a token, "bits_per_byte": bits a byte}`, compiled at its first
        call.
    """
    spare = -len(windows["weights"]) % batch_size
    batches = {
        name: np.pad(value, ((0, spare), (0, 0))).reshape(-1, batch_size, value.shape[1])
        for name, value in windows.items()
    }
    tokens = float(windows["weights"].sum())

    @jax.jit
    def total(params: Params, batches: Mapping[str, Array]) -> Array:
        def nats(batch: Mapping[str, Array]) -> Array:
            return jnp.sum(next_token_losses(apply, params, batch["input_ids"]) * batch["weights"])

        return jnp.sum(jax.lax.map(nats, batches))

    def measure(params: Params) -> dict[str, float]:
        nats = float(total(params, batches))
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / size}

    return measure
