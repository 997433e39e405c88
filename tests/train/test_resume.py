"""A run that is killed and started again ends with the numbers of one that was never killed."""

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.cli.main import main
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.logging import Metrics
from tests.helpers.tiny import write_corpus, write_run
from tests.train.test_pretraining import YAML

pytestmark = pytest.mark.default_flags

STEPS = 60


# Each run is a process, that of a server which has imported what takes seconds, and done no more.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "jaxlm.train.finetuning",
        "jaxlm.train.pretraining",
        "transformers.models.auto.tokenization_auto",
    ]
)


def command(words: list[str]) -> None:
    sys.exit(main(words))


def launch(words: list[str]) -> multiprocessing.process.BaseProcess:
    process = SERVER.Process(target=command, args=(words,))
    process.start()
    return process


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def kill(words: list[str], folder: Path, count: int, *, saving: bool, delay: float) -> None:
    """Starts a run and kills it a moment after metrics.jsonl has `count` lines.

    Or (saving) after the next checkpoint has begun to be written.
    """
    process = launch(words)
    deadline = time.monotonic() + 120

    def wait(what) -> None:
        while not what():
            assert process.is_alive(), process.exitcode
            assert time.monotonic() < deadline

    wait(lambda: lines(folder) >= count)
    if saving:
        wait(lambda: any(folder.glob("checkpoints/*.tmp")))
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "summary.json").exists()


def finish(words: list[str]) -> None:
    process = launch(words)
    process.join(120)
    assert process.exitcode == 0


def plain(leaf) -> np.ndarray:
    key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf)


def final(folder: Path):
    checkpoints = Checkpoints(folder / "checkpoints")
    leaves = {
        step: [plain(leaf) for leaf in jax.tree.leaves(checkpoints.read(step))]
        for step in checkpoints.steps()
    }
    # Byte for byte but for the clock, which lines of pretraining have.
    rows = re.sub(r'"seconds": [0-9.]+', "", (folder / "metrics.jsonl").read_text()).splitlines()
    files = [folder / "trajectory.zo", *(folder / "model").glob("*.safetensors")]
    written = {file.name: file.read_bytes() for file in files if file.exists()}
    return leaves, rows, written, json.loads((folder / "summary.json").read_text())


def without_clock(summary: dict) -> dict:
    """All but the clock and the place."""
    place = summary["config"]["output"]
    kept = {key: value for key, value in summary.items() if key not in ("seconds", "goodput")}
    return json.loads(json.dumps(kept).replace(place, "PLACE"))


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("adam", (0.35,)),
        *(
            pytest.param(kind, (0.02, 0.35, 0.65), marks=pytest.mark.slow)
            for kind in ("mezo", "adam", "pretrain")
        ),
    ],
)
def test_kill_9_at_random_moments(kind, shares, tmp_path, tiny_model, monkeypatch):
    """One of them while a checkpoint is written; of one alone, in a third of the cases."""
    # Programs half written by a process that is killed shall be found by no other test.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    flags = [f"--steps={STEPS}", "--eval-every=20", "--checkpoint-every=10"]
    if kind == "pretrain":
        write_corpus(tmp_path)
        path = tmp_path / "tiny.yaml"
        path.write_text(YAML.format(folder=tmp_path))
        words = ["pretrain", str(path), *flags]
    else:
        words = ["finetune", str(write_run(tmp_path, tiny_model)), *flags]
        words.append(f"--optimizer.name={kind}")
    finish([*words, f"--output={tmp_path / 'whole'}"])
    whole = final(tmp_path / "whole")
    seed = time.time_ns()
    print(f"seed {seed}")
    moments = random.Random(seed)
    saving = moments.randrange(3)
    for number, share in enumerate(shares):
        count = int(len(whole[1]) * (share + 0.2 * moments.random()))
        delay = moments.random() * (0.003 if number == saving else 0.05)
        kill(words, tmp_path / "run", max(count, 1), saving=number == saving, delay=delay)
    finish(words)
    found = final(tmp_path / "run")
    assert found[0].keys() == whole[0].keys()
    for step in whole[0]:
        for a, b in zip(whole[0][step], found[0][step], strict=True):
            np.testing.assert_array_equal(a, b)
    assert found[1:3] == whole[1:3]
    assert without_clock(found[3]) == without_clock(whole[3])


@pytest.mark.parametrize("counts", [(20,), pytest.param((1, 20), marks=pytest.mark.slow)])
def test_control_c_saves_and_exits_with_130(counts, tmp_path, tiny_model):
    """The run that goes on is bitwise the whole one."""
    steps = 4 * STEPS  # it shall not be done before it is told
    words = ["finetune", str(write_run(tmp_path, tiny_model)), f"--steps={steps}"]
    words += ["--eval-every=80", "--checkpoint-every=80", "--optimizer.name=adam"]
    finish([*words, f"--output={tmp_path / 'whole'}"])
    log = tmp_path / "run" / "log.txt"
    for number, count in enumerate(counts):
        process = launch(words)
        while not log.exists() or log.read_text().count("compiling the steps") <= number:
            assert process.is_alive(), process.exitcode
        while lines(tmp_path / "run") < count:
            assert process.is_alive(), process.exitcode
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        said = log.read_text()
        assert process.exitcode == 130, said
        assert Checkpoints(tmp_path / "run" / "checkpoints").latest_step is not None, said
    finish(words)
    (leaves, rows, written, summary), whole = (final(tmp_path / n) for n in ("run", "whole"))
    assert rows == whole[1]
    assert written == whole[2]
    assert without_clock(summary) == without_clock(whole[3])
    for a, b in zip(leaves[steps], whole[0][steps], strict=True):
        np.testing.assert_array_equal(a, b)


def test_metrics_are_cut_back_to_the_restored_step(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append(*({"step": i, "loss": 0.5} for i in range(1, 6)))
    with metrics.path.open("a") as file:
        file.write('{"step": 6, "lo')
    metrics.cut(3)
    assert [record["step"] for record in metrics.read()] == [1, 2, 3]
    metrics.cut(None)
    assert metrics.path.read_text() == ""
