"""Prefix tuning: every layer has m trained keys and values that every token sees.

    softmax(s q [P_k; K]^T) [P_v; V],        P_k, P_v [m, G, K] in each layer

The positions of the tokens stay what they were, and no mask or window hides a prefix.

References: Li and Liang, arXiv:2101.00190. As in arXiv:2305.17333 there is no network between the
trained numbers and the keys and values.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxlm.core.errors import UserError
from jaxlm.core.prng import leaf_key
from jaxlm.models import LanguageModel, adapters
from jaxlm.models.initialise import nest, unnest
from jaxlm.models.transformer import empty_cache, extend
from jaxlm.typing import PRNGKey

KEYS, VALUES = "layers.attention.prefix_keys", "layers.attention.prefix_values"


def prefix(
    lm: LanguageModel,
    key: PRNGKey,
    *,
    length: int = 5,
    init: Literal["activations", "normal"] = "activations",
    dtype="float32",
) -> LanguageModel:
    """Puts a prefix before the keys and values of every layer; train it with `select=PREFIX`.

    A prefix has no tap (`jaxlm.core.taps`).

    Args:
      lm: the model.
      key: of the tokens or numbers drawn.
      length: m.
      init: `activations` gives the prefix the keys and values, as attention sees them, of m tokens
        drawn uniformly from the vocabulary and read by the model; `normal` draws N(0, 1).
      dtype: of the prefix.

    Returns:
      A model with the further leaves `layers.attention.prefix_keys` and `prefix_values`, each
      [L, m, G, K]. It shares the other arrays with `lm`.

    Raises:
      UserError: if the model has a prefix, or the length is below 1 or more than its positions.
    """
    config = lm.config
    if adapters.found(lm.params, adapters.PREFIX):
        raise UserError("lm: has a prefix already (got another). Give the model without it.")
    if not 1 <= length <= config.max_positions:
        raise UserError(
            f"length: must be from 1 to {config.max_positions} (got {length}). Correct it."
        )
    if init == "activations":
        draw = leaf_key(key, KEYS)
        ids = jax.random.randint(draw, (1, length), 0, config.vocab_size, jnp.int32)
        keys, values = activations(lm, ids)
    elif init == "normal":
        shape = (config.num_layers, length, config.num_kv_heads, config.head_size)
        keys, values = (
            jax.random.normal(leaf_key(key, path), shape, jnp.float32) for path in (KEYS, VALUES)
        )
    else:
        raise UserError(f"init: is not known (got {init!r}). Choose one of activations, normal.")
    leaves = {KEYS: keys.astype(dtype), VALUES: values.astype(dtype)}
    return lm.replace(params=nest(unnest(lm.params) | leaves))


def activations(lm: LanguageModel, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [L, T, G, K] of one row of tokens [1, T], as attention sees them."""
    dtype = lm.config.compute_dtype or lm.params["embed"]["tokens"]["embedding"].dtype
    cache = empty_cache(lm.config, 1, ids.shape[1], dtype)
    _, cache = extend(lm.config, lm.params, ids, None, cache)
    keys, values = (jnp.swapaxes(x[:, 0], 1, 2) for x in (cache.keys, cache.values))
    return keys, values
