r"""What a paper prints about predictions: counts, F1, standard errors, calibration.

Shapes: N examples, C classes. A ratio with the denominator 0 is 0, as in scikit-learn.
"""

import numpy as np
from jaxtyping import Float, Int, Shaped

from jaxlm.core.checks import integer


def probabilities(scores: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N C"]:
    r"""Return the softmax $e^{s_c} / \sum_k e^{s_k}$ of scores, in float64.

    >>> probabilities(np.array([[0.0, np.log(3.0)]])).round(6)
    array([[0.25, 0.75]])
    """
    shifted = np.exp(scores - np.max(scores, axis=1, keepdims=True), dtype=np.float64)
    return shifted / shifted.sum(axis=1, keepdims=True)


def confusion_matrix(
    predicted: Int[np.ndarray, " N"], labels: Int[np.ndarray, " N"], num_classes: int
) -> Int[np.ndarray, "C C"]:
    """Return how many examples of class i (row) were predicted as class j (column).

    >>> confusion_matrix(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def class_report(confusion: Int[np.ndarray, "C C"]) -> dict[str, np.ndarray]:
    r"""Return the counts and ratios of each class, arrays [C] by name.

    With the true positives $t_c$ on the diagonal, `precision` is $t_c$ over the `predicted`
    examples, `recall` is $t_c$ over the `examples` of the class, and `f1` is
    $2 t_c / (\text{predicted}_c + \text{examples}_c)$. The macro F1 is the mean of `f1`.
    """
    return count_report(np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1))


def count_report(
    right: Int[np.ndarray, " C"], predicted: Int[np.ndarray, " C"], examples: Int[np.ndarray, " C"]
) -> dict[str, np.ndarray]:
    """Return the columns of `class_report` for the number of true positives and both others."""
    return {
        "examples": examples,
        "predicted": predicted,
        "precision": right / np.maximum(predicted, 1),
        "recall": right / np.maximum(examples, 1),
        "f1": 2 * right / np.maximum(predicted + examples, 1),
    }


def standard_error(values: Shaped[np.ndarray, " N"]) -> float:
    r"""Return the standard error $s / \sqrt N$ of a mean, with $s^2$ divided by $N - 1$.

    Of an accuracy a this is $\sqrt{a (1 - a) / (N - 1)}$; for one example it is NaN.

    >>> round(standard_error(np.array([1, 1, 0, 0])), 6)
    0.288675
    """
    values = np.asarray(values, np.float64)
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def paired_standard_error(
    ours: Shaped[np.ndarray, " N"], theirs: Shaped[np.ndarray, " N"]
) -> float:
    """Return the standard error of the difference of two means over the same examples.

    Two models tend to fail on the same examples, so it is smaller than the errors of both would
    suggest.
    """
    return standard_error(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))


def expected_calibration_error(
    confidences: Float[np.ndarray, " N"], right: Shaped[np.ndarray, " N"], *, bins: int = 15
) -> float:
    r"""Return $\sum_b \frac{n_b}{N} |\text{accuracy}_b - \text{confidence}_b|$.

    Args:
        confidences: probability of each prediction.
        right: 1 for a right prediction, 0 for a wrong one.
        bins: number of bins $(0, 1/b], (1/b, 2/b], \ldots$ of equal width.

    References:
        Guo et al., On calibration of modern neural networks (arXiv:1706.04599).

    >>> round(expected_calibration_error(np.array([0.8, 0.8, 0.6]), np.array([1, 0, 1])), 6)
    0.333333
    """
    integer("bins", bins)
    places = np.clip(np.ceil(np.asarray(confidences) * bins) - 1, 0, bins - 1).astype(int)
    gaps = np.bincount(places, np.asarray(right, np.float64) - confidences, bins)
    return float(np.abs(gaps).sum() / len(places))
