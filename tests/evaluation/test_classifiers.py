"""Classifiers: which of a model's outputs is which class of a task."""

from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.core.errors import UserError
from jaxlm.data import load_task, prepare_for, task_config
from jaxlm.models import LanguageModel, add_classifier
from jaxlm.train.load import with_head
from jaxlm.train.measure import MultipleChoiceMetric
from tests.helpers.tiny import make_masked, sentences, write_jsonl

GOLDEN = Path(__file__).parents[1] / "models" / "golden"
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return jaxlm.from_pretrained(GOLDEN / "bert-base").replace(tokenizer=make_masked())


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    return str(write_jsonl(tmp_path_factory.mktemp("rows") / "test.jsonl", sentences(12)))


def task(rows: str, labels=("bad", "good"), **values):
    template = "{text} it was {label}"
    known = {"name": "tiny", "template": template, "labels": list(labels), "test": rows}
    return load_task(task_config(known | values), seed=0)


def scores(lm: LanguageModel, rows: str, *args, **values) -> np.ndarray:
    encoded = prepare_for(lm, task(rows, *args, **values))
    return MultipleChoiceMetric(lm, encoded, batch_size=4).scores("test", lm.params)[0]


def test_the_outputs_of_a_classifier_are_the_classes_of_their_names(base, rows, tmp_path: Path):
    """Also after saving; and where no name is that of a class, their order counts."""
    nameless = add_classifier(base, 2, KEY)
    plain = scores(nameless, rows)
    assert np.abs(plain[:, 0] - plain[:, 1]).min() > 1e-6
    jaxlm.save_pretrained(add_classifier(base, 2, KEY, ("good", "bad")), tmp_path)
    named = jaxlm.from_pretrained(tmp_path)
    np.testing.assert_array_equal(scores(named, rows), plain[:, ::-1])
    np.testing.assert_array_equal(scores(named, rows, ("good", "bad")), plain)
    words = {"labels": ["cold", "warm"], "classes": ["BAD", "Good"]}
    np.testing.assert_array_equal(scores(named, rows, **words), plain[:, ::-1])
    np.testing.assert_array_equal(scores(named, rows, ("cold", "warm")), plain)


def test_classes_that_do_not_match_are_refused(base, rows):
    one = add_classifier(base, 2, KEY, ("good", "awful"))
    with pytest.raises(UserError, match=r"^model: its classes are not bad, good \(got good, awful"):
        prepare_for(one, task(rows))
    three = add_classifier(base, 3, KEY, ("good", "bad", "none"))
    with pytest.raises(UserError, match=r"^model: its classifier is not for 2 classes \(got 3\)"):
        scores(three, rows)


def test_a_new_classifier_has_the_names_of_the_task(base, rows):
    lm = with_head(base, 2, seed=0, names=task(rows).config.class_names)
    assert lm.config.label_names == ("bad", "good")
    assert prepare_for(base, task(rows)).token_ids.tolist() == [0, 1]
    assert prepare_for(lm, task(rows, ("good", "bad"))).token_ids.tolist() == [1, 0]
