"""Linear probing next to scikit-learn, and a model that has the probe's rows."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegressionCV
from threadpoolctl import threadpool_limits

from jaxlm.core.errors import UserError
from jaxlm.data import EncodedTask, load_task, prepare_for, task_config
from jaxlm.data.encoding import Encoded
from jaxlm.evaluation import option_scores, score_split
from jaxlm.models import from_pretrained
from jaxlm.studies.probe import LinearProbe, fit_rows, linear_probe, with_rows
from tests.helpers.tiny import sentences, write_jsonl

GOLDEN = Path(__file__).parents[1] / "models" / "golden"
THREE = ("good", "bad", "number")


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small are slowed down by threads that wait for each other."""
    with threadpool_limits(1):
        yield


def task(folder, labels):
    """Sentences whose class is their place modulo the number of labels: classes are learnable."""
    rows = [{**row, "label": i % len(labels)} for i, row in enumerate(sentences(36))]
    path = write_jsonl(folder / "rows.jsonl", rows)
    splits = {"train": str(path), "test": str(path)}
    template = "{text} it was {label}"
    config = task_config({"name": "t", "template": template, "labels": list(labels), **splits})
    return load_task(config, seed=0)


def read_by_hand(lm, encoded):
    """[N, D]: the hidden state at the last token, one text at a time and without padding."""
    found, hidden = [], jax.jit(lm.hidden)
    for each in encoded.test:
        ids = np.asarray(each.input_ids)
        found.append(np.asarray(hidden(lm.params, ids))[0, each.positions[0][0]])
    return np.stack(found), np.array([each.label for each in encoded.test])


def test_a_probe_is_scikit_learns_and_its_rows_predict_what_it_predicts(tmp_path, tiny_model):
    lm = from_pretrained(tiny_model)
    encoded = prepare_for(lm, task(tmp_path, THREE))
    probe = linear_probe(lm, encoded, batch_size=10)

    features, classes = read_by_hand(lm, encoded)
    wanted = LogisticRegressionCV(
        cv=5, fit_intercept=False, max_iter=5000, scoring="accuracy", l1_ratios=(0,),
        use_legacy_attributes=False,
    ).fit(features, classes)  # fmt: skip
    predicted = wanted.predict(features)
    # 1e-5: features differ in the last bits of float32, and the solver stops at 1e-4
    np.testing.assert_allclose(probe.accuracy["test"], wanted.score(features, classes), atol=1e-5)
    assert probe.accuracy.keys() == {"train", "test"}
    assert not probe.intercept.any()

    probed = with_rows(lm, encoded.token_ids, probe)
    scorer = jax.jit(lambda p, b: option_scores(probed.apply, encoded.token_ids, p, b))
    scores, _ = score_split(scorer, probed.params, encoded, "test", batch_size=10)
    np.testing.assert_array_equal(scores.argmax(axis=1), predicted)
    before = lm.params["embed"]["tokens"]["embedding"]
    np.testing.assert_array_equal(probed.params["embed"]["tokens"]["embedding"], before)


def texts():
    """Random tokens, the first of which tells the class."""
    ids = np.random.default_rng(0).integers(10, 20, (30, 6), np.int32)
    ids[:, 1] = 5 + np.arange(30) % 2
    examples = tuple(
        Encoded(i % 2, (tuple(row),), ((3,),), ((7,), (8,))) for i, row in enumerate(ids.tolist())
    )
    token_ids = np.array([7, 8], np.int32)
    return ids, EncodedTask(("good", "bad"), token_ids, 0, (6,), examples, (), examples)


def test_a_masked_head_takes_the_intercept_into_its_bias():
    lm, (ids, encoded) = from_pretrained(GOLDEN / "bert"), texts()
    assert "bias" in lm.params["lm_head"]
    probe = linear_probe(lm, encoded, batch_size=10)
    assert probe.intercept.any()
    probed = with_rows(lm, encoded.token_ids, probe)
    logits = jax.jit(probed.apply)(probed.params, ids)[:, 3][:, encoded.token_ids]
    labels = [each.label for each in encoded.test]
    assert np.mean(np.argmax(logits, axis=1) == np.array(labels)) == probe.accuracy["test"]


def test_of_several_right_options_a_probe_learns_the_first():
    lm, (_, encoded) = from_pretrained(GOLDEN / "bert"), texts()
    several = tuple(dataclasses.replace(each, gold=(each.label, 1)) for each in encoded.train)
    more = dataclasses.replace(encoded, train=several, test=several)
    assert linear_probe(lm, more).accuracy == linear_probe(lm, encoded).accuracy


def test_two_classes_are_two_rows_whose_difference_is_the_coefficient():
    numbers = np.random.default_rng(0)
    features = numbers.normal(size=(40, 3)).astype(np.float32)
    labels = (features[:, 0] + 0.5 > 0).astype(np.int32)
    rows, intercept = fit_rows(features, labels, names=("no", "yes"), intercept=True)
    wanted = LogisticRegressionCV(
        cv=5, max_iter=5000, scoring="accuracy", l1_ratios=(0,), use_legacy_attributes=False
    ).fit(features, labels)
    np.testing.assert_allclose(rows[1] - rows[0], wanted.coef_[0], rtol=1e-6)
    np.testing.assert_allclose(intercept[1] - intercept[0], wanted.intercept_[0], rtol=1e-6)


def test_what_cannot_be_probed_is_said(tmp_path, tiny_model):
    features = np.zeros((3, 2), np.float32)
    with pytest.raises(UserError, match=r"of every label \(got 1 of 'yes'\)\. Give more"):
        fit_rows(features, np.array([0, 0, 1], np.int32), names=("no", "yes"), intercept=False)
    lm = from_pretrained(tiny_model)
    encoded = prepare_for(lm, task(tmp_path, ("good good", "bad")))
    with pytest.raises(
        UserError, match=r"task\.labels: must be words of one token each\. Choose others\.$"
    ):
        linear_probe(lm, encoded)
    packed = from_pretrained(tiny_model, bits=8)
    probe = LinearProbe(np.zeros((2, 16), np.float32), np.zeros(2, np.float32), {}, 0)
    with pytest.raises(UserError, match=r"bits: .*floating-point numbers\. Leave out\.$"):
        with_rows(packed, np.array([7, 8]), probe)
