"""Every mistake of a user ends in one sentence and exit code 2, and damages nothing.

Each row breaks a run that works (`tests.tiny.write_run`) in one place. FOLDER in a sentence is the
folder of the configuration.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxlm.cli.main import main
from tests.tiny import questions, write_jsonl, write_run

Break = Callable[[Path], list[str] | None]


def train_text(content: str | bytes) -> Break:
    def apply(folder: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / "train.jsonl").write_bytes(data)

    return apply


def flags(*words: str) -> Break:
    return lambda folder: [word.replace("FOLDER", str(folder)) for word in words]


def model_without(folder: Path) -> list[str]:
    (folder / "model" / "model.safetensors").unlink()
    return [f"--model={folder / 'model'}"]


def model_with_pickle(folder: Path) -> list[str]:
    model_without(folder)
    (folder / "model" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    return [f"--model={folder / 'model'}"]


def model_truncated(folder: Path) -> list[str]:
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return [f"--model={folder / 'model'}"]


def model_of_another_shape(folder: Path) -> list[str]:
    from safetensors.numpy import load_file, save_file

    weights = folder / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = np.ones(17, np.float32)
    save_file(tensors, weights)
    return [f"--model={folder / 'model'}"]


def output_below_a_file(folder: Path) -> list[str]:
    (folder / "file").write_text("kept")
    return [f"--output={folder / 'file' / 'run'}"]


def output_with_other_files(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("kept")
    return []


def run_of_another_configuration(folder: Path) -> list[str]:
    import yaml

    from jaxlm.cli.config import load
    from jaxlm.train.finetuning import FinetuneConfig
    from jaxlm.train.run_folder import to_dict

    (folder / "run").mkdir()
    config = to_dict(load(FinetuneConfig, folder / "run.yaml"))
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run" / "summary.json").write_text("{}")  # it has begun
    return ["--optimizer.eps=0.5"]


def no_output(folder: Path) -> None:
    text = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(text[: text.index("output:")])


def answers_of_32_tokens(folder: Path) -> list[str]:
    rows = str(write_jsonl(folder / "questions.jsonl", questions(8)))
    task = {"name": "opt/squad", "train": rows, "test": rows, "num_validation": 4}
    return [f"--task={json.dumps({**task, 'max_new_tokens': 32})}"]


def not_yaml(folder: Path) -> None:
    (folder / "run.yaml").write_text("task: {text} x {")


GOOD = '{"text": "a", "label": 0}\n'
ROWS: dict[str, tuple[Break, str]] = {
    "missing configuration": (
        flags("--config=no.yaml"),
        "no.yaml: there is no such file. Give the path of a configuration.",
    ),
    "bits that are not there": (
        flags("--bits=2"),
        "command line: bits: is not known (got '2'). Choose one of 8, 4.",
    ),
    "dynamics without gradients": (
        flags("--dynamics.name=svag", "--dynamics.l=2"),
        "command line: dynamics: svag is of gradients, which the optimizer does without (got "
        "mezo). Give sgd or adamw.",
    ),
    "svag without l": (
        flags("--dynamics.name=svag"),
        "command line: dynamics.l: is missing. Add it.",
    ),
    "svag in few bits": (
        flags(
            "--optimizer.name=adamw",
            "--dynamics.name=svag",
            "--dynamics.l=2",
            "--param_dtype=bfloat16",
        ),
        "command line: dynamics: svag makes updates that are lost in few bits (got "
        "bfloat16). Give param_dtype float32 and no bits.",
    ),
    "missing file": (
        flags("--task.train=no.jsonl"),
        "task.train: there is no file 'no.jsonl'. Give a path relative to the YAML file or "
        "to the working directory, or the name of a data set.",
    ),
    "empty file": (
        train_text(""),
        "task.train: train.jsonl is empty. Give a file with at least one example.",
    ),
    "binary file": (
        train_text(b"\x00\xff\xfe\x00"),
        "train.jsonl: not a text file in UTF-8. Save it as UTF-8.",
    ),
    "line that is not JSON": (
        train_text(GOOD + "{text: 1}\n"),
        "train.jsonl, line 2: not valid JSON (Expecting property name enclosed in double "
        "quotes at character 1). Correct the file or write it again.",
    ),
    "line that is no object": (
        train_text(GOOD + "[1]\n"),
        'train.jsonl, line 2: not a JSON object. Write {"name": value} there.',
    ),
    "missing field": (
        train_text(GOOD + '{"txt": "a", "label": 0}\n'),
        "train.jsonl, line 2: has no field 'text', which task.template names (got 'txt', "
        "'label'). Name one of these.",
    ),
    "label outside the list": (
        train_text(GOOD + '{"text": "a", "label": 2}\n'),
        "train.jsonl, line 2: the label is not one of good, bad nor an index from 0 to 1 "
        "(got 2). Correct it, or name the classes in task.classes.",
    ),
    "empty label word": (
        flags('--task.labels=[good, ""]'),
        "command line: task.labels: word 2 is empty. Give a word for every class.",
    ),
    "template without label": (
        flags("--task.template={text} it was"),
        "command line: task.template: has no {label} (got '{text} it was'). Put it where "
        "the label word stands.",
    ),
    "unknown key": (
        flags("--batchsize=3"),
        "command line: batchsize: is no key. Did you mean batch_size?",
    ),
    "unknown key in a section": (
        flags("--optimizer.lerning_rate=3"),
        "command line: optimizer.lerning_rate: is no key. Did you mean optimizer.learning_rate?",
    ),
    "empty key": (
        flags("--output="),
        "command line: output: is empty. Give a path.",
    ),
    "missing key": (
        no_output,
        "run.yaml: output: is missing. Add it.",
    ),
    "wrong type": (
        flags("--steps=many"),
        "command line: steps: must be a whole number (got 'many'). Correct it.",
    ),
    "list for a number": (
        flags("--task.k=[1]"),
        "command line: task.k: must be a whole number (got '[1]'). Correct it.",
    ),
    "text for a list": (
        flags("--task.labels=good"),
        "command line: task.labels: must be a list (got 'good'). Write [a, b].",
    ),
    "negative steps": (
        flags("--steps=-3"),
        "command line: steps: must be from 0 to 1000000000 (got -3). Correct it.",
    ),
    "no batch": (
        flags("--batch_size=0"),
        "command line: batch_size: must be from 1 to 1048576 (got 0). Correct it.",
    ),
    "eps 0": (
        flags("--optimizer.eps=0"),
        "command line: optimizer.eps: must be above 0 (got 0.0). Correct it.",
    ),
    "unknown optimizer": (
        flags("--optimizer.name=adamm"),
        "command line: optimizer.name: is not known (got 'adamm'). Choose one of mezo, "
        "mezo_momentum, mezo_adam, meazo, fzoo, lozo, zo_muon, sgd, adam, adamw, muon.",
    ),
    "objective without a gradient": (
        flags("--optimizer.name=adam", "--objective=accuracy"),
        "command line: objective: has no gradient, which adam follows (got accuracy). Give "
        "mezo or another optimizer without gradients.",
    ),
    "objective of other tasks": (
        flags("--objective=f1"),
        "command line: objective: tiny is measured by accuracy (got f1). Give that.",
    ),
    "unknown calibration": (
        flags("--calibrate=maybe"),
        "command line: calibrate: is not known (got 'maybe'). Choose one of false, true, sfc.",
    ),
    "answers that leave no room": (
        answers_of_32_tokens,
        "task.max_new_tokens: leaves no room for a prompt, since task.max_length or the "
        "model allow 32 tokens in all (got 32). Lower it.",
    ),
    "unknown choice": (
        flags("--optimizer.schedule=cosine"),
        "command line: optimizer.schedule: is not known (got 'cosine'). Choose one of "
        "constant, linear.",
    ),
    "k larger than a class": (
        flags("--task.k=21"),
        "task.k: asks for 21 examples of every class, but task.train has 20 of 'good'. "
        "Lower it or give more examples.",
    ),
    "held out of too few": (
        flags("--task.k=11", "--task.validation=hold_out"),
        "task.k: asks for 11 training and 11 held-out examples of every class, but "
        "task.train has 20 of 'good'. Lower it or give more examples.",
    ),
    "model folder missing": (
        flags("--model=FOLDER/no"),
        "model: there is no such folder (got FOLDER/no). Give a folder or a hub id.",
    ),
    "model without safetensors": (
        model_without,
        "FOLDER/model/model.safetensors: there is no such file. Download it again.",
    ),
    "model with a pickle": (
        model_with_pickle,
        "FOLDER/model/pytorch_model.bin: is a pickle, which is never read, and there is no "
        "model.safetensors. Convert it to safetensors.",
    ),
    "truncated safetensors": (
        model_truncated,
        "FOLDER/model/model.safetensors: is truncated or not a safetensors file. Download it "
        "again.",
    ),
    "wrong shape": (
        model_of_another_shape,
        "FOLDER/model: model.norm.weight must have the shape [16] of config.json (got [17]). "
        "Correct config.json, or download the folder again.",
    ),
    "output below a file": (
        output_below_a_file,
        "output: FOLDER/file is not a folder (got FOLDER/file/run). Choose another output.",
    ),
    "output with other files": (
        output_with_other_files,
        "output: the folder has files but no run (got FOLDER/run). Choose another output.",
    ),
    "run of another configuration": (
        run_of_another_configuration,
        "output: the run in FOLDER/run has optimizer.eps = 0.001 (got 0.5), which cannot change. "
        "Choose another output or remove the folder.",
    ),
    "select takes nothing": (
        flags("--optimizer.select=nothing"),
        "optimizer.select: takes no parameter (got 'nothing'). Choose among "
        "embed.tokens.embedding, final_norm.scale, layers.attention.k_proj.kernel, "
        "layers.attention.o_proj.kernel, "
        "layers.attention.q_proj.kernel, layers.attention.v_proj.kernel, "
        "layers.attention_norm.scale, layers.mlp.down_proj.kernel and others.",
    ),
    "bad pattern": (
        flags("--optimizer.select=("),
        "command line: optimizer.select: not a regular expression, missing ), unterminated "
        "subpattern at position 0 (got '('). Correct it.",
    ),
    "not YAML": (
        not_yaml,
        "run.yaml line 1: not valid YAML. Put text with braces, colons or # in quotes.",
    ),
    "unknown resume": (
        flags("--resume=maybe"),
        "--resume: is not known (got maybe). Choose one of auto, never.",
    ),
    "two configurations": (
        flags("run.yaml"),
        "command line: two configuration files (got run.yaml and run.yaml). Give one.",
    ),
    "dry run on a device that is not known": (
        flags("--dry-run", "--device.name=H999"),
        "command line: device.name: not known (got 'H999'). Choose one of A100, H100, "
        "H200, TPU v4, TPU v5e, TPU v5p, or give device.peak_flops.",
    ),
    "dry run on a device that reaches more than its peak": (
        flags("--dry-run", "--device.name=A100", "--device.utilisation=40"),
        "command line: device.utilisation: must be above 0 and at most 1 (got 40.0). Correct it.",
    ),
    "dry run of no steps": (
        flags("--dry-run", "--device.name=A100", "--steps=0"),
        "steps: a dry run is of steps (got 0). Give 1 or more.",
    ),
    "flag without value": (
        flags("--steps"),
        "--steps: has no value (got nothing). Write --steps=VALUE.",
    ),
}


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    write_run(tmp_path, tiny_model)
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", ROWS)
def test_a_mistake_is_one_sentence(name, folder, tiny_model, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    breaks, expected = ROWS[name]
    extra = breaks(folder) or []
    before = contents(folder)
    words = [] if any(word.startswith("--config") for word in extra) else ["run.yaml"]
    assert main(["finetune", *words, *extra]) == 2
    said = capsys.readouterr()
    assert said.err.replace(str(folder), "FOLDER") == f"error: {expected}\n"
    assert said.out == ""
    assert contents(folder) == before


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(folder, capsys):
    rates = ["--optimizer.name=adam", "--optimizer.learning_rate=1e38"]
    decay = "--optimizer.weight_decay=1e10"
    assert main(["finetune", str(folder / "run.yaml"), *rates, decay]) == 2
    assert capsys.readouterr().err.splitlines()[-1].replace(str(folder), "FOLDER") == (
        "error: optimizer.learning_rate: the run diverged (got a loss of nan at step 2; the "
        "checkpoint of step 0 is kept in FOLDER/run/checkpoints). Lower it."
    )
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["0"]


@pytest.mark.parametrize("name", ["negative steps", "missing file", "model folder missing"])
def test_the_installed_command(name, folder):
    command = shutil.which("jaxlm", path=str(Path(sys.executable).parent))
    assert command is not None, "install the package: pip install -e ."
    breaks, expected = ROWS[name]
    words = [command, "finetune", "run.yaml", *(breaks(folder) or [])]
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr.replace(str(folder), "FOLDER") == f"error: {expected}\n"
    shown = subprocess.run(
        [*words, "--debug"], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr


def test_an_unknown_command_and_help(capsys):
    assert main(["finetone"]) == 2
    assert capsys.readouterr().err == (
        "error: command: is not known (got finetone). Choose one of finetune, sweep, kernel, "
        "select, evaluate, generate, pretrain, compare, convert, info.\n"
    )
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("finetune", "evaluate", "convert", "info"))
