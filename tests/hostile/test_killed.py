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
from tests.hostile.test_hostile import world
from tests.hostile.world import COMMANDS, Row, copy, environment, run

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
        elif path.suffix in (".rows", ".safetensors", ".zo"):
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """By command: the result of one run, and the seconds that it takes."""
    known = {}

    def of(name: str) -> tuple[dict[str, object], float]:
        if name not in known:
            row = Row(name, "environment", "killed")
            folder = copy(world, tmp_path_factory.mktemp(name) / "world", row)
            begin = time.monotonic()
            done = run(folder, COMMANDS[name])
            assert done.returncode == 0, done.stderr[-3000:]
            known[name] = result(folder / str(row.output)), time.monotonic() - begin
        return known[name]

    return of


def killed(folder: Path, output: Path, words: list[str], seconds: float, writing: bool) -> bool:
    """Starts a command and kills it after some time, or while it writes; False if it had ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxlm.cli.main", *words],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + (120 if writing else seconds)
    while time.monotonic() < deadline and process.poll() is None:
        if writing and any("tmp" in path.name for path in output.rglob("*")):
            break
        time.sleep(0.002)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return alive


@pytest.mark.hostile
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(5))
def test_a_killed_command_ends_as_if_it_had_not_been(name, seed, world, undisturbed, tmp_path):
    expected, seconds = undisturbed(name)
    row = Row(name, "environment", "killed")
    folder = copy(world, tmp_path / "world", row)
    output = folder / str(row.output)
    drawn = random.Random(f"{name} {seed}")
    kills = 0
    for attempt in range(3):
        writing = attempt == 1
        kills += killed(folder, output, COMMANDS[name], drawn.uniform(0.4, 1.0) * seconds, writing)
    done = run(folder, COMMANDS[name])
    assert done.returncode == 0, done.stderr[-3000:]
    print(f"{name}, {seed}: killed {kills} times")
    assert result(output) == expected
