"""A run again from its scalars, without a forward pass."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.zo.optimizers import ZerothOrderOptimizer
from jaxlm.zo.trajectory import Trajectory


def replay(
    opt: ZerothOrderOptimizer,
    params: Any,
    trajectory: Trajectory | Path | str,
    *,
    steps: int | None = None,
) -> Any:
    """The parameters that a run ended with, from those it began with and its trajectory.

    A step costs one update and no forward pass. On the same backend the result is that of the run
    bit for bit; elsewhere it differs by the rounding of the updates.

    Args:
      opt: the optimizer of the run, or one with the same settings.
      params: where the run began; kept as they are.
      trajectory: of the run, or its file.
      steps: how many steps; None for all.

    Raises:
      UserError: the file is damaged, or is that of other parameters or of another optimizer.
    """
    if not isinstance(trajectory, Trajectory):
        trajectory = Trajectory.open(trajectory)
    trajectory.check(params, {**trajectory.header.settings, **opt.settings})
    slopes = trajectory.projected_grad[:steps]
    state = opt.init(params, trajectory.header.key)
    params, state = jax.tree.map(jnp.copy, (params, state))

    @functools.partial(jax.jit, donate_argnums=(0, 1), keep_unused=True)
    def update(params, state, slopes):
        return opt.update(params, state, slopes)[:2]

    for row in slopes:
        params, state = update(params, state, jnp.asarray(row))
    return opt.finalize(params, state)
