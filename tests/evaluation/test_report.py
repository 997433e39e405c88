"""Counts, ratios, standard errors and calibration against scikit-learn and sums by hand."""

import numpy as np
import pytest
from sklearn import metrics

from jaxlm.data import Example
from jaxlm.evaluation import (
    class_report,
    confusion_matrix,
    expected_calibration_error,
    is_right,
    paired_standard_error,
    probabilities,
    right_options,
    standard_error,
)
from tests.helpers.sentences import refused


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (3, 1), (7, 2)])
def test_each_class_as_scikit_learn_has_it(classes, seed):
    """The last class is never predicted, the first is never right."""
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(1, classes, 60), rng.integers(0, classes - 1, 60)
    names = list(range(classes))
    confusion = confusion_matrix(predicted, labels, classes)
    wanted = metrics.confusion_matrix(labels, predicted, labels=names)
    np.testing.assert_array_equal(confusion, wanted)
    report = class_report(confusion)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, predicted, labels=names, zero_division=0
    )
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        np.testing.assert_allclose(report[name], values, rtol=1e-15)
    np.testing.assert_array_equal(report["examples"], support)
    np.testing.assert_array_equal(report["predicted"], np.bincount(predicted, minlength=classes))
    macro = metrics.f1_score(labels, predicted, labels=names, average="macro", zero_division=0)
    np.testing.assert_allclose(report["f1"].mean(), macro)


@pytest.mark.parametrize(("right", "count"), [(1, 4), (30, 40), (5, 5)])
def test_the_standard_error_of_an_accuracy_has_a_closed_form(right, count):
    values = np.arange(count) < right
    share = right / count
    expected = np.sqrt(share * (1 - share) / (count - 1))
    np.testing.assert_allclose(standard_error(values), expected)


def test_one_example_has_no_standard_error():
    assert np.isnan(standard_error(np.array([1])))


def test_the_paired_error_counts_the_examples_where_models_differ():
    """With b wins and c losses of N: ((b + c) - (b - c)^2 / N) / (N (N - 1)), as in McNemar."""
    ours = np.array([1, 1, 1, 0, 0, 1, 1, 0, 1, 1], bool)
    theirs = np.array([1, 0, 0, 0, 1, 1, 0, 0, 1, 1], bool)
    wins, losses, count = 3, 1, 10
    variance = (wins + losses - (wins - losses) ** 2 / count) / (count * (count - 1))
    np.testing.assert_allclose(paired_standard_error(ours, theirs), np.sqrt(variance))
    assert paired_standard_error(ours, ours) == 0
    alone = np.hypot(standard_error(ours), standard_error(theirs))
    assert paired_standard_error(ours, theirs) < alone


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_the_calibration_error_is_the_sum_over_bins(bins):
    """Written out bin by bin, with confidences on the borders."""
    rng = np.random.default_rng(bins)
    confidences = np.append(rng.uniform(0.3, 1, 50), [0.25, 0.5, 0.75, 1.0])
    right = rng.uniform(size=len(confidences)) < confidences
    total = 0.0
    for b in range(bins):
        inside = (confidences > b / bins) & (confidences <= (b + 1) / bins)
        if inside.any():
            gap = abs(right[inside].mean() - confidences[inside].mean())
            total += inside.mean() * gap
    found = expected_calibration_error(confidences, right, bins=bins)
    np.testing.assert_allclose(found, total, rtol=1e-12)
    with refused("bins"):
        expected_calibration_error(confidences, right, bins=0)


def test_probabilities_of_large_scores_and_missing_options():
    scores = np.array([[1000.0, 1000.0 + np.log(3), -np.inf], [-2000.0, -2000.0, -2000.0]])
    expected = [[0.25, 0.75, 0], [1 / 3, 1 / 3, 1 / 3]]
    np.testing.assert_allclose(probabilities(scores), expected, rtol=1e-12)
    assert probabilities(scores.astype(np.float32)).dtype == np.float64


def test_any_of_several_right_options_counts():
    one, two = Example({}, 1, "a"), Example({}, 0, "b", gold=(0, 2))
    assert right_options([one, one], 3).tolist() == [1, 1]
    mask = right_options([one, two], 3)
    assert mask.tolist() == [[False, True, False], [True, False, True]]
    scores = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert is_right(scores, mask).tolist() == [False, True]
