"""The optimizers that a configuration may name.

`optimizer: {name: adamw, learning_rate: 1e-3}` chooses a dataclass of `OPTIMIZERS` and fills it.
The dataclasses hold numbers and words; `jaxlm.train.state.method` turns one into a training step.
"""

import optax

from jaxlm.train.first_order import Adam, FirstOrder, Muon, ScheduleFree, Sgd, decay_mask, derived
from jaxlm.train.settings import Optimizer
from jaxlm.train.zeroth_order import ZEROTH_ORDER, Mezo, ZerothOrder, configuration

__all__ = [
    "OPTIMIZERS",
    "Adam",
    "FirstOrder",
    "Mezo",
    "Muon",
    "Optimizer",
    "ScheduleFree",
    "Sgd",
    "ZerothOrder",
    "configuration",
    "decay_mask",
    "derived",
]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    **ZEROTH_ORDER,
    "sgd": Sgd,
    "adam": Adam,
    "adamw": Adam,
    "muon": Muon,
    "lion": derived(optax.lion, 1e-4),
    "adafactor": derived(optax.adafactor, 1e-3),
    "schedule_free_adamw": ScheduleFree,
    "rmsprop": derived(optax.rmsprop, 1e-4),
}
