"""Classifiers: which of a model's outputs is which class of a task."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.core.errors import UserError
from jaxlm.data import load_task, prepare_for, task_config
from jaxlm.models import LanguageModel, add_classifier, init_params
from jaxlm.train.load import with_head
from jaxlm.train.measure import MultipleChoiceMetric
from tests.helpers.tiny import make_masked, make_model, read_lines, sentences, write_jsonl

GOLDEN = Path(__file__).parents[1] / "models" / "golden"
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return jaxlm.from_pretrained(GOLDEN / "bert-base").replace(tokenizer=make_masked())


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    return str(write_jsonl(tmp_path_factory.mktemp("rows") / "test.jsonl", sentences(12)))


def task(rows: str, labels=("bad", "good"), template="{text} it was {label}", **values):
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


@pytest.fixture(scope="module")
def decoder(base, tmp_path_factory) -> LanguageModel:
    """A decoder with a classifier, in the layout of Hugging Face."""
    lm = jaxlm.from_pretrained(make_model(tmp_path_factory.mktemp("decoder") / "lm"))
    config = lm.config.replace(
        head="classifier", num_labels=2, pooling="last", label_names=("POSITIVE", "NEGATIVE")
    )
    folder = tmp_path_factory.mktemp("classifier")
    jaxlm.save_pretrained(LanguageModel(config, init_params(config, KEY), lm.tokenizer), folder)
    return jaxlm.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_classifier_reads_the_text_alone(kind, base, decoder, rows):
    """Its logits are those of the tokenizer's own rows, which differ in length."""
    lm = decoder if kind == "decoder" else add_classifier(base, 2, KEY, ("POSITIVE", "NEGATIVE"))
    given = read_lines(Path(rows))
    given[3]["text"] = "the film"
    short = write_jsonl(Path(rows).with_name(f"{kind}.jsonl"), given)
    words = {"template": "{text} {label}", "labels": ["a long word", "x"]}
    words["classes"] = ["negative", "positive"]
    found = scores(lm, str(short), **words)
    for row, given_row in zip(found, given, strict=True):
        ids = np.asarray([lm.tokenizer(given_row["text"])["input_ids"]])
        logits = np.asarray(lm.apply(lm.params, ids))[0]
        np.testing.assert_allclose(row, logits[::-1], atol=1e-6)


def test_the_classifier_of_a_decoder_is_tuned_saved_and_loaded(decoder, rows, tmp_path: Path):
    model = tmp_path / "model"
    jaxlm.save_pretrained(decoder, model)
    hf = json.loads((model / "config.json").read_text())
    assert hf["architectures"] == ["LlamaForSequenceClassification"]
    assert hf["id2label"] == {"0": "POSITIVE", "1": "NEGATIVE"}
    words = {"template": "{text} {label}", "labels": ["NEGATIVE", "POSITIVE"]}
    data = {"name": "tiny", "train": rows, "test": rows, **words}
    run = jaxlm.finetune(
        model=str(model), task=data, optimizer={"name": "adam", "learning_rate": 0.03},
        steps=30, eval_every=30, batch_size=12, output=str(tmp_path / "run"),
    )  # fmt: skip
    assert run.summary["test"]["accuracy"] == 1.0
    jaxlm.save_pretrained(run.model, tmp_path / "tuned")
    again = jaxlm.evaluate(str(tmp_path / "tuned"), task=data)
    assert again["accuracy"] == jaxlm.evaluate(str(tmp_path / "run"))["accuracy"] == 1.0
    three = with_head(decoder, 3, seed=0, names=("a", "b", "c"))
    assert three.params["classifier"]["kernel"].shape == (16, 3)
    with pytest.raises(UserError, match=r"^head: a classifier has no logits of tokens"):
        decoder.log_probs(decoder.params, np.ones((1, 4), np.int32))


def test_a_new_classifier_has_the_names_of_the_task(base, rows):
    lm = with_head(base, 2, seed=0, names=task(rows).config.class_names)
    assert lm.config.label_names == ("bad", "good")
    assert prepare_for(base, task(rows)).token_ids.tolist() == [0, 1]
    assert prepare_for(lm, task(rows, ("good", "bad"))).token_ids.tolist() == [1, 0]
