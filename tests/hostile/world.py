"""A small world in which every command works, and its copies in which one thing is broken."""

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.helpers.tiny import make_model, sentences, write_corpus, write_jsonl

ROOT = Path(__file__).parents[2]
SECONDS = 120
MEMORY = 6 * 2**30
"""Address space of a command; JAX alone reserves about 2 GiB of it."""

TASK = {"template": "{text} it was {label}", "labels": ["good", "bad"], "name": "tiny"}
DATA = {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
PRETRAIN = {
    "model": {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "intermediate_size": 16,
        "max_positions": 32,
    },
    "tokenizer": "tokenizer",
    "corpus": {
        "path": "corpus",
        "domains": [{"name": "films", "weight": 1}, {"name": "more", "weight": 1}],
        "held_out": "held_out/films",
    },
    "optimizer": {"name": "adam", "learning_rate": 1e-2},
    "steps": 4,
    "batch_size": 2,
    "seq_len": 8,
    "log_every": 2,
    "eval_every": 4,
    "checkpoint_every": 2,
    "output": "pretrained",
}
FINETUNE = {
    "model": "model",
    "task": TASK | DATA,
    "optimizer": {"name": "mezo", "learning_rate": 1e-2, "eps": 1e-3},
    "steps": 4,
    "batch_size": 8,
    "eval_every": 2,
    "checkpoint_every": 2,
    "log_every": 2,
    "output": "run",
}
FILES: dict[str, dict] = {
    "finetune.yaml": FINETUNE,
    "adam.yaml": FINETUNE
    | {"optimizer": {"name": "adam", "learning_rate": 1e-3}, "output": "adam", "peft": "lora"},
    "pretrain.yaml": PRETRAIN,
    "sweep.yaml": {
        "run": {k: v for k, v in FINETUNE.items() if k not in ("optimizer", "output")},
        "methods": {"mezo": {"optimizer": FINETUNE["optimizer"]}},
        "seeds": [0],
        "output": "sweep",
    },
    "less.yaml": {
        "study": "less",
        "model": "model",
        "sources": {"right": {"task": TASK | {"train": "train.jsonl"}, "rows": 8}},
        "target": {"task": TASK | {"validation": "test.jsonl", "test": "test.jsonl"}, "rows": 4},
        "recipe": {
            "peft": {"rank": 2},
            "optimizer": {"learning_rate": 1e-2},
            "epochs": 1,
            "batch_size": 2,
        },
        "features": {"dim": 16, "dtype": "int8", "block_size": 4},
        "warmup_fraction": 0.5,
        "fraction": 0.5,
        "methods": ["less"],
        "output": "less",
    },
    "kernel.yaml": {
        "study": "kernel",
        "model": "model",
        "task": TASK | {"train": "train.jsonl", "test": "test.jsonl"},
        "ks": [4],
        "prompts": [True],
        "training": [
            {
                "optimizer": {"name": "sgd"},
                "learning_rates": [1e-2],
                "steps": 2,
                "batch_size": 4,
                "eval_every": 2,
            }
        ],
        "output": "kernel",
    },
    "evaluate.yaml": {"model": "model", "task": TASK | DATA},
    "compare.yaml": {
        "study": "curves",
        "run": {k: v for k, v in PRETRAIN.items() if k != "output"},
        "variants": {"plain": {}, "slow": {"optimizer.learning_rate": 1e-3}},
        "seeds": [0],
        "figure": False,
        "output": "compare",
    },
}
COMMANDS: dict[str, list[str]] = {
    "finetune": ["finetune", "finetune.yaml"],
    "adam": ["finetune", "adam.yaml"],
    "pretrain": ["pretrain", "pretrain.yaml"],
    "sweep": ["sweep", "sweep.yaml"],
    "less": ["study", "less.yaml"],
    "kernel": ["study", "kernel.yaml"],
    "compare": ["study", "compare.yaml"],
    "evaluate": ["evaluate", "evaluate.yaml"],
    "evaluate run": ["evaluate", "run"],
    "predict": ["predict", "evaluate.yaml", "rows.jsonl", "--output=p.out"],
    "predict run": ["predict", "run", "rows.jsonl", "--output=p.out"],
    "generate": ["generate", "model", "--prompt=the film", "--max_new_tokens=2"],
    "generate run": ["generate", "run", "--prompt=the film", "--max_new_tokens=2"],
    "generate file": ["generate", "model", "--file=p.jsonl", "--max_new_tokens=2"],
    "convert": ["convert", "model", "converted"],
    "convert run": ["convert", "run", "converted"],
    "info": ["info", "model"],
    "info run": ["info", "adam"],
}
"""Name of a row's command to its words. Those that make a folder have made it in the world."""


MADE = {
    "finetune": "run",
    "adam": "adam",
    "pretrain": "pretrained",
    "sweep": "sweep",
    "less": "less",
    "kernel": "kernel",
    "compare": "compare",
}
"""Commands that make a folder, and which."""


def build(folder: Path) -> None:
    """Writes the inputs of every command."""
    folder.mkdir(parents=True)
    make_model(folder / "model")
    write_corpus(folder)
    for name, count in (("train", 40), ("validation", 16), ("test", 16)):
        write_jsonl(folder / f"{name}.jsonl", sentences(count))
    write_jsonl(folder / "rows.jsonl", [{"text": row["text"]} for row in sentences(8)])
    write_jsonl(folder / "p.jsonl", [{"prompt": "the film"}, {"prompt": "it was"}])
    for name, values in FILES.items():
        (folder / name).write_text(yaml.safe_dump(values, sort_keys=False))


class World:
    """Inputs in one folder, and what commands made of them, each when it is first needed.

    Several processes may share the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._once("inputs", lambda: build(folder / "inputs"))

    def _once(self, name: str, make: Callable[[], None]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (self.folder / f"{name}.done").exists():
                make()
                (self.folder / f"{name}.done").touch()

    def _make(self, command: str) -> None:
        folder = self.folder / command
        shutil.copytree(self.folder / "inputs", folder)
        done = run(folder, COMMANDS[command])
        assert done.returncode == 0, (command, done.stderr[-3000:])

    def copy(self, folder: Path, row: "Row") -> Path:
        """The inputs, and the folder that the row's command reads or is to continue."""
        shutil.copytree(self.folder / "inputs", folder)
        if row.needs is not None:
            self._once(row.needs, lambda: self._make(row.needs))
            output = MADE[row.needs]
            source = self.folder / row.needs
            shutil.copytree(source / output, folder / output, symlinks=True)
            for path in (folder / output).rglob("config.yaml"):  # it names inputs by whole paths
                text = path.read_text().replace(str(source.resolve()), str(folder.resolve()))
                path.write_text(text)
        return folder


def environment(**changes: str) -> dict[str, str]:
    """What a command inherits: no more than it needs, the tests' cache of programs included."""
    kept = ("PATH", "HOME", "XLA_FLAGS", "JAX_", "HF_", "TOKENIZERS_")
    values = {name: value for name, value in os.environ.items() if name.startswith(kept)}
    values |= {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"} | changes
    return {name: value for name, value in values.items() if value != "UNSET"}


@dataclasses.dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


class Starter:
    """A process of `starter.py`, which runs commands one after the other."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.starter"],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, folder: Path, words: list[str]) -> Done:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with tempfile.TemporaryDirectory() as aside:
            paths = {name: f"{aside}/{name}" for name in ("out", "err")}
            limits = {"seconds": SECONDS, "memory": MEMORY}
            request = {"folder": str(folder), "words": words} | paths | limits
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            code = json.loads(self.process.stdout.readline())
            texts = [Path(path).read_text(errors="replace") for path in paths.values()]
        return Done(code, *texts)


@functools.cache
def starter() -> Starter:
    return Starter()


def run(
    folder: Path,
    words: list[str],
    *,
    env: dict[str, str] | None = None,
    stdout: int | None = None,
    pipe_to: str | None = None,
) -> Done:
    """Runs `jaxlm WORDS` in `folder` under limits of time and memory.

    Args:
        folder: working directory.
        words: of the command line.
        env: changes of the environment; UNSET takes a variable away.
        stdout: file descriptor to write to.
        pipe_to: shell command that reads its output.
    """
    if env is None and stdout is None and pipe_to is None:
        return starter()(folder, words)
    shell = f'ulimit -v {MEMORY // 1024}; "$@"' + (f" | {pipe_to}" if pipe_to else "")
    command = ["bash", "-c", f"{shell}; exit ${{PIPESTATUS[0]}}", "bash"]
    done = subprocess.run(
        [*command, sys.executable, "-m", "jaxlm.cli.main", *words],
        cwd=folder,
        env=environment(**(env or {})),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        timeout=SECONDS,
        check=False,
    )
    return Done(done.returncode, done.stdout or "", done.stderr)


def contents(folder: Path) -> dict[str, str]:
    """Every file, folder and link below `folder`, with what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "log.txt":
            continue  # which says what was tried
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            readable = os.access(path, os.R_OK)
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if readable else "closed"
        else:
            found[name] = "a folder" if path.is_dir() else "neither file nor folder"
    return found


Break = Callable[[Path], None]
"""Damages one thing in a copy of the world."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing that is broken, and what the command must say.

    Attributes:
        command: key of `COMMANDS`.
        kind: of file or value that is broken.
        name: what is wrong with it.
        breaks: does it; None where the words alone are wrong.
        words: added to the command line.
        named: texts of which the sentence names at least one: the key or the file.
        code: exit codes that are right.
        fresh: folders that other commands made and this one is to make anew.
        env: changes of the environment.
        changes: whether files may change, since the command stops in the middle of its work.
    """

    command: str
    kind: str
    name: str
    breaks: Break | None = None
    words: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    code: tuple[int, ...] = (2,)
    fresh: bool = True
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    changes: bool = False

    @property
    def id(self) -> str:
        return f"{self.command}-{self.kind}-{self.name}".replace(" ", "_")

    @property
    def output(self) -> str | None:
        """The folder that the command makes, where it does."""
        return MADE.get(self.command)

    @property
    def needs(self) -> str | None:
        """The command whose folder it reads or continues."""
        if self.command.endswith(" run"):
            return next(name for name in MADE if MADE[name] == COMMANDS[self.command][1])
        return None if self.fresh or self.command not in MADE else self.command


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
