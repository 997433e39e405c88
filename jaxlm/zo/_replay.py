"""A run again from its scalars, without a forward pass."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.zo.optimizers import ZerothOrderOptimizer, hold, release
from jaxlm.zo.perturbation import accepts
from jaxlm.zo.trajectory import Trajectory


def replay(
    opt: ZerothOrderOptimizer,
    params: Any,
    trajectory: Trajectory | Path | str,
    *,
    steps: int | None = None,
    verify: bool = True,
) -> Any:
    """The parameters that a run ended with, from those it began with and its trajectory.

    A step costs one update and no forward pass. On the same backend the result is that of the run
    bit for bit; elsewhere it differs by the rounding of the updates.

    Args:
      opt: the optimizer of the run, or one with the same settings.
      params: where the run began; kept as they are.
      trajectory: of the run, or its file.
      steps: how many steps, from 0 to those of the file; None for the whole run.
      verify: compare the result with what the file says of the end of its run, if it does.

    Raises:
      UserError: the file is damaged, has not the steps that are asked for, or is that of other
        parameters or of another optimizer; or the result is not that of the run, beyond rounding.
    """
    if not isinstance(trajectory, Trajectory):
        trajectory = Trajectory.open(trajectory)
    trajectory.check(
        params, {**trajectory.header.settings, **opt.settings}, learning_rate=opt.learning_rate
    )
    trajectory.check_steps(steps)
    state = opt.init(params, trajectory.header.key)
    start, state = hold(params), jax.tree.map(jnp.copy, state)
    moved = jax.tree.map(jnp.copy, start)

    @functools.partial(jax.jit, donate_argnums=(0, 1), keep_unused=True)
    def update(params, state, slopes, rate):
        # Numbers of the run, where they are known: a schedule has other last bits elsewhere.
        options = {"learning_rate": rate} if accepts(opt.update, "learning_rate") else {}
        params, state, _ = opt.update(release(params), state, slopes, **options)
        return hold(params), state

    rates = trajectory.learning_rate
    for t, slopes in enumerate(trajectory.projected_grad[:steps]):
        rate = None if np.isnan(rates[t]) else jnp.asarray(rates[t])
        moved, state = update(moved, state, jnp.asarray(slopes), rate)
    end = opt.finalize(release(moved), state)
    if verify and steps is None:
        trajectory.check_end(params, end)
    return end
