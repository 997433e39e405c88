"""The commands as functions: the same bits, the same files, and results to go on with."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.cli.config import load
from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.train.finetuning import FinetuneConfig
from jaxlm.train.optimizers import Mezo
from tests.helpers.tiny import read_lines, write_corpus, write_run

TEMPLATE = "{text} it was {label}"


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory) -> Path:
    """A folder with the files of a task."""
    return write_run(tmp_path_factory.mktemp("python"), tiny_model).parent


@pytest.fixture(scope="module")
def keys(tiny_model, folder):
    """The configuration of `write_run`, as Python has it."""
    task = {split: folder / f"{split}.jsonl" for split in ("train", "validation", "test")}
    task |= {"name": "tiny", "template": TEMPLATE, "labels": ["good", "bad"]}
    optimizer = {"name": "mezo", "learning_rate": np.float64(1e-2), "eps": 1e-3}
    return {
        "model": tiny_model,
        "task": task,
        "optimizer": optimizer,
        "steps": 12,
        "batch_size": np.int64(8),
        "eval_every": 6,
        "log_every": 2,
        "checkpoint_every": 4,
    }


@pytest.fixture(scope="module")
def run(keys, folder):
    return jaxlm.finetune(**keys, output=folder / "python")


def test_the_function_and_the_command_give_the_same_bits(run, folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["finetune", "run.yaml", "--output=command"]) == 0
    by_command = folder / "command"
    lines, ours = (read_lines(each / "metrics.jsonl") for each in (by_command, run.folder))
    assert lines == ours
    trajectories = [(each / "trajectory.zo").read_bytes() for each in (by_command, run.folder)]
    assert trajectories[0] == trajectories[1]
    theirs = jaxlm.finetune(folder / "run.yaml", output="command").model.params
    jax.tree.map(np.testing.assert_array_equal, run.model.params, theirs)


def test_the_metrics_are_the_lines_of_the_file(run):
    assert run.summary == json.loads((run.folder / "summary.json").read_text())
    lines = read_lines(run.folder / "metrics.jsonl")
    assert run.metrics["step"].tolist() == list(range(13))
    for name, width in (("loss", ()), ("projected_grad", (1,)), ("validation_accuracy", ())):
        found = {line["step"]: line[name] for line in lines if name in line}
        assert run.metrics[name].shape == (13, *width)
        for step, value in zip(run.metrics["step"], run.metrics[name], strict=True):
            expected = found.get(step, np.full(width, np.nan))
            np.testing.assert_array_equal(value, expected)


def test_a_configuration_an_object_and_a_dotted_key_are_one(run, keys):
    config = FinetuneConfig(
        **run.summary["config"]
        | {
            "task": run_config(run).task,
            "optimizer": Mezo(learning_rate=1e-2, eps=1e-3),
            "log_to": (),
        }
    )
    assert config == run_config(run)
    assert jaxlm.finetune(config).summary == run.summary
    other = {**keys, "optimizer": {"name": "mezo", "learning_rate": 0.5, "eps": 1e-3}}
    dotted = {"optimizer.learning_rate": "1e-2"}
    assert jaxlm.finetune(**other, **dotted, output=run.folder).summary == run.summary
    with pytest.raises(UserError, match=r"output: the run in .* has steps = 12"):
        jaxlm.finetune(config, steps=3)


def run_config(run):
    return load(FinetuneConfig, run.folder / "config.yaml")


def test_without_an_output_the_same_call_has_the_same_folder(keys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = {**keys, "steps": 2, "optimizer": "adam"}
    first, other, again = (jaxlm.finetune(**short, seed=seed) for seed in (0, 1, 0))
    assert first.folder == again.folder != other.folder
    assert first.summary == again.summary
    assert first.folder.parent == tmp_path / "runs"
    assert first.folder.name.startswith("finetune-")


def test_a_mistake_names_the_key(keys):
    with pytest.raises(UserError, match=r"^arguments: step: is not a key .*Did you mean steps\?"):
        jaxlm.finetune(**keys, step=3)
    with pytest.raises(UserError, match=r"^arguments: optimizer\.name: is not known"):
        jaxlm.finetune(**keys | {"optimizer": "adamant"})
    with pytest.raises(UserError, match="study: not known"):
        jaxlm.study("curve")


def printed(capsys, *words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_evaluate_returns_what_the_command_prints(run, keys, tiny_model, capsys):
    by_command = json.loads(printed(capsys, "evaluate", run.folder))
    assert jaxlm.evaluate(run.folder) == jaxlm.evaluate(model=run.folder) == by_command
    assert by_command["accuracy"] == run.summary["test"]["accuracy"]
    words = ["evaluate", run.folder / "config.yaml", "--split=train"]
    by_command = json.loads(printed(capsys, *words))
    assert jaxlm.evaluate(run.folder / "config.yaml", split="train") == by_command
    assert jaxlm.evaluate(model=tiny_model, task=keys["task"], split="train") == by_command


def test_generate_returns_what_the_command_writes(tiny_model, tmp_path, capsys):
    words = [tiny_model, "--prompt=the film", "--max_new_tokens=4", "--temperature=1", "--seed=3"]
    options = {"prompt": "the film", "max_new_tokens": 4, "temperature": 1, "seed": 3}
    written = [json.loads(printed(capsys, "generate", *words, "--json=true"))]
    file = tmp_path / "samples.jsonl"
    assert jaxlm.generate(tiny_model, **options, output=file, stop="nothing") == written
    assert read_lines(file) == written


def test_pretrain_and_a_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}
    run = {
        "model": sizes | {"max_positions": 32},
        "tokenizer": "tokenizer",
        "corpus": {
            "path": "corpus",
            "domains": [{"name": "films", "weight": 1}],
            "held_out": "held_out/films",
        },
        "optimizer": {"name": "adam", "learning_rate": 1e-2},
        "steps": 4,
        "batch_size": 2,
        "seq_len": 8,
        "log_every": 2,
        "eval_every": 2,
        "checkpoint_every": 2,
    }
    alone = jaxlm.pretrain(**run, seed=1)
    assert alone.metrics["held_out_loss"][-1] == alone.summary["held_out_loss"]
    assert alone.model.config.num_layers == 1
    result = jaxlm.study("curves", run=run, variants={"plain": {}}, seeds=[1], figure=False)
    assert result.table["rows"][0]["last"] == alone.summary["held_out_loss"]
    assert next((tmp_path / "runs").glob("curves-*/table.json")).exists()


def test_the_learning_curve_is_drawn_once_more_steps_are_done(run, monkeypatch):
    curve = run.folder / "learning_curve.png"
    assert curve.read_bytes().startswith(b"\x89PNG")
    axes = run.plot()
    assert axes.get_xlabel() == "step"
    named = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    np.testing.assert_array_equal(named["loss"][:, 1], run.metrics["loss"][1:])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["loss", "validation accuracy"]
    before = curve.stat().st_mtime_ns
    jaxlm.finetune(run_config(run))
    assert curve.stat().st_mtime_ns == before
    curve.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    jaxlm.finetune(run_config(run))
    assert not curve.exists()
    with pytest.raises(UserError, match=r"pip install 'jaxlm\[plots\]'"):
        run.plot()


def test_a_curve_that_cannot_be_written_fails_no_run(run, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    (run.folder / "learning_curve.png").unlink(missing_ok=True)
    monkeypatch.setattr("jaxlm.studies.figures.write_atomic", full)
    assert jaxlm.finetune(run_config(run)).summary == run.summary
