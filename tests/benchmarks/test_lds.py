"""What counting answers explains is told apart from what an attribution foresees."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks.lds import answer_counts, answer_words, balanced_masks, interval, partial
from jaxlm import influence
from jaxlm.studies.less_rows import PoolRow


def test_balanced_halves_have_half_of_every_answer():
    answers = np.repeat([0, 1, 2, 3], [5, 7, 8, 4])
    masks = balanced_masks(answers, 20)
    counts = answer_counts(masks, answers)
    assert (masks.sum(1) == 12).all()
    assert (counts == counts[0]).all()
    assert counts[0].sum() == 12
    assert np.abs(counts[0] - np.array([2.5, 3.5, 4, 2])).max() <= 0.5
    assert len({mask.tobytes() for mask in masks}) == 20


def test_a_partial_correlation_is_that_of_the_textbook():
    rng = np.random.default_rng(0)
    x, y, z = rng.normal(size=(3, 40)) + rng.normal(size=40)
    r, a, b = (spearmanr(*pair)[0] for pair in ((x, y), (x, z), (y, z)))
    wanted = (r - a * b) / np.sqrt((1 - a**2) * (1 - b**2))
    found = partial(x[:, None], y[:, None], z[:, None])
    np.testing.assert_allclose(found, [wanted], atol=1e-12)


def test_an_attribution_that_counts_answers_foresees_them_and_nothing_else():
    answers = np.repeat([0, 1], 32)
    masks = influence.subset_masks(64, 60)
    tau = (answers == 1).astype(float)[:, None]
    outputs = masks @ tau
    assert influence.lds(tau, masks, outputs).value == pytest.approx(1)
    counts = answer_counts(masks, answers)
    assert counts[0].tolist() == [masks[0, :32].sum(), masks[0, 32:].sum()]
    assert interval(masks @ tau, outputs + np.arange(60)[:, None] / 1e3, counts)[0] == 0


def test_answers_are_the_tokens_that_are_learnt():
    rows = [PoolRow("a", (5, 6, 7), (2,)), PoolRow("b", (7, 7, 6), (2,))]
    train, target = answer_words(rows, rows[::-1])
    assert train.tolist() == [1, 0]
    assert target.tolist() == [0, 1]
