"""A run that is killed and started again ends with the numbers of one that was never killed."""

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.train.checkpoint import Checkpoints, copied_bytes
from jaxlm.train.logging import Metrics
from tests.tiny import write_run

STEPS = 60


# Each run is a process, that of a server which has imported what takes seconds, and done no more.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["jaxlm.train.run", "orbax.checkpoint", "transformers.models.auto.tokenization_auto"]
)


def launch(path: Path) -> multiprocessing.process.BaseProcess:
    flags = [f"--steps={STEPS}", "--eval-every=20", "--checkpoint-every=10"]
    process = SERVER.Process(target=main, args=(["finetune", str(path), *flags],))
    process.start()
    return process


def lines(path: Path) -> int:
    file = path.parent / "run" / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def kill_after(path: Path, count: int, delay: float) -> None:
    """Starts the run and kills it a moment after metrics.jsonl has `count` lines."""
    process = launch(path)
    deadline = time.monotonic() + 120
    while lines(path) < count:
        assert process.is_alive(), process.exitcode
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (path.parent / "run" / "summary.json").exists()


def finish(path: Path) -> None:
    process = launch(path)
    process.join(120)
    assert process.exitcode == 0


def plain(leaf) -> np.ndarray:
    key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf)


def final(path: Path):
    folder = path.parent / "run"
    checkpoints = Checkpoints(folder / "checkpoints")
    steps = sorted(checkpoints.steps())
    leaves = [plain(leaf) for step in steps for leaf in jax.tree.leaves(checkpoints.read(step))]
    summary = json.loads((folder / "summary.json").read_text())
    written = [(folder / name).read_bytes() for name in ("metrics.jsonl", "trajectory.zo")]
    return steps, leaves, written, summary


def without_clock(summary: dict) -> dict:
    config = {key: value for key, value in summary["config"].items() if key != "output"}
    return {key: value for key, value in summary.items() if key not in ("seconds", "goodput")} | {
        "config": config
    }


def test_kill_9_at_three_random_moments(tmp_path, tiny_model, monkeypatch):
    # Programs half written by a process that is killed shall be found by no other test.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    paths = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        paths.append(write_run(tmp_path / name, tiny_model))
    finish(paths[0])
    moments = random.Random(time.time_ns())
    for first in (1, 20, 40):
        kill_after(paths[1], first + moments.randrange(12), moments.random() * 0.05)
    finish(paths[1])
    (steps, leaves, written, summary), killed = map(final, paths)
    assert killed[0] == steps
    for a, b in zip(leaves, killed[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert killed[2] == written
    assert without_clock(killed[3]) == without_clock(summary)


def test_metrics_are_cut_back_to_the_restored_step(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append(*({"step": i, "loss": 0.5} for i in range(1, 6)))
    with metrics.path.open("a") as file:
        file.write('{"step": 6, "lo')
    metrics.cut(3)
    assert [record["step"] for record in metrics.read()] == [1, 2, 3]
    metrics.cut(None)
    assert metrics.path.read_text() == ""


def test_checkpoints_keep_the_latest_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    key = jax.random.key(1)
    for step, best in ((0, 0), (5, 5), (10, 5), (15, 5)):
        state = {"params": {"w": np.full(3, step, np.float32)}, "key": key}
        checkpoints.save(step, state, {"best_step": best})
    assert sorted(checkpoints.steps()) == [5, 15]
    step, state, record = Checkpoints(tmp_path).restore(state)
    assert (step, record) == (15, {"best_step": 5})
    np.testing.assert_array_equal(state["params"]["w"], 15.0)
    assert jax.random.key_data(state["key"]).tolist() == jax.random.key_data(key).tolist()
    np.testing.assert_array_equal(Checkpoints(tmp_path).best_params()["w"], 5.0)


def test_a_state_is_copied_a_part_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.train.checkpoint.AT_ONCE", 2**12)
    sizes = (10, 1000, 3, 3000, 2000, 2000)
    params = {f"w{i}": jnp.arange(size) + 0.5 for i, size in enumerate(sizes)}
    state = {"params": params, "key": jax.random.key(1)}
    assert copied_bytes(state) == 2 * 4 * 3000
    assert copied_bytes({"w": params["w0"]}) == 40
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    like = jax.eval_shape(lambda: params)
    for found in (
        checkpoints.restore(state)[1]["params"],
        checkpoints.restore_params(like, 1),
        checkpoints.best_params(),
    ):
        jax.tree.map(np.testing.assert_array_equal, found, params)


def test_a_save_cut_short_leaves_the_former_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = {"w": np.ones(3, np.float32)}
    checkpoints.save(1, state, {})
    checkpoints.close()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir()
    assert Checkpoints(tmp_path).restore(state)[0] == 1


@pytest.mark.parametrize("folder", ["state", "state/d"])
def test_a_damaged_checkpoint_is_named(folder, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = {"w": np.ones(3, np.float32)}
    checkpoints.save(1, state, {})
    checkpoints.close()
    for file in (tmp_path / "1" / folder).rglob("*"):
        if file.is_file():
            file.write_bytes(b"" if folder == "state" else file.read_bytes()[::-1])
    with pytest.raises(UserError, match=f"^{tmp_path / '1'}: this checkpoint cannot be read"):
        Checkpoints(tmp_path).restore(state)
