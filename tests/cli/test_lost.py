"""A process that is killed, a disk that is full: a sentence, and a run that goes on."""

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.cli.launch import GRACE, TRY_AGAIN
from jaxlm.cli.main import main
from jaxlm.train.checkpoint import Checkpoints
from tests.cli.processes import free_port, start
from tests.helpers.tiny import write_corpus, write_run
from tests.train.test_pretraining import YAML

LONG = ["--mesh=data=4,fsdp=2", "--steps=2000", "--checkpoint-every=10", "--eval-every=20"]
FLAGS = ["--steps=60" if flag == "--steps=2000" else flag for flag in LONG]
AGAIN = "Start all processes again; the run resumes from its last checkpoint.\n"


IMPATIENT = """
import sys
from jaxlm.cli.main import main
from jaxlm.sharding import multihost
multihost.HEARTBEAT = 6
if __name__ == "__main__":
    sys.exit(main(script=__file__))
"""
"""A jaxlm that waits for a silent process no longer than a test should take."""


def pair(words: list[str], **options) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [start(words, port=port, rank=rank, **options) for rank in (0, 1)]


def ended(runs: list[subprocess.Popen[str]], timeout: float) -> list[str]:
    """What the processes said; none of them hangs."""
    try:
        return [run.communicate(timeout=timeout)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def child_of(run: subprocess.Popen[str]) -> int:
    (child,) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return int(child)


def kill_after(
    words: list[str], folder: Path, count: int, victim: int, saving=False, **options
) -> float:
    """Kills one of two processes once there are `count` lines; how long the other one took.

    Or (saving) after the next checkpoint has begun to be written.
    """
    runs = pair(words, **options)
    deadline = time.monotonic() + 200

    def wait(what: Callable[[], bool]) -> None:
        while not what():
            assert all(run.poll() is None for run in runs), ended(runs, 1)
            assert time.monotonic() < deadline
            time.sleep(0.0005)

    wait(lambda: lines(folder) >= count)
    if saving:
        wait(lambda: any(folder.glob("checkpoints/*.tmp")))
    os.kill(child_of(runs[victim]), signal.SIGKILL)
    begin = time.monotonic()
    said = ended(runs, 100)
    assert [run.returncode for run in runs] == [TRY_AGAIN, TRY_AGAIN], said
    assert said[victim].endswith(f"error: distributed: this process was ended by SIGKILL. {AGAIN}")
    assert "error: distributed: another process was lost" in said[1 - victim]
    assert said[1 - victim].endswith(AGAIN)
    return time.monotonic() - begin


def final(folder: Path) -> tuple[list[np.ndarray], list[str], dict]:
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    (step,) = {60} & set(checkpoints.steps())
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoints.read(step, "params"))]
    summary = json.loads((folder / "summary.json").read_text())
    clock = ("seconds", "goodput", "config", "model")
    numbers = {key: value for key, value in summary.items() if key not in clock}
    # Byte for byte but for the clock, which lines of pretraining have.
    rows = re.sub(r'"seconds": [0-9.]+', "", (folder / "metrics.jsonl").read_text()).splitlines()
    return leaves, rows, numbers


