"""Tests of attributions against models that are retrained on parts of the data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxlm.core.checks import integer, real
from jaxlm.core.errors import UserError


class LDS(NamedTuple):
    """A linear datamodelling score.

    Attributes:
      value: mean over targets of Spearman's correlation, -1 to 1.
      low, high: the bootstrap interval.
      of_targets: the correlation for every target.
    """

    value: float
    low: float
    high: float
    of_targets: Float[np.ndarray, " M"]


def subset_masks(
    count: int, subsets: int, fraction: float | int = 0.5, seed: int = 0
) -> Bool[np.ndarray, "K N"]:
    """Draw random subsets of the training data, each to train a model on.

    Args:
      count: N, how many training examples there are.
      subsets: K. A larger K adds subsets to those of a smaller one.
      fraction: fraction of the examples in each subset, rounded down.
      seed: 0 or more.

    Raises:
      UserError: if a subset would have no example, or all of them.

    >>> subset_masks(count=6, subsets=4).sum(axis=1).tolist()
    [3, 3, 3, 3]
    """
    integer("seed", seed, least=0)
    integer("subsets", subsets)
    real("fraction", fraction, above=0, below=1)
    taken = int(fraction * count * (1 + 1e-12))  # 0.29 * 100 is 28.999999999999996
    if not 0 < taken < count:
        raise UserError(
            f"fraction: takes {taken} of {count} examples (got {fraction}). Take some, not all."
        )
    masks = np.zeros((subsets, count), bool)
    for k, mask in enumerate(masks):
        mask[np.random.default_rng([seed, k]).permutation(count)[:taken]] = True
    return masks


def lds(
    attributions: Any,
    masks: Any,
    outputs: Any,
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> LDS:
    r"""Return the linear datamodelling score with a bootstrap interval.

    $$\mathrm{LDS} = \mathrm{mean}_m\ \mathrm{Spearman}_k\Big(f_m(S_k),\ \sum_{n \in S_k}
    \tau_{nm}\Big).$$

    The ends of the interval are quantiles of the score over replicates, in which both the subsets k
    and the targets m are drawn with replacement: it accounts for the choice of both. A subset that
    is drawn twice counts twice, and ties share their mean rank.

    Args:
      attributions: τ [N, M], such as `score` with subtasks 0 to M - 1; [N] for one target.
      masks: bool [K, N], which examples each model was trained on, as `subset_masks` draws them.
      outputs: f [K, M], an output of each model for each target, averaged over training seeds; [K]
        for one target. It must be higher for better models, as the margin and the negative loss
        are.
      replicates: number of bootstrap replicates.
      level: confidence level of the interval, above 0 and below 1.
      seed: seed of the bootstrap, 0 or more.

    Raises:
      UserError: if shapes do not fit, numbers are not finite, there are fewer than 3 subsets, or
        the outputs or attributions of a target are the same for all subsets.

    >>> masks = subset_masks(count=8, subsets=20)
    >>> truth = np.arange(8.0)
    >>> lds(truth, masks, masks @ truth).value
    1.0

    References: Ilyas et al., "Datamodels", arXiv:2202.00622; Park et al., "TRAK: Attributing Model
    Behavior at Scale", arXiv:2303.14186; Owen, "The pigeonhole bootstrap", 2007.
    """
    tau, f = (
        x[:, None] if x.ndim == 1 else x
        for x in (np.asarray(attributions, np.float64), np.asarray(outputs, np.float64))
    )
    chosen = np.asarray(masks)
    _check(tau, chosen, f)
    integer("seed", seed, least=0)
    integer("replicates", replicates)
    real("level", level, above=0, below=1)
    # Sums that are equal in exact arithmetic may differ by rounding; they must stay ties.
    rounding = len(tau) * np.finfo(np.float64).eps * np.abs(tau).sum(axis=0)
    sums = chosen.astype(np.float64) @ tau
    columns = (_ranker(f, "outputs"), _ranker(sums, "attributions", rounding))
    of_targets = _spearman(*columns, np.ones(len(f)))
    subsets, targets = f.shape
    rng = np.random.default_rng(seed)
    scores = [
        _spearman(*columns, _draw(rng, subsets)) @ _draw(rng, targets) / targets
        for _ in range(replicates)
    ]
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return LDS(float(of_targets.mean()), float(low), float(high), of_targets)


def leave_one_out(output: Callable[[np.ndarray], Any], count: int) -> Float[np.ndarray, "N M"]:
    r"""Return the effect of leaving out each example: $f(\text{all}) - f(\text{all but } n)$.

    Args:
      output: function from a bool mask [N] of training examples to the outputs [M] of a model that
        was trained on them, as in `lds`. It is called N + 1 times.
      count: N, 2 or more.

    Raises:
      UserError: if there are fewer than 2 examples.

    >>> leave_one_out(lambda mask: [np.array([1.0, 5.0, 2.0])[mask].sum()], count=3).tolist()
    [[1.0], [5.0], [2.0]]
    """
    integer("count", count, least=2)
    everything = np.asarray(output(np.ones(count, bool)), np.float64).reshape(-1)
    rows = []
    for n in range(count):
        mask = np.arange(count) != n
        rows.append(everything - np.asarray(output(mask), np.float64).reshape(-1))
    return np.stack(rows)


def _ranker(
    values: np.ndarray, name: str, rounding: Any = 0.0
) -> Callable[[np.ndarray], np.ndarray]:
    """Return the mean ranks in each column as a function of how often each row counts.

    Neighbours that differ by at most `rounding` [M] are ties.
    """
    # `scipy.stats.rankdata` on every replicate gives the same ranks, but sorts each time. Here the
    # columns are sorted once, and ranks are cumulative sums.
    order = np.argsort(values, axis=0, kind="stable")
    back = np.argsort(order, axis=0)
    new = np.ones(values.shape, bool)
    new[1:] = np.diff(np.take_along_axis(values, order, 0), axis=0) > rounding
    constant = new.sum(axis=0) == 1
    if constant.any():
        raise UserError(
            f"{name}: are the same for all subsets at target {int(constant.argmax())}. Leave the "
            "target out."
        )
    rows = np.arange(len(values))[:, None]
    first = np.maximum.accumulate(np.where(new, rows, 0), axis=0)
    ends = np.where(np.roll(new, -1, axis=0), rows, len(values))
    last = np.minimum.accumulate(ends[::-1], axis=0)[::-1]

    def ranks(weights: np.ndarray) -> np.ndarray:
        ordered = weights[order]
        total = np.cumsum(ordered, axis=0)
        before = np.take_along_axis(total - ordered, first, 0)
        tied = np.take_along_axis(total, last, 0) - before
        return np.take_along_axis(before + (tied + 1) / 2, back, 0)

    return ranks


def _spearman(first: Any, second: Any, weights: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of every column; 0 where a column is constant."""
    a, b = (ranks(weights) - (weights.sum() + 1) / 2 for ranks in (first, second))
    covariance = weights @ (a * b)
    size = np.sqrt((weights @ (a * a)) * (weights @ (b * b)))
    return np.divide(covariance, size, out=np.zeros_like(size), where=size > 0)


def _draw(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.multinomial(count, np.full(count, 1 / count)).astype(np.float64)


def _check(tau: np.ndarray, masks: np.ndarray, f: np.ndarray) -> None:
    shapes = f"(got {tau.shape}, {masks.shape} and {f.shape})"
    if masks.shape != (len(f), len(tau)) or tau.ndim != 2 or f.shape[1:] != tau.shape[1:]:
        raise UserError(
            f"attributions: with masks and outputs must be [N, M], [K, N] and [K, M] {shapes}. "
            "Correct them."
        )
    if masks.dtype != bool:
        raise UserError(
            f"masks: must be bool, true for training examples (got {masks.dtype}). Convert them."
        )
    if len(f) < 3 or not f.shape[1]:
        raise UserError(f"outputs: must have 3 or more subsets and a target {shapes}. Train more.")
    for name, row, values in (("attributions", "example", tau), ("outputs", "subset", f)):
        wrong = np.argwhere(~np.isfinite(values))
        if len(wrong):
            at, target = wrong[0]
            raise UserError(
                f"{name}: must be finite (got {values[at, target]} for {row} {at} at target "
                f"{target}). Leave the {row} out."
            )
