"""Ranking accuracy, what it could be, when pairs flip, and tables of what training did."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import preference
from jaxlm.preference import PairScores
from tests.helpers.sentences import refused
from tests.preference.test_losses import SCORES

RATES = np.array([0.9, 0.6, 0.75, 0.999])
REFERENCE = SCORES._replace(chosen=SCORES.ref_chosen, rejected=SCORES.ref_rejected)


def test_accuracies_of_the_golden_vectors():
    assert preference.ranking_accuracy(SCORES) == 0.5
    assert preference.ranking_accuracy(SCORES, length_normalize=True) == 1.0
    assert preference.ranking_accuracy(REFERENCE) == 0.75
    assert preference.reward_accuracy(SCORES) == 0.5


def test_equal_log_probabilities_are_ranked_right_but_not_rewarded():
    start = PairScores(*np.zeros((4, 3)))
    assert preference.ranking_accuracy(start) == 1
    assert preference.reward_accuracy(start) == 0
    assert preference.idealized_ranking_accuracy(start, 0.5, 0.1) == 0


def test_a_band_of_ties():
    scores = PairScores(np.array([0.0, 0, 0, 0]), np.array([-3.0, -0.5, 0.5, 3]))
    assert preference.ranking_accuracy(scores) == 0.5
    shares = [preference.ranking_accuracy(scores, band=band) for band in (0.5, 0.6, 9)]
    assert shares == [0.5, 0.5, 0.5]
    scores = scores._replace(rejected=np.array([-3.0, -0.5, -0.5, 3]))
    shares = [preference.ranking_accuracy(scores, band=band) for band in (0.5, 0.6, 9)]
    assert shares == [0.75, 0.5, 0.5]


def test_padding_does_not_count():
    padded = PairScores(*(np.append(x, [0, 0]) for x in SCORES[:6]))
    for function in (preference.ranking_accuracy, preference.reward_accuracy):
        assert function(padded) == function(SCORES)
    rates = np.append(RATES, [1, 1])
    assert preference.idealized_ranking_accuracy(padded, rates, 0.1) == 0.75
    changed = padded._replace(chosen=padded.chosen - 1)
    found = preference.displacement(padded, changed)
    assert found[:3] == (1, -1, 0)
    loss = preference.loss(SCORES._replace(chosen=SCORES.chosen - 1)) - preference.loss(SCORES)
    np.testing.assert_allclose(found.loss, loss.mean(), rtol=1e-5)
    assert preference.flip_table(padded, padded).pairs.sum() == 4


def test_the_idealized_accuracy_of_the_golden_vectors():
    betas = np.array([0.01, 0.1, 1, 5, 10])
    found = preference.idealized_ranking_accuracy(SCORES, RATES, betas)
    np.testing.assert_array_equal(found, [1, 0.75, 0.75, 0.75, 0.75])
    one = [preference.idealized_ranking_accuracy(SCORES, RATES, float(beta)) for beta in betas]
    np.testing.assert_array_equal(found, one)


def test_limits_of_the_idealized_accuracy():
    rng = np.random.default_rng(0)
    scores = PairScores(None, None, *rng.normal(0, 20, (2, 1000)))
    scores = scores._replace(chosen=scores.ref_chosen, rejected=scores.ref_rejected)
    rate = rng.uniform(0.01, 0.99, 1000)
    small, large = preference.idealized_ranking_accuracy(scores, rate, np.array([1e-6, 1e6]))
    np.testing.assert_allclose(small, (rate > 0.5).mean(), rtol=1e-6)
    np.testing.assert_allclose(large, preference.ranking_accuracy(scores), rtol=1e-6)
    # No preference leaves the reference, and a certain one is clipped and not infinite.
    even = preference.idealized_ranking_accuracy(scores, 0.5, 0.1)
    np.testing.assert_allclose(even, preference.ranking_accuracy(scores), rtol=1e-6)
    assert preference.idealized_ranking_accuracy(scores, 1.0, 10.0) < 0.6
    assert preference.idealized_ranking_accuracy(scores, 1.0, 1e-3) == 1


def test_the_optimum_of_dpo_has_the_idealized_accuracy():
    """Fit the margin of each pair to its preference rate, and rank by the result."""
    rng = np.random.default_rng(1)
    reference, rate, beta = rng.normal(0, 5, (2, 50)), rng.uniform(0.05, 0.95, 50), 0.3

    def expected_loss(margin):
        return -(rate * np.log(sigmoid(margin)) + (1 - rate) * np.log(sigmoid(-margin)))

    def sigmoid(margin):
        return 1 / (1 + np.exp(-beta * margin))

    grid = np.linspace(-15, 15, 6001)
    best = grid[np.argmin([expected_loss(np.full(50, x)) for x in grid], axis=0)]
    right = reference[0] - reference[1] + best > 0
    found = preference.idealized_ranking_accuracy(PairScores(*reference, *reference), rate, beta)
    np.testing.assert_allclose(found, right.mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("beta", "k", "threshold"),
    [(0.1, 5, 0.474077), (0.1, 30, 0.048587), (0.1, -5, 0.974077), (0.5, 2, 0.313262)],
)
def test_thresholds_of_dpo(beta, k, threshold):
    scores = PairScores(*np.array([[0.0], [0.0], [0.0], [k]]))
    np.testing.assert_allclose(preference.flip_threshold(scores, beta), threshold, atol=5e-7)


def cases(seed):
    rng = np.random.default_rng(seed)
    return PairScores(*-rng.exponential(40, (4, 10_000)), *rng.integers(1, 40, (2, 10_000)))


def ranked(scores, kind):
    chosen, rejected = scores.chosen, scores.rejected
    if kind in ("dpo_norm", "ipo"):
        chosen, rejected = chosen / scores.chosen_tokens, rejected / scores.rejected_tokens
    return chosen >= rejected


@pytest.mark.parametrize("kind", ["dpo", "dpo_norm"])
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_dpo_ranks_right_if_and_only_if_its_loss_is_at_most_the_threshold(kind, beta):
    scores = cases(0)
    with jax.enable_x64(True):
        below = preference.loss(scores, kind, beta=beta) <= preference.flip_threshold(
            scores, beta, kind
        )
        np.testing.assert_array_equal(below, ranked(scores, kind))


@pytest.mark.parametrize("kind", ["ipo", "ipo_sum"])
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_ipo_ranks_right_if_its_loss_is_at_most_the_threshold(kind, beta):
    scores = cases(1)
    right = ranked(scores, kind)
    with jax.enable_x64(True):
        threshold = np.asarray(preference.flip_threshold(scores, beta, kind))
        below = np.asarray(preference.loss(scores, kind, beta=beta) <= threshold)
        assert below.any()
        assert right[below].all()
        assert right[~below].any()  # so it does not hold the other way round
        # Where the threshold is -inf, loss 0 means that the rejected response is more likely.
        k = scores.ref_rejected - scores.ref_chosen
        if kind == "ipo":
            lengths = scores.chosen_tokens, scores.rejected_tokens
            k = scores.ref_rejected / lengths[1] - scores.ref_chosen / lengths[0]
        np.testing.assert_array_equal(np.isinf(threshold), 1 / (2 * beta) - k < 0)


def test_a_threshold_of_another_loss():
    with refused("kind", "dpo_norm"):
        preference.flip_threshold(SCORES, 0.1, "hinge")


def test_flips():
    before = PairScores(np.array([-1.0, -1, -1, -1, -1, -1]), np.array([-9.0, -3, -1, -0.9, 0, 9]))
    after = before._replace(rejected=np.array([-9.0, 0, -2, -1, 0, -9]))
    table = preference.flip_table(before, after)
    np.testing.assert_array_equal(table.pairs, [3, 3])
    np.testing.assert_array_equal(table.right, [2, 2])
    table = preference.flip_table(before, after, edges=(-5.0, 0.0, 5.0))
    np.testing.assert_array_equal(table.pairs, [1, 2, 2, 1])
    np.testing.assert_array_equal(table.right, [1, 1, 1, 1])


def test_more_than_two_responses():
    rng = np.random.default_rng(2)
    log_probs = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
    ratings = rng.integers(1, 5, (7, 5)).astype(np.float32)
    ratings[0, 2] = np.nan
    for band in (0.0, 1.0):
        right = [
            log_probs[b, i] >= log_probs[b, j]
            for b in range(7)
            for i in range(5)
            for j in range(5)
            if ratings[b, i] > ratings[b, j] + band
        ]
        found = preference.listwise_ranking_accuracy(log_probs, ratings, band=band)
        np.testing.assert_allclose(found, np.mean(right), rtol=1e-6)
    pairs = jnp.stack([SCORES.chosen, SCORES.rejected], axis=1)
    found = preference.listwise_ranking_accuracy(pairs, np.array([[1.0, 0.0]] * 4))
    assert found == preference.ranking_accuracy(SCORES)
