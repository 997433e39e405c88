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
    from jaxlm.train.run import FinetuneConfig
    from jaxlm.train.run_folder import to_dict

    (folder / "run").mkdir()
    config = to_dict(load(FinetuneConfig, folder / "run.yaml"))
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
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
        "no.yaml: there is no such file: give the path of a configuration.",
    ),
    "bits that are not there": (flags("--bits=2"), "run.yaml: bits is '2': choose one of 8, 4."),
    "dynamics without gradients": (
        flags("--dynamics.name=svag", "--dynamics.l=2"),
        "run.yaml: dynamics svag is of gradients, which mezo does without: give sgd or adamw.",
    ),
    "svag without l": (
        flags("--dynamics.name=svag"),
        "run.yaml: dynamics.l is missing: add it.",
    ),
    "svag in few bits": (
        flags(
            "--optimizer.name=adamw",
            "--dynamics.name=svag",
            "--dynamics.l=2",
            "--param_dtype=bfloat16",
        ),
        "run.yaml: dynamics svag makes updates that are lost in few bits: give param_dtype "
        "float32 and no bits.",
    ),
    "missing file": (
        flags("--task.train=no.jsonl"),
        "task.train: there is no file 'no.jsonl': give a path relative to the YAML file or "
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
        "train.jsonl, line 2: not valid JSON (Expecting property name enclosed in double quotes at "
        "character 1). Correct the file or write it again.",
    ),
    "line that is no object": (
        train_text(GOOD + "[1]\n"),
        'train.jsonl, line 2: not a JSON object. Write {"name": value} there.',
    ),
    "missing field": (
        train_text(GOOD + '{"txt": "a", "label": 0}\n'),
        "train.jsonl, line 2: has no field 'text', which task.template names (got 'txt', 'label'). "
        "Name one of these.",
    ),
    "label outside the list": (
        train_text(GOOD + '{"text": "a", "label": 2}\n'),
        "train.jsonl, line 2: the label is not one of good, bad nor an index from 0 to 1 (got 2). "
        "Correct it, or name the classes in task.classes.",
    ),
    "empty label word": (
        flags('--task.labels=[good, ""]'),
        "run.yaml: task.labels: word 2 is empty. Give a word for every class.",
    ),
    "template without label": (
        flags("--task.template={text} it was"),
        "run.yaml: task.template: has no {label} (got '{text} it was'). Put it where the label "
        "word stands.",
    ),
    "unknown key": (
        flags("--batchsize=3"),
        "run.yaml: unknown key 'batchsize': did you mean 'batch_size'?",
    ),
    "unknown key in a section": (
        flags("--optimizer.lerning_rate=3"),
        "run.yaml: unknown key 'optimizer.lerning_rate': did you mean 'learning_rate'?",
    ),
    "empty key": (
        flags("--output="),
        "run.yaml: output is empty: give the folder of the run.",
    ),
    "missing key": (
        no_output,
        "run.yaml: output is missing: add it.",
    ),
    "wrong type": (
        flags("--steps=many"),
        "run.yaml: steps is 'many': give a whole number.",
    ),
    "list for a number": (
        flags("--task.k=[1]"),
        "run.yaml: task.k is '[1]': give a whole number.",
    ),
    "text for a list": (
        flags("--task.labels=good"),
        "run.yaml: task.labels is 'good': give a list [a, b].",
    ),
    "negative steps": (
        flags("--steps=-3"),
        "run.yaml: steps is -3: give 0 or more.",
    ),
    "no batch": (
        flags("--batch_size=0"),
        "run.yaml: batch_size is 0: give 1 or more.",
    ),
    "eps 0": (
        flags("--optimizer.eps=0"),
        "run.yaml: optimizer.eps is 0: give a positive number.",
    ),
    "unknown optimizer": (
        flags("--optimizer.name=adamm"),
        "run.yaml: unknown optimizer 'adamm': choose one of mezo, mezo_momentum, mezo_adam, meazo, "
        "fzoo, lozo, zo_muon, sgd, adam, adamw, muon.",
    ),
    "objective without a gradient": (
        flags("--optimizer.name=adam", "--objective=accuracy"),
        "run.yaml: objective accuracy has no gradient, which adam follows: give mezo or another "
        "optimizer without gradients.",
    ),
    "objective of other tasks": (
        flags("--objective=f1"),
        "run.yaml: objective is f1, but tiny is measured by accuracy: give that.",
    ),
    "unknown calibration": (
        flags("--calibrate=maybe"),
        "run.yaml: calibrate is 'maybe': choose one of false, true, sfc.",
    ),
    "answers that leave no room": (
        answers_of_32_tokens,
        "task.max_new_tokens: leaves no room for a prompt, since task.max_length or the model "
        "allow 32 tokens in all (got 32). Lower it.",
    ),
    "unknown choice": (
        flags("--optimizer.schedule=cosine"),
        "run.yaml: optimizer.schedule is 'cosine': choose one of constant, linear.",
    ),
    "k larger than a class": (
        flags("--task.k=21"),
        "task.k: asks for 21 examples of every class, but task.train has 20 of 'good'. Lower "
        "it or give more examples.",
    ),
    "held out of too few": (
        flags("--task.k=11", "--task.validation=hold_out"),
        "task.k: asks for 11 training and 11 held-out examples of every class, but task.train "
        "has 20 of 'good'. Lower it or give more examples.",
    ),
    "model folder missing": (
        flags("--model=FOLDER/no"),
        "model folder FOLDER/no does not exist; give a folder or a hub id",
    ),
    "model without safetensors": (
        model_without,
        "model folder FOLDER/model has no model.safetensors; download it again",
    ),
    "model with a pickle": (
        model_with_pickle,
        "model folder FOLDER/model has only the pickle pytorch_model.bin, which is never "
        "read; convert it to safetensors",
    ),
    "truncated safetensors": (
        model_truncated,
        "FOLDER/model/model.safetensors is truncated or not a safetensors file; download it again",
    ),
    "wrong shape": (
        model_of_another_shape,
        "FOLDER/model: model.norm.weight has the shape [17], config.json asks for [16]; one of "
        "them is wrong",
    ),
    "output below a file": (
        output_below_a_file,
        "output FOLDER/file/run: FOLDER/file is no folder: choose another output.",
    ),
    "output with other files": (
        output_with_other_files,
        "output FOLDER/run: the folder has files but no run: choose another output.",
    ),
    "run of another configuration": (
        run_of_another_configuration,
        "output FOLDER/run: the run there has optimizer.eps = 0.001, not 0.5: choose another "
        "output or remove the folder.",
    ),
    "select takes nothing": (
        flags("--optimizer.select=nothing"),
        "optimizer.select='nothing' takes no parameter; paths are embed.tokens.embedding, "
        "final_norm.scale, layers.attention.k_proj.kernel, layers.attention.o_proj.kernel, "
        "layers.attention.q_proj.kernel, layers.attention.v_proj.kernel, "
        "layers.attention_norm.scale, layers.mlp.down_proj.kernel, ...: correct it.",
    ),
    "bad pattern": (
        flags("--optimizer.select=("),
        "run.yaml: optimizer.select is '(': give a regular expression (missing ), "
        "unterminated subpattern at position 0).",
    ),
    "not YAML": (
        not_yaml,
        "run.yaml line 1: not valid YAML: put text with braces, colons or # in quotes.",
    ),
    "unknown resume": (
        flags("--resume=maybe"),
        "--resume is 'maybe': choose one of auto, never.",
    ),
    "two configurations": (
        flags("run.yaml"),
        "two configuration files, run.yaml and run.yaml: give one.",
    ),
    "dry run on a device that is not known": (
        flags("--dry-run", "--device.name=H999"),
        "command line: device.name is 'H999': choose one of A100, H100, H200, TPU v4, TPU v5e, "
        "TPU v5p, or give device.peak_flops.",
    ),
    "dry run on a device that reaches more than its peak": (
        flags("--dry-run", "--device.name=A100", "--device.utilisation=40"),
        "command line: device.utilisation is 40: give a part of 1.",
    ),
    "dry run of no steps": (
        flags("--dry-run", "--device.name=A100", "--steps=0"),
        "steps is 0, and a dry run is of steps: give 1 or more.",
    ),
    "flag without value": (
        flags("--steps"),
        "--steps has no value: write --steps=value.",
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
        "error: the loss is nan at step 2; the checkpoint of step 0 is kept in "
        "FOLDER/run/checkpoints: lower optimizer.learning_rate."
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
        "error: unknown command 'finetone': choose one of finetune, sweep, kernel, select, "
        "evaluate, generate, pretrain, compare, convert, info.\n"
    )
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("finetune", "evaluate", "convert", "info"))
