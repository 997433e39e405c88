"""ROUGE-L, and the report of unlearning, against brute force and other implementations."""

import jax
import numpy as np
import pytest

from jaxlm import unlearning
from jaxlm.data.rows import PaddedRows, TokenRow
from jaxlm.evaluation import (
    UnlearningData,
    attacks,
    gradient_norms,
    halves,
    knowledge,
    rouge_l,
    text_scores,
    unlearning_report,
    verbatim,
)
from jaxlm.models import from_pretrained
from jaxlm.train.losses import row_losses
from tests.helpers.sentences import refused
from tests.helpers.tiny import make_model, make_tokenizer


@pytest.mark.parametrize(
    ("reference", "hypothesis", "value"),
    [
        ("The cat sat on the mat.", "the cat lay on a mat", (2 / 3, 2 / 3, 2 / 3)),
        ("Harry-Potter, 11 years", "harry potter was eleven years", (0.6, 0.75, 2 / 3)),
        ("don't stop", "dont stop", (0.5, 1 / 3, 0.4)),
        ("naïve café", "naive cafe", (0, 0, 0)),
        ("", "something", (0, 0, 0)),
        ([3, 1, 4, 1, 5], [1, 4, 5], (1, 0.6, 0.75)),
    ],
)
def test_rouge_l(reference, hypothesis, value):
    np.testing.assert_allclose(rouge_l(reference, hypothesis), value)


def test_common_subsequences_by_dynamic_programming():
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = (rng.integers(0, 4, rng.integers(0, 12)).tolist() for _ in "ab")
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                best = max(table[i, j + 1], table[i + 1, j])
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else best
        expected = 2 * table[-1, -1] / (len(a) + len(b)) if table[-1, -1] else 0
        np.testing.assert_allclose(rouge_l(a, b).f1, expected)


@pytest.mark.torch
def test_rouge_l_is_that_of_the_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    rng = np.random.default_rng(1)
    words = ["a", "The", "cat,", "cat", "mat.", "don't", "11", "naïve", "x-y", "", "  "]
    for _ in range(10_000):
        one, other = (" ".join(rng.choice(words, rng.integers(0, 9))) for _ in "ab")
        expected = scorer.score(one, other)["rougeL"]
        found = rouge_l(one, other)
        assert found == pytest.approx((expected.precision, expected.recall, expected.fmeasure))


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<s>"
    return from_pretrained(make_model(tmp_path_factory.mktemp("models") / "m", tokenizer, scale=3))


def rows(seed: int, count: int = 5) -> PaddedRows:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        ids = rng.integers(2, 20, rng.integers(6, 12))
        made.append(TokenRow(str(i), (1, *ids.tolist()), tuple(range(3, len(ids) + 1))))
    return PaddedRows(made, 0)


