"""What a run folder takes, refuses and survives."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.artifacts.folder import hold
from jaxlm.cli import config as configs
from jaxlm.core.errors import UserError
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.finetuning import FinetuneConfig, finetune
from jaxlm.train.load import load_model
from jaxlm.train.pretraining import PretrainConfig, pretrain
from jaxlm.train.run_folder import RunFolder
from jaxlm.zo import Trajectory
from tests.helpers.tiny import read_lines, sentences, write_corpus, write_jsonl, write_run

ADAM = {"optimizer.name": "adam"}  # whose program compiles faster than that of MeZO


def start(path: Path, **overrides: object) -> dict:
    flags = {key: str(value) for key, value in overrides.items()}
    return finetune(configs.load(FinetuneConfig, path, flags), base_dir=path.parent)


def without_clock(summary: dict) -> dict:
    clock = ("seconds", "goodput", "config", "peak_memory_bytes")
    return {key: value for key, value in summary.items() if key not in clock}


def params_of(folder: Path) -> list[np.ndarray]:
    kept = Checkpoints(folder / "checkpoints", read_only=True)
    return jax.tree.leaves(kept.read(kept.latest_step, "params"))


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """(folder, summary) of a finished run; each test takes a copy."""
    path = write_run(tmp_path_factory.mktemp("whole"), tiny_model)
    return path.parent, start(path)


@pytest.fixture
def run(whole, tmp_path):
    """The configuration of a copy of a finished run."""
    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    text = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(text.replace(str(whole[0]), str(folder)))
    return folder / "run.yaml"


def test_a_run_in_a_folder_of_any_name_is_kept_and_read(run_yaml):
    output = run_yaml.parent / "lr[1e-3] *"
    start(run_yaml, output=output, steps=2, **ADAM)
    assert params_of(output)
    load_model(output)


def test_a_folder_that_another_process_writes_is_refused_and_read(run, capsys):
    folder = run.parent / "run"
    (folder / "summary.json").unlink()
    with hold(folder):
        with pytest.raises(UserError, match=r"^output: another process writes into .* \(process"):
            start(run)
        load_model(folder)
    start(run)


def test_a_folder_without_a_step_is_configured_anew(run_yaml):
    """A first start that failed, by its data or for want of memory, is corrected and repeated."""
    with pytest.raises(UserError, match="a loss of nan"):
        start(run_yaml, **{"optimizer.name": "adam", "optimizer.learning_rate": 1e38,
                           "optimizer.weight_decay": 1e10})  # fmt: skip
    assert Checkpoints(run_yaml.parent / "run" / "checkpoints").steps() == [0]
    flags = {"batch_size": 4, "seed": 3, "steps": 4, **ADAM}
    summary = start(run_yaml, **flags)
    other = start(run_yaml, **flags, output=run_yaml.parent / "other")
    assert without_clock(summary) == without_clock(other)
    with pytest.raises(UserError, match=r"has batch_size = 4 \(got 8\), which cannot change"):
        start(run_yaml, **flags | {"batch_size": 8})


@pytest.mark.parametrize("content", ["", '{"step": 0, "zero_sh'])
def test_lost_metrics_do_not_stop_a_run_from_resuming(content, run, whole):
    folder = run.parent / "run"
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").write_text(content)
    assert without_clock(start(run)) == without_clock(whole[1])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("summary.json", '{"steps": 12, "te', "Remove it: the same command then writes it"),
        ("summary.json", '{"steps": 12}', "Remove it: the same command then writes it"),
        ("summary.json", "[1]", "Remove it: the same command then writes it"),
        ("config.yaml", "a: [1", "Put back what was there"),
        ("config.yaml", "[1, 2]", "Put back what was there"),
        ("config.yaml", "- " * 3000, "Put back what was there"),
        ("config.yaml", "optimizer: {name: mezo}", "Put back what was there"),
        ("config.yaml", lambda text: re.sub("(?m)^steps: .*", "", text), "Put back what was there"),
        ("metrics.jsonl", '{"step": 0}\nthree\n', "not valid JSON"),
        ("metrics.jsonl", '{"step": 0}\n[3]\n', "line 2: not a JSON object"),
        ("data.json", '{"task.train"', "not valid JSON"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(name, content, said, run):
    folder = run.parent / "run"
    if name != "summary.json":
        (folder / "summary.json").unlink()
    file = folder / name
    file.write_text(content(file.read_text()) if callable(content) else content)
    with pytest.raises(UserError, match=said) as caught:
        start(run)
    assert str(file) in str(caught.value)


def test_half_a_summary_is_written_again_once_it_is_removed(run, whole):
    (run.parent / "run" / "summary.json").unlink()
    assert without_clock(start(run)) == without_clock(whole[1])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda folder: write_jsonl(folder / "train.jsonl", sentences(42)), "train"),
        (lambda folder: write_jsonl(folder / "test.jsonl", sentences(16)[::-1]), "test"),
    ],
)
def test_data_that_changed_since_the_run_began_are_refused_by_name(change, name, run):
    (run.parent / "run" / "summary.json").unlink()
    change(run.parent)
    said = rf"^task.{name}: has changed since .* \(got {name}\.jsonl\).* start anew\.$"
    with pytest.raises(UserError, match=said):
        start(run)


def test_a_changed_corpus_is_refused_by_name(tmp_path, monkeypatch):
    config = pretraining(tmp_path)
    text = tmp_path / "corpus" / "films.jsonl"
    save = Checkpoints.save

    def change(saved: bool) -> None:
        """Starts, stops after the first checkpoint of steps, or before it, and changes the text."""

        def stopping(checkpoints, step, *args):
            if saved or not step:
                save(checkpoints, step, *args)
            if step:
                raise KeyboardInterrupt

        monkeypatch.setattr(Checkpoints, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
        monkeypatch.undo()
        write_jsonl(text, [*read_lines(text), {"text": "the warm film"}])

    change(saved=False)
    change(saved=True)  # a run that has done no step begins anew
    with pytest.raises(UserError, match=rf"^corpus.films: has changed .*got {text}.* start anew"):
        pretrain(config)


def pretraining(folder: Path, **overrides: object) -> PretrainConfig:
    from tests.train.test_pretraining import YAML

    if not (folder / "tiny.yaml").exists():
        write_corpus(folder)
        (folder / "tiny.yaml").write_text(YAML.format(folder=folder))
    flags = {"steps": "6", "eval_every": "6"} | {k: str(v) for k, v in overrides.items()}
    return configs.load(PretrainConfig, folder / "tiny.yaml", flags)


def test_a_pretraining_run_is_a_model_finished_or_not(tmp_path, monkeypatch):
    save = Checkpoints.save

    def stopping(self, step, *rest):
        save(self, step, *rest)
        if step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        pretrain(pretraining(tmp_path, steps=12, eval_every=12))
    monkeypatch.undo()
    folder = tmp_path / "run"
    assert RunFolder(folder).tested_step() == (6, 12)
    kept = Checkpoints(folder / "checkpoints", read_only=True).read(6, "params")["params"]
    jax.tree.map(np.testing.assert_array_equal, load_model(folder).params, kept)
    pretrain(pretraining(tmp_path, steps=12, eval_every=12))
    last = load_model(folder / "model")
    jax.tree.map(np.testing.assert_array_equal, load_model(folder).params, last.params)
    (folder / "summary.json").write_text('{"steps": 12}')
    with pytest.raises(UserError, match=r"summary\.json: is damaged .* Remove it"):
        pretrain(pretraining(tmp_path, steps=12, eval_every=12))


def test_a_configuration_beside_a_model_is_no_run(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "config.yaml").write_text("anything: else\n")
    jax.tree.map(
        np.testing.assert_array_equal, load_model(folder).params, load_model(tiny_model).params
    )


def test_a_run_whose_model_is_itself_is_refused(run):
    folder = run.parent / "run"
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub("(?m)^model: .*", f"model: {folder}", text))
    with pytest.raises(UserError, match="model leads back to"):
        load_model(folder)


def test_a_trajectory_of_half_of_the_steps_is_not_the_run(run):
    folder = run.parent / "run"
    shutil.rmtree(folder / "checkpoints")
    load_model(folder)
    Trajectory.open(folder / "trajectory.zo").cut(6)
    with pytest.raises(UserError, match=r"trajectory\.zo: has 6 of the 12 steps"):
        load_model(folder)


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("mezo", marks=pytest.mark.slow)])
def test_a_finished_run_goes_on_to_more_steps(optimizer, run_yaml):
    """With a constant schedule every step is what it is in a run that is longer at once."""
    flags = {"optimizer.name": optimizer, "task.validation": "null"}
    start(run_yaml, steps=8, **flags)
    summary = start(run_yaml, steps=16, **flags)
    other = run_yaml.parent / "other"
    at_once = start(run_yaml, steps=16, output=other, **flags)
    assert without_clock(summary) == without_clock(at_once)
    for a, b in zip(params_of(run_yaml.parent / "run"), params_of(other), strict=True):
        np.testing.assert_array_equal(a, b)
    if optimizer == "mezo":
        one, two = (
            Trajectory.open(at / "trajectory.zo") for at in (run_yaml.parent / "run", other)
        )
        np.testing.assert_array_equal(one.projected_grad, two.projected_grad)
        shutil.rmtree(run_yaml.parent / "run" / "checkpoints")
        load_model(run_yaml.parent / "run")
    with pytest.raises(UserError, match=r"has steps = 16 \(got 12\).* since 16 are done"):
        start(run_yaml, steps=12, **flags)


def test_a_schedule_over_the_steps_fixes_their_number(run_yaml):
    flags = {"optimizer.schedule": "linear", **ADAM}
    start(run_yaml, steps=4, **flags)
    said = "since the schedule of its learning rate depends on them. Go on .* --model=.*/run in"
    with pytest.raises(UserError, match=said):
        start(run_yaml, steps=8, **flags)


def test_passes_of_calibration_are_counted(run_yaml):
    """40 training texts in batches of 16 are three passes."""
    summary = start(run_yaml, steps=2, calibrate="true", eval_batch_size=16, **ADAM)
    assert summary["forwards"] == 3 + 2


def test_a_run_that_diverged_says_since_when_and_its_best_checkpoint_wins(run_yaml, capsys):
    flags = {"optimizer": "{name: sgd, learning_rate: 8}", "task.validation": "null"}
    # Losses of about 0.7, 1.2, 400 and 30,000; a few steps later they are not finite.
    summary = start(run_yaml, log_every=1, steps=4, **flags)
    rows = read_lines(run_yaml.parent / "run" / "metrics.jsonl")
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    since = next(step for step in losses if losses[step] > 10 * max(losses[1], np.log(2)))
    assert summary["diverged_since"] == since
    said = capsys.readouterr().err
    assert f"diverged since step {since}: lower optimizer.learning_rate\n" in said
    assert all(row.get("diverged_since") == since for row in rows if row["step"] > since)
    assert summary["tested_step"] < since


def test_a_run_without_a_terminal_says_what_it_is_at_before_its_first_step(run_yaml, capsys):
    start(run_yaml, steps=1, **ADAM)
    said = capsys.readouterr().err.splitlines()
    waits = [said.index(line) for line in ("evaluating test 0/16", "compiling the steps")]
    assert waits == sorted(waits)
    assert waits[-1] < next(i for i, line in enumerate(said) if line.startswith("step 1/1  loss"))


def test_test_rows_that_are_training_rows_are_counted(run_yaml, capsys):
    """Rows of `sentences` repeat after 56; 16 test rows and 3 others are 16 of 19."""
    new = [{"text": f"the stale film number {i}", "label": 1} for i in (10, 11, 12)]
    write_jsonl(run_yaml.parent / "test.jsonl", [*sentences(16), *new])
    assert start(run_yaml, steps=0)["test_rows_in_training"] == 16
    assert "16 of 19 test rows are training rows, too\n" in capsys.readouterr().err


def test_the_step_that_stands_for_a_run_is_told(run, whole):
    folder = RunFolder(run.parent / "run")
    assert folder.tested_step() == (whole[1]["tested_step"], 12)
    assert RunFolder(run.parent).tested_step() is None


@pytest.mark.parametrize(
    ("given", "stored"), [("bf16", "bfloat16"), ("fp32", "float32"), ("torch.bfloat16", "bfloat16")]
)
def test_dtypes_are_spelt_as_elsewhere(given, stored, run_yaml):
    assert configs.load(FinetuneConfig, run_yaml, {"param_dtype": given}).param_dtype == stored


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("param_dtype", "float16"), ("param_dtype", "int8"), ("steps", "1e12"),
        ("batch_size", "1e12"), ("batch_size", "0"), ("eval_batch_size", "0"), ("seed", "-1"),
        ("seed", "4294967296"), ("optimizer.num_directions", "1e12"),
        ("optimizer.learning_rate", "nan"), ("optimizer.learning_rate", "1e-60"),
        ("optimizer.learning_rate", "1e39"), ("optimizer.eps", "1e-60"),
        ("optimizer.weight_decay", "-1"), ("optimizer.warmup", "1e12"), ("output", ""),
        ("optimizer.select", "(a{999}){99}"), ("output", "~nosuchuser/x"), ("output", "a\0b"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused_by_key(key, value, run_yaml):
    with pytest.raises(UserError, match=rf"{key}: .* \(?.*got|{key}: is empty"):
        configs.load(FinetuneConfig, run_yaml, {key: value})


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "adamw", "b1": "0.999999999"}, {"name": "adamw", "eps": "1e-50"},
        {"name": "lozo", "rank": "1e9"}, {"name": "zo_muon", "rank": "0"},
        {"name": "mezo_adam", "horizon": "1e9"}, {"name": "fzoo", "num_directions": "1"},
        {"name": "sgd", "momentum": "1"}, {"name": "sgd", "clip": "0"},
    ],
)  # fmt: skip
def test_numbers_of_optimizers_are_refused_by_key(optimizer, run_yaml):
    key = list(optimizer)[1]
    flags = {"optimizer": json.dumps(optimizer)}
    with pytest.raises(UserError, match=rf"optimizer\.{key}: .*\(got .*\)\. "):
        configs.load(FinetuneConfig, run_yaml, flags)


def test_an_output_in_the_home_folder(run_yaml, monkeypatch):
    monkeypatch.setenv("HOME", str(run_yaml.parent / "home"))
    start(run_yaml, steps=0, output="~/x")
    summary = json.loads((run_yaml.parent / "home" / "x" / "summary.json").read_text())
    assert summary["steps"] == 0
