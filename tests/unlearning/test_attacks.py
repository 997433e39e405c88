"""Membership inference and memorisation: golden values, scikit-learn, brute force, mistakes."""

import numpy as np
import pytest
import sklearn.metrics

from jaxlm import unlearning
from tests.helpers.sentences import refused

LOG_PROBS = np.array([[-1.0, -2.0, -3.0, -4.0, -5.0, -0.5, -0.25, 9.0]])
MASK = np.array([[1, 1, 1, 1, 1, 1, 1, 0]])


@pytest.mark.parametrize(("k", "value"), [(0.2, 5.0), (0.4, 4.5), (1.0, 2.25)])
def test_min_k(k, value):
    assert unlearning.min_k(LOG_PROBS, MASK, k) == value
    rng = np.random.default_rng(0)
    order = np.append(rng.permutation(7), 7)
    assert unlearning.min_k(LOG_PROBS[:, order], MASK[:, order], k) == value


def test_min_k_of_one_is_the_mean_loss():
    rng = np.random.default_rng(0)
    log_probs, mask = -rng.exponential(size=(50, 30)), rng.integers(0, 2, (50, 30))
    mask[:, 0] = 1
    means = -(log_probs * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(unlearning.min_k(log_probs, mask, 1.0), means)


def test_shares_are_whole_numbers_of_tokens():
    log_probs = -np.arange(1.0, 101)[None]
    assert unlearning.min_k(log_probs, np.ones((1, 100)), 0.29) == np.mean(np.arange(72, 101))


def test_min_k_plus_plus():
    p = np.array([1 / 2, 1 / 4, 1 / 8, 1 / 8])
    mean = np.full((1, 2), (p * np.log(p)).sum())
    std = np.sqrt(np.full((1, 2), (p * np.log(p) ** 2).sum()) - mean**2)
    np.testing.assert_allclose([mean[0, 0], std[0, 0] ** 2], [-1.213008, 0.330311], atol=1e-6)
    token = np.log(p[[[0, 3]]])
    found = unlearning.min_k(token, np.ones((1, 2)), 0.5, plus_plus=(mean, std))
    np.testing.assert_allclose(found, 1.507557, atol=1e-6)
    found = unlearning.min_k(token, np.ones((1, 2)), 1.0, plus_plus=(mean, std))
    np.testing.assert_allclose(found, (1.507557 - 0.904534) / 2, atol=1e-6)


def test_auc_and_privleak():
    forget, holdout = np.array([1, 2, 2, 3]), np.array([2, 3, 4, 5])
    assert unlearning.auc(forget, holdout) == 0.15625
    assert unlearning.privleak(forget, holdout, 0.5) == -68.75
    np.testing.assert_allclose(unlearning.privleak(forget, holdout, 0.4772), -67.2569, atol=1e-4)
    assert unlearning.privleak(forget, holdout, unlearning.auc(forget, holdout)) == 0


def test_auc_is_that_of_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(200):
        forget, holdout = (rng.integers(0, 6, rng.integers(1, 20)) for _ in "fh")
        labels = np.repeat([1, 0], [len(forget), len(holdout)])
        expected = sklearn.metrics.roc_auc_score(labels, np.append(forget, holdout))
        np.testing.assert_allclose(unlearning.auc(forget, holdout), expected, rtol=1e-12)


# AUC of forgotten against held-out texts by Min-40 %, of the authors' stored results: in
# github.com/jaechan-repo/muse_bench at 9b89f0d, privleak/out/*/auc.json, key forget_holdout. And
# PrivLeak in table 3 of the paper (arXiv:2407.06460).
PUBLISHED = {
    "news": {
        "retrain": (0.4772, 0.0),
        "target": (0.0009, -99.8),
        "GA": (0.50195, 5.2),
        "GA with GDR": (0.9930, 108.1),
        "GA with KLR": (0.0187, -96.1),
        "NPO": (0.5935, 24.4),
        "NPO with GDR": (0.9822, 105.8),
        "NPO with KLR": (0.0200, -95.8),
        "task vector": (0.0009, -99.8),
        "WHP": (1.0, 109.6),
    },
    "books": {
        "retrain": (0.5393, 0.0),
        "target": (0.2291, -57.5),
        "GA": (0.4047, -25.0),
        "GA with GDR": (0.3962, -26.5),
        "GA with KLR": (0.3223, -40.2),
        "NPO": (0.4084, -24.3),
        "NPO with GDR": (0.3730, -30.8),
        "NPO with KLR": (0.3048, -43.5),
        "task vector": (0.2291, -57.5),
        "WHP": (0.8442, 56.5),
    },
}


@pytest.mark.parametrize("corpus", PUBLISHED)
def test_privleak_of_the_published_table_follows_from_its_aucs(corpus):
    runs = PUBLISHED[corpus]
    for name, (area, leak) in runs.items():
        # Statistics of 20,000 pairs with this share of held-out texts below the forgotten one.
        below = round(area * 20_000)
        holdout = np.append(np.zeros(below), np.full(20_000 - below, 2.0))
        found = unlearning.privleak(np.ones(1), holdout, runs["retrain"][0])
        np.testing.assert_allclose(found, leak, atol=0.051, err_msg=name)


def test_memorisation():
    right = np.array([3, 5, 2, 7, 7]) == np.array([3, 1, 2, 7, 7])
    for padded in (right[None], np.append(right, False)[None]):
        mask = np.ones(padded.shape)
        mask[:, 5:] = 0
        np.testing.assert_allclose(unlearning.exact_memorization(padded, mask), 0.8)
        np.testing.assert_allclose(unlearning.extraction_strength(padded, mask), 0.6)
    wrong_at_the_end = np.array([[True, True, False]])
    assert unlearning.extraction_strength(wrong_at_the_end, np.ones((1, 3))) == 0
    assert unlearning.extraction_strength(np.ones((1, 3), bool), np.ones((1, 3))) == 1


def test_extraction_by_brute_force():
    rng = np.random.default_rng(0)
    right, counts = rng.random((40, 9)) < 0.8, rng.integers(1, 10, 40)
    mask = (np.arange(9) < counts[:, None]).astype(int)
    found = unlearning.extraction_strength(right, mask)
    for row, n, value in zip(right, counts, found, strict=True):
        k = next(k for k in range(n + 1) if row[k:n].all())
        np.testing.assert_allclose(value, 1 - k / n)


def test_truth_ratio_quality_and_utility():
    one = np.array([2.0]), np.array([1.2])
    kinds = ("raw", "forget", "retain", "share")
    values = [unlearning.truth_ratio(*one, kind)[0] for kind in kinds]
    t = np.exp(-2.0) / np.exp(-1.2)
    np.testing.assert_allclose(values, [t, 0.449329, 0.550671, 1 / (1 + t)], atol=1e-6)
    assert unlearning.truth_ratio(*one[::-1], "forget") == values[1]  # min(t, 1/t)
    assert unlearning.truth_ratio(*one[::-1], "retain") == 0
    first, second = np.array([0.1, 0.4, 0.5, 0.9]), np.array([0.2, 0.6, 0.7, 0.8])
    np.testing.assert_allclose(unlearning.forget_quality(first, second), 0.771429, atol=1e-6)
    values = np.array([0.5, 0.4, 0.8, 0.9, 0.6, 0.7, 0.55, 0.65, 0.75])
    np.testing.assert_allclose(unlearning.model_utility(values), 0.614488, atol=1e-6)
    assert unlearning.model_utility(np.array([0.5, 0.0])) == 0


def test_zlib():
    texts = ["aaaaaaaaaaaaaaaaaaaaaaaa", "the quick brown fox jumps"]
    found = unlearning.zlib_ratio(np.array([1.0, 1.0]), texts)
    assert found[0] > found[1] > 0


@pytest.mark.parametrize(
    ("make", "key", "part"),
    [
        (lambda: unlearning.min_k(LOG_PROBS, MASK, 0.05), "k", "less than one token in 1 of 1"),
        (lambda: unlearning.min_k(LOG_PROBS, MASK, 0.0), "k", "above 0"),
        (lambda: unlearning.auc(np.zeros(0), np.zeros(2)), "forget", "empty"),
        (lambda: unlearning.auc(np.zeros(2), np.array([np.nan])), "holdout", "not finite"),
        (lambda: unlearning.privleak(np.ones(1), np.ones(1), 0.01), "retrain_auc", "0.05"),
    ],
)
def test_mistakes(make, key, part):
    with refused(key, part):
        make()
