"""Scores of answers worked out by hand, and a model whose answers are known by construction."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import jaxlm
from jaxlm.evaluation import evaluate_generation, exact_match, normalise_answer, token_f1
from tests.evaluation.test_generation import chain


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an A-team, a  team", "ateam team"),  # the article went before its hyphen could part it
        ("thermal anode", "thermal anode"),  # articles are whole words
        ("...", ""),
    ],
)
def test_normal_form(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal


@pytest.mark.parametrize(
    ("text", "answers", "f1", "exact"),
    [
        ("The capital.", ["a capital", "city"], 1.0, 1.0),
        ("big capital", ["capital"], 2 / 3, 0.0),  # p = 1/2, r = 1
        ("big big capital", ["big capital city"], 2 / 3, 0.0),  # a word counts as often as in both
        ("red wine", ["white beer", "red beer"], 1 / 2, 0.0),  # the best of the answers
        ("", ["red"], 0.0, 0.0),
        ("the", ["a"], 0.0, 1.0),  # no word is left: no word in common, as SQuAD's script has it
        ("no answer", ["no answer", "answer"], 1.0, 1.0),
        ("answer", ["no answer", "answer"], 0.0, 1.0),  # there is none, and one was given
    ],
)
def test_f1_and_exact_match(text, answers, f1, exact) -> None:
    assert token_f1(text, answers) == pytest.approx(f1)
    assert exact_match(text, answers) == exact


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(jaxlm.__file__).parent / "assets" / "model")


def test_what_a_model_answers(tokenizer) -> None:
    """A model that goes on with the tokens of the answer, the end of the line, and more."""
    prompts = ["the film is", "a long one but the film is", "so"]
    ids = tokenizer(" good fun", add_special_tokens=False)["input_ids"]
    end, more, first, other = (
        tokenizer(text)["input_ids"][-1] for text in ("\n", " bad", " is", prompts[2])
    )
    lm = chain(tokenizer, [first, *ids, end, more, other])
    answers = [["good fun"], ["fun", "fun things"], ["bad"]]
    nothing = lm.replace(params=None)  # the parameters that are given are those that answer
    found = evaluate_generation(
        nothing, lm.params, prompts, answers, max_new_tokens=len(ids) + 2, batch_size=2
    )
    assert found.texts[:2] == ("good fun", "good fun")
    wanted = [1.0, 2 / 3, token_f1(found.texts[2], ["bad"])]
    assert found.f1 == pytest.approx(np.mean(wanted))
    assert found.exact_match == pytest.approx(1 / 3)


def test_a_long_prompt_is_cut_on_the_left(tokenizer) -> None:
    lm = chain(tokenizer, tokenizer(" is good fun", add_special_tokens=False)["input_ids"])
    assert lm.config.max_positions == 64
    prompt = "film " * 100 + "is"
    found = evaluate_generation(lm, lm.params, [prompt], [["good fun"]], max_new_tokens=2)
    assert (found.texts, found.f1) == (("good fun",), 1.0)
