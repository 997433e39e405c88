"""The model that comes with the package."""

import json

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.models import hf


@pytest.fixture(scope="module")
def lm():
    return jaxlm.from_pretrained()


def test_is_small_and_in_bfloat16():
    files = list(hf.SHIPPED.iterdir())
    assert sum(path.stat().st_size for path in files) < 10e6
    assert json.loads((hf.SHIPPED / "config.json").read_text())["dtype"] == "bfloat16"
    stored = jaxlm.from_pretrained(param_dtype="auto").params
    assert hf.shapes_from_pretrained(param_dtype="auto").params == jax.eval_shape(lambda: stored)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(stored)} == {"bfloat16"}


def test_has_a_card_with_its_licence_and_learning_curve():
    card = (hf.SHIPPED / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "bits per byte" in card
    assert (hf.SHIPPED / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_sentences_start_with_the_separator_and_do_not_end_with_it(lm):
    ids = lm.tokenizer("A Fine film .")["input_ids"]
    assert ids[0] == lm.config.bos_id
    assert lm.config.eos_id not in ids[1:]
    assert ids == lm.tokenizer("a fine film .")["input_ids"]


def test_has_learnt_its_language(lm):
    """A sentence costs far less than under a uniform choice of tokens, and less than shuffled."""

    def nats(text):
        ids = np.array([lm.tokenizer(text)["input_ids"]])
        log_probs = np.asarray(jax.nn.log_softmax(lm.apply(lm.params, ids)[0, :-1]))
        return -float(np.take_along_axis(log_probs, ids[0, 1:, None], axis=1).mean())

    sentence = "it is one of the best films of the year , and it is a lot of fun ."
    words = sentence.split()
    shuffled = " ".join(np.random.default_rng(0).permutation(words))
    assert nats(sentence) < 0.5 * np.log(lm.config.vocab_size)
    assert nats(sentence) < nats(shuffled) - 1


@pytest.mark.torch
def test_transformers_opens_it(lm):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    from transformers import AutoModelForCausalLM

    ids = np.array([lm.tokenizer("the film is a mess , but it is fun .")["input_ids"]])
    theirs = AutoModelForCausalLM.from_pretrained(hf.SHIPPED, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(lm.apply(lm.params, ids), wanted, atol=1e-4)
