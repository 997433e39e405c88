"""Models in the Hugging Face layout: config.json, safetensors, tokenizer files; both ways.

Only safetensors and JSON are read; never pickle, never remote code.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.core.paths import flatten
from jaxlm.models.config import ModelConfig
from jaxlm.models.families import MODULES, Name, family, take
from jaxlm.models.initialise import nest, param_shapes
from jaxlm.models.language_model import LanguageModel

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SHIPPED = Path(__file__).parent.parent / "assets" / "model"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")


def from_pretrained(
    name_or_path: str | os.PathLike | None = None, param_dtype="float32", mesh=None
) -> LanguageModel:
    """Loads a model from a local folder or a hub id.

    Args:
      name_or_path: folder with config.json, one or several safetensors files and, if there is
        one, a tokenizer; or the id of such a repository on the Hugging Face hub; None for the
        small model that comes with the package.
      param_dtype: dtype of every parameter.
      mesh: a `jax.sharding.Mesh` over which the parameters are replicated; None leaves them on the
        default device.

    Returns:
      The model; `tokenizer` is None where the folder has none. `config.head` of an encoder is
      "mlm", "classifier" or "none" by what the checkpoint holds.

    Raises:
      UserError: folder missing, unknown architecture, no safetensors, truncated file, wrong shape.
    """
    folder = SHIPPED if name_or_path is None else _resolve(name_or_path)
    config, module = _config(folder)
    where = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with contextlib.ExitStack() as stack:
        checkpoint = _Checkpoint(folder, module, _open(folder, stack))
        config = checkpoint.match_head(config)
        flat = {
            path: jax.device_put(checkpoint.leaf(config, path, jnp.dtype(param_dtype)), where)
            for path in param_shapes(config)
        }
    return LanguageModel(config, nest(flat), _tokenizer(folder))


def _resolve(name_or_path) -> Path:
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    text = str(name_or_path)
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise UserError(f"model folder {text} does not exist; give a folder or a hub id")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
        return Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:
        raise UserError(
            f"model {text} is neither a folder nor could it be had from the hub "
            f"({type(error).__name__}); check the name and the network"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
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


def _config(folder: Path) -> tuple[ModelConfig, ModuleType]:
    hf, path = _read_json(folder / CONFIG), folder / CONFIG
    try:
        module = family(hf.get("model_type", ""))
    except KeyError as error:
        known = ", ".join(MODULES)
        raise UserError(f"{path} has the model_type {error}; supported are {known}") from None
    try:
        take(hf, "quantization_config", None)
        return module.read_config(hf), module
    except KeyError as error:
        raise UserError(f"{path} lacks the key {error}; complete it") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    except TypeError as error:
        raise UserError(f"{path} has a value of the wrong type; download it again") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
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


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, tuple[Any, str]]:
    """Every tensor's name, with the open file that holds it and its name there."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for path in _weight_files(folder):
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is truncated or not a safetensors file; download it again"
            ) from error
        for name in file.keys():  # noqa: SIM118 - the file is no dict
            tensors[_modern(name)] = file, name
    return tensors


