"""The head on topics: next to least squares on its features, and fitted without the documents."""

import numpy as np
import pytest

from benchmarks.topics import documents, true_topics
from jaxlm import topics
from tests.helpers.sentences import refused

DOCUMENTS, TOPICS, FORGET = 3000, 4, 40


@pytest.fixture(scope="module")
def labelled():
    """A model, counts, two targets that depend on the weights of documents, and a head."""
    rng = np.random.default_rng(0)
    counts, weights = documents(rng, true_topics(rng, 60, TOPICS), DOCUMENTS, 30)
    targets = weights[:, :2] + 0.1 * rng.normal(size=(DOCUMENTS, 2))
    model = topics.fit(counts, TOPICS)
    return model, counts, targets, topics.head_fit(model.topics, counts, targets)


@pytest.mark.parametrize("features", ["topics", "weights"])
def test_the_head_is_ridge_regression(labelled, features):
    model, counts, targets, _ = labelled
    A = getattr(model, features)
    head = topics.head_fit(A, counts, targets, ridge=1e-3)
    shares = counts.toarray() / 30
    x = shares @ A
    strength = 1e-3 * (x**2).sum() / TOPICS
    stacked = np.concatenate([x, strength**0.5 * np.eye(TOPICS)])
    padded = np.concatenate([targets, np.zeros((TOPICS, 2))])
    expected = np.linalg.lstsq(stacked, padded, rcond=None)[0]
    np.testing.assert_allclose(head.weights, expected, rtol=1e-9)
    np.testing.assert_allclose(shares @ head.word_weights, x @ expected, atol=1e-9)


def test_the_head_predicts_the_targets(labelled):
    _, counts, targets, head = labelled
    error = counts.toarray() / 30 @ head.word_weights - targets
    assert (error.std(axis=0) < 0.6 * targets.std(axis=0)).all()


def test_unlearning_is_fitting_without_the_documents(labelled):
    model, counts, targets, head = labelled
    gone, kept = np.arange(FORGET), np.arange(FORGET, DOCUMENTS)
    base = topics.unlearn(model, counts[gone]).model
    for A in (model.topics, base.topics):
        found = topics.head_unlearn(head, A, counts[gone], targets[gone])
        expected = topics.head_fit(A, counts[kept], targets[kept])
        for name in ("weights", "word_weights"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-7)
        np.testing.assert_allclose(found.gram, expected.gram, atol=1e-12)
        np.testing.assert_allclose(found.cross, expected.cross, atol=1e-12)
    followed = topics.head_unlearn(head, base.topics)
    expected = topics.head_fit(base.topics, counts, targets)
    np.testing.assert_allclose(followed.weights, expected.weights, rtol=1e-7)
    assert np.abs(followed.weights - head.weights).max() > 1e-3


def test_bad_arguments_are_refused(labelled):
    model, counts, targets, head = labelled
    with refused("ridge", "got 0.0"):
        topics.head_fit(model.topics, counts, targets, ridge=0.0)
    with refused("targets", "got [2, 2]"):
        topics.head_fit(model.topics, counts, targets[:2])
    with refused("targets", "finite"):
        topics.head_fit(model.topics, counts, targets * np.nan)
    with refused("counts", "got [3000, 60]"):
        topics.head_fit(model.topics[:5], counts, targets)
    with refused("forget_counts", "not fitted to"):
        topics.head_unlearn(
            head, model.topics, 5 * np.eye(60, dtype=int)[:1].repeat(900, 0), np.zeros((900, 2))
        )
