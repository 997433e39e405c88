"""Metrics that are sent elsewhere are those of the run's folder."""

import struct
import sys
from pathlib import Path

import pytest

import jaxlm
from jaxlm.core.errors import UserError
from tests.helpers.tiny import read_lines

WANDB = """
import json, os

class Run:
    def __init__(self, options):
        self.path = os.path.join(options["dir"], "wandb", "lines.jsonl")
        self.write({"init": {name: options[name] for name in ("id", "name", "resume", "config")}})

    def write(self, line):
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\\n")

    def define_metric(self, name, step_metric):
        self.write({"axis": [name, step_metric]})

    def log(self, values):
        self.write(values)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.write({"exit": kind and kind.__name__})

def init(**options):
    if os.environ.get("REFUSED"):
        raise ConnectionError("no key")
    return Run(options)
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package in place of wandb, which writes down what it is told."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield tmp_path / "run" / "wandb" / "lines.jsonl"
    sys.modules.pop("wandb", None)


def numbers(folder: Path, after: int = -1) -> list[tuple[int, str, float]]:
    """What stands in metrics.jsonl, a row for each number."""
    lines = read_lines(folder / "metrics.jsonl")
    return [
        (line["step"], name, value)
        for line in lines
        if line["step"] > after
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float)
    ]


def rows(lines: list[dict]) -> list[tuple[int, str, float]]:
    """The same of what was logged."""
    return [
        (line["step"], name, value)
        for line in lines
        if "step" in line
        for name, value in line.items()
        if name != "step"
    ]


def test_wandb_gets_every_line_and_a_resumed_run_goes_on(run_yaml, wandb):
    run = jaxlm.finetune(run_yaml, steps=8, log_to=["wandb"])
    lines = read_lines(wandb)
    begin = lines[0]["init"]
    assert (begin["name"], begin["resume"]) == ("run", "allow")
    assert begin["config"]["optimizer"]["eps"] == 1e-3
    assert lines[1] == {"axis": ["*", "step"]}
    assert lines[-1] == {"exit": None}
    assert rows(lines) == numbers(run.folder)
    wandb.unlink()
    jaxlm.finetune(run_yaml, log_to=["wandb"])
    lines = read_lines(wandb)
    assert lines[0]["init"]["id"] == begin["id"]
    assert rows(lines) == numbers(run.folder, after=8)


def test_a_writer_that_comes_later_gets_the_earlier_lines(run_yaml, wandb):
    run = jaxlm.finetune(run_yaml, steps=8, optimizer="adam")
    jaxlm.finetune(run_yaml, optimizer="adam", log_to=["wandb"])
    assert rows(read_lines(wandb)) == numbers(run.folder)


def test_wandb_learns_that_a_run_has_failed(run_yaml, wandb):
    optimizer = {"name": "adamw", "learning_rate": 1e38, "weight_decay": 1e10}
    with pytest.raises(UserError, match="the run diverged"):
        jaxlm.finetune(run_yaml, log_to=["wandb"], optimizer=optimizer)
    assert read_lines(wandb)[-1] == {"exit": "Diverged"}


def test_a_refusal_of_wandb_is_a_sentence(run_yaml, wandb, monkeypatch):
    monkeypatch.setenv("REFUSED", "1")
    with pytest.raises(UserError, match=r"log_to: wandb does not start \(got Connection.*: no key"):
        jaxlm.finetune(run_yaml, log_to=["wandb"])


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_refused_before_the_run(name, package, run_yaml, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    said = rf"^log_to: {name} needs {package} .* pip install 'jaxlm\[log\]'\.$"
    with pytest.raises(UserError, match=said):
        jaxlm.finetune(run_yaml, log_to=[name])
    assert not (run_yaml.parent / "run").exists()


def test_the_folder_of_wandb_is_not_taken_for_the_package(run_yaml, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="log_to: wandb needs wandb"):
        jaxlm.finetune(run_yaml, log_to=["wandb"])
    del sys.modules["wandb"]


def test_tensorboard_has_every_number(run_yaml):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX: pip install 'jaxlm[log]'")
    run = jaxlm.finetune(run_yaml, steps=8, optimizer="adam", log_to=["tensorboard"])
    jaxlm.finetune(run_yaml, optimizer="adam", log_to=["tensorboard"])
    first, second = sorted((run.folder / "tensorboard").iterdir())
    wanted = numbers(run.folder)
    for file, part in (
        (first, [row for row in wanted if row[0] <= 8]),
        (second, [row for row in wanted if row[0] > 8]),
    ):
        found = [(step, name, pytest.approx(value, rel=1e-6)) for step, name, value in events(file)]
        assert part == found


def events(path: Path):
    """The scalars of an event file: length, checksum, event, checksum, and so on."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + size])
        for value in event.summary.value:
            yield event.step, value.tag, value.simple_value
        data = data[16 + size :]


def test_only_what_is_known_is_written_to(run_yaml):
    with pytest.raises(UserError, match=r"log_to\[0\]: is not known .*tensorboard, wandb"):
        jaxlm.finetune(run_yaml, log_to=["clearml"])
    with pytest.raises(UserError, match="log_to: "):
        jaxlm.finetune(run_yaml, log_to=["wandb", "wandb"])
