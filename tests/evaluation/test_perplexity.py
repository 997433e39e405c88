"""Bits per byte against closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import UserError
from jaxlm.evaluation.perplexity import perplexity

V = 5


def test_a_loss_that_is_not_finite_or_of_nothing_is_refused():
    cut = {"input_ids": np.zeros((1, 3), np.int32), "weights": np.ones((1, 2), np.float32)}
    with pytest.raises(UserError, match="not finite"):
        perplexity(uniform, cut, size=4, batch_size=1)(jnp.float32(np.nan))
    with pytest.raises(UserError, match="no token to predict"):
        perplexity(uniform, cut | {"weights": np.zeros((1, 2))}, size=4, batch_size=1)


def uniform(params, ids):
    return jnp.full(ids[:, 1:].shape, -jnp.log(params))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_a_uniform_model_needs_the_entropy_of_its_vocabulary(batch_size):
    rng = np.random.default_rng(1)
    cut = {
        "input_ids": rng.integers(0, V, (5, 7)).astype(np.int32),
        "weights": rng.integers(0, 2, (5, 6)).astype(np.float32),
    }
    found = perplexity(uniform, cut, size=40, batch_size=batch_size)(jnp.float32(V))
    assert found["loss"] == pytest.approx(np.log(V), rel=1e-6)
    bits = cut["weights"].sum() * np.log2(V) / 40
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
