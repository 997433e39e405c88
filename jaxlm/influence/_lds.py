"""Whether attributions can be trusted: models that were trained on parts of the data say so."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxlm.core.errors import UserError


class LDS(NamedTuple):
    """A linear datamodelling score.

    Attributes:
      value: mean over targets of Spearman's correlation, -1 to 1.
      low, high: the interval that the bootstrap gives.
      of_targets: the correlation of every target.
    """

    value: float
    low: float
    high: float
    of_targets: Float[np.ndarray, " M"]


def subset_masks(
    count: int, subsets: int, fraction: float | int = 0.5, seed: int = 0
) -> Bool[np.ndarray, "K N"]:
    """Random parts of the training data, each to train a model on.

    Args:
      count: N, training examples.
      subsets: K. More of them do not change those that were there.
      fraction: of the examples in each part, rounded down.
      seed: 0 or more.

    Raises:
      UserError: if a part would have no example, or all.

    >>> subset_masks(count=6, subsets=4).sum(axis=1).tolist()
    [3, 3, 3, 3]
    """
    check_seed(seed)
    taken = int(np.clip(np.nan_to_num(fraction), 0, 1) * count * (1 + 1e-12))
    if subsets < 1:
        raise UserError(f"subsets: too few (got {subsets}). Give 1 or more.")
    if not 0 < taken < count:
        raise UserError(f"fraction={fraction} of {count} examples is {taken}; give some, not all")
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
    r"""The linear datamodelling score, with a bootstrap interval.

    $$\mathrm{LDS} = \mathrm{mean}_m\ \mathrm{Spearman}_k\Big(f_m(S_k),\ \sum_{n \in S_k}
    \tau_{nm}\Big).$$

    The interval is between quantiles of the score over replicates in which both the subsets k and
    the targets m are drawn again with replacement: it says what other models and other targets
    might have given. A subset that is drawn twice counts twice, with ties at their mean rank.

    Args:
      attributions: τ [N, M], such as `score` with subtasks 0 to M - 1; [N] for one target.
      masks: bool [K, N], which examples each model was trained on, of `subset_masks`.
      outputs: f [K, M], what each model makes of each target, averaged over seeds of training;
        [K] for one target. It must grow where attributions say that an example helps: the margin or
        the negative loss.
      replicates: of the bootstrap.
      level: of the interval, above 0 and below 1.
      seed: of the bootstrap, 0 or more.

    Raises:
      UserError: for other shapes, numbers that are not finite, fewer than 3 subsets, or a target
        whose outputs or attributions do not differ between subsets.

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
    check_seed(seed)
    if replicates < 1 or not 0 < level < 1:
        raise UserError(
            f"replicates={replicates} and level={level} are impossible; give 1 or more, and a "
            "level between 0 and 1"
        )
    # Sums that are equal differ by the rounding of their order, and are to stay ties.
    rounding = len(tau) * np.finfo(np.float64).eps * np.abs(tau).sum(axis=0)
    sums = chosen.astype(np.float64) @ tau
    sides = (_Ranked(f, "outputs"), _Ranked(sums, "attributions", rounding))
    of_targets = _spearman(*sides, np.ones(len(f)))
    subsets, targets = f.shape
    rng = np.random.default_rng(seed)
    drawn = [
        _spearman(*sides, _draw(rng, subsets)) @ _draw(rng, targets) / targets
        for _ in range(replicates)
    ]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return LDS(float(of_targets.mean()), float(low), float(high), of_targets)


