"""Few examples of each class, drawn by a seed."""

from collections.abc import Sequence

import numpy as np

from jaxlm.core.errors import UserError


def draw_per_class(
    labels: Sequence[int], k: int, *, seed: int, names: Sequence[str], skip: int = 0
) -> list[int]:
    """Indices of k examples of every class.

    Each class is permuted by a PCG64 generator keyed by (seed, class), and the places
    `skip, ..., skip + k - 1` of the permutation are taken. So a draw with `skip=k` holds k more of
    each class, none of them in the draw with `skip=0`: a held-out set.

    Args:
        labels: class of each example.
        k: examples per class.
        seed: a whole number, 0 or more.
        names: the label words, for the number of classes and for messages.
        skip: places of the permutation to leave out.

    Returns:
        Increasing indices into `labels`, k per class.

    Raises:
        UserError: a class has fewer than `skip + k` examples.

    >>> draw_per_class([0, 1, 0, 1, 0, 1], 1, seed=0, names=["terrible", "great"])
    [4, 5]
    """
    places = np.asarray(labels)
    chosen: list[int] = []
    for label, name in enumerate(names):
        members = np.flatnonzero(places == label)
        if len(members) < skip + k:
            asked = f"{skip} training and {k} held-out examples" if skip else f"{k} examples"
            raise UserError(
                f"task.k: asks for {asked} of every class, but task.train has {len(members)} of "
                f"{name!r}. Lower it or give more examples."
            )
        generator = np.random.Generator(np.random.PCG64([seed, label]))
        chosen += generator.permutation(members)[skip : skip + k].tolist()
    return sorted(chosen)


def draw_split(
    count: int, num_train: int | None, num_validation: int, *, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of a training and a held-out set, drawn over all classes.

    Of a permutation of all places by NumPy's `RandomState(seed)`, the first `num_train +
    num_validation` are taken; the last `num_validation` of these are held out. So where there are
    too few examples, the training set is smaller. These are the draws of MeZO's code.

    Args:
        count: examples that there are.
        num_train: examples to train on; None for all that are not held out.
        num_validation: examples to hold out.
        seed: a whole number from 0 to 2**32 - 1.

    Returns:
        (training, held-out), in the order of the permutation.

    Raises:
        UserError: nothing is left to train on.

    >>> draw_split(8, 3, 2, seed=0)
    ([6, 2, 1], [7, 3])
    """
    places = np.random.RandomState(seed).permutation(count).tolist()
    taken = places[: None if num_train is None else num_train + num_validation]
    if num_validation >= len(taken):
        raise UserError(
            f"task.num_validation: leaves nothing of the {count} examples of task.train to train "
            f"on (got {num_validation}). Lower it or give more examples."
        )
    cut = len(taken) - num_validation
    return taken[:cut], taken[cut:]
