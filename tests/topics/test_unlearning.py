"""Unlearning of documents next to learning without them."""

import math

import jax
import numpy as np
import pytest
import scipy

from benchmarks.topics import distance, documents, true_topics
from jaxlm import topics
from tests.helpers.sentences import refused

DOCUMENTS, TOPICS = 20_000, 6


@pytest.fixture(scope="module")
def corpus():
    """Counts of documents, the order of most of topic 0, and a model of them."""
    rng = np.random.default_rng(0)
    counts, weights = documents(rng, true_topics(rng, 120, TOPICS), DOCUMENTS, 10)
    return counts, np.argsort(-weights[:, 0]), topics.fit(counts, TOPICS)


def split(counts, order, number):
    return counts[order[:number]], counts[np.sort(order[number:])]


def retrained(counts, model):
    """The co-occurrence, and the topics with the anchors of a model."""
    Q = topics.cooccurrence(counts)
    return Q, topics.recover(Q, model.anchors, loss=model.loss)[0]


def test_golden_downdate():
    counts = np.array([[2, 1, 0], [0, 1, 1]])
    model = topics.fit(counts, 1, min_documents=1)._replace(anchors=np.array([0]))
    found = topics.unlearn(model, counts[1:]).model
    np.testing.assert_allclose(found.Q, [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0], [0, 0, 0]], atol=1e-15)
    np.testing.assert_allclose(found.topics, [[2 / 3], [1 / 3], [0]], atol=1e-15)
    assert (found.num_documents, found.document_counts.tolist()) == (1, [1, 1, 0])


@pytest.mark.parametrize("number", [20, 200, 1000, 4000])
def test_unlearning_is_retraining_while_anchors_are_stable(corpus, number):
    counts, _, model = corpus
    order = np.random.default_rng(1).permutation(DOCUMENTS)
    forget, retain = split(counts, order, number)
    Q, expected = retrained(retain, model)
    found = topics.unlearn(model, forget)
    np.testing.assert_allclose(found.model.Q, Q, atol=1e-15)
    assert distance(found.model.topics, expected) < 1e-10
    assert found.distance_bound < 1e-9
    assert found.anchors_stable
    anew = topics.fit(retain, TOPICS)
    same = topics.match(found.model.topics, anew.topics)
    for name in ("topics", "weights", "anchors"):
        np.testing.assert_allclose(
            getattr(found.model, name)[..., same], getattr(anew, name), atol=1e-10
        )
    np.testing.assert_allclose(found.model.R[np.ix_(same, same)], anew.R, atol=1e-10)
    np.testing.assert_array_equal(found.model.document_counts, anew.document_counts)

    published = topics.unlearn(model, forget, projection="euclidean")
    floor = distance(published.model.topics, expected)
    assert 1e-4 < floor < 5e-3
    assert distance(model.topics, expected) > floor * (0.5 if number == 20 else 2)
    assert np.linalg.norm(published.model.topics - expected) <= published.distance_bound < 0.1


def test_the_flag_says_when_retraining_has_other_anchors(corpus):
    counts, heaviest, model = corpus
    for number, stable in ((200, True), (4000, False)):
        forget, retain = split(counts, heaviest, number)
        for projection in ("gram", "euclidean"):
            found = topics.unlearn(model, forget, projection=projection)
            assert found.anchors_stable == stable
            assert math.isfinite(found.distance_bound) == stable
        same = set(topics.fit(retain, TOPICS).anchors) == set(model.anchors)
        assert same == stable


def test_the_flag_follows_the_candidates_of_retraining(corpus):
    """An anchor that is in too few documents now, and no other candidates but the anchors."""
    counts, _, _ = corpus
    with_anchor = np.flatnonzero(counts[:, [0]].toarray())
    least = len(with_anchor) - 5
    forget, retain = split(counts, with_anchor, 10)
    model = topics.fit(counts, TOPICS, min_documents=50)
    assert topics.unlearn(model, forget).anchors_stable
    raised = model._replace(min_documents=least)
    assert not topics.unlearn(raised, forget).anchors_stable
    none = model._replace(min_documents=DOCUMENTS)
    assert not topics.unlearn(none, forget).anchors_stable
    with refused("r", "candidates"):
        topics.fit(retain, TOPICS, min_documents=DOCUMENTS)


def test_two_calls_are_one(corpus):
    counts, _, model = corpus
    first = topics.unlearn(model, counts[:50]).model
    second = topics.unlearn(first, counts[50:90].toarray()).model
    once = topics.unlearn(model, counts[:90]).model
    np.testing.assert_allclose(second.Q, once.Q, atol=1e-16)
    np.testing.assert_allclose(second.topics, once.topics, atol=1e-12)
    assert second.num_documents == once.num_documents == DOCUMENTS - 90


