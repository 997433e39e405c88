"""Commands that are killed, at any moment, and started again end as if they had not been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.train.checkpoint import Checkpoints
from tests.helpers.tiny import read_lines, sentences, write_jsonl
from tests.hostile.test_hostile import world
from tests.hostile.world import COMMANDS, MADE, Row, environment, run

__all__ = ["world"]

CLOCKS = {"seconds", "goodput", "compile_seconds", "peak_memory_bytes", "time", "config", "output"}
NAMES = ("finetune", "adam", "pretrain", "less", "kernel", "sweep")


def without_clocks(value):
    if isinstance(value, dict):
        return {k: without_clocks(v) for k, v in value.items() if k not in CLOCKS}
    return [without_clocks(item) for item in value] if isinstance(value, list) else value


def result(folder: Path) -> dict[str, object]:
    """What a command left: numbers without clocks, arrays, and the bytes of everything else."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "checkpoints":
            checkpoints = Checkpoints(path, read_only=True)
            step = checkpoints.latest_step
            assert step is not None
            leaves = jax.tree.leaves(checkpoints.read(step, "params"))
            found[name] = (step, [np.asarray(leaf).tobytes() for leaf in leaves])
        elif "checkpoints/" in name or not path.is_file() or path.name == "log.txt":
            continue
        elif path.suffix == ".json" and path.name != "checksums.json":
            found[name] = without_clocks(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            found[name] = [without_clocks(json.loads(x)) for x in path.read_text().splitlines()]
        elif path.suffix in (".safetensors", ".zo"):
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """By command: the result of one run, and the seconds that it takes."""
    known = {}

    def of(name: str, more: tuple[str, ...]) -> tuple[dict[str, object], float]:
        if (name, more) not in known:
            row = Row(name, "environment", "killed")
            folder = world.copy(tmp_path_factory.mktemp(name) / "world", row)
            begin = time.monotonic()
            done = run(folder, [*COMMANDS[name], *more])
            assert done.returncode == 0, done.stderr[-3000:]
            known[name, more] = result(folder / MADE[name]), time.monotonic() - begin
        return known[name, more]

    return of


def writes(output: Path) -> bool:
    """Whether a file, such as one of a checkpoint, is just being written under another name."""
    names = [str(path.relative_to(output)) for path in output.rglob("*")]
    return any("tmp" in name and "/" in name for name in names)


def killed(folder: Path, output: Path, words: list[str], seconds: float | None) -> bool:
    """Starts a command and kills it and its children; False if it had ended before.

    Args:
        folder: working directory.
        output: that the command makes.
        words: of the command.
        seconds: after it has begun to write; None for the next moment when it writes.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxlm.cli.main", *words],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    begun = None
    while process.poll() is None:
        if begun is None and (output / ".lock").exists():
            begun = time.monotonic()
        if begun is not None:
            late = seconds is not None and time.monotonic() > begun + seconds
            if late or (seconds is None and writes(output)):
                break
        time.sleep(0.002)
    alive = process.poll() is None
    if alive:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, children)):
            os.killpg(pid, signal.SIGKILL)
    process.wait()
    return alive


@pytest.mark.hostile
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(5))
def test_a_killed_command_ends_as_if_it_had_not_been(name, seed, world, undisturbed, tmp_path):
    more = ("--processes=2",) if seed == 4 and name in ("finetune", "adam", "pretrain") else ()
    expected, seconds = undisturbed(name, more)
    row = Row(name, "environment", "killed")
    folder = world.copy(tmp_path / "world", row)
    output, words = folder / MADE[name], [*COMMANDS[name], *more]
    drawn = random.Random(f"{name} {seed}")
    kills = 0
    for moment in (None, drawn.uniform(0, 1) * seconds):
        kills += killed(folder, output, words, moment)
    done = run(folder, words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert kills, "it was never killed"
    assert result(output) == expected


@pytest.mark.hostile
def test_a_killed_prediction_loses_and_repeats_no_row(world, tmp_path):
    folder = world.copy(tmp_path / "world", Row("predict", "environment", "killed"))
    write_jsonl(folder / "rows.jsonl", [{**row, "id": i} for i, row in enumerate(sentences(4000))])
    words = ["predict", "evaluate.yaml", "rows.jsonl", "--eval_batch_size=4"]
    assert run(folder, [*words, "--output=whole"]).returncode == 0
    output, words = folder / "killed", [*words, "--output=killed"]
    kills = 0
    for least in (1, 300_000, 600_000):  # bytes of about 700,000
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxlm.cli.main", *words],
            cwd=folder,
            env=environment(),
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not (output.exists() and output.stat().st_size >= least):
            time.sleep(0.002)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills, "it was never killed"
    assert run(folder, words).returncode == 0
    assert output.read_bytes() == (folder / "whole").read_bytes()
    assert [row["id"] for row in read_lines(output)] == list(range(4000))
