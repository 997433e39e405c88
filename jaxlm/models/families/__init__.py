"""One file a family: HF config to ours, HF names to our paths.

A family module has `PREFIX`, the HF name of the model without its head, which some checkpoints
leave out; `read_config(hf)` and `write_config(config)`; and `names(config)`, a list of `Name`. A
path may stand there several times: the first name that a checkpoint holds is read, all of them are
written.
"""

import dataclasses
import importlib
from types import ModuleType
from typing import Any

from jaxlm.models.config import Activation, ModelConfig

MODULES = ("bert", "gpt2", "llama", "opt", "roberta")
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclasses.dataclass(frozen=True)
class Name:
    """Where one of our leaves lives in a HF checkpoint.

    Attributes:
      path: our path.
      hf: the HF name, with `{layer}` under `layers`.
      transpose: torch keeps Linear weights as [out, in], we as [in, out].
      part: (i, n): our leaf is the i-th of n equal parts of the HF tensor, on its last axis after
        the transpose.
    """

    path: str
    hf: str
    transpose: bool = False
    part: tuple[int, int] = (0, 1)


def linear(path: str, hf: str) -> list[Name]:
    """The names of a torch Linear: `kernel` (transposed) and `bias`."""
    return [
        Name(path + ".kernel", hf + ".weight", transpose=True),
        Name(path + ".bias", hf + ".bias"),
    ]


def layer_norm(path: str, hf: str) -> list[Name]:
    """The names of a torch LayerNorm or RMSNorm."""
    return [Name(path + ".scale", hf + ".weight"), Name(path + ".bias", hf + ".bias")]


def take(hf: dict[str, Any], key: str, accepted: Any) -> None:
    """Raises ValueError if the HF config sets `key` to something that is not implemented here."""
    if hf.get(key, accepted) != accepted:
        raise ValueError(f"{key}={hf[key]!r} is not supported, only {accepted!r}")


def read_activation(hf: dict[str, Any], key: str, default: str) -> Activation:
    """Our name of the activation at `key`; ValueError for one that this library does not have."""
    name = hf.get(key, default)
    if name not in _ACTIVATIONS:
        raise ValueError(f"{key}={name!r} is not supported, only {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def write_activation(activation: Activation) -> str:
    """The HF name of one of our activations."""
    return next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == activation)


def read_special_ids(hf: dict[str, Any]) -> dict[str, Any]:
    """`bos_id`, `eos_id` and `pad_id` for `ModelConfig`; the first where HF lists several."""
    ids = {name: hf.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {f"{name}_id": i[0] if isinstance(i, list) else i for name, i in ids.items()}


def write_special_ids(config: ModelConfig) -> dict[str, int | None]:
    """The HF keys of the special token ids."""
    return {f"{name}_token_id": getattr(config, name + "_id") for name in ("bos", "eos", "pad")}


def family(model_type: str) -> ModuleType:
    """The module of a HF `model_type`.

    Raises:
      KeyError: for an unknown one.
    """
    if model_type not in MODULES:
        raise KeyError(model_type)
    return importlib.import_module(f"{__name__}.{model_type}")
