"""Topics from anchor words: of the population exactly, of samples nearly, and what is refused."""

import jax
import numpy as np
import pytest
import scipy

from benchmarks.topics import distance, documents, true_topics
from jaxlm import topics
from tests.helpers.sentences import refused

GOLDEN = np.array([[2, 1, 0], [0, 1, 1]])
WORDS, TOPICS = 120, 6


@pytest.fixture(scope="module")
def corpus():
    """The true topics, and counts of documents with anchor words 0 to 5."""
    rng = np.random.default_rng(0)
    A = true_topics(rng, WORDS, TOPICS)
    return A, documents(rng, A, 20_000, 10)[0]


@pytest.fixture(scope="module")
def population(corpus):
    """The true topics, and R and Q of infinitely many documents."""
    A, _ = corpus
    alpha = np.full(TOPICS, 0.2)
    R = (np.diag(alpha) + np.outer(alpha, alpha)) / (alpha.sum() * (alpha.sum() + 1))
    return A, R, A @ R @ A.T


def test_golden_cooccurrence():
    expected = [[1 / 6, 1 / 6, 0], [1 / 6, 0, 1 / 4], [0, 1 / 4, 0]]
    np.testing.assert_allclose(topics.cooccurrence(GOLDEN), expected, atol=1e-15)
    alone = topics.cooccurrence(GOLDEN[:1])
    np.testing.assert_allclose(alone, [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0], [0, 0, 0]], atol=1e-15)


def test_cooccurrence_is_the_share_of_pairs():
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.7, (40, 9))
    counts = counts[counts.sum(axis=1) >= 2]
    expected = np.zeros((9, 9))
    for row in counts:
        words = np.repeat(np.arange(9), row)
        for i, first in enumerate(words):
            for j, second in enumerate(words):
                share = len(words) * (len(words) - 1) * len(counts)
                expected[first, second] += (i != j) / share
    place = np.nonzero(counts)
    split = scipy.sparse.coo_array(  # ones at the same place, and a zero that is stored
        (
            np.append(np.ones(counts.sum()), 0),
            [np.append(np.repeat(p, counts[place]), 0) for p in place],
        ),
        shape=counts.shape,
    )
    for form in (counts, counts.astype(np.float32), scipy.sparse.csc_matrix(counts), split):
        np.testing.assert_allclose(topics.cooccurrence(form), expected, atol=1e-15)


def test_the_population_gives_anchors_topics_and_moments_exactly(population):
    A, R, Q = population
    anchors = topics.find_anchors(Q, TOPICS)
    assert set(anchors.tolist()) == set(range(TOPICS))
    found, moments, weights = topics.recover(Q, anchors)
    np.testing.assert_allclose(found, A[:, anchors], atol=1e-13)
    np.testing.assert_allclose(moments, R[np.ix_(anchors, anchors)], atol=1e-13)
    bayes = A[:, anchors] * (A[:, anchors].T @ Q.sum(axis=1) > 0) * R.sum(axis=0)[anchors]
    np.testing.assert_allclose(weights, bayes / bayes.sum(axis=1, keepdims=True), atol=1e-12)
    np.testing.assert_array_equal(topics.match(found, A), np.argsort(anchors))
    by_divergence, _, _ = topics.recover(Q, anchors, loss="kl")
    assert distance(by_divergence, found) < 2e-3


def test_projected_rows_and_candidates(population):
    _, _, Q = population
    projected = topics.find_anchors(Q, TOPICS, key=jax.random.key(0))
    assert set(projected.tolist()) == set(range(TOPICS))
    others = topics.find_anchors(Q, 4, candidates=np.arange(WORDS) >= 2)
    assert set(others.tolist()) == {2, 3, 4, 5}


@pytest.mark.parametrize("loss", ["l2", "kl"])
def test_a_sample_gives_the_topics_nearly(corpus, loss):
    A, counts = corpus
    model = topics.fit(counts, TOPICS, loss=loss)
    assert set(model.anchors.tolist()) == set(range(TOPICS))
    order = topics.match(model.topics, A)
    np.testing.assert_array_equal(model.anchors[order], range(TOPICS))
    assert np.abs(model.topics[:, order] - A).sum(axis=0).mean() < 0.1
    np.testing.assert_allclose(model.topics.sum(axis=0), 1)
    np.testing.assert_allclose(model.weights.sum(axis=1), 1)
    np.testing.assert_allclose(model.R.sum(), 1, atol=0.02)
    np.testing.assert_array_equal(model.document_counts, (counts.toarray() > 0).sum(axis=0))


def test_rare_words_are_anchors_if_they_may_be(corpus):
    _, counts = corpus
    model = topics.fit(counts[:2000], TOPICS, min_documents=1)
    assert not set(model.anchors.tolist()) <= set(range(TOPICS))
    model = topics.fit(counts[:2000], TOPICS, min_documents=40)
    assert set(model.anchors.tolist()) == set(range(TOPICS))


def test_a_word_that_does_not_occur_changes_nothing(corpus):
    _, counts = corpus
    wider = scipy.sparse.hstack([counts, scipy.sparse.csr_array((counts.shape[0], 1))])
    for loss in ("l2", "kl"):
        model, expected = (topics.fit(c, TOPICS, loss=loss) for c in (wider, counts))
        np.testing.assert_allclose(model.topics[:-1], expected.topics, atol=1e-9)
        assert not model.topics[-1].any()
        assert not model.weights[-1].any()


@pytest.mark.parametrize(
    ("counts", "part"),
    [
        ([[2, -1, 1]], "got -1"),
        ([[2, 1.5, 0]], "got 1.5"),
        ([[2, np.nan, 0]], "got nan"),
        ([[2, np.inf, 0]], "got inf"),
        ([[2, 0, 0], [1, 0, 0], [0, 0, 0]], "got 2 documents"),
        (np.zeros((0, 3)), "got [0, 3]"),
        ([2, 1, 0], "got [3]"),
    ],
)
def test_bad_counts_are_refused(counts, part):
    with refused("counts", part):
        topics.cooccurrence(counts)
    with refused("counts", part):
        topics.fit(counts, 1, min_documents=1)


def test_bad_arguments_are_refused(population):
    _, _, Q = population
    with refused("r", "candidates, 0"):
        topics.fit(GOLDEN, 1)
    with refused("r", "rank of Q, 6"):
        topics.find_anchors(Q, TOPICS + 1)
    with refused("r", "got 0"):
        topics.find_anchors(Q, 0)
    with refused("min_documents", "got 0"):
        topics.fit(GOLDEN, 1, min_documents=0)
    for wrong in ([0, 0], [0, WORDS], [-1, 0], []):
        with refused("anchors", "words that occur"):
            topics.recover(Q, np.array(wrong, int))
    alike = Q.copy()
    alike[6], alike[:, 6] = alike[0], alike[:, 0]
    with refused("anchors", "dependent rows"):
        topics.recover(alike, np.array([0, 6]))
