"""Several texts in a row, told apart by segment ids, are read as each would be alone."""

from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("attention", ["xla", "blockwise"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bert"])
def test_a_packed_row_is_read_as_its_texts(name: str, attention: str):
    lm = jaxlm.from_pretrained(GOLDEN / name)
    lm = lm.replace(config=lm.config.replace(attention=attention))
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 20, length) for length in (5, 3, 4)]
    packed = np.concatenate([*texts, [0, 0]])[None]
    segments = np.repeat([1, 2, 3, 0], [5, 3, 4, 2])[None]
    found = jax.jit(lm.apply)(lm.params, packed, segment_ids=segments)[0]
    start = 0
    for text in texts:
        padded = np.zeros((1, 5), int)
        padded[0, : len(text)] = text
        mask = (np.arange(5) < len(text)).astype(int)[None]
        alone = jax.jit(lm.apply)(lm.params, padded, mask)[0]
        stop = start + len(text)
        np.testing.assert_allclose(found[start:stop], alone[: len(text)], atol=2e-5)
        start = stop
