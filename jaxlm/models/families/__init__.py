"""One file a family: HF config to ours, HF names to our paths.

A family module has `ARCHITECTURES` (HF architecture name -> head), `read_config(hf)`,
`write_config(config)` and `names(config)`, a tuple of `Name`.
"""

import dataclasses
import importlib
from types import ModuleType
from typing import Any

MODULES = {"gpt2": "gpt2", "llama": "llama"}


@dataclasses.dataclass(frozen=True)
class Name:
    """Where one of our leaves lives in a HF checkpoint.

    Attributes:
      path: our path.
      hf: the HF name, with `{layer}` under `layers`.
      transpose: torch keeps Linear weights as [out, in], we as [in, out].
      part: (i, n): our leaf is the i-th of n equal parts of the HF tensor, on its last axis after the
        transpose.
    """

    path: str
    hf: str
    transpose: bool = False
    part: tuple[int, int] = (0, 1)


def linear(path: str, hf: str, bias: bool) -> list[Name]:
    """The names of a torch Linear: `kernel` (transposed) and, if there is one, `bias`."""
    kernel = Name(path + ".kernel", hf + ".weight", transpose=True)
    return [kernel, Name(path + ".bias", hf + ".bias")] if bias else [kernel]


def layer_norm(path: str, hf: str, bias: bool = True) -> list[Name]:
    """The names of a torch LayerNorm, or of an RMSNorm without bias."""
    scale = Name(path + ".scale", hf + ".weight")
    return [scale, Name(path + ".bias", hf + ".bias")] if bias else [scale]


def take(hf: dict[str, Any], key: str, accepted: Any) -> None:
    """Raises ValueError if the HF config sets `key` to a value that this library does not implement."""
    if hf.get(key, accepted) != accepted:
        raise ValueError(f"{key}={hf[key]!r} is not supported, only {accepted!r}")


def family(model_type: str) -> ModuleType:
    """The family module of a HF `model_type`.

    Raises:
      KeyError: for an unknown one.
    """
    return importlib.import_module(f"{__name__}.{MODULES[model_type]}")
