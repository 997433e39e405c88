"""Memory of compiled programs, which depends on how XLA optimizes them; none is run."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxlm.models import init_params, scoring
from jaxlm.models.attention import IMPLEMENTATIONS, Mask
from tests.helpers.models import CONFIG

pytestmark = pytest.mark.optimized


def temporaries(function, *args) -> int:
    """Bytes of the intermediate arrays of the gradient."""
    compiled = jax.jit(jax.grad(function)).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_blocks_grows_with_length_and_not_with_its_square():
    @functools.cache
    def attending(name, length):
        inputs = [jax.ShapeDtypeStruct((2, length, heads, 3), jnp.float32) for heads in (4, 2, 2)]
        row = jnp.ones((2, length), jnp.int32)

        def loss(inputs):
            mask = Mask(row, row, row)
            return jnp.sum(IMPLEMENTATIONS[name](*inputs, mask, scale=1.0) ** 2)

        return temporaries(loss, inputs)

    assert attending("blockwise", 4096) < 3 * attending("blockwise", 2048)
    assert attending("blockwise", 4096) < 0.1 * attending("xla", 4096)


LARGE = CONFIG.replace(vocab_size=2**16, num_layers=1)
LOGITS = 4 * 192 * LARGE.vocab_size * 4
"""Bytes of those of 192 more tokens, in each of four rows."""


def scored(length, block):
    params = jax.eval_shape(lambda: init_params(LARGE, jax.random.key(0)))

    def loss(params, ids):
        return scoring.next_token_log_probs(LARGE, params, ids, block=block).sum()

    return temporaries(loss, params, jax.ShapeDtypeStruct((4, length), jnp.int32))


def test_memory_of_scores_does_not_grow_with_length_times_vocabulary():
    assert scored(257, 32) - scored(65, 32) < 0.1 * LOGITS


@pytest.mark.slow
def test_memory_of_scores_in_one_block_does():
    assert scored(257, 4 * 256) - scored(65, 4 * 64) > LOGITS
