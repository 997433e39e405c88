"""Tasks as functions: next to single unpadded rows, and to scikit-learn's heads."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import log_loss
from threadpoolctl import threadpool_limits

from jaxlm.core.errors import UserError
from jaxlm.data import task_config
from jaxlm.models import from_pretrained
from jaxlm.studies.kernel_task import kernel_task
from jaxlm.train.losses import classification_objective
from tests.helpers.tiny import BAD, GOOD, make_masked, sentences, write_jsonl

GOLDEN = Path(__file__).parents[1] / "models" / "golden"
LONG = " number film" * 3


def few_shot(folder, labels=("good", "bad"), k=4, long=LONG, test=12):
    """Sentences with and without `long` at their end, `k` of a class to train on."""
    found = [{**row, "label": i % len(labels)} for i, row in enumerate(sentences(60))]
    for row in found[::3]:
        row["text"] += long
    path = str(write_jsonl(folder / "rows.jsonl", found))
    path_of_test = str(write_jsonl(folder / "test.jsonl", found[:test]))
    return task_config(
        {
            "name": "tiny",
            "template": "{text} it was {label}",
            "labels": list(labels),
            "train": path,
            "validation": "hold_out",
            "test": path_of_test,
            "k": k,
        }
    )


def encoder(name):
    """A small BERT whose tokenizer knows the words of the sentences."""
    return from_pretrained(GOLDEN / name).replace(tokenizer=make_masked())


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small are slowed down by threads that wait for each other."""
    with threadpool_limits(1):
        yield


def one_by_one(task, split, function):
    """`function(params, ids)[0]` of every example alone, without padding, where it is read."""
    rows, compiled = [], jax.jit(function)
    for each in getattr(task.encoded, split):
        ids = np.asarray(each.input_ids[0], np.int32)[None]
        rows.append(np.asarray(compiled(task.lm.params, ids))[0, each.positions[0][0]])
    return np.stack(rows)


def differences(logits):
    """[N, 1] of two label words, or the logits of more."""
    return logits if logits.shape[1] > 2 else logits[:, 1:] - logits[:, :1]


@pytest.mark.parametrize("labels", [("good", "bad"), ("good", "bad", "number")])
def test_a_prompted_decoder_is_its_label_words(tmp_path, tiny_model, labels):
    task = kernel_task(tiny_model, few_shot(tmp_path, labels), seed=0)
    wanted = differences(one_by_one(task, "test", task.lm.apply)[:, task.encoded.token_ids])
    lengths = {len(each.input_ids[0]) for each in task.encoded.test}
    assert len(lengths) > 1
    f = jax.jit(task.f)
    found = task.values(f, "test", task.lm.params)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(f(task.lm.params, task.whole("test")), wanted, atol=1e-5)
    predicted = wanted.argmax(axis=1) if len(labels) == 3 else wanted[:, 0] > 0
    assert task.accuracy(found, "test") == np.mean(predicted == task.labels("test"))


def test_groups_have_every_example_once_at_like_lengths(tmp_path, tiny_model):
    task = kernel_task(tiny_model, few_shot(tmp_path), seed=0)
    groups = task.groups("test")
    assert sorted(np.concatenate([places for places, _ in groups])) == list(range(12))
    assert len({x["input_ids"].shape[1] for _, x in groups}) == len(groups) == 2


def test_seeds_draw_other_examples_of_each_class(tmp_path, tiny_model):
    drawn = [kernel_task(tiny_model, few_shot(tmp_path), seed=seed) for seed in (0, 1)]
    assert drawn[0].encoded.train != drawn[1].encoded.train
    for task in drawn:
        assert np.bincount(task.labels("train")).tolist() == [4, 4]
        assert np.bincount(task.labels("validation")).tolist() == [4, 4]


def head_of_scikit_learn(features, labels, intercept):
    model = LogisticRegressionCV(
        cv=4, fit_intercept=intercept, max_iter=5000, scoring="accuracy", l1_ratios=(0,),
        use_legacy_attributes=False,
    )  # fmt: skip
    return model.fit(features, labels)


