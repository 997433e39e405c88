"""Dynamics of training: equations that optimizers follow, and workers that average."""

from jaxlm.dynamics.adaptive import (
    AdamState,
    AdaptiveConstants,
    RMSpropState,
    adam_sde,
    rmsprop_sde,
)
from jaxlm.dynamics.diffusion import NoiseOperator, as_operator, example_noise, is_additive
from jaxlm.dynamics.local import (
    LocalOptimizer,
    LocalState,
    Workers,
    local_update,
    run_workers,
    start_workers,
)
from jaxlm.dynamics.schedules import (
    HSchedule,
    comm_fraction,
    constant_h,
    linear_h,
    qsr,
    sync_steps,
)
from jaxlm.dynamics.sde import SDE, MomentumState, sgd_sde, sgdm_sde
from jaxlm.dynamics.simulate import run_optimizer, simulate
from jaxlm.dynamics.slow import local_drift_factor, local_sgd_sde
from jaxlm.dynamics.weak import WeakError, ou_moments, weak_error, weak_order

__all__ = [
    "SDE",
    "AdamState",
    "AdaptiveConstants",
    "HSchedule",
    "LocalOptimizer",
    "LocalState",
    "MomentumState",
    "NoiseOperator",
    "RMSpropState",
    "WeakError",
    "Workers",
    "adam_sde",
    "as_operator",
    "comm_fraction",
    "constant_h",
    "example_noise",
    "is_additive",
    "linear_h",
    "local_drift_factor",
    "local_sgd_sde",
    "local_update",
    "ou_moments",
    "qsr",
    "rmsprop_sde",
    "run_optimizer",
    "run_workers",
    "sgd_sde",
    "sgdm_sde",
    "simulate",
    "start_workers",
    "sync_steps",
    "weak_error",
    "weak_order",
]