def leave_one_out(output: Callable[[np.ndarray], Any], count: int) -> Float[np.ndarray, "N M"]:
    r"""What is lost without each example: $f(\text{all}) - f(\text{all but } n)$.

    Args:
      output: from a bool mask [N] of training examples to the outputs [M] of a model that was
        trained on them, as in `lds`. It is called N + 1 times.
      count: N.

    Raises:
      UserError: for fewer than 2 examples.

    >>> leave_one_out(lambda mask: [np.array([1.0, 5.0, 2.0])[mask].sum()], count=3).tolist()
    [[1.0], [5.0], [2.0]]
    """
    if count < 2:
        raise UserError(f"count is {count}; give two or more examples to leave one out")
    everything = np.asarray(output(np.ones(count, bool)), np.float64).reshape(-1)
    rows = []
    for n in range(count):
        mask = np.arange(count) != n
        rows.append(everything - np.asarray(output(mask), np.float64).reshape(-1))
    return np.stack(rows)


def check_seed(seed: Any) -> None:
    """Raises UserError for what is no seed of NumPy."""
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise UserError(f"seed: no seed (got {seed!r}). Give a whole number, 0 or more.")


class _Ranked:
    """Columns in their order, so that ranks under any weights of the rows are two sums.

    Neighbours in that order that are no further apart than `rounding` [M] are ties.
    """

    def __init__(self, values: np.ndarray, name: str, rounding: Any = 0.0):
        self._order = np.argsort(values, axis=0, kind="stable")
        self._back = np.argsort(self._order, axis=0)
        ordered = np.take_along_axis(values, self._order, 0)
        new = np.ones(values.shape, bool)
        new[1:] = np.diff(ordered, axis=0) > rounding
        if (new.sum(axis=0) == 1).any():
            target = int((new.sum(axis=0) == 1).argmax())
            raise UserError(
                f"the {name} of target {target} are the same for all subsets; leave it out"
            )
        rows = np.arange(len(values))[:, None]
        self._first = np.maximum.accumulate(np.where(new, rows, 0), axis=0)
        last = np.ones(values.shape, bool)
        last[:-1] = new[1:]
        ends = np.where(last, rows, len(values))
        self._last = np.minimum.accumulate(ends[::-1], axis=0)[::-1]

    def ranks(self, weights: np.ndarray) -> np.ndarray:
        """Mean ranks where row k is there weights[k] times."""
        ordered = weights[self._order]
        total = np.cumsum(ordered, axis=0)
        before = np.take_along_axis(total - ordered, self._first, 0)
        tied = np.take_along_axis(total, self._last, 0) - before
        return np.take_along_axis(before + (tied + 1) / 2, self._back, 0)


def _spearman(first: _Ranked, second: _Ranked, weights: np.ndarray) -> np.ndarray:
    """Spearman's correlation of every column; 0 where a column is constant."""
    a, b = (each.ranks(weights) - (weights.sum() + 1) / 2 for each in (first, second))
    covariance = weights @ (a * b)
    size = np.sqrt((weights @ (a * a)) * (weights @ (b * b)))
    return np.divide(covariance, size, out=np.zeros_like(size), where=size > 0)


def _draw(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.multinomial(count, np.full(count, 1 / count)).astype(np.float64)


def _check(tau: np.ndarray, masks: np.ndarray, f: np.ndarray) -> None:
    shapes = f"attributions {tau.shape}, masks {masks.shape}, outputs {f.shape}"
    if masks.shape != (len(f), len(tau)) or tau.ndim != 2 or f.shape[1:] != tau.shape[1:]:
        raise UserError(f"{shapes} do not fit; give [N, M], [K, N] and [K, M]")
    if masks.dtype != bool:
        raise UserError(f"masks are {masks.dtype}; give bool, true where an example is in")
    if len(f) < 3 or not f.shape[1]:
        raise UserError(f"{shapes} are too few; give 3 or more subsets and a target")
    for name, row, values in (("attributions", "example", tau), ("outputs", "subset", f)):
        wrong = np.argwhere(~np.isfinite(values))
        if len(wrong):
            raise UserError(
                f"{name} are not finite; look at their examples (got {values[tuple(wrong[0])]} of "
                f"{row} {wrong[0][0]} at target {wrong[0][1]})"
            )
