"""Numbers that are read back are finite: one check for weights, adapters and checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import UserError


def all_finite(values: np.ndarray) -> bool:
    """Whether no number is infinite or NaN; whole numbers never are."""
    return not jnp.issubdtype(values.dtype, jnp.inexact) or bool(np.isfinite(values).all())


def check_finite(values: np.ndarray, name: str, where: object) -> None:
    """Refuses numbers that are infinite or NaN.

    Args:
      values: what was read, or a part of it.
      name: of the tensor, for messages.
      where: file or folder that it comes from.

    Raises:
      UserError: naming the tensor and the first such number.
    """
    if not all_finite(values):
        first = values.flat[int(np.argmin(np.isfinite(values)))]
        raise UserError(
            f"{where}: {name} holds numbers that are not finite (got {first}). The weights are "
            "damaged or of a run that diverged: use others."
        )


def check_tree_finite(tree: Any, where: object) -> None:
    """`check_finite` of every leaf of a pytree of arrays, wherever its shards lie.

    Raises:
      UserError: naming the first leaf that holds such a number.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        shards = leaf.addressable_shards if isinstance(leaf, jax.Array) else ()
        for part in [shard.data for shard in shards] or [np.asarray(leaf)]:
            # On the device first, so that only what is refused is copied to the host.
            if jnp.issubdtype(part.dtype, jnp.inexact) and not jnp.isfinite(part).all():
                check_finite(np.asarray(part), name, where)
