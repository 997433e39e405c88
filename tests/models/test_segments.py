"""Packed rows: each segment is read and scored as its text would be alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core.errors import UserError
from jaxlm.models.scoring import sequence_log_probs
from tests.helpers.models import GOLDEN, small_model

LENGTHS = (5, 3, 4)
TEXTS = [np.random.default_rng(i).integers(5, 20, length) for i, length in enumerate(LENGTHS)]
PACKED = np.concatenate([*TEXTS, [0, 0]])[None]
SEGMENTS = np.repeat([1, 2, 3, 0], [*LENGTHS, 2])[None]
STARTS = np.cumsum([0, *LENGTHS])
ROWS = np.stack([np.pad(text, (0, 5 - len(text))) for text in TEXTS])
MASK = (np.arange(5) < np.array(LENGTHS)[:, None]).astype(int)


# With windows in both directions and in one, learned positions, and rotary ones.
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *(("gpt2", "xla"), ("gemma2", "blockwise"), ("modernbert", "xla")),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                *(("gpt2", "blockwise"), ("gemma2", "xla"), ("modernbert", "blockwise")),
                *((name, how) for name in ("llama", "bert") for how in ("xla", "blockwise")),
            )
        ),
    ],
)
def test_logits_of_a_packed_row(name: str, attention: str):
    lm = jaxlm.from_pretrained(GOLDEN / name)
    lm = lm.replace(config=lm.config.replace(attention=attention))
    found = jax.jit(lm.apply)(lm.params, PACKED, segment_ids=SEGMENTS)[0]
    alone = jax.jit(lm.apply)(lm.params, ROWS, MASK)
    for row, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=False)):
        wanted = alone[row, :length]
        np.testing.assert_allclose(found[start : start + length], wanted, atol=2e-5)


@pytest.mark.parametrize(("name", "excess"), [("gpt2", 0), ("gpt2", 2), ("gemma2", 0)])
def test_log_probs_of_a_packed_row(name: str, excess: int):
    """Of 14 tokens all but the last are read, of 16 all; Gemma 2 has windows."""
    ids, segments = (np.pad(x, ((0, 0), (0, excess))) for x in (PACKED, SEGMENTS))
    with jax.enable_x64(True):
        lm = jaxlm.from_pretrained(GOLDEN / name, param_dtype="float64")
        alone = np.asarray(jax.jit(lm.log_probs)(lm.params, ROWS, MASK))
        found = jax.jit(lm.log_probs)(lm.params, ids, segment_ids=segments)[0]
    wanted = np.zeros(ids.shape[1] - 1)
    for row, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=False)):
        wanted[start : start + length - 1] = alone[row, : length - 1]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


COMPLETION = np.array([[0, 1, 1, 0, 1], [0, 0, 1, 0, 0], [0, 1, 1, 1, 0]])


@pytest.mark.parametrize(("completion", "reduction"), [(None, "sum"), (COMPLETION, "mean")])
def test_sequences_of_a_packed_row(completion, reduction: str):
    packed = None
    if completion is not None:
        parts = [row[mask > 0] for row, mask in zip(completion, MASK, strict=True)]
        packed = np.concatenate([*parts, [0, 0]])[None]
    with jax.enable_x64(True):
        lm = small_model("float64")
        score = functools.partial(sequence_log_probs, lm.config, reduction=reduction)
        found = jax.jit(functools.partial(score, num_segments=4))(
            lm.params, PACKED, None, packed, segment_ids=SEGMENTS
        )
        wanted = jax.jit(score)(lm.params, ROWS, MASK, completion)
        found = np.asarray(found)
    np.testing.assert_allclose(found[0, :3], wanted, rtol=1e-9)
    assert found[0, 3] == 0


def test_gradients_of_a_packed_row():
    lm = jaxlm.from_pretrained(GOLDEN / "llama")

    def packed(params):
        return lm.log_probs(params, PACKED, segment_ids=SEGMENTS).sum()

    def alone(params):
        return (lm.log_probs(params, ROWS, MASK) * MASK[:, 1:]).sum()

    found, wanted = (jax.jit(jax.grad(f))(lm.params) for f in (packed, alone))
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * scale)


def test_the_number_of_segments_belongs_to_them():
    lm = jaxlm.from_pretrained(GOLDEN / "llama")
    for options in ({"segment_ids": SEGMENTS}, {"num_segments": 3}):
        with pytest.raises(UserError, match=r"^num_segments: "):
            sequence_log_probs(lm.config, lm.params, PACKED, **options)
