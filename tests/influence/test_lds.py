"""The linear datamodelling score next to scipy, and its interval next to repeated experiments."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from jaxlm.influence import datamodels, lds, leave_one_out, subset_masks
from tests.helpers.sentences import refused

K, N, M = 12, 9, 3
RNG = np.random.default_rng(0)
TAU = RNG.standard_normal((N, M))
MASKS = subset_masks(N, K)
OUTPUTS = MASKS @ TAU + RNG.standard_normal((K, M))


def test_the_score_is_scipys():
    found = lds(TAU, MASKS, OUTPUTS)
    wanted = [spearmanr(MASKS @ TAU[:, m], OUTPUTS[:, m]).statistic for m in range(M)]
    np.testing.assert_allclose(found.of_targets, wanted, rtol=1e-12)
    assert found.value == pytest.approx(np.mean(wanted), rel=1e-12)
    assert found.low < found.value < found.high


def test_one_target():
    np.testing.assert_array_equal(
        lds(TAU[:, 0], MASKS, OUTPUTS[:, 0]).of_targets, lds(TAU, MASKS, OUTPUTS).of_targets[:1]
    )


@pytest.mark.parametrize("levels", [2, 4, 1000])
def test_ranks_of_subsets_that_are_drawn_again_are_scipys(levels):
    """A weight says how often a row is there; few levels give ties."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, levels, (2, 15, 4)).astype(float)
    columns = (datamodels._ranker(a, "a"), datamodels._ranker(b, "b"))
    for _ in range(5):
        weights = rng.integers(0, 3, 15)
        again = [np.repeat(x, weights, axis=0) for x in (a, b)]
        if any((x == x[:1]).all(axis=0).any() for x in again):
            continue
        wanted = [spearmanr(again[0][:, m], again[1][:, m]).statistic for m in range(4)]
        found = datamodels._spearman(*columns, weights.astype(float))
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_perfect_and_opposite_attributions():
    exact = MASKS @ TAU
    assert lds(TAU, MASKS, np.exp(exact)).value == pytest.approx(1)
    assert lds(-TAU, MASKS, exact).value == pytest.approx(-1)


def test_the_interval_of_nothing_is_as_wide_as_it_should_be():
    """Of independent ranks, the correlation has a standard deviation of 1 / sqrt(K - 1)."""
    rng = np.random.default_rng(2)
    masks = subset_masks(50, 100)
    tau, outputs = rng.standard_normal(50), rng.standard_normal(100)
    found = lds(tau, masks, outputs)
    assert found.high - found.low == pytest.approx(2 * 1.96 / np.sqrt(99), rel=0.2)
    narrow = lds(tau, masks, outputs, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 / np.sqrt(99), rel=0.2)
    assert lds(tau, masks, outputs)[:3] == found[:3]
    assert lds(tau, masks, outputs, seed=1).low != found.low


def test_the_interval_knows_of_targets_that_share_their_models():
    """One noise for all targets: twenty of them say no more than one."""
    rng = np.random.default_rng(3)
    masks = subset_masks(40, 60)
    tau, noise = rng.standard_normal((40, 1)), rng.standard_normal((60, 1))
    outputs = masks @ tau + 5 * noise
    one, many = (
        lds(np.repeat(tau, m, 1), masks, np.repeat(outputs, m, 1), replicates=500) for m in (1, 20)
    )
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.2)


def test_subsets_are_random_halves():
    masks = subset_masks(40, 500, fraction=0.3)
    assert masks.dtype == bool
    assert (masks.sum(axis=1) == 12).all()
    deviation = np.sqrt(0.3 * 0.7 / 500)
    assert np.abs(masks.mean(axis=0) - 0.3).max() < 4.5 * deviation
    np.testing.assert_array_equal(subset_masks(40, 7, fraction=0.3), masks[:7])
    assert (subset_masks(40, 7, fraction=0.3, seed=1) != masks[:7]).any()


def test_leaving_one_out():
    def output(mask):
        return np.array([mask @ TAU[:, 0], (mask @ TAU[:, 0]) ** 2])

    found = leave_one_out(output, N)
    total = TAU[:, 0].sum()
    squares = total**2 - (total - TAU[:, 0]) ** 2
    np.testing.assert_allclose(found, np.stack([TAU[:, 0], squares], axis=1), rtol=1e-9)


SAME = np.array(OUTPUTS)
SAME[:, 1] = 0.5


@pytest.mark.parametrize(
    ("call", "key", "part"),
    [
        (lambda: lds(TAU[:4], MASKS, OUTPUTS), "attributions", "(got (4, 3), (12, 9) and (12, 3))"),
        (lambda: lds(TAU, MASKS.T, OUTPUTS), "attributions", "[N, M], [K, N] and [K, M]"),
        (lambda: lds(TAU[:, 0], MASKS, OUTPUTS), "attributions", "[N, M], [K, N] and [K, M]"),
        (lambda: lds(TAU, MASKS.astype(int), OUTPUTS), "masks", "(got int64)"),
        (lambda: lds(TAU, MASKS[:2], OUTPUTS[:2]), "outputs", "3 or more subsets"),
        (lambda: lds(TAU * np.nan, MASKS, OUTPUTS), "attributions", "(got nan for example 0"),
        (lambda: lds(TAU, MASKS, OUTPUTS * np.inf), "outputs", "for subset 0 at target 0"),
        (lambda: lds(TAU, MASKS, SAME), "outputs", "the same for all subsets at target 1"),
        (lambda: lds(TAU * 0, MASKS, OUTPUTS), "attributions", "the same for all subsets"),
        (lambda: lds(TAU, MASKS, OUTPUTS, replicates=0), "replicates", "(got 0)"),
        (lambda: lds(TAU, MASKS, OUTPUTS, level=1.0), "level", "(got 1.0)"),
        (lambda: lds(TAU, MASKS, OUTPUTS, seed=-1), "seed", "(got -1)"),
        (lambda: subset_masks(9, 4, seed=-1), "seed", "(got -1)"),
        (lambda: subset_masks(9, 0), "subsets", "(got 0)"),
        (lambda: subset_masks(9, 3, fraction=0.1), "fraction", "takes 0 of 9"),
        (lambda: subset_masks(9, 3, fraction=1), "fraction", "(got 1)"),
        (lambda: leave_one_out(lambda mask: [0.0], 1), "count", "(got 1)"),
    ],
)
def test_bad_input(call, key, part):
    with refused(key, part):
        call()


def test_sums_that_are_equal_stay_ties():
    """Tenths have equal sums that floats do not give: 0.1 + 0.7 is not 0.3 + 0.5."""
    tenths = np.random.default_rng(4).integers(-9, 10, 40)
    masks = subset_masks(40, 300)
    sums = masks @ tenths
    assert len(np.unique(masks @ (tenths / 10))) > len(np.unique(sums))
    assert lds(tenths / 10, masks, sums).value == pytest.approx(1, abs=1e-12)
    with refused("attributions", "the same for all subsets at target 0"):
        lds(np.full(40, 0.1), masks, sums)