def test_scores_of_texts_row_by_row(lm):
    given = rows(0)
    found = text_scores(lm, given, batch_size=2)
    for i, row in enumerate(given.rows):
        logits = np.asarray(lm.apply(lm.params, np.array([row.ids])), np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        at = np.array(row.loss_positions) - 1
        targets = np.array(row.ids)[at + 1]
        assert np.flatnonzero(found.mask[i]).tolist() == at.tolist()
        np.testing.assert_allclose(found.log_probs[i, at], log_p[at, targets], atol=1e-5)
        mean = (np.exp(log_p) * log_p).sum(-1)
        std = np.sqrt((np.exp(log_p) * (log_p - mean[:, None]) ** 2).sum(-1))
        np.testing.assert_allclose(found.mean[i, at], mean[at], atol=1e-4)
        np.testing.assert_allclose(found.std[i, at], std[at], rtol=1e-3)
        assert found.right[i, at].tolist() == (logits[at].argmax(-1) == targets).tolist()
        np.testing.assert_allclose(found.losses[i], -log_p[at, targets].mean(), rtol=1e-5)


def test_attacks_are_areas_of_statistics(lm):
    sides = [text_scores(lm, rows(seed)) for seed in (0, 1)]
    losses = [side.losses for side in sides]
    found = attacks(*sides, k=0.5, reference=(np.zeros(5), np.zeros(5)))
    assert found["loss"] == found["reference"] == unlearning.auc(*losses)
    low = [unlearning.min_k(side.log_probs, side.mask, 0.5) for side in sides]
    assert found["min_k"] == unlearning.auc(*low)
    assert found.keys() == {"loss", "min_k", "min_k_plus_plus", "reference"}


def test_gradient_norms(lm):
    given = PaddedRows(rows(0).rows, 0, form="targets")
    batches = [given.batch([i]) for i in range(5)]
    losses = row_losses(lm)
    found = gradient_norms(losses, lm.params, batches)
    for batch, norm in zip(batches, found, strict=True):
        grads = jax.grad(lambda params, batch=batch: losses(params, batch)[0])(lm.params)
        leaves = [np.ravel(x) for x in jax.tree.leaves(grads)]
        np.testing.assert_allclose(norm, np.linalg.norm(np.concatenate(leaves)), rtol=1e-4)


def test_halves_of_rows(lm):
    row = TokenRow("a", (1, 2, 3, 4, 5, 6, 1), (3, 4, 5, 6))
    prompts, rests = halves(PaddedRows([row], 0), lm.tokenizer)
    assert prompts == [[1, 2, 3, 4, 5]]
    assert rests == [lm.tokenizer.decode([6])]  # without the token that ends a text
    prompts, rests = halves(PaddedRows([row], 0), lm.tokenizer, 0.0)
    assert prompts == [[1, 2, 3]]
    assert rests == [lm.tokenizer.decode([4, 5, 6])]


def test_verbatim_is_the_rouge_of_greedy_tokens(lm):
    prompts, _ = halves(rows(0), lm.tokenizer)
    written = []
    for ids in prompts:
        given = np.array([ids])
        new = lm.generate(lm.params, given, np.ones_like(given), max_new_tokens=4)
        written.append(lm.tokenizer.decode(np.asarray(new.tokens)[0]))
    assert verbatim(lm, prompts, written, max_new_tokens=4).tolist() == [1.0] * 5
    assert verbatim(lm, prompts, [""] * 5, max_new_tokens=4).tolist() == [0.0] * 5


def test_questions_come_after_solved_ones(lm, monkeypatch):
    asked = {}

    def recorded(lm, prompts, references, **options):
        asked.update(options, prompts=prompts, references=references)
        return np.zeros(1)

    monkeypatch.setattr("jaxlm.evaluation.unlearning.verbatim", recorded)
    knowledge(lm, ["who?"], ["me"], shots=[("why?", "so")])
    assert asked["prompts"] == ["Question: why?\nAnswer: so\n\nQuestion: who?\nAnswer:"]
    assert asked["stop"] == ("\n\n", "\nQuestion", "Question:")
    assert asked["max_new_tokens"] == 32


def test_the_report(lm):
    data = UnlearningData(rows(0), rows(1), rows(2), rows(3), rows(4))
    found = unlearning_report(lm, data, max_new_tokens=4)
    assert "privleak" not in found
    own = unlearning_report(lm, data, max_new_tokens=4, retrain_auc=found["auc_min_k"])
    assert own["privleak"] == 0
    other = unlearning_report(lm, data, max_new_tokens=4, retrain_auc=0.5)
    np.testing.assert_allclose(other["privleak"], 200 * (found["auc_min_k"] - 0.5))
    forget = text_scores(lm, data.forget)
    np.testing.assert_allclose(found["forget_loss"], forget.losses.mean())
    share = (forget.right & (forget.mask > 0)).sum(1) / forget.mask.sum(1)
    np.testing.assert_allclose(found["exact_memorization"], 100 * share.mean())
    assert 0 <= found["verbmem"] <= 100
    without = unlearning_report(lm, data._replace(forget_questions=None), max_new_tokens=4)
    assert found.keys() - without.keys() == {"knowmem_forget"}
    with refused("holdout", "empty"):
        unlearning_report(lm, data._replace(holdout=PaddedRows([], 0)))
    with refused("retrain_auc", "0.05"):
        unlearning_report(lm, data, retrain_auc=0.01, max_new_tokens=4)
