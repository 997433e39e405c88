"""What a model's folder holds besides tensors: its configuration, and which files have weights."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.models.config import ModelConfig
from jaxlm.models.families import MODULES, family, take

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
GENERATION = "generation_config.json"


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object; UserError where the file is missing or holds something else."""
    if not path.is_file():
        raise UserError(
            f"model folder {path.parent} has no {path.name}; it is not in the HF layout"
        )
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} does not hold one JSON object; download it again")
    return found


def read_config(folder: Path) -> tuple[ModelConfig, ModuleType]:
    """Our configuration and the family's module; UserError where they cannot be had."""
    hf, path = read_json(folder / CONFIG), folder / CONFIG
    try:
        module = family(hf.get("model_type", ""))
    except KeyError as error:
        known = ", ".join(MODULES)
        raise UserError(f"{path} has the model_type {error}; supported are {known}") from None
    try:
        take(hf, "quantization_config", None)
        config = module.read_config(hf)
    except KeyError as error:
        raise UserError(f"{path} lacks the key {error}; complete it") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    except TypeError as error:
        raise UserError(f"{path} has a value of the wrong type; download it again") from error
    stop_ids = _stop_ids(folder) or config.stop_ids
    return config.replace(stop_ids=() if stop_ids == (config.eos_id,) else stop_ids), module


def _stop_ids(folder: Path) -> tuple[int, ...]:
    """The end tokens of generation_config.json, which chat models list there alone."""
    path = folder / GENERATION
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(i, int) for i in ids):
        raise UserError(f"{path} has a value of the wrong type; download it again")
    return tuple(ids)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model; UserError where one is missing."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise UserError(f"{folder / INDEX} has no weight_map; download it again")
        names = sorted(set(places.values()))
        for name in names:
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder / INDEX} names {name}, which is missing; download it again"
                )
        return [folder / name for name in names]
    for ending in ("bin", "pt", "pth"):
        for path in sorted(folder.glob(f"*.{ending}")):
            raise UserError(
                f"model folder {folder} has only the pickle {path.name}, which is never read; "
                "convert it to safetensors"
            )
    raise UserError(f"model folder {folder} has no {WEIGHTS}; download it again")


def modern_name(name: str) -> str:
    """Today's name of a tensor: the oldest checkpoints call a norm's weights gamma and beta."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
