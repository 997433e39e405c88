"""Training as a stochastic process: its equation, scaling rules and laws, momentum and noise."""

from jaxlm.dynamics._crossover import crossover, crossover_probability
from jaxlm.dynamics._svag import SVAG, svag, svag_coefficients, svag_value_and_grad
from jaxlm.dynamics.averages import average_params, average_params_by_compute
from jaxlm.dynamics.laws import (
    PowerLaw,
    bootstrap_interval,
    bootstrap_power_law,
    fit_chinchilla,
    fit_power_law,
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

__all__ = [
    "SVAG",
    "MomentumComparison",
    "NoiseStats",
    "NoiseSums",
    "OptHParams",
    "PowerLaw",
    "RunningNoise",
    "StepLaw",
    "average_params",
    "average_params_by_compute",
    "bootstrap_interval",
    "bootstrap_power_law",
    "compare_momentum",
    "coupled_iterate",
    "crossover",
    "crossover_probability",
    "effective_lr_schedule",
    "fit_chinchilla",
    "fit_power_law",
    "gaussian_example_weights",
    "grad_noise_stats",
    "max_scale",
    "ngos",
    "pair_indices",
    "scale_rule",
    "scale_schedule",
    "sgdm",
    "split_halves",
    "step_law",
    "svag",
    "svag_coefficients",
    "svag_value_and_grad",
    "value_and_grad_with_noise",
]