def _modern(name: str) -> str:
    """Today's name of a tensor: the oldest checkpoints call a norm's weights gamma and beta."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """The open files of a model, read by our paths."""

    folder: Path
    module: ModuleType
    tensors: dict[str, tuple[Any, str]]

    def find(self, config: ModelConfig, path: str, layer: int = 0) -> tuple[Name, str] | None:
        """The first name of a leaf that the checkpoint holds, with or without the prefix."""
        for row in self.module.names(config):
            name = row.hf.format(layer=layer)
            for known in (name, name.removeprefix(self.module.PREFIX)):
                if row.path == path and known in self.tensors:
                    return row, known
        return None

    def match_head(self, config: ModelConfig) -> ModelConfig:
        """Settles the head of an encoder by what the checkpoint holds."""
        if config.kind == "decoder":
            return config
        if self.find(config, "mlm.dense.kernel"):
            return dataclasses.replace(config, head="mlm")
        classifier = dataclasses.replace(config, head="classifier", pooled=True)
        bias = self.find(classifier, "classifier.bias")
        if bias and self.find(classifier, "pooler.kernel"):
            return dataclasses.replace(classifier, num_labels=self.tensor(bias[1]).shape[0])
        return dataclasses.replace(config, pooled=self.find(config, "pooler.kernel") is not None)

    def tensor(self, name: str) -> np.ndarray:
        file, stored = self.tensors[name]
        return file.get_tensor(stored)

    def leaf(self, config: ModelConfig, path: str, dtype) -> np.ndarray:
        """One of our leaves, its layers stacked."""
        host = np.empty(param_shapes(config)[path], dtype)
        for layer, block in enumerate(host if path.startswith("layers.") else host[None]):
            found = self.find(config, path, layer)
            if found is None:
                names = (row.hf for row in self.module.names(config) if row.path == path)
                raise UserError(
                    f"model folder {self.folder} has no tensor {next(names).format(layer=layer)}; "
                    f"its weights are incomplete, or not those of a {config.family} model"
                )
            row, name = found
            stored = self.tensor(name)
            value = stored.T if row.transpose else stored
            wanted = (*block.shape[:-1], row.part[1] * block.shape[-1])
            if value.shape != wanted:
                raise UserError(
                    f"{self.folder}: {name} has the shape {list(stored.shape)}, {CONFIG} asks for "
                    f"{list(wanted[::-1] if row.transpose else wanted)}; one of them is wrong"
                )
            index, count = row.part
            grouped = value.reshape(*block.shape[:-1], row.groups, count, -1)
            block[...] = grouped[..., index, :].reshape(block.shape)
        return host


def _tokenizer(folder: Path):
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({type(error).__name__}); "
            "download its files again"
        ) from error


def save_pretrained(lm: LanguageModel, directory: str | os.PathLike, params=None) -> None:
    """Writes a model in the HF layout; transformers opens it and gives the same logits.

    Args:
      lm: the model; its tokenizer is written too.
      directory: created if missing. Weights and configuration are written under a temporary name
        and renamed.
      params: in place of `lm.params`.

    Raises:
      UserError: if the directory cannot be written, or `params` are not those of this model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    folder = Path(directory)
    flat = {leaf.path: leaf.value for leaf in flatten(lm.params if params is None else params)[0]}
    module = family(lm.config.family)
    tensors = _export(lm.config, module, flat)
    dtype = str(next(iter(tensors.values())).dtype)
    text = json.dumps({**module.write_config(lm.config), "dtype": dtype}, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt"}))
        _replace(folder / CONFIG, lambda path: path.write_text(text))
        if lm.tokenizer is not None:
            lm.tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the model to {folder}: {reason}; choose another") from error


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)


def _export(config: ModelConfig, module: ModuleType, flat) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    shapes = param_shapes(config)
    for row in module.names(config):
        if row.path not in shapes:
            continue
        if np.shape(flat.get(row.path)) != shapes[row.path]:
            raise UserError(f"the parameters have no {row.path} of shape {list(shapes[row.path])}")
        host = np.asarray(flat[row.path])
        name = row.hf.removeprefix(module.PREFIX) if config.head == "none" else row.hf
        index, count = row.part
        for layer, value in enumerate(host if row.path.startswith("layers.") else host[None]):
            shape = (*value.shape[:-1], count * value.shape[-1])
            tensor = tensors.setdefault(
                name.format(layer=layer),
                np.empty(shape[::-1] if row.transpose else shape, host.dtype),
            )
            whole = tensor.T if row.transpose else tensor
            grouped = value.reshape(*value.shape[:-1], row.groups, -1)
            size = grouped.shape[-1]
            for group in range(row.groups):
                start = (group * count + index) * size
                whole[..., start : start + size] = grouped[..., group, :]
    return tensors
