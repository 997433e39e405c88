"""How much a step on each training example helps a target, from the rows of both."""

from typing import Any

import numpy as np
from jaxtyping import Float

from jaxlm.core.errors import UserError
from jaxlm.influence import products
from jaxlm.influence.sides import check_sides, side, subtasks_of, weights_of


def score(
    train: Any,
    targets: Any,
    weights: Any = None,
    subtask: Any = None,
    aggregate: str = "cosine_of_mean",
    *,
    over: str | None = None,
) -> Float[np.ndarray, "..."]:
    r"""The influence of each training example on targets, by cosines of gradient features.

    With $g_{en}$ the row of training example n at checkpoint e, $t_{em}$ that of target m, and
    $\hat x = x / \|x\|$, for the targets of a subtask s

    $$\mathrm{score}_{ns} = \sum_e w_e \cos\big(g_{en}, \mathrm{mean}_{m \in s}\, t_{em}\big)
    \quad\text{or}\quad \sum_e w_e\, \mathrm{mean}_{m \in s} \cos(g_{en}, t_{em}).$$

    The first is the equation of the paper. The second, `mean_of_cosines`, is what the authors' code
    computes, with weights divided by their sum, which changes no ranking. Both are one product of
    [N, R] with [R, S], since the second is $\hat g_{en} \cdot \mathrm{mean}\, \hat t_{em}$. A block
    of 32 MiB of the training rows is in memory at a time.

    Args:
      train: rows of training examples: [E, N, R] of E checkpoints, [N, R] of one, or stores.
      targets: rows of targets, [E, M, R], [M, R] or stores likewise.
      weights: [E], of the checkpoints: the mean learning rate of the epoch that ended with each. By
        default those in the specs of the stores.
      subtask: int [M], the subtask of every target, 0 to S - 1, as many of each as there are. None
        where there is one.
      aggregate: see above.
      over: "max" or "mean" of the scores over subtasks; LESS takes the largest.

    Returns:
      [N] where `subtask` is None or `over` is given, else [N, S]: float32, or float64 of arrays in
      that dtype. A training row of zeros has cosine 0 with everything.

    Raises:
      UserError: if both sides do not fit together, with the field in which their stores differ; for
        subtasks without targets, targets without direction, and rows that are not finite.

    >>> train = np.array([[[2.0, 0.0], [0.0, 3.0]]], np.float32)
    >>> targets = np.array([[[1.0, 0.0], [0.0, 4.0]]], np.float32)
    >>> score(train, targets, subtask=np.array([0, 1]))
    array([[1., 0.],
           [0., 1.]], dtype=float32)

    References: Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning",
    arXiv:2402.04333.
    """
    if aggregate not in ("cosine_of_mean", "mean_of_cosines"):
        raise UserError(
            f"aggregate={aggregate!r} is not known; give cosine_of_mean or mean_of_cosines"
        )
    check_over(over)
    left, right = side(train, "train"), side(targets, "targets")
    check_sides(left, right)
    w = weights_of(left, weights)
    groups = subtasks_of(right.examples, subtask)
    directions = []
    for checkpoint, weight in enumerate(w):
        if aggregate == "cosine_of_mean":
            total = products.sums(right, checkpoint, groups, normalize=False)
            each = products.unit(total, right.name)
        else:
            each = products.means(right, checkpoint, groups, normalize=True)
        directions.append(weight * each)
    found = products.products(left, directions, products.cosines)
    return reduced(found, subtask, over)


def check_over(over: str | None) -> None:
    """Checks how scores of subtasks become one.

    Raises:
      UserError: for an unknown way.
    """
    if over not in (None, "max", "mean"):
        raise UserError(f"over={over!r} is not known; give max, mean or None")


def reduced(
    found: Float[np.ndarray, "N S"], subtask: Any, over: str | None
) -> Float[np.ndarray, "..."]:
    """Scores of subtasks as they are, their largest or mean, or the only one."""
    if over is not None:
        return found.max(axis=1) if over == "max" else found.mean(axis=1)
    return found[:, 0] if subtask is None else found
