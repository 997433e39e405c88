"""Adapters as leaves of the parameter tree, which the model reads next to a weight.

`jaxlm.peft` adds them:

layers.attention.q_proj.lora_a [L, in, r]      layers.attention.q_proj.lora_b [L, r, out]
layers.attention.prefix_keys [L, m, G, K]      layers.attention.prefix_values [L, m, G, K]
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxlm.core.errors import UserError
from jaxlm.core.paths import path_predicate
from jaxlm.core.precision import Packed
from jaxlm.models.config import ModelConfig
from jaxlm.models.initialise import nest, unnest

LORA = r"\.lora_[ab]$"
PREFIX = r"\.prefix_(keys|values)$"


def has(params: Any, pattern: str) -> bool:
    """Return whether a pattern is found in a path of a tree."""
    return any(map(path_predicate(pattern), unnest(params)))


def merge(config: ModelConfig, params: Any) -> Any:
    """Return the tree with `W + s A B`, summed in float32, for every kernel W with an adapter."""
    flat = unnest(params)
    takes = path_predicate(LORA)
    merged = {path: leaf for path, leaf in flat.items() if not takes(path)}
    for path in [path for path in flat if path.endswith(".lora_a")]:
        stem = path.removesuffix(".lora_a")
        kernel = flat[stem + ".kernel"]
        if isinstance(kernel, Packed):
            raise UserError(
                f"{stem}.kernel: cannot be merged while packed (got {kernel.bits} bits). Call "
                "jaxlm.core.precision.dequantize on the parameters first."
            )
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        left, right = (flat[stem + name].astype(wide) for name in (".lora_a", ".lora_b"))
        low = jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
        merged[stem + ".kernel"] = (kernel + config.lora_scale * low).astype(kernel.dtype)
    return nest(merged)
