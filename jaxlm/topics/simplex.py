r"""Minima over the simplex $\{c \ge 0, \sum_k c_k = 1\}$, for many rows at once.

Rows are the words of a topic model, and c [n, r] are their weights.
"""

import numpy as np
from jaxtyping import Bool, Float

from jaxlm.core.errors import UserError

Rows = Float[np.ndarray, "n r"]

TOLERANCE = 1e-10
"""Largest violation of the optimality conditions, where the largest entry of G's diagonal is 1."""
GAP = 1e-7
SMALLEST = 1e-12


def project(x: Rows) -> Rows:
    """Return the Euclidean projection of each row.

    >>> project(np.array([[0.6, 0.5, -0.2]])).round(9).tolist()
    [[0.55, 0.45, 0.0]]
    """
    ordered = -np.sort(-x, axis=1)
    excess = (np.cumsum(ordered, axis=1) - 1) / np.arange(1, x.shape[1] + 1)
    last = (ordered > excess).sum(axis=1, keepdims=True) - 1
    return np.maximum(x - np.take_along_axis(excess, last, axis=1), 0)


def violation(G: Float[np.ndarray, "r r"], b: Rows, c: Rows) -> Rows:
    r"""Return by how much the gradient at c violates the conditions of a minimum of `minimize`.

    With λ the smallest eigenvalue of G, the minimum is at most $\|\text{violation}\| / \lambda$
    from c.
    """
    slack = c @ G - b
    slack -= (c * slack).sum(axis=1, keepdims=True)
    return np.where(c > 0, slack, np.minimum(slack, 0))


def minimize(G: Float[np.ndarray, "r r"], b: Rows, start: Rows | None = None) -> Rows:
    r"""Minimize $c^\top G c - 2 c^\top b$ for each row b, by an active-set method.

    Each round solves for the minimum on the face of every row that is not done. A row moves towards
    it until a weight is 0, or adds the weight whose gradient is the most negative.

    Args:
        G: positive definite.
        b: a row for each problem.
        start: points of the simplex, for example the minima for a similar G; by default vertices.

    Raises:
        UserError: G is so nearly singular that rounding prevents an error below `TOLERANCE`.
    """
    scale = np.diag(G).max()
    G, b = G / scale, b / scale
    r = len(G)
    c = np.eye(r)[np.argmin(np.diag(G) - 2 * b, axis=1)] if start is None else start.copy()
    free, todo = c > 0, np.arange(len(b))
    for _ in range(20 * r):
        if not todo.size:
            break
        x, on, sides = c[todo], free[todo], b[todo]
        target = _minimum_on_face(G, sides, on)
        blocked = on & (target < 0)
        share = np.divide(x, x - target, out=np.full_like(x, np.inf), where=blocked)
        step = np.minimum(share.min(axis=1, keepdims=True), 1)
        x = np.where(step < 1, np.maximum(x + step * (target - x), 0), target)
        dropped = blocked & (share <= step)
        x[dropped], on[dropped] = 0, False
        slack = x @ G - sides
        slack = np.where(on, 0, slack - (x * slack).sum(axis=1, keepdims=True))
        entering = slack.argmin(axis=1)
        # Far above rounding and far below TOLERANCE: no weight enters and leaves for ever.
        enters = ~blocked.any(axis=1) & (slack.min(axis=1) < -TOLERANCE / 100)
        on[enters, entering[enters]] = True
        c[todo], free[todo] = x, on
        todo = todo[blocked.any(axis=1) | enters]
    worst = np.abs(violation(G, b, c)).max(initial=0)
    if not worst <= TOLERANCE:
        raise UserError(
            f"Q: the rows of its anchors are nearly dependent (got an error of {worst:.1g} in the "
            "weights' gradient). Choose fewer topics, or more frequent words as candidates."
        )
    return c


def _minimum_on_face(G: Float[np.ndarray, "r r"], b: Rows, free: Bool[np.ndarray, "n r"]) -> Rows:
    """Minimize with a sum of 1 and the signs free, for the weights that `free` marks; others 0."""
    # Systems are as small as the largest face: few topics have a given word.
    size = free.sum(axis=1).max()
    places = np.argsort(~free, axis=1, kind="stable")[:, :size]
    on = np.take_along_axis(free, places, axis=1)
    pairs = G[places[:, :, None], places[:, None]]
    matrix = np.where(on[:, :, None] & on[:, None], pairs, np.eye(size))
    sides = np.stack([np.take_along_axis(b, places, axis=1), np.ones(on.shape)], axis=-1)
    without_sum, ones = np.moveaxis(np.linalg.solve(matrix, sides * on[:, :, None]), -1, 0)
    level = (1 - without_sum.sum(axis=1)) / ones.sum(axis=1)
    result = np.zeros(b.shape)
    np.put_along_axis(result, places, without_sum + level[:, None] * ones, axis=1)
    return result


def divergence(
    q: Float[np.ndarray, "n v"], rows: Float[np.ndarray, "r v"], start: Rows | None = None
) -> Rows:
    r"""Minimize $\mathrm{KL}(q_i \,\|\, c_i^\top \text{rows})$ for each row, to a gap of `GAP`.

    Exponentiated gradient with steps of Armijo; the gap bounds the distance from the lowest value.
    """
    covered = rows.any(axis=0)  # elsewhere the divergence is infinite whatever c is
    q, rows = q[:, covered], rows[:, covered]
    c = np.full((len(q), len(rows)), 1 / len(rows)) if start is None else start
    c = np.maximum(c, SMALLEST)  # a weight of 0 would stay 0
    c /= c.sum(axis=1, keepdims=True)
    steps, todo = np.ones((len(q), 1)), np.arange(len(q))
    for _ in range(20_000):
        x, target = c[todo], q[todo]
        mixture = x @ rows
        pull = (target / mixture) @ rows.T
        highest = pull.max(axis=1, keepdims=True)
        open_ = (highest - (x * pull).sum(axis=1, keepdims=True))[:, 0] > GAP
        if not open_.any():
            return c
        trial = np.maximum(x * np.exp(steps[todo] * (pull - highest)), SMALLEST)
        trial /= trial.sum(axis=1, keepdims=True)
        gain = (target * np.log(trial @ rows / mixture)).sum(axis=1)
        # Without an allowance for rounding, a weight that starts near 0 might never grow.
        enough = open_ & (gain >= ((trial - x) * pull).sum(axis=1) / 2 - 1e-14)
        c[todo[enough]] = trial[enough]
        steps[todo] *= np.where(enough, 2, 0.5)[:, None]
        todo = todo[open_]
    raise UserError(
        f"loss: kl has not converged (got {len(todo)} open words after 20,000 steps). Use l2."
    )
