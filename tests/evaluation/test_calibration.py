"""Scores less those of the prompt without the example, against log-probabilities summed by hand."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.cli.main import main
from jaxlm.data import load_task, task_config
from jaxlm.evaluation import domain_offsets, domain_scores, subtract_domain_scores
from jaxlm.train.run_folder import RunFolder
from tests.helpers.tiny import sentences, write_jsonl

LABELS = ("good film", "bad film number")


@pytest.fixture(scope="module")
def base(tiny_model):
    return jaxlm.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def log_softmax(base):
    return jax.jit(lambda params, ids: jax.nn.log_softmax(base.apply(params, ids)[0]))


def by_hand(lm, log_softmax):
    """(prompt, option) -> log-probability of all tokens of the option."""

    def log_prob(prompt: str, option: str) -> float:
        before, ids = (lm.tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {option}"))
        logits = np.asarray(log_softmax(lm.params, np.array([ids + [0] * (24 - len(ids))])))
        return float(sum(logits[i - 1, ids[i]] for i in range(len(before), len(ids))))

    return log_prob


@pytest.fixture
def task(tmp_path):
    rows = str(write_jsonl(tmp_path / "rows.jsonl", sentences(8)))
    values = {"name": "mine", "template": "{text} it was {label}", "labels": list(LABELS)}
    return load_task(task_config({**values, "train": rows, "test": rows}), seed=0)


@pytest.fixture(scope="module")
def lm(base):
    """With an output that tells options apart."""
    return base.replace(params=jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, base.params))


def test_label_words_have_one_row(lm, log_softmax, task) -> None:
    log_prob = by_hand(lm, log_softmax)
    wanted = np.array([log_prob("it was", label) for label in LABELS])
    scores = domain_scores(lm, lm.params, task, "test", batch_size=4)
    np.testing.assert_allclose(scores, wanted[None], rtol=1e-5)
    np.testing.assert_allclose(domain_offsets(lm, task), wanted - wanted.mean(), rtol=1e-4)


def test_demonstrations_stay(lm, log_softmax, task) -> None:
    texts = [f"the film was {label}\n\n" for label in LABELS]
    test = (dataclasses.replace(task.test[i], context=text) for i, text in enumerate(texts))
    task = dataclasses.replace(task, test=tuple(test))
    log_prob = by_hand(lm, log_softmax)
    wanted = [[log_prob(f"{text} it was", label) for label in LABELS] for text in texts]
    scores = domain_scores(lm, lm.params, task, "test", batch_size=4)
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)


def test_options_of_each_example(lm, log_softmax, tmp_path) -> None:
    choices = [("it was good", "it was bad"), ("it was good", "it was bad film")]
    rows = [
        {"premise": "the film was bright", "question": "cause", "choice1": a, "choice2": b}
        for a, b in choices
    ]
    source = str(write_jsonl(tmp_path / "rows.jsonl", [row | {"label": 0} for row in rows]))
    config = {"name": "opt/copa", "train": None, "validation": None, "test": source}
    config["num_test"] = None  # all, in their order
    task = load_task(task_config(config), seed=0)
    log_prob = by_hand(lm, log_softmax)
    wanted = [[log_prob("because", option) for option in options] for options in choices]
    scores = domain_scores(lm, lm.params, task, "test", batch_size=4)
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)


@pytest.mark.slow
def test_a_run_starts_from_the_scores_less_those_of_the_domain(
    run_yaml, base, log_softmax, capsys, monkeypatch
) -> None:
    folder = run_yaml.parent / "run"
    labels = f"--task.labels=[{', '.join(LABELS)}]"
    flags = [labels, "--calibrate=sfc", "--steps=1", "--optimizer.learning_rate=0"]
    assert main(["finetune", str(run_yaml), *flags]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    log_prob = by_hand(base, log_softmax)
    offsets = np.array([log_prob("it was", label) for label in LABELS])
    found = RunFolder(folder).option_offsets()
    np.testing.assert_allclose(found, offsets - offsets.mean(), rtol=1e-3)
    hits = []
    for row in sentences(16):
        scores = [log_prob(f"{row['text']} it was", label) for label in LABELS]
        hits.append(np.argmax(scores - offsets) == row["label"])
    assert summary["zero_shot"]["calibrated_accuracy"] == np.mean(hits)
    assert summary["test"]["accuracy"] == np.mean(hits)
    monkeypatch.chdir(folder.parent)
    capsys.readouterr()
    assert main(["evaluate", "run"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["accuracy"] == evaluated["calibrated_accuracy"] == np.mean(hits)


def test_an_option_that_is_not_there_stays_out() -> None:
    scores = np.array([[1.0, 2.0, -np.inf, -np.inf], [0.0, 1.0, 5.0, -np.inf]], np.float32)
    domain = np.array([[0.5, 2.0, -np.inf], [-1.0, 3.0, 1.0]], np.float32)
    wanted = [[0.5, 0.0, -np.inf], [1.0, -2.0, 4.0]]
    np.testing.assert_array_equal(subtract_domain_scores(scores, domain), wanted)
