"""Training as a stochastic process: equations, scaling rules, momentum, noise, workers, laws.

The functions that most users need are here. The others are in six modules: `sde` (equations of
optimizers), `simulation` (their paths), `local` (workers that average rarely), `noise` (gradient
noise), `momentum`, and `laws` (scaling laws).
"""

from jaxlm.dynamics import laws, local, momentum, noise, sde, simulation
from jaxlm.dynamics._svag import (
    SVAG,
    split_halves,
    svag,
    svag_coefficients,
    svag_value_and_grad,
)
from jaxlm.dynamics.local import local_update, qsr
from jaxlm.dynamics.scaling import OptHParams, scale_rule
from jaxlm.dynamics.sde import sgd_sde
from jaxlm.dynamics.simulation import run_optimizer, simulate

__all__ = [
    "SVAG",
    "OptHParams",
    "laws",
    "local",
    "local_update",
    "momentum",
    "noise",
    "qsr",
    "run_optimizer",
    "scale_rule",
    "sde",
    "sgd_sde",
    "simulate",
    "simulation",
    "split_halves",
    "svag",
    "svag_coefficients",
    "svag_value_and_grad",
]
