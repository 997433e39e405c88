"""Zeroth-order fine-tuning: gradients and updates from forward passes alone."""

from jaxlm.zo.estimators import Perturbation, SPSAEstimate, materialize, spsa, value_and_grad
from jaxlm.zo.optimizers import (
    MezoInfo,
    MezoState,
    ScaleBySpsaState,
    ZerothOrderOptimizer,
    descend,
    jit_step,
    mezo,
    scale_by_spsa,
)
from jaxlm.zo.samplers import Gaussian, Rademacher, Sampler, gaussian, rademacher
from jaxlm.zo.trajectory import Trajectory

__all__ = [
    "Gaussian",
    "MezoInfo",
    "MezoState",
    "Perturbation",
    "Rademacher",
    "SPSAEstimate",
    "Sampler",
    "ScaleBySpsaState",
    "Trajectory",
    "ZerothOrderOptimizer",
    "descend",
    "gaussian",
    "jit_step",
    "materialize",
    "mezo",
    "rademacher",
    "scale_by_spsa",
    "spsa",
    "value_and_grad",
]
