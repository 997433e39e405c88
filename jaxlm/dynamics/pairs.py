"""Pairs of batches, of which SVAG takes two for a step."""

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.dynamics.choices import check_choice
from jaxlm.typing import Batch, PRNGKey

PAIRINGS = ("independent", "consecutive")


def split_halves(batch: Batch) -> tuple[Batch, Batch]:
    """The first and the second half of a batch, for loaders that give both at once.

    Args:
        batch: leaves [2 B, ...].

    Returns:
        Two batches of leaves [B, ...].

    Raises:
        UserError: a leaf has no or an odd number of examples.

    >>> split_halves(np.arange(4))
    (array([0, 1]), array([2, 3]))
    """
    for leaf in paths.flatten(batch)[0]:
        shape = list(np.shape(leaf.value))
        if not shape or shape[0] % 2 or shape[0] == 0:
            place = f" at {leaf.path}" if leaf.path else ""
            raise UserError(
                f"the batch has shape {shape}{place}, which has no two halves of equal size; give "
                "an even number of examples"
            )
    return (
        jax.tree.map(lambda x: x[: len(x) // 2], batch),
        jax.tree.map(lambda x: x[len(x) // 2 :], batch),
    )


def pair_indices(
    key: PRNGKey,
    step: int | Array,
    num_examples: int,
    batch_size: int,
    *,
    pairing: str = "independent",
) -> Int[Array, "2 B"]:
    """Which examples the two halves of a step hold, as a function of key and step alone.

    "independent" draws every example uniformly, with replacement: what the theory asks for.
    "consecutive" cuts each shuffled pass over the data into pairs of batches, without replacement,
    as the authors' code does; a pass is `num_examples // (2 * batch_size)` steps, what is left over
    is skipped, and a step costs a permutation of all examples.

    Args:
        key: of the run.
        step: from 0; may be traced.
        num_examples: size of the data set.
        batch_size: B, of one half.
        pairing: "independent" or "consecutive".

    Raises:
        UserError: an unknown pairing, or too few examples.

    >>> pair_indices(jax.random.key(0), 0, 6, 3, pairing="consecutive").shape
    (2, 3)
    """
    check_choice("pairing", pairing, PAIRINGS)
    least = 2 * batch_size if pairing == "consecutive" else 1
    if batch_size < 1 or num_examples < least:
        raise UserError(
            f"{num_examples} examples give no two batches of {batch_size}; take smaller batches, "
            "of 1 or more"
        )
    if pairing == "independent":
        drawn = jax.random.fold_in(key, step)
        return jax.random.randint(drawn, (2, batch_size), 0, num_examples)
    steps = num_examples // least
    order = jax.random.permutation(jax.random.fold_in(key, step // steps), num_examples)
    return lax.dynamic_slice_in_dim(order, step % steps * least, least).reshape(2, batch_size)
