"""Options after a prompt that is read once, against each option read with its prompt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.data import Encoded, EncodedTask
from jaxlm.evaluation import accuracy, option_scores, score_split
from jaxlm.train.losses import classification_objective, lm_objective
from tests.helpers import reference
from tests.helpers.models import GOLDEN

RNG = np.random.default_rng(0)


def draw(count: int) -> tuple[int, ...]:
    return tuple(RNG.integers(4, 37, count).tolist())


# Prompts of 3 to 7 tokens with 2 to 4 options of 1 to 4 tokens; the third has two right options.
PROMPTS = [draw(n) for n in (5, 3, 7)]
OPTIONS = [[draw(n) for n in counts] for counts in ((1, 3), (2, 2, 4), (4, 1, 2, 3))]
GOLD = [(1,), (0,), (2, 3)]
EXAMPLES = tuple(
    Encoded(gold[0], (prompt,), (), tuple(options), None, gold if len(gold) > 1 else ())
    for prompt, options, gold in zip(PROMPTS, OPTIONS, GOLD, strict=True)
)


def encoded(train: tuple[Encoded, ...] = EXAMPLES) -> EncodedTask:
    return EncodedTask(
        labels=(), token_ids=None, pad_id=1, buckets=(8,), train=train, validation=(), test=EXAMPLES
    )


def batch():
    found = next(encoded().eval_batches("test", batch_size=4))  # with one filling row
    return found, found.pop("index")


@pytest.fixture(scope="module")
def lm():
    return jaxlm.from_pretrained(GOLDEN / "opt")


def whole(ids: tuple[int, ...]) -> np.ndarray:
    """One row of 12 tokens, for one compilation; no token sees those behind it."""
    return np.array([[*ids, *[9] * (12 - len(ids))]])


def separately(log_softmax, reduce=np.mean) -> list[list[float]]:
    """Each option after its prompt, one at a time."""
    scores = []
    for prompt, options in zip(PROMPTS, OPTIONS, strict=True):
        row = []
        for option in options:
            places = np.arange(len(prompt) - 1, len(prompt + option) - 1)
            row.append(float(reduce(log_softmax(whole(prompt + option))[places, list(option)])))
        scores.append(row)
    return scores


def check(scores, expected) -> None:
    for row, wanted in zip(scores, expected, strict=True):
        np.testing.assert_allclose(row[: len(wanted)], wanted, atol=1e-5)
        assert np.all(np.isneginf(row[len(wanted) :]))


@pytest.fixture(scope="module")
def log_softmax(lm):
    return jax.jit(lambda ids: jax.nn.log_softmax(lm.apply(lm.params, ids)[0]))


@pytest.mark.parametrize(("reduction", "reduce"), [("mean", np.mean), ("sum", np.sum)])
def test_scores_are_those_of_each_option_with_its_prompt(
    lm, log_softmax, reduction, reduce
) -> None:
    score = functools.partial(
        option_scores,
        lm.apply,
        None,
        log_probs=lm.continuation_log_probs,
        reduction=reduction,
    )
    scores, right = score_split(jax.jit(score), lm.params, encoded(), "test", batch_size=4)
    check(scores, separately(log_softmax, reduce))
    np.testing.assert_array_equal(right, [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]])


@pytest.mark.torch
def test_scores_are_those_of_transformers(tmp_path) -> None:
    import torch

    theirs = reference.make_model("opt")
    theirs.save_pretrained(tmp_path)
    lm = jaxlm.from_pretrained(tmp_path)

    def log_softmax(ids):
        with torch.no_grad():
            return torch.log_softmax(theirs(torch.from_numpy(ids)).logits[0], dim=-1).numpy()

    inputs, index = batch()
    scores = option_scores(lm.apply, None, lm.params, inputs, log_probs=lm.continuation_log_probs)
    order = np.argsort(np.where(index < 0, 9, index))[:3]
    check(np.asarray(scores)[order], separately(log_softmax))


def test_the_loss_of_ragged_options_and_its_gradient(lm) -> None:
    """The cross-entropy of each example over its own options, averaged, as MeZO's code does."""
    inputs, _ = batch()
    loss_fn = classification_objective(lm.apply, log_probs=lm.continuation_log_probs)

    pairs = [(i, option) for i, options in enumerate(OPTIONS) for option in options]
    rows = np.concatenate([whole(PROMPTS[i] + option) for i, option in pairs])
    weights = np.zeros((*rows.shape, 37))
    for row, (i, option) in enumerate(pairs):
        places = len(PROMPTS[i]) - 1 + np.arange(len(option))
        weights[row, places, list(option)] = 1 / len(option)

    def separate(params):
        scored = (jax.nn.log_softmax(lm.apply(params, rows)) * weights).sum((1, 2))
        own = jnp.split(scored, np.cumsum([len(options) for options in OPTIONS])[:-1])
        right = [jax.nn.log_softmax(row)[gold[0]] for row, gold in zip(own, GOLD, strict=True)]
        return -jnp.stack(right).mean()

    (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(lm.params, inputs)
    wanted, expected = jax.jit(jax.value_and_grad(separate))(lm.params)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_loss_of_a_completion_is_the_mean_over_its_option_tokens(lm, log_softmax) -> None:
    import dataclasses

    task = dataclasses.replace(encoded(), objective="completion")
    inputs = task.batch(0, batch_size=3, seed=0)
    loss, aux = jax.jit(lm_objective(lm.log_probs))(lm.params, inputs)

    totals = separately(log_softmax, np.sum)
    counts = [len(options[gold[0]]) for options, gold in zip(OPTIONS, GOLD, strict=True)]
    total = sum(row[gold[0]] for row, gold in zip(totals, GOLD, strict=True))
    assert float(aux["tokens"]) == sum(counts)
    np.testing.assert_allclose(loss, -total / sum(counts), rtol=1e-5)


def test_a_batch_of_continuations_says_what_it_needs(lm) -> None:
    with pytest.raises(TypeError, match="options after a prompt need log_probs"):
        option_scores(lm.apply, None, lm.params, batch()[0])


def test_any_right_option_counts() -> None:
    scores = np.array([[0.0, 2.0, 1.0], [3.0, 0.0, -np.inf]])
    right = np.array([[False, True, True], [False, True, False]])
    assert accuracy(scores, right) == 0.5
