"""Every command on eight devices, and in two processes of four each: the numbers of one device."""

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlm.cli.main import main
from jaxlm.influence import GradientStore
from jaxlm.sharding import mesh_from_text
from tests.cli.processes import MESH, run_in_two
from tests.cli.test_select import STUDY
from tests.helpers.tiny import read_lines, sentences, write_corpus, write_jsonl, write_run
from tests.train.test_pretraining import YAML

pytestmark = pytest.mark.multidevice
KERNEL = """\
study: kernel
model: MODEL
task: {name: tiny, train: train.jsonl, test: test.jsonl, template: "{text} it was {label}",
       labels: [good, bad]}
ks: [4]
prompts: [true]
seeds: [0]
training: [{optimizer: {name: sgd}, learning_rates: [0.1], steps: 4, batch_size: 4, eval_every: 2}]
output: OUTPUT
"""
ADAM = ("--optimizer.name=adamw", "--optimizer.learning_rate=0.01")
EVERY = ("--checkpoint-every=4", "--eval-every=4")
LOCAL = (*ADAM, "--dynamics.name=local", "--dynamics.workers=2")


def commands(folder: Path, which: str) -> list[list[str]]:
    """Commands, with outputs in a folder of inputs."""
    run = str(folder / "run.yaml")
    if which == "adam":
        return [["finetune", run, f"--output={folder / 'adam'}", *ADAM, *EVERY]]
    if which == "mezo":
        return [["finetune", run, f"--output={folder / 'mezo'}", "--optimizer.learning_rate=1e-3"]]
    if which == "less":
        return [["study", str(folder / "study.yaml")]]
    return [
        ["study", str(folder / "kernel.yaml")],
        ["finetune", run, f"--output={folder / 'local'}", *LOCAL],
        ["pretrain", str(folder / "tiny.yaml")],
        ["generate", str(folder / "run" / "model"), "--prompt=the warm", "--max_new_tokens=4",
         f"--output={folder / 'texts.jsonl'}"],
        ["evaluate", run],
        ["predict", run, str(folder / "test.jsonl"), f"--output={folder / 'predicted.jsonl'}"],
    ]  # fmt: skip


def inputs(folder: Path, model: Path) -> Path:
    folder.mkdir()
    write_run(folder, model)
    write_corpus(folder)
    (folder / "tiny.yaml").write_text(YAML.format(folder=folder))
    write_jsonl(folder / "train.jsonl", sentences(40))
    for name, text in (("kernel", KERNEL), ("study", STUDY)):
        text = text.replace("MODEL", str(model)).replace("OUTPUT", str(folder / name))
        (folder / f"{name}.yaml").write_text(text)
    return folder


def made(folder: Path, model: Path, where: str, which: str) -> Path:
    """A folder in which commands have run."""
    words = commands(inputs(folder, model), which)
    if where == "two processes":
        run_in_two(words)
    for command, *rest in () if where == "two processes" else words:
        module = importlib.import_module(f"jaxlm.cli.{command}")
        module.run(rest, mesh=mesh_from_text(MESH) if where == "eight devices" else None)
    return folder


@pytest.fixture(scope="module")
def at(tiny_model, tmp_path_factory) -> Callable[[str, str], Path]:
    """The folder of what some commands make somewhere, for all tests of it."""

    @functools.cache
    def at(where: str, which: str) -> Path:
        return made(tmp_path_factory.mktemp("mesh") / "made", tiny_model, where, which)

    return at


@pytest.fixture(scope="module", params=["eight devices", "two processes"])
def rest(request, at) -> tuple[Path, Path]:
    """What a mesh and one device make by the other commands."""
    return at(request.param, "rest"), at("one device", "rest")


