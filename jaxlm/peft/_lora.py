r"""Low-rank adaptation: a kernel W stays as it is, and a product of two thin matrices is added.

    y = x W + b + (alpha / r) x A B,        A [in, r], B [r, out]

References: Hu et al., arXiv:2106.09685.
"""

import math

import jax
import jax.numpy as jnp

from jaxlm.core.errors import UserError
from jaxlm.core.paths import Select, path_predicate
from jaxlm.core.prng import leaf_key
from jaxlm.models import LanguageModel, adapters
from jaxlm.models.initialise import nest, unnest
from jaxlm.typing import PRNGKey


def lora(
    lm: LanguageModel,
    key: PRNGKey,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Select = r"attention\.(q|v)_proj",
    dtype="float32",
) -> LanguageModel:
    """Puts low-rank adapters beside kernels; the model computes the same until they are trained.

    Train them with `select=jaxlm.peft.LORA`. B is 0 at first, so the first gradient of A is 0, and
    zeroth-order steps see A only together with a perturbed B.

    Args:
      lm: the model; its kernels may be packed.
      key: of A, uniform between ±1 / sqrt(in); B is 0.
      rank: r.
      alpha: the product is multiplied by alpha / r, which becomes `config.lora_scale`.
      targets: which kernels, a regular expression searched in their paths or a predicate.
      dtype: of the adapters; in float32, small steps count over weights of any precision.

    Returns:
      A model with the further leaves `lora_a` and `lora_b`. It shares the other arrays with `lm`.

    Raises:
      UserError: if the model has such adapters, no kernel is taken, alpha is not finite, or the
        rank is below 1 or above every side of the matrices.
    """
    flat = unnest(lm.params)
    refuse_second(lm)
    if rank < 1:
        raise UserError(f"rank: must be at least 1 (got {rank}). Correct it.")
    if not abs(alpha) <= 1e30:
        raise UserError(f"alpha: must be a finite number (got {alpha}). Correct it.")
    kernels = [path for path in flat if path.endswith(".kernel")]
    takes = path_predicate(targets, "targets")
    chosen = [path for path in kernels if takes(path)]
    if not chosen:
        shown = ", ".join(kernels[:8]) + (", ..." if len(kernels) > 8 else "")
        raise UserError(f"targets: takes no kernel (got {targets!r}). Name some of {shown}.")
    most = max(max(flat[path].shape[-2:]) for path in chosen)
    if rank > most:
        raise UserError(
            f"rank: must be at most {most}, the side of the largest matrix (got {rank}). Lower it."
        )
    for path in chosen:
        *stack, size_in, size_out = flat[path].shape
        left = path.removesuffix(".kernel") + ".lora_a"
        bound = 1 / math.sqrt(size_in)
        shape = (*stack, size_in, rank)
        drawn = jax.random.uniform(leaf_key(key, left), shape, jnp.float32, -bound, bound)
        flat[left] = drawn.astype(dtype)
        flat[left[:-1] + "b"] = jnp.zeros((*stack, rank, size_out), dtype)
    return lm.replace(config=lm.config.replace(lora_scale=alpha / rank), params=nest(flat))


def refuse_second(lm: LanguageModel) -> None:
    """Raises UserError for a model with low-rank adapters, since all of them share one scale."""
    if adapters.found(lm.params, adapters.LORA):
        raise UserError(
            "lm: has a LoRA adapter already (got another). Call jaxlm.peft.merge on it first."
        )


def merge(lm: LanguageModel) -> LanguageModel:
    """The same model with `W + (alpha / r) A B`, summed in float32, as its kernels.

    Raises:
      UserError: if a kernel with an adapter is packed.
    """
    params = adapters.merge(lm.config, lm.params)
    return lm.replace(config=lm.config.replace(lora_scale=1.0), params=params)
