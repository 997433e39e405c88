"""Log-probabilities against the whole softmax in float64, and the memory that they save."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.models import LanguageModel, scoring
from tests.helpers.models import CONFIG, GOLDEN, MASK, PROMPTS, small_model

IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 9))
SEEN = np.array([[1] * 9, [1] * 6 + [0] * 3, [0] * 2 + [1] * 7])


@pytest.fixture(scope="module")
def lm():
    return small_model()


@jax.jit
def dense(params, ids, mask=None):
    logits = LanguageModel(CONFIG, params).apply(params, ids, mask)
    return jnp.take_along_axis(
        jax.nn.log_softmax(logits[:, :-1]), jnp.asarray(ids)[:, 1:, None], axis=-1
    )[..., 0]


REAL = SEEN[:, 1:] * SEEN[:, :-1]


@pytest.fixture(scope="module")
def by_softmax(lm):
    """The sum over real tokens and its gradient, in float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), lm.params)
        both = jax.value_and_grad(lambda params: (dense(params, IDS, SEEN) * REAL).sum())
        return jax.tree.map(np.asarray, jax.jit(both)(params))


# Of 24 tokens: several blocks with an excess, and one block.
@pytest.mark.parametrize(
    "block", [7, 24, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 25))]
)
def test_blocks_are_the_dense_softmax_in_value_and_gradient(lm, by_softmax, block):
    expected, wanted = by_softmax

    def ours(params):
        scored = scoring.next_token_log_probs(CONFIG, params, IDS, SEEN, block=block)
        return (scored * REAL).sum()

    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), lm.params)
        value, grad = jax.jit(jax.value_and_grad(ours))(params)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        scale = max(np.abs(b).max() for b in jax.tree.leaves(wanted))
        for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-13 * scale)


@pytest.mark.parametrize(
    "length", [16, 17, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8, 9))]
)
def test_every_length_up_to_one_more_than_the_positions(length):
    """The last token needs no position: nothing is predicted from it."""
    lm = jaxlm.from_pretrained(GOLDEN / "gpt2")
    assert lm.config.max_positions == 16
    ids = np.random.default_rng(length).integers(4, 37, (2, length))
    logits = jax.jit(lm.apply)(lm.params, ids[:, :-1])
    wanted = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[:, 1:, None], 2)[..., 0]
    found = jax.jit(lm.log_probs)(lm.params, ids, np.ones_like(ids))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_sequences_count_the_tokens_of_the_completion(lm):
    completion = np.zeros_like(IDS)
    completion[0, 4:7] = completion[1, 2:] = 1

    @jax.jit
    def both(params):
        def scored(params):
            found = [
                scoring.sequence_log_probs(CONFIG, params, IDS, SEEN, completion, reduction=how)
                for how in ("sum", "mean")
            ]
            return found[0][2] + found[1][2], found

        grad, found = jax.grad(scored, has_aux=True)(params)
        return found, grad

    found, grad = both(lm.params)
    each = np.asarray(dense(lm.params, IDS, SEEN))
    parts = [each[0, 3:6], each[1, 1:5], np.zeros(1)]
    np.testing.assert_allclose(found[0], [part.sum() for part in parts], rtol=1e-5)
    np.testing.assert_allclose(found[1], [part.mean() for part in parts], rtol=1e-5)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grad))


def test_continuations_share_a_prompt_and_equal_whole_sequences(lm):
    rng = np.random.default_rng(1)
    score = jax.jit(functools.partial(scoring.continuation_log_probs, CONFIG))
    for length in (1, 3):
        options = rng.integers(0, CONFIG.vocab_size, (3, 4, length))
        found = score(lm.params, PROMPTS, MASK, options)
        assert found.shape == (3, 4, length)
        for row, (prompt, mask) in enumerate(zip(PROMPTS, MASK, strict=True)):
            start = prompt[mask > 0]
            ids = np.zeros((4, 8), int)  # what follows is not seen
            ids[:, : len(start)] = start
            ids[:, len(start) : len(start) + length] = options[row]
            wanted = dense(lm.params, ids)[:, len(start) - 1 :][:, :length]
            np.testing.assert_allclose(found[row], wanted, atol=2e-5)


def test_log_probabilities_of_bfloat16_logits_are_float32():
    logits = jnp.array([[1.0, 2.0, 4.0]], jnp.bfloat16)
    result = scoring.log_probs_of(logits, jnp.array([2]))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, [4 - np.log(np.exp([1, 2, 4]).sum())], rtol=1e-6)
