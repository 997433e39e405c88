"""What the loop keeps of a zeroth-order run, on a loss of three numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import UserError
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.loop import LoopConfig, fit
from jaxlm.train.optimizers import Adam, Mezo
from jaxlm.train.state import method
from jaxlm.zo import Trajectory

MEZO = Mezo(learning_rate=0.1, num_directions=2)


def loss_fn(params, batch, *, key=None, view=None):
    w = params["w"] if view is None else view("w", params["w"], None)
    return jnp.sum((w - batch["target"]) ** 2), {}


def batches(first, count):
    return {"target": np.arange(first, first + count, dtype=np.float32)[:, None]}


def start(value=0.0):
    return {"w": jnp.full(3, value)}


def run(folder, steps, *, optimizer=MEZO, params=None, feed=batches):
    return fit(
        method(optimizer, loss_fn, 6),
        start() if params is None else params,
        feed,
        LoopConfig(steps=steps, checkpoint_every=4, log_every=3),
        key=jax.random.key(3),
        checkpoints=Checkpoints(folder / "checkpoints"),
        trajectory=folder / "trajectory.zo",
    )


def test_the_trajectory_holds_the_run(tmp_path):
    infos = run(tmp_path, 6).infos
    found = Trajectory.open(tmp_path / "trajectory.zo")
    wanted = [info["projected_grad"] for info in infos]
    np.testing.assert_array_equal(found.projected_grad, np.float32(wanted))
    assert found.header.num_directions == 2
    assert jax.random.key_data(found.header.key).tolist() == [0, 3]
    found.check(start(), method(MEZO, loss_fn, 6).settings)
    with pytest.raises(UserError, match=r"with eps = 0.001 \(got 0.1\)"):
        found.check(start(), method(Mezo(learning_rate=0.1, eps=0.1), loss_fn, 6).settings)


def test_a_run_with_gradients_has_none(tmp_path):
    run(tmp_path, 2, optimizer=Adam())
    assert not (tmp_path / "trajectory.zo").exists()


def test_a_run_goes_on_with_its_trajectory_alone(tmp_path):
    file = tmp_path / "trajectory.zo"
    run(tmp_path, 4)
    with pytest.raises(UserError, match=r"the run began with other values of w. Give the model"):
        run(tmp_path, 6, params=start(1.0))
    Trajectory.open(file).append(4, np.ones((1, 2), np.float32))
    run(tmp_path, 6)
    (tmp_path / "whole").mkdir()
    run(tmp_path / "whole", 6)
    assert file.read_bytes() == (tmp_path / "whole" / "trajectory.zo").read_bytes()
    file.unlink()
    run(tmp_path, 7)
    assert not file.exists()


def test_steps_after_a_loss_that_is_not_finite_are_left_out(tmp_path):
    def feed(first, count):
        target = batches(first, count)["target"]
        return {"target": np.where(target == 4, np.nan, target)}

    with pytest.raises(UserError, match="a loss of nan at step 5"):
        run(tmp_path, 6, feed=feed)
    assert Trajectory.open(tmp_path / "trajectory.zo").steps == 4
