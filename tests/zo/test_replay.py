"""A run rebuilt from its trajectory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import zo
from jaxlm.core.errors import UserError
from tests.zo.problems import network_batch, network_loss, network_params

pytestmark = pytest.mark.optimized

METHODS = {
    "mezo": lambda: zo.mezo(1e-2, weight_decay=0.1),
    "stochastic": lambda: zo.mezo(1e-2, num_directions=2, rounding="stochastic"),
    "sphere": lambda: zo.meazo(1e-3, sampler=zo.sphere()),
    "adam": lambda: zo.mezo_adam(1e-3, horizon=3),
    "fzoo": lambda: zo.fzoo(1e-3, num_directions=3),
    "lozo_momentum": lambda: zo.lozo_momentum(1e-2, interval=2),
    "lozo_residual": lambda: zo.lozo_residual(1e-2, interval=2),
    "zo_muon": lambda: zo.zo_muon(1e-2, rank=4, interval=2, num_directions=2),
}


def run(opt, params, path, steps=5):
    """A run of `jit_step` that keeps its trajectory; where it ends."""
    key, settings = jax.random.key(3), opt.settings
    log = zo.Trajectory.create(
        path, params, key=key, num_directions=settings["num_directions"], settings=settings
    )
    step, state = zo.jit_step(opt, network_loss), opt.init(params, key)
    batch = network_batch()
    params = jax.tree.map(jnp.copy, params)
    for t in range(steps):
        params, state, info = step(params, state, batch)
        log.append(t, np.asarray(info.projected_grad)[None])
    return opt.finalize(params, state)


QUICK = [
    ("mezo", "float32"),
    ("stochastic", "bfloat16"),
    ("adam", "float32"),
    ("lozo_residual", "float32"),
]
SLOW = [(name, "float32") for name in METHODS if (name, "float32") not in QUICK]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
)
def test_a_replay_ends_where_the_run_ended_bit_for_bit(tmp_path, name, dtype):
    start = network_params(dtype)
    end = run(METHODS[name](), start, tmp_path / "run.zo")
    again = zo.replay(METHODS[name](), start, tmp_path / "run.zo")
    for old, new in zip(*map(jax.tree.leaves, (end, again)), strict=True):
        np.testing.assert_array_equal(np.asarray(old), np.asarray(new))
        assert old.dtype == dtype
    kernels = (tree["layers"]["kernel"] for tree in (end, start))
    assert not np.array_equal(*kernels)


def test_another_optimizer_or_start_is_refused(tmp_path):
    start = network_params()
    run(zo.mezo(1e-2), start, tmp_path / "run.zo", steps=1)
    with pytest.raises(UserError, match=r"made with eps = 0\.001, not 0\.01"):
        zo.replay(zo.mezo(1e-2, eps=1e-2), start, tmp_path / "run.zo")
    with pytest.raises(UserError, match="made with rule"):
        zo.replay(zo.meazo(1e-2), start, tmp_path / "run.zo")
    moved = jax.tree.map(lambda x: x + 1, start)
    with pytest.raises(UserError, match="other values of"):
        zo.replay(zo.mezo(1e-2), moved, tmp_path / "run.zo")