def numbers(path: Path) -> list[dict]:
    """The lines of metrics.jsonl without the clock."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_lines(path)]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["eight devices", "two processes"])
@pytest.mark.parametrize("run", ["mezo", "adam"])
def test_runs_have_the_curves_of_one_device(run, where, at):
    assert_same_curves(at(where, run) / run, at("one device", run) / run)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["local", "run"])
def test_workers_and_pretraining_have_the_curves_of_one_device(run, rest):
    assert_same_curves(*(folder / run for folder in rest))


def assert_same_curves(*runs: Path) -> None:
    found, wanted = (numbers(run / "metrics.jsonl") for run in runs)
    assert len(found) == len(wanted) > 3
    # A projected gradient is a difference of losses near 3 over 2 eps = 2e-3.
    slack = {"projected_grad": 3 * 2**-22 / 2e-3}
    for new, old in zip(found, wanted, strict=True):
        assert new.keys() == old.keys()
        for name, value in old.items():
            np.testing.assert_allclose(
                new[name], value, rtol=2e-4, atol=slack.get(name, 1e-6), err_msg=name
            )


@pytest.mark.slow
def test_kernels_are_those_of_one_device(rest):
    other, one = rest
    files = sorted((one / "kernel" / "kernels").rglob("kernel.safetensors"))
    assert len(files) >= 3
    for file in files:
        wanted = load_file(file)["kernel"]
        found = load_file(other / file.relative_to(one))["kernel"]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("where", ["eight devices", "two processes"])
def test_selections_are_those_of_one_device(where, at):
    """By gradients along a run of Adam."""
    one, other = at("one device", "less"), at(where, "less")
    (wanted,), (found,) = (list(f.glob("study/seed-0/train-1-*/store")) for f in (one, other))
    stores = [GradientStore.open(path) for path in (found, wanted)]
    order = [np.argsort(store.ids) for store in stores]
    new, old = (store[places] for store, places in zip(stores, order, strict=True))
    np.testing.assert_allclose(new, old, atol=2 / 127 * np.abs(old).max())  # int8
    chosen = [{row["id"] for f in [folder] for row in selected(f)} for folder in (other, one)]
    assert chosen[0] == chosen[1]


def selected(folder: Path) -> list[dict]:
    (path,) = folder.glob("study/seed-0/select-less-*/selected.jsonl")
    return read_lines(path)


@pytest.mark.slow
def test_models_and_texts_are_those_of_one_device(rest):
    found, wanted = (load_file(f / "run" / "model" / "model.safetensors") for f in rest)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)
    texts = [read_lines(folder / "texts.jsonl")[0]["text"] for folder in rest]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_predictions_are_those_of_one_device(rest):
    found, wanted = (read_lines(folder / "predicted.jsonl") for folder in rest)
    assert [row["text"] for row in found] == [row["text"] for row in wanted]
    found, wanted = ([[*row["probabilities"].values()] for row in rows] for rows in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_run_goes_on_with_another_mesh(at, tiny_model, tmp_path):
    """Stopped on fsdp=4, model=2, and finished on one device."""
    one = at("one device", "adam")
    path = write_run(tmp_path, tiny_model)
    for mesh, steps in (("fsdp=4,model=2", 4), (None, 12)):
        flags = [f"--steps={steps}", *EVERY, *ADAM]
        edit(tmp_path / "run" / "config.yaml", steps)
        (tmp_path / "run" / "summary.json").unlink(missing_ok=True)
        module = importlib.import_module("jaxlm.cli.finetune")
        module.run([str(path), *flags], mesh=mesh and mesh_from_text(mesh))
    found, wanted = (numbers(run / "metrics.jsonl") for run in (tmp_path / "run", one / "adam"))
    for new, old in zip(found, wanted, strict=True):
        for name, value in old.items():
            np.testing.assert_allclose(new[name], value, rtol=2e-4, atol=1e-6, err_msg=name)


def edit(config: Path, steps: int) -> None:
    """Makes a finished run one of more steps."""
    if config.exists():
        lines = config.read_text().splitlines()
        config.write_text(
            "".join(
                (f"steps: {steps}" if line.startswith("steps:") else line) + "\n" for line in lines
            )
        )


def test_a_profile_is_written(tmp_path, capsys):
    assert main(["evaluate", "--split=none", f"--profile={tmp_path}"]) == 2
    assert list(tmp_path.rglob("*.xplane.pb"))
    capsys.readouterr()


def test_the_summary_says_how_much_of_the_time_went_into_steps(at):
    summary = json.loads((at("one device", "adam") / "adam" / "summary.json").read_text())
    assert 0 < summary["goodput"] < 1