def finish(words: list[str]) -> None:
    runs = pair(words)
    said = ended(runs, 200)
    assert [run.returncode for run in runs] == [0, 0], said


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("kind", ["mezo", "adamw", "pretrain"])
def test_a_run_whose_processes_are_killed_three_times_ends_as_if_they_were_not(
    kind, tmp_path, tiny_model
):
    """At random moments, one of them while a checkpoint is written."""
    if kind == "pretrain":
        write_corpus(tmp_path)
        (tmp_path / "tiny.yaml").write_text(YAML.format(folder=tmp_path))
        words = ["pretrain", str(tmp_path / "tiny.yaml"), *FLAGS, "--batch_size=8"]
    else:
        words = ["finetune", str(write_run(tmp_path, tiny_model)), *FLAGS]
        words.append(f"--optimizer.name={kind}")
    finish([*words, f"--output={tmp_path / 'whole'}"])
    wanted = final(tmp_path / "whole")
    drawn, most = random.Random(kind), len(wanted[1]) - 10
    saving = drawn.randrange(3)
    for number in range(3):
        count = min(lines(tmp_path / "run") + drawn.randrange(1, most // 3), most)
        victim = drawn.randrange(2)
        taken = kill_after(words, tmp_path / "run", count, victim, saving=number == saving)
        print(f"killed after {count} lines, the other ended {taken:.1f} s later")
        assert taken < 60
    finish(words)
    found = final(tmp_path / "run")
    for new, old in zip(found[0], wanted[0], strict=True):
        np.testing.assert_array_equal(new, old)
    assert found[1:] == wanted[1:]


@pytest.mark.multidevice
def test_a_lost_process_ends_the_other(tmp_path, tiny_model):
    words = ["finetune", str(write_run(tmp_path, tiny_model)), *FLAGS, "--optimizer.name=adamw"]
    words.append("--task.validation=null")
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT)
    assert kill_after(words, tmp_path / "run", 5, victim=1, jaxlm=(str(script),)) < 60


@pytest.mark.parametrize("room", [pytest.param(0, marks=pytest.mark.slow), 20_000])
def test_a_full_disk_keeps_the_last_checkpoint(room, tmp_path, tiny_model, capfd):
    """A file system of 2 MB, on which something else takes most of the room before step 6."""
    if os.geteuid() != 0:
        pytest.skip("needs root: to mount a small file system")
    path, small = write_run(tmp_path, tiny_model), tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], check=True)
    flags = [f"--output={small / 'run'}", "--checkpoint-every=2", "--eval-every=100"]
    flags.append("--optimizer.name=adam")
    try:
        assert main(["finetune", str(path), f"--output={tmp_path / 'whole'}", *flags[1:]]) == 0
        save = Checkpoints.save

        def crowded(self, step, state, record):
            if step == 6:
                write_until_full(small / "other", room)
            save(self, step, state, record)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoints, "save", crowded)
            assert main(["finetune", str(path), *flags]) == 2
        said = capfd.readouterr().err
        assert said.endswith(
            f"error: {small / 'run' / 'checkpoints' / '6'}: cannot be written (No space left on "
            "device). Make room there, or choose another place; the same command resumes from the "
            "last checkpoint, if there is one.\n"
        ), said
        assert said.count("No space left") == 1
        assert "Traceback" not in said
        assert Checkpoints(small / "run" / "checkpoints", read_only=True).latest_step == 4
        (small / "other").unlink()
        assert main(["finetune", str(path), *flags]) == 0
        assert "start from step 4" in capfd.readouterr().err
        written = [folder / "metrics.jsonl" for folder in (small / "run", tmp_path / "whole")]
        assert written[0].read_text() == written[1].read_text()
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
@pytest.mark.multidevice
def test_a_full_disk_of_two_processes_is_a_mistake_and_not_a_loss(tmp_path, tiny_model):
    """Only the first process writes metrics; the other one waits for it in vain."""
    if os.geteuid() != 0:
        pytest.skip("needs root: to mount a small file system")
    path, small = write_run(tmp_path, tiny_model), tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], check=True)
    words = ["finetune", str(path), *LONG, f"--output={small / 'run'}"]
    try:
        runs = pair(words)
        while lines(small / "run") < 5:
            assert all(run.poll() is None for run in runs), ended(runs, 1)
            time.sleep(0.005)
        write_until_full(small / "other", 0)
        begin = time.monotonic()
        said = ended(runs, 60)
        assert runs[0].returncode == 2, said
        assert "cannot be written (No space left on device). Make room there" in said[0]
        assert runs[1].returncode in (2, TRY_AGAIN)
        assert time.monotonic() - begin < 60
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.slow
@pytest.mark.multidevice
def test_processes_that_are_told_to_stop_do(tmp_path, tiny_model):
    words = ["finetune", str(write_run(tmp_path, tiny_model)), *LONG]
    runs = pair(words)
    while lines(tmp_path / "run") < 5:
        assert all(run.poll() is None for run in runs), ended(runs, 1)
        time.sleep(0.005)
    for run in runs:
        run.terminate()
    said = ended(runs, GRACE + 20)
    assert [run.returncode for run in runs] == [128 + signal.SIGTERM] * 2, said


def write_until_full(path: Path, room: int) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(file.tell() - room)
