"""Flags that stand beside any command: help, --print-config, --allow-code."""

import importlib
import subprocess
import sys

import pytest
import yaml

from jaxlm.artifacts.keys import keys_of
from jaxlm.cli.config import load
from jaxlm.cli.main import ALONE, COMMANDS, main
from jaxlm.studies import STUDIES
from jaxlm.studies.study import module_of
from jaxlm.train.finetuning import FinetuneConfig
from tests.helpers.sentences import check_sentence
from tests.helpers.tiny import write_run


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {command}" in shown for command in COMMANDS)


@pytest.mark.parametrize("words", [*COMMANDS, *(f"study {name}" for name in STUDIES)])
def test_the_help_of_a_command_gives_type_default_and_meaning_of_every_key(words, capsys):
    command, *study = words.split()
    assert main([command, *study, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    if study:
        keys = list(keys_of(module_of(*study).Config))
    elif command in (*ALONE, "study"):
        keys = []
    else:
        module = importlib.import_module(f"jaxlm.cli.{command}")
        keys = list(keys_of(module.config_class()))
    for key in keys:
        assert key.meaning, key.dotted
        assert f"{key.dotted}: {key.kind} = " in shown
        assert " ".join(key.meaning.split()) in shown


def test_print_config_is_a_file_that_gives_the_same_configuration(tmp_path, tiny_model, capsys):
    path = write_run(tmp_path, tiny_model)
    flags = ["--optimizer.name=adam", "--steps=3"]
    assert main(["finetune", str(path), *flags, "--print-config"]) == 0
    (tmp_path / "whole.yaml").write_text(shown := capsys.readouterr().out)
    config = load(FinetuneConfig, tmp_path / "whole.yaml")
    assert (config.steps, config.optimizer.name) == (3, "adam")
    assert config == load(FinetuneConfig, path, {"optimizer.name": "adam", "steps": "3"})
    assert yaml.safe_load(shown)["optimizer"]["b1"] == 0.9
    assert not (tmp_path / "run").exists()


def test_print_config_of_a_study_is_a_file_of_that_study(tmp_path, capsys):
    shown = []
    for place in ("configs/studies/svag.yaml", str(tmp_path / "again.yaml")):
        assert main(["study", place, "--print-config"]) == 0
        shown.append(capsys.readouterr().out)
        (tmp_path / "again.yaml").write_text(shown[-1])
    assert shown[0] == shown[1]
    assert shown[0].startswith("study: curves\n")


def test_a_script_is_started_for_each_process(tmp_path):
    script = tmp_path / "own.py"
    script.write_text(
        "import sys\nfrom jaxlm.cli.main import main\nprint('own', flush=True)\n"
        "sys.exit(main(script=__file__))\n"
    )
    words = [sys.executable, script, "info", "--processes=2"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.count("own")) == (2, 3)
    assert "info, which runs on one device" in result.stderr


def test_print_config_of_the_quickstart(capsys):
    assert main(["finetune", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["mezo"]["optimizer"]["name"] == "mezo"


READER = """\
from pathlib import Path

from jaxlm.data import ParsedRow

Path("ran").touch()


def read(row):
    return ParsedRow({"text": row["text"]}, (row["label"],))
"""


def test_code_of_a_task_runs_only_with_the_flag(tmp_path, tiny_model, capsys, monkeypatch):
    """The consent is a flag alone: no key of a file, no variable of the environment."""
    path = write_run(tmp_path, tiny_model)
    (tmp_path / "their_reader.py").write_text(READER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXLM_ALLOW_CODE", "1")
    read = "--task.read=their_reader:read"
    for words, key in (
        ([str(path), read], "task.read"),
        ([str(path), read, "--allow_code=true"], "allow_code"),
    ):
        assert main(["finetune", *words, "--dry-run"]) == 2
        check_sentence(capsys.readouterr().err.strip().removeprefix("error: "), key)
    path.write_text(path.read_text() + "allow_code: true\n")
    assert main(["finetune", str(path), read]) == 2
    assert "allow_code: is not a key" in capsys.readouterr().err
    path.write_text(path.read_text().replace("allow_code: true\n", ""))
    assert main(["finetune", str(path), read]) == 2
    assert "task.read: names code outside" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert main(["evaluate", str(path), read, "--allow-code"]) == 0
    assert (tmp_path / "ran").exists()
    assert main(["evaluate", str(path), read]) == 2