def test_a_word_of_the_forgotten_documents_alone_is_gone(corpus):
    counts, _, _ = corpus
    own = np.zeros((DOCUMENTS, 1))
    own[7:10] = [[1], [2], [1]]
    wider = scipy.sparse.hstack([counts, scipy.sparse.csr_array(own)]).tocsr()
    model = topics.fit(wider, TOPICS)
    assert model.topics[-1].any()
    for projection in ("gram", "euclidean"):
        found = topics.unlearn(model, wider[5:12], projection=projection).model
        assert not found.Q[-1].any()
        assert not found.Q[:, -1].any()
        assert not found.topics[-1].any()
        assert not found.weights[-1].any()
    _, expected = retrained(wider[np.r_[0:5, 12:DOCUMENTS]], model)
    found = topics.unlearn(topics.unlearn(model, wider[5:9]).model, wider[9:12]).model
    np.testing.assert_allclose(found.topics, expected, atol=1e-12)


def test_divergence_is_minimized_anew(corpus):
    counts, _, _ = corpus
    model = topics.fit(counts, TOPICS, loss="kl")
    found = topics.unlearn(model, counts[:1000])
    _, expected = retrained(counts[1000:], model)
    assert distance(found.model.topics, expected) < 1e-3 < distance(model.topics, expected)
    assert found.distance_bound == math.inf
    with refused("projection", "got euclidean"):
        topics.unlearn(model, counts[:5], projection="euclidean")


def test_noise_has_the_scale_and_the_promise_is_kept_or_refused(corpus):
    counts, heaviest, model = corpus
    privacy = topics.Privacy(epsilon=1.0, delta=1e-5, sensitivity=1e-6)
    key = jax.random.key(3)
    found = topics.unlearn(model, counts[:20], privacy=privacy, key=key)
    noise = found.released - found.model.topics
    assert noise.dtype == np.float64
    np.testing.assert_allclose(noise.std(), 4.84480526e-6, rtol=0.1)
    assert found.private
    again = topics.unlearn(model, counts[:20], privacy=privacy, key=key)
    np.testing.assert_array_equal(found.released, again.released)
    plain = topics.unlearn(model, counts[:20])
    assert plain.released is None
    assert not plain.private
    published = {"projection": "euclidean", "privacy": privacy, "key": key}
    assert not topics.unlearn(model, counts[:20], **published).private
    wide = {**published, "privacy": privacy._replace(sensitivity=0.1)}
    assert topics.unlearn(model, counts[:20], **wide).private
    assert not topics.unlearn(model, counts[heaviest[:4000]], **wide).private
    with refused("key", "got None"):
        topics.unlearn(model, counts[:20], privacy=privacy)


@pytest.mark.parametrize("epsilon", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("delta", [1e-8, 1e-5, 0.1])
def test_the_noise_is_enough_by_the_exact_privacy_of_normal_noise(epsilon, delta):
    """Balle & Wang 2018, arXiv:1805.06530, Theorem 8."""
    sensitivity = 0.7
    scale = topics.noise_scale(epsilon, delta, sensitivity)
    a, b = sensitivity / (2 * scale), epsilon * scale / sensitivity
    normal = scipy.stats.norm.cdf
    assert normal(a - b) - math.exp(epsilon) * normal(-a - b) <= delta


@pytest.mark.parametrize(
    ("key", "values"),
    [
        *(("epsilon", (value, 1e-5, 1.0)) for value in (0.0, -1.0, 1.5, math.nan)),
        *(("delta", (1.0, value, 1.0)) for value in (0.0, 1.0, -0.1)),
        ("sensitivity", (1.0, 1e-5, -1.0)),
    ],
)
def test_promises_out_of_range_are_refused(corpus, key, values):
    counts, _, model = corpus
    with refused(key):
        topics.noise_scale(*values)
    with refused(key):
        privacy = topics.Privacy(*values)
        topics.unlearn(model, counts[:2], privacy=privacy, key=jax.random.key(0))


def test_capacities():
    assert topics.deletion_capacity(20_000, 100, 4) == 20_000 / (16 * 20)
    assert topics.deletion_capacity(20_000, 100, 4, q=0.5) == 20_000 * 0.5 / (4 * 20)
    with refused("q", "at least 0.25"):
        topics.deletion_capacity(20_000, 100, 4, q=0.1)
    with refused("num_topics", "got 0"):
        topics.deletion_capacity(20_000, 100, 0)


def test_what_cannot_be_unlearned_is_refused(corpus):
    counts, _, model = corpus
    with refused("forget_counts", "anchor word"):
        topics.unlearn(model, counts[np.flatnonzero(counts[:, [0]].toarray())])
    with refused("forget_counts", "anchor word"):
        topics.unlearn(model, counts)
    with refused("forget_counts", "not fitted to", "20002 of 20000"):
        topics.unlearn(model, scipy.sparse.vstack([counts, counts[:2]]))
    foreign = np.zeros((1, 120), int)
    foreign[0, 0], foreign[0, 1] = 10_000, 10_000  # these pairs are in few documents
    with refused("forget_counts", "not fitted to", "400 of 20000"):
        topics.unlearn(model, np.repeat(foreign, 400, axis=0))
    with refused("forget_counts", "got -1"):
        topics.unlearn(model, -foreign)
    with refused("forget_counts", "got [1, 2]"):
        topics.unlearn(model, [[1, 1]])
    with refused("forget_counts", "got [0, 120]"):
        topics.unlearn(model, counts[:0])
