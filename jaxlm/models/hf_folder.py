"""What a model's folder holds besides tensors: its configuration, and which files have weights."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxlm.artifacts import files
from jaxlm.artifacts.files import inside
from jaxlm.core.errors import UserError
from jaxlm.models.config import ModelConfig
from jaxlm.models.families import MODULES, family, take
from jaxlm.models.hf_fields import TOKENS, check_config, check_fields, check_sizes

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
GENERATION = "generation_config.json"
_OF_A_MODEL = re.compile(
    r"(config|(generation|adapter|preprocessor|processor|tokenizer)_config|tokenizer|vocab"
    r"|special_tokens_map|added_tokens|chat_template)\.json"
    r"|(vocab|merges)\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model"
    r"|chat_template\.jinja|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)


def is_of_a_model(path: Path) -> bool:
    """Whether a reader would take a file for a part of the model of its folder, by its name.

    Pickles are not, nor are adapters without their configuration: they stay where a model is saved.
    """
    if path.is_dir():
        return path.name == "additional_chat_templates"
    return _OF_A_MODEL.fullmatch(path.name) is not None


def check_regular(folder: Path) -> None:
    """Refuses a folder in which a pipe, a device or a folder has the name of a model's file."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        known = _OF_A_MODEL.fullmatch(path.name) is not None
        if known and path.exists() and not path.is_file():
            raise UserError(f"{path}: not a regular file. Give the file that was written.")


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object; UserError where the file is missing or holds something else."""
    try:
        return files.read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such file. Give a model folder in the HF layout."
        ) from None


def read_config(folder: Path) -> tuple[ModelConfig, ModuleType]:
    """Our configuration and the family's module; UserError where they cannot be had."""
    check_regular(folder)
    hf, path = read_json(folder / CONFIG), folder / CONFIG
    try:
        module = family(hf.get("model_type", ""))
    except KeyError as error:
        known = ", ".join(MODULES)
        raise UserError(
            f"{path}: model_type is not supported (got {error}). Choose one of {known}."
        ) from None
    check_config(hf, str(path))
    try:
        take(hf, "quantization_config", None)
        config = module.read_config(hf)
    except KeyError as error:
        raise UserError(
            f"{path}: the key {error} is missing. Add it, or download the file again."
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    check_sizes(config, str(path))
    stop_ids = _stop_ids(folder) or config.stop_ids
    stop_ids = () if stop_ids == (config.eos_id,) else stop_ids
    return config.replace(stop_ids=stop_ids, label_names=_label_names(hf)), module


def _label_names(hf: dict[str, Any]) -> tuple[str, ...]:
    """The names of a classifier's classes, if they say more than their numbers."""
    found = hf.get("id2label") or {}
    names = tuple(found[str(i)] for i in range(len(found)))
    return () if names == tuple(f"LABEL_{i}" for i in range(len(names))) else names


def _stop_ids(folder: Path) -> tuple[int, ...]:
    """The end tokens of generation_config.json, which chat models list there alone."""
    path = folder / GENERATION
    found = read_json(path) if path.is_file() else {}
    check_fields(found, {"eos_token_id": TOKENS}, str(path))
    ids = found.get("eos_token_id")
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model; UserError where one is missing or lies elsewhere."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{folder / INDEX}: has no weight_map. Download it again.")
        found = {inside(folder, name, str(folder / INDEX)) for name in places.values()}
        for path in sorted(found):
            if not path.is_file():
                raise UserError(
                    f"{folder / INDEX}: names {path.name}, which is missing. Download it again."
                )
        return sorted(found)
    for ending in ("bin", "pt", "pth"):
        for path in sorted(folder.glob(f"*.{ending}")):
            raise UserError(
                f"{path}: is a pickle, which is never read, and there is no {WEIGHTS}. Convert it "
                "to safetensors."
            )
    raise UserError(f"{folder / WEIGHTS}: there is no such file. Download it again.")


def modern_name(name: str) -> str:
    """Today's name of a tensor: the oldest checkpoints call a norm's weights gamma and beta."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
