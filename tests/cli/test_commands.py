"""evaluate, convert and info on a tiny model and on a run of it."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

import jaxlm
import jaxlm.train.load
from jaxlm.cli.main import main
from jaxlm.models import from_pretrained
from jaxlm.train.load import load_model
from jaxlm.train.optimizers import OPTIMIZERS
from jaxlm.train.run_folder import RunFolder
from tests.helpers.tiny import sentences, write_jsonl, write_run

TASK = ("train.jsonl", "validation.jsonl", "test.jsonl")


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("run"), tiny_model)
    words = ["--optimizer.name=adam", "--optimizer.learning_rate=0.02", "--steps=40"]
    assert main(["finetune", str(path), *words, "--log_every=20", "--eval_every=20"]) == 0
    return path


def evaluate(capsys, *words):
    capsys.readouterr()
    assert main(["evaluate", *map(str, words)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return json.loads(said.out)


def test_the_table_of_a_run(run, capsys):
    capsys.readouterr()
    words = ["--optimizer.name=adam", "--optimizer.learning_rate=0.02", "--steps=40"]
    assert main(["finetune", str(run), *words, "--log_every=20", "--eval_every=20"]) == 0
    shown = capsys.readouterr().out
    assert "test accuracy" in shown
    assert re.search(r"test, always the most frequent class\W+50.0 %", shown)
    assert "40, 40" in shown
    assert main(["finetune", str(run), *words, "--resume=never"]) == 2


def test_evaluate_a_run_is_the_test_of_its_summary(run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    result = evaluate(capsys, run.parent / "run")
    summary = json.loads((run.parent / "run" / "summary.json").read_text())
    assert result["accuracy"] == summary["test"]["accuracy"] == 1.0
    assert (result["examples"], result["majority_accuracy"]) == (16, 0.5)
    assert (result["step"], result["of_steps"]) == (summary["tested_step"], 40)


def test_the_parameters_of_an_unfinished_run_are_told(run, tmp_path, capsys, monkeypatch):
    """A run of 200 steps, stopped after its checkpoint of step 40."""
    monkeypatch.chdir(run.parent)
    folder = tmp_path / "run"
    shutil.copytree(run.parent / "run", folder)
    (folder / "summary.json").unlink()
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub("(?m)^steps: 40$", "steps: 200", text))
    step = RunFolder(run.parent / "run").tested_step()[0]
    result = evaluate(capsys, folder)
    assert (result["step"], result["of_steps"]) == (step, 200)
    assert main(["info", str(folder)]) == 0
    assert f"{folder}: a run, after step {step} of 200\n" in capsys.readouterr().out


def test_the_most_frequent_class_is_that_of_the_tested_rows(run, tmp_path, capsys):
    """Training rows are of both classes alike, and 12 of 16 test rows of one."""
    rows = [{**row, "label": int(i > 3)} for i, row in enumerate(sentences(16))]
    flags = [f"--task.test={write_jsonl(tmp_path / 'test.jsonl', rows)}", "--steps=0"]
    assert evaluate(capsys, run, flags[0])["majority_accuracy"] == 0.75
    assert main(["finetune", str(run), *flags, f"--output={tmp_path / 'run'}"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["majority_accuracy"] == 0.75


def test_evaluate_a_configuration_is_zero_shot(run, capsys):
    result = evaluate(capsys, run, "--split=validation")
    summary = json.loads((run.parent / "run" / "summary.json").read_text())
    assert result["model"] == summary["model"]
    assert "step" not in result
    assert result["split"] == "validation"
    assert 0 <= result["calibrated_accuracy"] <= 1
    assert evaluate(capsys, run)["accuracy"] == summary["zero_shot"]["accuracy"]


def test_convert_a_run_to_a_model_folder(run, tmp_path, capsys):
    target = tmp_path / "model"
    assert main(["convert", str(run.parent / "run"), str(target), "--dtype=bfloat16"]) == 0
    lm = from_pretrained(target, param_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lm.params)} == {"bfloat16"}
    task = [f"--task.{name.split('.')[0]}={run.parent / name}" for name in TASK]
    words = ["--task.name=t", "--task.template={text} it was {label}", "--task.labels=[good, bad]"]
    assert evaluate(capsys, target, *task, *words)["accuracy"] == 1.0
    assert main(["convert", str(run.parent / "run"), str(target)]) == 2


def test_a_folder_that_another_conversion_has_made_is_left_alone(
    tiny_model, tmp_path, capsys, monkeypatch
):
    target = tmp_path / "model"

    def loading(*args, **options):
        target.mkdir()
        return load_model(*args, **options)

    monkeypatch.setattr(jaxlm.train.load, "load_model", loading)
    assert main(["convert", str(tiny_model), str(target)]) == 2
    assert "TARGET: exists already" in capsys.readouterr().err
    assert list(target.iterdir()) == []


def test_info_lists_what_a_configuration_may_name(capsys, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "mine", OPTIMIZERS["sgd"])
    assert main(["info"]) == 0
    listed = dict(re.findall(r"^(\w[\w ]*)\n((?:  .*\n)+)", capsys.readouterr().out, re.M))
    assert list(listed) == ["tasks", "model families", "optimizers", "objectives", "studies"]
    names = {kind: text.replace("\n", "").split(", ") for kind, text in listed.items()}
    names = {kind: [name.strip() for name in each] for kind, each in names.items()}
    assert {"mr", "subj", "opt/rte", "roberta/sst-2"} <= set(names["tasks"])
    assert {"llama", "roberta"} <= set(names["model families"])
    assert names["optimizers"] == [*OPTIMIZERS]
    assert "classification" in names["objectives"]
    assert names["studies"] == [
        "bottleneck", "curves", "displacement", "kernel", "less", "muse", "one_token", "ranking",
    ]  # fmt: skip


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{jaxlm.__version__}\n"


def test_info_lists_the_parameters(tiny_model, capsys):
    assert main(["info", str(tiny_model)]) == 0
    shown = capsys.readouterr().out
    total = sum(np.size(leaf) for leaf in jax.tree.leaves(from_pretrained(tiny_model).params))
    assert f"jax {jax.__version__}" in shown
    assert "layers.attention.q_proj.kernel" in shown
    assert f"{total:,}" in shown
    assert main(["info", "a", "b"]) == 2
