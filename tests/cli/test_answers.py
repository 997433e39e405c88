"""Answers in words by finetune, evaluate and sweep: trained by likelihood or F1, judged by F1."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxlm.cli.main import main
from tests.helpers.tiny import make_model, make_reader, questions, write_jsonl

TASK = {"name": "opt/squad", "num_validation": 16, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "reader", make_reader(), scale=4.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder as the hub has SQuAD."""
    folder = tmp_path_factory.mktemp("squad")
    write_jsonl(folder / "train.jsonl", questions(56))
    write_jsonl(folder / "validation.jsonl", questions(16))
    return folder


def words(data: Path, model: Path, output: Path, **keys) -> list[str]:
    task = {**TASK, "train": data, "test": f"{data}:validation"}
    keys = {"model": model, "output": output, **{f"task.{key}": task[key] for key in task}, **keys}
    return [f"--{key}={value}" for key, value in keys.items()]


def adam(steps: int) -> dict:
    sizes = {"steps": steps, "eval_every": 20, "checkpoint_every": steps, "log_every": 20}
    return {"optimizer.name": "adam", "optimizer.learning_rate": 0.01, **sizes}


def summary(output: Path) -> dict:
    return json.loads((output / "summary.json").read_text())


def evaluated(capsys, *words) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def run(data, model, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    assert main(["finetune", *words(data, model, output, **adam(60))]) == 0
    return output


def test_trained_on_the_tokens_of_the_answer_the_f1_of_what_is_written_rises(run, capsys) -> None:
    found = summary(run)
    assert found["metric"] == "f1"
    assert found["zero_shot"] == {"f1": 0.0, "exact_match": 0.0}
    assert found["validation"]["f1"] >= 0.9
    assert min(found["test"].values()) >= 0.9
    assert evaluated(capsys, run).items() >= {**found["test"], "examples": 16}.items()


def test_the_best_f1_on_validation_is_tested(run) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    looks = {line["step"]: line["validation_f1"] for line in lines if "validation_f1" in line}
    assert list(looks) == [0, 20, 40, 60]
    best = max(looks, key=looks.__getitem__)
    assert summary(run)["tested_step"] == best
    assert summary(run)["validation"]["f1"] == looks[best]
    assert all("validation_exact_match" in line for line in lines if "validation_f1" in line)


def f1_words(data, run, output, **keys) -> list[str]:
    sizes = {"batch_size": 40, "steps": 1, "eval_every": 1, "log_every": 1}
    return words(data, run, output, objective="f1", **{**sizes, **keys})


@pytest.fixture(scope="module")
def started(data, model, tmp_path_factory) -> Path:
    """A run that writes answers, half of them right."""
    output = tmp_path_factory.mktemp("runs") / "started"
    task = {"task.validation": "null", "task.num_train": 40}
    assert main(["finetune", *words(data, model, output, **adam(14), **task)]) == 0
    return output


def test_the_loss_of_a_step_is_less_the_f1_of_what_evaluation_writes(
    started, data, tmp_path, capsys
) -> None:
    """One batch has all training examples, and eps changes no text."""
    output = tmp_path / "f1"
    keys = {"task.validation": "null", "task.num_train": 40, "optimizer.select": "final_norm"}
    keys |= {"optimizer.eps": 1e-6, "batch_size": 40, "steps": 1, "objective": "f1"}
    assert main(["finetune", *words(data, started, output, **keys)]) == 0
    loss = json.loads((output / "metrics.jsonl").read_text().splitlines()[1])["loss"]
    wanted = evaluated(capsys, started, "--split=train")["f1"]
    assert 0 < wanted < 1
    np.testing.assert_allclose(-loss, wanted, rtol=1e-6)
    found = summary(output)
    assert (found["forwards"], found["backwards"], found["validation"]["f1"]) == (2, 0, None)


@pytest.mark.slow
def test_mezo_on_f1_lifts_f1(started, data, tmp_path) -> None:
    """From a model whose answers have the right form: one that is always wrong has no slope."""
    output = tmp_path / "f1"
    mezo = {"eps": 0.05, "learning_rate": 0.03, "num_directions": 8, "select": "final_norm"}
    keys = {f"optimizer.{key}": value for key, value in mezo.items()}
    keys |= {"batch_size": 40, "steps": 30, "eval_every": 10, "log_every": 10, "objective": "f1"}
    assert main(["finetune", *words(data, started, output, **keys)]) == 0
    before, after = (summary(output)[name]["f1"] for name in ("zero_shot", "test"))
    print(f"F1 {before:.3f} -> {after:.3f}")
    assert after >= before + 0.2


def test_a_sweep_and_in_context_learning(data, model, tmp_path, capsys) -> None:
    path, output = tmp_path / "sweep.yaml", tmp_path / "out"
    task = json.dumps({**TASK, "train": str(data), "test": f"{data}:validation"})
    path.write_text(
        f"run: {{model: {model}, task: {task}, steps: 0}}\noutput: {output}\n"
        "methods: {start: , ICL: {kind: icl}}"
    )
    assert main(["sweep", str(path)]) == 0
    assert capsys.readouterr().out.startswith("F1 in per cent")
    table = json.loads((output / "table.json").read_text())
    assert table["metric"] == "f1"
    start, icl = table["methods"]
    assert (start["validation"]["mean"], icl["validation"]["mean"]) == (0.0, None)
    assert 0 <= icl["test"]["mean"] <= 1


def test_mistakes(data, model, tmp_path, capsys) -> None:
    words_of_squad = words(data, model, tmp_path / "run")
    for flags, message in (
        (["--objective=accuracy"], "objective: opt/squad is measured by f1 (got"),
        (["--calibrate=sfc"], "calibrate: needs the same options in every example, and"),
        (["--task.max_new_tokens=0"], "task.max_new_tokens: must be from 1 to"),
        (["--task.max_new_tokens=null"], "task.max_new_tokens: leaves no room for a prompt, "
         "since task.max_length or the model allows 32 tokens in all (got 50). Lower it."),
    ):  # fmt: skip
        capsys.readouterr()
        keys = {flag.partition("=")[0] for flag in flags}
        others = [word for word in words_of_squad if word.partition("=")[0] not in keys]
        assert main(["finetune", *others, *flags]) == 2
        assert message in capsys.readouterr().err
    squad = [word for word in words_of_squad if not word.startswith("--output")]
    assert main(["evaluate", *squad, "--calibrate=sfc"]) == 2
    assert "calibrate: opt/squad has no options (got sfc)" in capsys.readouterr().err
    squad = [word for word in squad if "max_new_tokens" not in word]
    assert main(["evaluate", *squad, "--task.max_new_tokens=32"]) == 2
    assert "max_new_tokens: leaves no room for a prompt" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
