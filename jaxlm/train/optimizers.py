"""The optimizers that a configuration may name.

`optimizer: {name: adamw, learning_rate: 1e-3}` chooses a dataclass of `OPTIMIZERS` and fills it.
The classes hold numbers only; `jaxlm.train.state.method` turns one into a training step.
"""

from jaxlm.train.first_order import Adam, FirstOrder, Muon, Sgd, decay_mask
from jaxlm.train.settings import Optimizer
from jaxlm.train.zeroth_order import (
    Fzoo,
    Lozo,
    Meazo,
    Mezo,
    MezoAdam,
    MezoMomentum,
    ZerothOrder,
    ZoMuon,
)

__all__ = [
    "OPTIMIZERS",
    "Adam",
    "FirstOrder",
    "Fzoo",
    "Lozo",
    "Meazo",
    "Mezo",
    "MezoAdam",
    "MezoMomentum",
    "Muon",
    "Optimizer",
    "Sgd",
    "ZerothOrder",
    "ZoMuon",
    "decay_mask",
]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "mezo": Mezo,
    "mezo_momentum": MezoMomentum,
    "mezo_adam": MezoAdam,
    "meazo": Meazo,
    "fzoo": Fzoo,
    "lozo": Lozo,
    "zo_muon": ZoMuon,
    "sgd": Sgd,
    "adam": Adam,
    "adamw": Adam,
    "muon": Muon,
}
