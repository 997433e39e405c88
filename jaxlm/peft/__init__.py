"""Fine-tuning of few parameters, each kind with a regular expression that selects them.

An adapter is further leaves of the parameter tree, so that optimizers, checkpoints and views take
it like any other parameter.
"""

from jaxlm.models.adapters import LORA, PREFIX
from jaxlm.peft._lora import lora, merge
from jaxlm.peft._prefix import prefix
from jaxlm.peft.adapters import load_adapter, save_adapter
from jaxlm.peft.bitfit import BITFIT, bitfit_selection
from jaxlm.peft.head import head_selection, untie
from jaxlm.peft.tunings import TUNINGS, BitFit, Head, Lora, Prefix, Tuning

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
