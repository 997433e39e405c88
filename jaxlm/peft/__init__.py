"""Parameter-efficient fine-tuning: each kind selects what is trained by a regular expression.

An adapter is a set of additional leaves in the parameter tree, so optimizers, checkpoints and views
treat it like any other parameter.
"""

from jaxlm.models.adapters import LORA, PREFIX
from jaxlm.peft.adapters import load_adapter, save_adapter
from jaxlm.peft.methods import (
    BITFIT,
    TUNINGS,
    BitFit,
    Head,
    Lora,
    Prefix,
    Tuning,
    bitfit_selection,
    head_selection,
    lora,
    merge,
    prefix,
    untie,
)

__all__ = [
    "BITFIT",
    "LORA",
    "PREFIX",
    "TUNINGS",
    "BitFit",
    "Head",
    "Lora",
    "Prefix",
    "Tuning",
    "bitfit_selection",
    "head_selection",
    "load_adapter",
    "lora",
    "merge",
    "prefix",
    "save_adapter",
    "untie",
]