def test_without_a_prompt_a_decoder_has_a_linear_head_on_the_last_token(tmp_path, tiny_model):
    task = kernel_task(tiny_model, few_shot(tmp_path), seed=0, prompt=False, calibrate=True)
    assert task.offsets is None
    rendered = task.lm.tokenizer.decode(task.encoded.train[0].input_ids[0])
    assert "it was" not in rendered
    assert any(word in rendered for word in (*GOOD, *BAD))
    base = from_pretrained(tiny_model)
    features, other = (
        one_by_one(task, split, lambda _, ids: base.hidden(base.params, ids))
        for split in ("train", "test")
    )
    model = head_of_scikit_learn(features, task.labels("train"), False)
    found = task.values(jax.jit(task.f), "test", task.lm.params)[:, 0]
    # Features differ in their last bits, and so does where the solver stops.
    np.testing.assert_allclose(found, model.decision_function(other), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("name", ["bert", "bert-classifier"])
def test_without_a_prompt_an_encoder_has_a_classifier_on_the_first_token(
    tmp_path, name, monkeypatch
):
    lm, fits = encoder(name), []

    class Watched(LogisticRegressionCV):
        def fit(self, features, labels):
            super().fit(features, labels)
            fits.append((features, labels, self.intercept_[0], self.coef_[0]))
            return self

    monkeypatch.setattr("sklearn.linear_model.LogisticRegressionCV", Watched)
    task = kernel_task(lm, few_shot(tmp_path), seed=0, prompt=False)
    texts = [lm.tokenizer.decode(each.input_ids[0]) for each in task.encoded.train]
    assert not any("[MASK]" in text for text in texts)
    assert all(text.startswith("[CLS]") and text.endswith("[SEP]") for text in texts)
    kernel, bias = (np.asarray(task.lm.params["pooler"][part]) for part in ("kernel", "bias"))

    def pooled(params, ids):
        return jnp.tanh(task.lm.hidden(params, ids) @ kernel + bias[None, None])

    features, other = (one_by_one(task, split, pooled) for split in ("train", "test"))
    ((seen, labels, constant, vector),) = fits
    np.testing.assert_allclose(seen, features, atol=1e-5)
    np.testing.assert_array_equal(labels, task.labels("train"))
    found = task.values(jax.jit(task.f), "test", task.lm.params)[:, 0]
    np.testing.assert_allclose(found, other @ vector + constant, atol=1e-3)


def test_a_prompted_encoder_is_read_at_its_mask(tmp_path):
    task = kernel_task(encoder("bert"), few_shot(tmp_path), seed=0)
    for each in task.encoded.test:
        assert each.input_ids[0][each.positions[0][0]] == task.lm.tokenizer.mask_token_id
    wanted = differences(one_by_one(task, "test", task.lm.apply)[:, task.encoded.token_ids])
    found = task.values(jax.jit(task.f), "test", task.lm.params)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_calibrated_scores_are_centred_on_texts_without_labels(tmp_path, tiny_model):
    config = few_shot(tmp_path)
    plain, task = (
        kernel_task(tiny_model, config, seed=0, calibrate=calibrate) for calibrate in (False, True)
    )
    f, g = jax.jit(plain.f), jax.jit(task.f)
    texts = [plain.values(f, split, plain.lm.params) for split in ("train", "validation")]
    shift = np.median(np.concatenate(texts))
    found = task.values(g, "test", task.lm.params)
    np.testing.assert_allclose(found, plain.values(f, "test", plain.lm.params) - shift, atol=1e-5)
    ids = task.encoded.token_ids
    loss_fn = jax.jit(classification_objective(task.lm.apply, ids, offsets=task.offsets))
    loss, _ = loss_fn(task.lm.params, task.encoded.batch(0, batch_size=8, seed=0))
    chances = 1 / (1 + np.exp(-task.values(g, "train", task.lm.params)[:, 0]))
    np.testing.assert_allclose(loss, log_loss(task.labels("train"), chances), rtol=1e-5)


def test_mistakes_are_named(tmp_path, tiny_model):
    import dataclasses

    config = few_shot(tmp_path)
    with pytest.raises(UserError, match=r"task\.test: the task has no such examples"):
        kernel_task(tiny_model, dataclasses.replace(config, test=None), seed=0)
    long = dataclasses.replace(config, labels=("good film", "bad"))
    with pytest.raises(UserError, match=r"task\.labels: must be words of one token each"):
        kernel_task(tiny_model, long, seed=0)
