"""The quickstart on a tiny random model: every row, and the command's table."""

import pytest

from jaxlm.cli import config as configs
from jaxlm.cli import finetune
from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.studies import quickstart
from tests.helpers.tiny import write_run


@pytest.fixture
def flags(tmp_path, tiny_model):
    write_run(tmp_path, tiny_model)
    task = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation", "test")}
    task |= {"name": "tiny", "template": "{text} it was {label}", "labels": "[good, bad]"}
    small = {"mezo.steps": "2", "random_init.steps": "2", "adam.steps": "40", "unlabelled": "10"}
    rate = {"adam.optimizer.learning_rate": "0.02", "model": str(tiny_model), "log_every": "20"}
    return {f"task.{key}": value for key, value in task.items()} | small | rate


def test_every_row(flags):
    config = configs.load(quickstart.QuickstartConfig, finetune.QUICKSTART, flags)
    rows = {row.method: row for row in quickstart.run(config, quiet=True)}
    assert list(rows) == [
        "majority class",
        "zero-shot",
        "zero-shot, calibrated",
        "MeZO",
        "MeZO, random init",
        "Adam",
        "logistic regression",
    ]
    assert rows["majority class"].accuracy == 0.5
    assert rows["logistic regression"].accuracy == 1.0
    assert rows["Adam"].accuracy == 1.0
    passes = {name: (row.forwards, row.backwards) for name, row in rows.items()}
    assert passes["zero-shot, calibrated"] == (1, 0)
    assert passes["MeZO"] == passes["MeZO, random init"] == (1 + 4, 0)
    assert passes["Adam"] == (1 + 40, 40)
    assert rows["MeZO"].peak_bytes < rows["Adam"].peak_bytes


def test_the_command_prints_the_table(flags, capsys, monkeypatch):
    row = quickstart.Row("MeZO", 0.5, 600, 0, 2**20, 1.0)
    monkeypatch.setattr(quickstart, "run", lambda config: [row])
    assert main(["finetune", "quickstart", *(f"--{k}={v}" for k, v in flags.items())]) == 0
    assert "50.0 %" in capsys.readouterr().out


def test_steps_are_checked():
    with pytest.raises(UserError, match=r"command line: mezo\.steps: must be from 1 to "):
        configs.load(quickstart.QuickstartConfig, finetune.QUICKSTART, {"mezo.steps": "0"})
