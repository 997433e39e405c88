"""A small world in which every command works, and its copies in which one thing is broken."""

import dataclasses
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.tiny import make_model, sentences, write_corpus, write_jsonl

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
        "base": {k: v for k, v in FINETUNE.items() if k not in ("optimizer", "output")},
        "methods": {"mezo": {"optimizer": FINETUNE["optimizer"]}},
        "seeds": [0],
        "output": "sweep",
    },
    "less.yaml": {
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
        "model": "model",
        "task": TASK | {"train": "train.jsonl", "validation": "hold_out", "test": "test.jsonl"},
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
    "compare.yaml": {
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
    "less": ["select", "less.yaml"],
    "kernel": ["kernel", "kernel.yaml"],
    "compare": ["compare", "compare.yaml"],
    "evaluate": ["evaluate", "model", "--task=task.yaml"],
    "evaluate run": ["evaluate", "run"],
    "generate": ["generate", "model", "--prompt=the film", "--max_new_tokens=2"],
    "generate run": ["generate", "run", "--prompt=the film", "--max_new_tokens=2"],
    "convert": ["convert", "model", "converted"],
    "convert run": ["convert", "adam", "converted"],
    "info": ["info", "model"],
    "info run": ["info", "run"],
}
"""Name of a row's command to its words. Those that make a folder have made it in the world."""

MADE = ("finetune", "adam", "pretrain", "sweep", "less", "kernel", "compare")


def build(folder: Path) -> None:
    """Writes the inputs of every command, and runs those that leave folders for others."""
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model")
    write_corpus(folder)
    for name, count in (("train", 40), ("validation", 16), ("test", 16)):
        write_jsonl(folder / f"{name}.jsonl", sentences(count))
    for name, values in FILES.items():
        (folder / name).write_text(yaml.safe_dump(values, sort_keys=False))
    (folder / "task.yaml").write_text(yaml.safe_dump(TASK | DATA))
    for name in MADE:
        done = run(folder, COMMANDS[name])
        assert done.returncode == 0, (name, done.stderr[-3000:])


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


def run(
    folder: Path,
    words: list[str],
    *,
    env: dict[str, str] | None = None,
    stdin: str | None = None,
    stdout: int | None = None,
    pipe_to: str | None = None,
) -> Done:
    """Runs `jaxlm WORDS` in `folder` under limits of time and memory.

    Args:
        folder: working directory.
        words: of the command line.
        env: changes of the environment; UNSET takes a variable away.
        stdin: text that the command may read; by default nothing.
        stdout: file descriptor to write to.
        pipe_to: shell command that reads its output.
    """

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    command: list[str] = [sys.executable, "-m", "jaxlm.cli.main", *words]
    shell = f'"$@" | {pipe_to}; exit ${{PIPESTATUS[0]}}'
    if pipe_to is not None:
        command = ["bash", "-c", shell, "bash", *command]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(**(env or {})),
        input=stdin or "",
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        timeout=SECONDS,
        preexec_fn=limited,
        check=False,
    )
    return Done(done.returncode, done.stdout or "", done.stderr)


def contents(folder: Path) -> dict[str, str]:
    """Every file, folder and link below `folder`, with what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
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
        file = next((word for word in COMMANDS[self.command] if word in FILES), None)
        return FILES[file]["output"] if file else None


def copy(world: Path, folder: Path, row: Row) -> Path:
    """A copy of the world, without what the row's command is to make itself."""
    shutil.copytree(world, folder, symlinks=True)
    if row.fresh and row.output is not None:
        shutil.rmtree(folder / row.output)
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
