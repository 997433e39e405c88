"""Prefixes against the tokens whose keys and values they are; loops are in test_attention."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import peft
from jaxlm.core.errors import UserError
from jaxlm.models import save_pretrained
from jaxlm.peft.methods import activations
from tests.helpers.models import GOLDEN

KEY = jax.random.key(3)
PREFIX = jnp.array([[7, 22, 9]])
IDS = jnp.array([[20, 3, 30, 7, 1], [1, 1, 9, 9, 11], [5, 6, 8, 1, 1]])
MASK = jnp.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])


def with_prefix(lm, keys, values):
    attention = lm.params["layers"]["attention"]
    attention = {**attention, "prefix_keys": keys, "prefix_values": values}
    layers = {**lm.params["layers"], "attention": attention}
    return lm.replace(params={**lm.params, "layers": layers})


@pytest.mark.parametrize(("name", "attention"), [("opt", "xla"), ("llama", "blockwise")])
def test_activations_of_tokens_stand_for_the_tokens(name: str, attention: str):
    """The model on [prefix tokens, text], both counted from position 0, without any prefix."""
    lm = jaxlm.from_pretrained(GOLDEN / name, attention=attention)
    rows = len(IDS)
    ids = jnp.concatenate([jnp.repeat(PREFIX, rows, 0), IDS], axis=1)
    mask = jnp.concatenate([jnp.ones((rows, 3), int), MASK], axis=1)
    text = jnp.maximum(jnp.cumsum(MASK, axis=1) - 1, 0)
    positions = jnp.concatenate([jnp.repeat(jnp.arange(3)[None], rows, 0), text], axis=1)
    wanted = jax.jit(lm.apply)(lm.params, ids, mask, position_ids=positions)[:, 3:]

    tuned = with_prefix(lm, *activations(lm, PREFIX))
    found = jax.jit(tuned.apply)(tuned.params, IDS, MASK)
    real = MASK.astype(bool)
    np.testing.assert_allclose(found[real], wanted[real], atol=2e-5)
    without = jax.jit(lm.apply)(lm.params, IDS, MASK)
    assert np.abs(found - without)[real].max() > 0.1


@pytest.mark.parametrize("name", ["gemma", pytest.param("bert", marks=pytest.mark.slow)])
def test_the_first_prefix_is_of_tokens_drawn_from_the_vocabulary(name: str):
    lm = jaxlm.from_pretrained(GOLDEN / name)
    params = peft.prefix(lm, KEY, length=1).params["layers"]["attention"]
    found = params["prefix_keys"], params["prefix_values"]
    every = jnp.arange(lm.config.vocab_size)[:, None, None]
    keys, values = jax.lax.map(lambda ids: activations(lm, ids), every)
    same = [np.allclose(found, pair, atol=1e-6) for pair in zip(keys, values, strict=True)]
    assert sum(same) == 1


def test_the_tokens_of_an_encoders_prefix_see_each_other():
    """Their last keys are those of a pass in both directions, whatever stands behind."""
    lm = jaxlm.from_pretrained(GOLDEN / "bert")
    forward, backward = (activations(lm, ids)[0] for ids in (PREFIX, PREFIX.at[0, 2].set(5)))
    np.testing.assert_array_equal(forward[0, 0], backward[0, 0])
    assert np.abs(forward[1, 0] - backward[1, 0]).max() > 1e-3
    tuned = peft.prefix(lm, KEY)
    blocks = tuned.replace(config=tuned.config.replace(attention="blockwise"))
    found, again, without = (
        jax.jit(each.apply)(each.params, IDS, MASK) for each in (tuned, blocks, lm)
    )
    np.testing.assert_allclose(again, found, atol=2e-5)
    assert np.abs(found - without).max() > 1e-2


def test_numbers_drawn_at_random():
    lm = jaxlm.from_pretrained(GOLDEN / "llama")
    drawn = peft.prefix(lm, KEY, length=16, init="normal").params["layers"]["attention"]
    x = np.stack([drawn["prefix_keys"], drawn["prefix_values"]])
    assert x.shape == (2, lm.config.num_layers, 16, lm.config.num_kv_heads, lm.config.head_size)
    assert abs(x.mean()) < 4.5 * x.size**-0.5
    assert abs(x.var() - 1) < 4.5 * (2 / x.size) ** 0.5


def test_generation_with_a_cache_sees_the_prefix():
    lm = peft.prefix(jaxlm.from_pretrained(GOLDEN / "gemma2"), KEY, init="normal")
    ids, mask = IDS[:2], MASK[:2]
    found = lm.generate(lm.params, ids, mask, max_new_tokens=4, eos_id=[]).tokens
    apply = jax.jit(lm.apply)
    whole = jnp.concatenate([ids, jnp.zeros((2, 4), int)], axis=1)
    real = jnp.concatenate([mask, jnp.zeros((2, 4), int)], axis=1)
    for place in range(5, 9):
        best = jnp.argmax(apply(lm.params, whole, real)[:, place - 1], axis=-1)
        whole, real = whole.at[:, place].set(best), real.at[:, place].set(1)
    np.testing.assert_array_equal(found, whole[:, 5:])


def test_mistakes(tmp_path: Path):
    lm = jaxlm.from_pretrained(GOLDEN / "opt")
    tuned = peft.prefix(lm, KEY, init="normal")
    with pytest.raises(UserError, match=r"length: must be from 1 to 16 \(got 0\)"):
        peft.prefix(lm, KEY, length=0)
    with pytest.raises(UserError, match=r"length: must be from 1 to 16 \(got 17\)"):
        peft.prefix(lm, KEY, length=17)
    with pytest.raises(UserError, match="lm: has a prefix already"):
        peft.prefix(tuned, KEY)
    with pytest.raises(UserError, match="a prefix, which a model folder cannot hold"):
        save_pretrained(tuned, tmp_path)
    assert not any(tmp_path.iterdir())
