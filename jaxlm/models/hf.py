"""Models in the Hugging Face layout: config.json, safetensors, tokenizer files; both ways.

Only safetensors and JSON are read; never pickle, never remote code.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.core.paths import flatten
from jaxlm.models.config import ModelConfig
from jaxlm.models.families import MODULES, Name, family
from jaxlm.models.initialise import nest, param_shapes
from jaxlm.models.language_model import LanguageModel

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
_OLD_NAMES = ((".gamma", ".weight"), (".beta", ".bias"))


def from_pretrained(
    name_or_path: str | os.PathLike, param_dtype="float32", mesh=None
) -> LanguageModel:
    """Loads a model from a local folder or a hub id.

    Args:
      name_or_path: folder with config.json, one or several safetensors files and, if there is one, a
        tokenizer; or the id of such a repository on the Hugging Face hub.
      param_dtype: dtype of every parameter.
      mesh: a `jax.sharding.Mesh` over which the parameters are replicated; None leaves them on the
        default device.

    Returns:
      The model; `tokenizer` is None where the folder has none. An encoder without a masked-token head
      comes back with `config.head == "none"` (or "classifier" where it has one).

    Raises:
      UserError: folder missing, unknown architecture, no safetensors, truncated file, wrong shape.
    """
    folder = _resolve(name_or_path)
    hf = _read_json(folder / CONFIG)
    config, module = _config(hf, folder)
    where = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with contextlib.ExitStack() as stack:
        read = _reader(folder, stack)
        config, table = _match_head(config, module, read, folder)
        flat = _load(config, table, read, folder, jnp.dtype(param_dtype), where)
    return LanguageModel(config, nest(flat), _tokenizer(folder))


def _resolve(name_or_path) -> Path:
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    text = str(name_or_path)
    if (
        text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or os.environ.get("HF_HUB_OFFLINE") == "1"
    ):
        raise UserError(f"model folder {text} does not exist; give a folder or a hub id")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
        return Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:
        reason = type(error).__name__
        raise UserError(
            f"model {text} is neither a folder nor could it be had from the hub ({reason}); "
            "check the name and the network"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"model folder {path.parent} has no {path.name}; it is not in the HF layout"
        )
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON; download it again") from error


def _config(hf: dict[str, Any], folder: Path):
    try:
        module = family(hf.get("model_type", ""))
    except KeyError:
        raise UserError(
            f"{folder / CONFIG} has model_type {hf.get('model_type')!r}; "
            f"known are {', '.join(sorted(MODULES))}"
        ) from None
    try:
        return module.read_config(hf), module
    except KeyError as error:
        raise UserError(f"{folder / CONFIG} lacks the key {error}; complete it") from None
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None


def _reader(folder: Path, stack: contextlib.ExitStack):
    """Returns `{name: handle}` over all safetensors files of a folder, opened lazily."""
    from safetensors import SafetensorError, safe_open

    if (folder / INDEX).is_file():
        files = sorted(set(_read_json(folder / INDEX)["weight_map"].values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(
            path.name for path in folder.glob("*.pt")
        )
        if pickles:
            raise UserError(
                f"model folder {folder} has only the pickle {pickles[0]}, which is never read; "
                "convert it to safetensors"
            )
        raise UserError(f"model folder {folder} has no safetensors file; add {WEIGHTS}")
    handles: dict[str, Any] = {}
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"{folder / INDEX} names {file}, which is missing; download it again")
        try:
            handle = stack.enter_context(safe_open(folder / file, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{folder / file} is truncated or not a safetensors file; download it again"
            ) from error
        for name in handle.keys():  # noqa: SIM118 - the handle is no dict
            for old, new in _OLD_NAMES:
                if name.endswith(old):
                    handles[name.removesuffix(old) + new] = (handle, name)
            handles[name] = (handle, name)
    return handles


def _match_head(config: ModelConfig, module, handles, folder: Path):
    """Settles the head by what the checkpoint holds, and finds how its names are prefixed."""
    if hasattr(module, "match_head"):
        config = module.match_head(config, handles)
    first = module.names(config)[0].hf
    prefix = module.PREFIX if module.PREFIX + first in handles else ""
    if prefix + first not in handles:
        raise UserError(
            f"model folder {folder} has no tensor {module.PREFIX + first}; "
            f"its weights are not those of a {config.family} model"
        )
    return config, _table(config, module, prefix)


def _table(config: ModelConfig, module, prefix: str) -> dict[str, Name]:
    rows = [Name(n.path, prefix + n.hf, n.transpose, n.part) for n in module.names(config)]
    return {row.path: row for row in (*rows, *module.head_names(config))}


def _load(config, table, handles, folder, dtype, where) -> dict[str, jax.Array]:
    flat = {}
    for path, shape in param_shapes(config).items():
        row = table[path]
        stacked = path.startswith("layers.")
        one = shape[1:] if stacked else shape
        host = np.empty(shape, dtype)
        for layer in range(config.num_layers if stacked else 1):
            value = _tensor(row, layer, handles, folder)
            if value.shape != one:
                raise UserError(
                    f"{folder}: {row.hf.format(layer=layer)} gives {path} the shape "
                    f"{list(value.shape)}, {CONFIG} asks for {list(one)}; one of them is wrong"
                )
            host[layer if stacked else ...] = value
        flat[path] = jax.device_put(host, where)
    return flat


def _tensor(row: Name, layer: int, handles, folder: Path) -> np.ndarray:
    name = row.hf.format(layer=layer)
    if name not in handles:
        raise UserError(f"model folder {folder} has no tensor {name}; the checkpoint is incomplete")
    handle, stored = handles[name]
    value = handle.get_tensor(stored)
    if row.transpose:
        value = value.T
    index, count = row.part
    width = value.shape[-1] // count if value.ndim else 1
    return value[..., index * width : (index + 1) * width] if count > 1 else value


def _tokenizer(folder: Path):
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def save_pretrained(lm: LanguageModel, directory: str | os.PathLike, params=None) -> None:
    """Writes a model in the HF layout; transformers opens it and gives the same logits.

    Args:
      lm: the model; its tokenizer is written too.
      directory: created if missing. Every file is written under a temporary name and renamed.
      params: in place of `lm.params`.

    Raises:
      UserError: if the directory cannot be written.
    """
    from safetensors.numpy import save_file

    folder = Path(directory)
    params = lm.params if params is None else params
    module = family(lm.config.family)
    tensors = _export(lm.config, module, {leaf.path: leaf.value for leaf in flatten(params)[0]})
    dtype = str(next(iter(tensors.values())).dtype)
    hf = {**module.write_config(lm.config), "dtype": dtype}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / (WEIGHTS + ".tmp")
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(folder / WEIGHTS)
        temporary = folder / (CONFIG + ".tmp")
        temporary.write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n")
        temporary.replace(folder / CONFIG)
        if lm.tokenizer is not None:
            lm.tokenizer.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"cannot write the model to {folder}: {error.strerror or error}") from error


def _export(config: ModelConfig, module, flat) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {}
    table = _table(config, module, module.PREFIX)
    for path, shape in param_shapes(config).items():
        row = table[path]
        host = np.asarray(flat[path])
        if host.shape != shape:
            raise UserError(
                f"{path} has the shape {list(host.shape)}, the model asks for {list(shape)}"
            )
        for layer, value in enumerate(host if path.startswith("layers.") else host[None]):
            value = value.T if row.transpose else value
            parts.setdefault(row.hf.format(layer=layer), []).append(value)
    return {
        name: np.ascontiguousarray(
            np.concatenate(values, axis=-1) if len(values) > 1 else values[0]
        )
        for name, values in parts.items()
    }
