"""Bits per byte against closed forms."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.evaluation.perplexity import next_token_losses, perplexity

V = 5


def bigram(params, ids):
    """Logits that depend on the present token alone."""
    return params[ids]


def test_losses_are_those_of_a_known_distribution():
    table = np.random.default_rng(0).dirichlet(np.ones(V), V)
    ids = np.array([[0, 3, 1, 4], [2, 2, 0, 1]], np.int32)
    shift = np.arange(V, dtype=np.float32)[:, None]  # of the logits of a row: without effect
    losses = next_token_losses(bigram, jnp.asarray(np.log(table) + shift, jnp.float32), ids)
    expected = [[-np.log(table[a, b]) for a, b in itertools.pairwise(r)] for r in ids]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_half_precision_logits_are_reduced_in_float32():
    logits = jnp.zeros((V, V), jnp.bfloat16)
    losses = next_token_losses(bigram, logits, np.zeros((1, 3), np.int32))
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, np.full((1, 2), np.log(V)), rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_a_uniform_model_needs_the_entropy_of_its_vocabulary(batch_size):
    rng = np.random.default_rng(1)
    cut = {
        "input_ids": rng.integers(0, V, (5, 7)).astype(np.int32),
        "weights": rng.integers(0, 2, (5, 6)).astype(np.float32),
    }
    found = perplexity(bigram, cut, size=40, batch_size=batch_size)(jnp.zeros((V, V)))
    assert found["loss"] == pytest.approx(np.log(V), rel=1e-6)
    bits = cut["weights"].sum() * np.log2(V) / 40
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
