"""Training as a stochastic process: equations, scaling rules and laws, momentum, noise, workers."""

from jaxlm.dynamics._crossover import crossover, crossover_probability
from jaxlm.dynamics._simulate import run_optimizer, simulate
from jaxlm.dynamics._svag import SVAG, svag, svag_coefficients, svag_value_and_grad
from jaxlm.dynamics.adaptive import (
    AdamState,
    AdaptiveConstants,
    RMSpropState,
    adam_sde,
    rmsprop_sde,
)
from jaxlm.dynamics.averages import average_params, average_params_by_compute
from jaxlm.dynamics.diffusion import NoiseOperator, as_operator, example_noise, is_additive
from jaxlm.dynamics.laws import (
    PowerLaw,
    bootstrap_interval,
    bootstrap_power_law,
    fit_chinchilla,
    fit_power_law,
)
from jaxlm.dynamics.local import (
    LocalOptimizer,
    LocalState,
    Workers,
    local_update,
    run_workers,
    start_workers,
)
from jaxlm.dynamics.momentum import (
    MomentumComparison,
    compare_momentum,
    coupled_iterate,
    effective_lr_schedule,
    sgdm,
)
from jaxlm.dynamics.noise import (
    NoiseStats,
    NoiseSums,
    RunningNoise,
    gaussian_example_weights,
    grad_noise_stats,
    ngos,
    value_and_grad_with_noise,
)
from jaxlm.dynamics.pairs import pair_indices, split_halves
from jaxlm.dynamics.scaling import (
    OptHParams,
    StepLaw,
    max_scale,
    scale_rule,
    scale_schedule,
    step_law,
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
from jaxlm.dynamics.slow import local_drift_factor, local_sgd_sde
from jaxlm.dynamics.weak import WeakError, ou_moments, weak_error, weak_order

__all__ = [
    "SDE",
    "SVAG",
    "AdamState",
    "AdaptiveConstants",
    "HSchedule",
    "LocalOptimizer",
    "LocalState",
    "MomentumComparison",
    "MomentumState",
    "NoiseOperator",
    "NoiseStats",
    "NoiseSums",
    "OptHParams",
    "PowerLaw",
    "RMSpropState",
    "RunningNoise",
    "StepLaw",
    "WeakError",
    "Workers",
    "adam_sde",
    "as_operator",
    "average_params",
    "average_params_by_compute",
    "bootstrap_interval",
    "bootstrap_power_law",
    "comm_fraction",
    "compare_momentum",
    "constant_h",
    "coupled_iterate",
    "crossover",
    "crossover_probability",
    "effective_lr_schedule",
    "example_noise",
    "fit_chinchilla",
    "fit_power_law",
    "gaussian_example_weights",
    "grad_noise_stats",
    "is_additive",
    "linear_h",
    "local_drift_factor",
    "local_sgd_sde",
    "local_update",
    "max_scale",
    "ngos",
    "ou_moments",
    "pair_indices",
    "qsr",
    "rmsprop_sde",
    "run_optimizer",
    "run_workers",
    "scale_rule",
    "scale_schedule",
    "sgd_sde",
    "sgdm",
    "sgdm_sde",
    "simulate",
    "split_halves",
    "start_workers",
    "step_law",
    "svag",
    "svag_coefficients",
    "svag_value_and_grad",
    "sync_steps",
    "value_and_grad_with_noise",
    "weak_error",
    "weak_order",
]
