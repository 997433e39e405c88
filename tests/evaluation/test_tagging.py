"""F1 of entities: the numbers of seqeval and scikit-learn.

The golden values are those of seqeval 1.2.2 (`get_entities`, `precision_score`, `recall_score`,
`f1_score` and `classification_report` in the default mode) and of scikit-learn 1.9.1.
"""

import numpy as np
import pytest

from jaxlm.evaluation import entities, tag_report

NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG"]


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        (
            "I-PER I-PER O B-LOC B-LOC I-ORG",
            [("PER", 0, 1), ("LOC", 3, 3), ("LOC", 4, 4), ("ORG", 5, 5)],
        ),
        ("B-PER I-LOC E-LOC E-LOC O", [("PER", 0, 0), ("LOC", 1, 2), ("LOC", 3, 3)]),
        ("S-PER I-PER S-PER", [("PER", 0, 0), ("PER", 1, 1), ("PER", 2, 2)]),
        (
            "O I-A B-A I-A I-B B-B O O E-A",
            [("A", 1, 1), ("A", 2, 3), ("B", 4, 4), ("B", 5, 5), ("A", 8, 8)],
        ),
        ("B I B-X-Y I-X-Y", [("_", 0, 1), ("X-Y", 2, 3)]),
        (
            "E-A E-A I-A S-B B-B",
            [("A", 0, 0), ("A", 1, 1), ("A", 2, 2), ("B", 3, 3), ("B", 4, 4)],
        ),
        ("O O", []),
    ],
)
def test_the_entities_of_seqeval(tags, wanted):
    assert entities(tags.split()) == wanted


@pytest.mark.parametrize(
    ("seed", "wanted", "accuracy", "kinds"),
    [
        (
            0,
            (0.8333333333333334, 0.8695652173913043, 0.851063829787234),
            0.7333333333333333,
            {
                "LOC": (0.7692307692307693, 1.0, 0.8695652173913044, 10),
                "ORG": (1.0, 0.6666666666666666, 0.8, 6),
                "PER": (0.8571428571428571, 0.8571428571428571, 0.8571428571428571, 7),
            },
        ),
        (
            1,
            (0.6666666666666666, 0.6086956521739131, 0.6363636363636365),
            0.7,
            {
                "LOC": (0.7142857142857143, 0.5555555555555556, 0.6250000000000001, 9),
                "ORG": (0.7142857142857143, 0.7142857142857143, 0.7142857142857143, 7),
                "PER": (0.5714285714285714, 0.5714285714285714, 0.5714285714285714, 7),
            },
        ),
    ],
)
def test_the_report_of_seqeval(seed, wanted, accuracy, kinds):
    numbers = np.random.RandomState(seed)
    labels = [numbers.randint(0, 7, size) for size in (9, 1, 14, 6)]
    predicted = [
        np.where(numbers.rand(len(row)) < 0.4, numbers.randint(0, 7, len(row)), row)
        for row in labels
    ]
    report = tag_report(labels, predicted, NAMES)
    found = [report[name] for name in ("precision", "recall", "f1", "accuracy")]
    np.testing.assert_allclose(found, [*wanted, accuracy], rtol=1e-12)
    columns = ("precision", "recall", "f1", "examples")
    assert [*report["classes"]] == [*kinds]
    for kind, values in kinds.items():
        found = [report["classes"][kind][column] for column in columns]
        np.testing.assert_allclose(found, values, rtol=1e-12)
    most = max(np.bincount(np.concatenate(labels)))
    assert report["majority_accuracy"] == most / 30


def test_tags_that_mark_no_entities_have_the_macro_f1_of_scikit_learn():
    """That of the classes that occur; here NUM does not."""
    names = ["NOUN", "VERB", "ADJ", "NUM"]
    labels, predicted = [np.array([0, 1, 2, 2]), np.array([1])], [np.array([0, 2, 2, 2]), [1]]
    report = tag_report(labels, [np.array(row) for row in predicted], names)
    assert report["macro_f1"] == pytest.approx(0.8222222222222223)
    assert [*report["classes"]] == names[:3]
    assert report["classes"]["VERB"]["f1"] == pytest.approx(0.66666667)
    assert (report["accuracy"], report["majority_accuracy"]) == (0.8, 0.4)
    once = tag_report([np.array([0, 0, 1])], [np.array([0, 3, 1])], names)
    assert once["macro_f1"] == pytest.approx(0.5555555555555555)
    assert "f1" not in report


def test_without_an_entity_the_ratios_are_0():
    report = tag_report([np.array([0, 0])], [np.array([0, 0])], NAMES)
    assert (report["f1"], report["accuracy"], report["classes"]) == (0.0, 1.0, {})
