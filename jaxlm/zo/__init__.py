"""Zeroth-order fine-tuning: gradients and updates from forward passes alone."""

from jaxlm.zo import factored, rules
from jaxlm.zo.estimators import (
    Estimator,
    SPSAEstimate,
    central,
    estimator,
    forward_gradient,
    materialize,
    one_sided,
    population,
    residual_feedback,
    spsa,
    value_and_grad,
)
from jaxlm.zo.master import MasterMemory, float32_master
from jaxlm.zo.methods import (
    fzoo,
    lozo,
    lozo_momentum,
    meazo,
    mezo,
    mezo_adam,
    mezo_momentum,
    zo_muon,
)
from jaxlm.zo.optimizers import (
    ZerothOrderInfo,
    ZerothOrderOptimizer,
    ZerothOrderState,
    descend,
    jit_step,
    zeroth_order,
)
from jaxlm.zo.perturbation import Perturbation
from jaxlm.zo.residual import lozo_residual
from jaxlm.zo.samplers import (
    Gaussian,
    Rademacher,
    Sampler,
    Sphere,
    gaussian,
    rademacher,
    sphere,
)
from jaxlm.zo.sites import Site
from jaxlm.zo.structured import (
    expectation_modified,
    layer_blocks,
    low_rank,
    magnitude,
    probed_norms,
    subspace,
    tree_norms,
    variance_modified,
)
from jaxlm.zo.trajectory import Trajectory, replay
from jaxlm.zo.transformation import ScaleBySpsaState, scale_by_spsa

__all__ = [
    "Estimator",
    "Gaussian",
    "MasterMemory",
    "Perturbation",
    "Rademacher",
    "SPSAEstimate",
    "Sampler",
    "ScaleBySpsaState",
    "Site",
    "Sphere",
    "Trajectory",
    "ZerothOrderInfo",
    "ZerothOrderOptimizer",
    "ZerothOrderState",
    "central",
    "descend",
    "estimator",
    "expectation_modified",
    "factored",
    "float32_master",
    "forward_gradient",
    "fzoo",
    "gaussian",
    "jit_step",
    "layer_blocks",
    "low_rank",
    "lozo",
    "lozo_momentum",
    "lozo_residual",
    "magnitude",
    "materialize",
    "meazo",
    "mezo",
    "mezo_adam",
    "mezo_momentum",
    "one_sided",
    "population",
    "probed_norms",
    "rademacher",
    "replay",
    "residual_feedback",
    "rules",
    "scale_by_spsa",
    "sphere",
    "spsa",
    "subspace",
    "tree_norms",
    "value_and_grad",
    "variance_modified",
    "zeroth_order",
    "zo_muon",
]
