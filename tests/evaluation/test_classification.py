"""Scores and accuracies against sums written out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import UserError
from jaxlm.data import Encoded, EncodedTask
from jaxlm.evaluation import accuracy, calibrate, majority_accuracy, option_scores, score_split
from jaxlm.models.scoring import log_probs_of
from jaxlm.train.losses import classification_objective, lm_objective

VOCABULARY = 7


def apply(params, ids, mask=None, *, positions=None, token_ids=None, view=None, **unused):
    """A model whose logits at a place depend on the token there alone."""
    logits = params["table"][ids]
    if positions is not None:
        index = positions.reshape(positions.shape[0], -1)
        logits = jnp.take_along_axis(logits, index[..., None], axis=1)
        logits = logits.reshape(*positions.shape, -1)
    return logits if token_ids is None else logits[..., token_ids]


def log_probs(params, ids, mask=None, *, view=None):
    return log_probs_of(apply(params, ids[:, :-1]), ids[:, 1:])


@pytest.fixture
def params():
    return {"table": jax.random.normal(jax.random.key(0), (VOCABULARY, VOCABULARY))}


def scored(ids, params, batch, offsets=None):
    """`option_scores`, compiled as a whole: faster than operation by operation."""
    return jax.jit(functools.partial(option_scores, apply, ids, offsets=offsets))(params, batch)


def objective(params, batch, *args, **options):
    return jax.jit(classification_objective(apply, *args, **options))(params, batch)


def label_words_batch():
    return {
        "input_ids": np.array([[1, 2, 0], [3, 4, 5], [1, 1, 1]], np.int32),
        "attention_mask": np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1]], np.int32),
        "positions": np.array([1, 2, 0], np.int32),
        "labels": np.array([1, 0, 1], np.int32),
        "weights": np.array([1, 1, 0], np.float32),
    }


def label_words_task(count):
    """Examples of growing length that start with their number."""
    examples = tuple(Encoded(i % 2, ((i,) * (i + 1),), ((i,),), ((5,),)) for i in range(count))
    return EncodedTask(("a", "b"), np.array([5, 2], np.int32), 0, (8,), (), (), examples)


def options_batch(words, batch):
    """The same examples written out as an option for each label word."""
    shape = (len(batch["labels"]), len(words))
    ids = np.repeat(batch["input_ids"][:, None], len(words), axis=1)
    mask = np.repeat(batch["attention_mask"][:, None], len(words), axis=1)
    positions = np.broadcast_to(batch["positions"][:, None, None], (*shape, 1))
    targets = np.broadcast_to(np.asarray(words, np.int32)[None, :, None], (*shape, 1))
    return batch | {
        "input_ids": ids,
        "attention_mask": mask,
        "positions": positions,
        "targets": targets,
        "target_mask": np.ones((*shape, 1), np.float32),
    }


def test_label_words_are_scored_by_their_logits(params):
    batch = label_words_batch()
    scores = scored(np.array([5, 2]), params, batch)
    table = np.asarray(params["table"])
    np.testing.assert_array_equal(scores, table[[2, 5, 1]][:, [5, 2]])


def test_options_are_scored_by_the_mean_log_probability_of_their_tokens(params):
    batch = {
        "input_ids": np.array([[[1, 2, 3], [1, 2, 4]]], np.int32),
        "attention_mask": np.ones((1, 2, 3), np.int32),
        "positions": np.array([[[1, 2], [1, 0]]], np.int32),
        "targets": np.array([[[3, 6], [4, 0]]], np.int32),
        "target_mask": np.array([[[1, 1], [1, 0]]], np.float32),
        "labels": np.array([0], np.int32),
        "weights": np.ones(1, np.float32),
    }
    table = np.asarray(params["table"], np.float64)
    logp = table - np.log(np.exp(table).sum(-1, keepdims=True))
    expected = [[(logp[2, 3] + logp[3, 6]) / 2, logp[2, 4]]]
    np.testing.assert_allclose(scored(None, params, batch), expected, rtol=1e-5)


def test_one_token_options_and_label_words_give_one_loss(params):
    words, batch = [5, 2], label_words_batch()
    one, aux = objective(params, batch, np.asarray(words))
    other, other_aux = objective(params, options_batch(words, batch))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    np.testing.assert_array_equal(aux["accuracy"], other_aux["accuracy"])


def test_rows_of_weight_0_do_not_count(params):
    batch, words = label_words_batch(), np.array([5, 2])
    loss, aux = objective(params, batch, words)
    fewer = {name: value[:2] for name, value in batch.items()}
    expected, expected_aux = objective(params, fewer, words)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert aux["accuracy"] == expected_aux["accuracy"]


@pytest.mark.parametrize("form", ["label_words", "options"])
def test_offsets_are_taken_from_scores_and_so_from_the_loss(params, form):
    words, batch = np.array([5, 2]), label_words_batch()
    ids, batch = (words, batch) if form == "label_words" else (None, options_batch(words, batch))
    offsets = np.array([0.5, -2.0], np.float32)
    plain = np.asarray(scored(ids, params, batch), np.float64)
    shifted = plain - offsets
    scores = scored(ids, params, batch, offsets)
    np.testing.assert_allclose(scores, shifted, rtol=1e-6)
    logp = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    loss, _ = objective(params, batch, ids, offsets=offsets)
    np.testing.assert_allclose(loss, -(logp[0, 1] + logp[1, 0]) / 2, rtol=1e-5)


def test_lm_loss_is_the_mean_surprise_of_all_but_the_first_token(params):
    ids = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    table = np.asarray(params["table"], np.float64)
    logp = table - np.log(np.exp(table).sum(-1, keepdims=True))
    loss, aux = jax.jit(lm_objective(log_probs))(params, {"input_ids": ids})
    expected = -np.mean([logp[1, 2], logp[2, 3], logp[4, 5], logp[5, 6]])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert aux["tokens"] == 4
    mask = np.array([[1, 1, 0], [1, 1, 1]], np.int32)
    loss, aux = jax.jit(lm_objective(log_probs))(params, {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(loss, -np.mean([logp[1, 2], logp[4, 5], logp[5, 6]]), rtol=1e-5)
    assert aux["tokens"] == 3


def test_accuracy_is_the_share_of_highest_scores():
    scores = np.array([[1.0, 2.0, 0.0], [3.0, 0.0, 1.0], [0.0, 0.0, 5.0]])
    assert accuracy(scores, np.array([1, 0, 1])) == pytest.approx(2 / 3)


def test_calibration_of_two_options_thresholds_their_difference_at_its_median():
    rng = np.random.default_rng(0)
    scores, unlabelled = (rng.normal(size=(n, 2)) + np.array([0, 3]) for n in (50, 20))
    threshold = np.median(unlabelled[:, 1] - unlabelled[:, 0])
    expected = scores[:, 1] - scores[:, 0] > threshold
    np.testing.assert_array_equal(calibrate(scores, unlabelled).argmax(axis=1), expected)


def test_calibration_takes_a_constant_preference_away():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(99, 4))
    biased = scores + np.array([0.0, 5.0, -2.0, 1.0]) + rng.normal(size=(99, 1))
    np.testing.assert_allclose(calibrate(biased, biased), calibrate(scores, scores), atol=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_majority_is_that_of_the_tested_rows_and_at_least_one_in_c(classes):
    """By trying every constant answer."""
    labels = np.random.default_rng(classes).integers(0, classes, 50)
    right = np.eye(classes, dtype=bool)[labels] | (np.arange(classes) == 1)
    for given, mask in ((labels, np.eye(classes, dtype=bool)[labels]), (right, right)):
        best = max(np.mean(mask[:, answer]) for answer in range(classes))
        assert majority_accuracy(given) == best >= 1 / classes


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused_by_example(bad):
    scores, task = np.ones((5, 2)), label_words_task(5)
    scores[3, 1] = bad
    uses = (
        lambda: accuracy(scores, np.zeros(5, int)),
        lambda: calibrate(scores, np.ones((5, 2))),
        lambda: calibrate(np.ones((5, 2)), scores),
        lambda: score_split(lambda params, batch: scores[::-1], None, task, "test", batch_size=5),
    )
    for use in uses:
        with pytest.raises(UserError, match=r"not finite for 1 of 5 examples \(got .* example 4\)"):
            use()


def test_an_option_that_an_example_does_not_have_is_no_mistake_but_one_must_be_there():
    scores = np.array([[1.0, -np.inf], [-np.inf, 2.0]])
    assert accuracy(scores, np.array([0, 1])) == 1.0
    with pytest.raises(UserError, match="1 of 2 examples"):
        accuracy(np.array([[1.0, 2.0], [-np.inf, -np.inf]]), np.array([1, 0]))


def test_a_split_is_scored_in_its_own_order():
    """Batches hold the longest examples first, and the last one is filled up."""

    def scorer(params, batch):
        first = jnp.asarray(batch["input_ids"][:, 0])
        return jnp.stack([first, -first], axis=1) * 1.0

    scores, labels = score_split(scorer, None, label_words_task(3), "test", batch_size=2)
    np.testing.assert_array_equal(scores, [[0, 0], [1, -1], [2, -2]])
    np.testing.assert_array_equal(labels, [0, 1, 0])
