"""Low-rank adapters as folders of Hugging Face PEFT, both ways.

A folder names HF modules, `base_model.model.<module>.lora_A.weight` [r, in] and `lora_B.weight`
[out, r]. Where a family keeps queries, keys and values in one module, the adapters of our three
kernels are blocks of that module's: A stacks theirs, and B has zeros between the blocks. What is
read from such a module gives all three the same A.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.artifacts.arrays import check_finite
from jaxlm.artifacts.files import file_path
from jaxlm.artifacts.folder import replace_contents
from jaxlm.core.errors import UserError
from jaxlm.core.paths import LAYERS
from jaxlm.models import LanguageModel, ModelConfig, param_shapes
from jaxlm.models.families import Name, family
from jaxlm.models.hf_tensors import runs
from jaxlm.models.initialise import nest, unnest
from jaxlm.peft._lora import refuse_second
from jaxlm.peft.settings import CONFIG, read_settings, write_settings

WEIGHTS = "adapter_model.safetensors"
ROOT = "base_model.model."
KERNEL, LEFT, RIGHT = ".kernel", ".lora_a", ".lora_b"


def _modules(config: ModelConfig) -> dict[str, list[tuple[Name, int | None]]]:
    """HF module -> the kernels of ours that lie in it, with their layers."""
    module, shapes = family(config.family), param_shapes(config)
    found: dict[str, list[tuple[Name, int | None]]] = {}
    for row in module.names(config):
        if row.path in shapes and row.path.endswith(KERNEL):
            name = row.hf.removesuffix(".weight")
            name = name.removeprefix(module.PREFIX) if config.head == "none" else name
            stacked = row.path.startswith(LAYERS + ".")
            for layer in range(config.num_layers) if stacked else (None,):
                found.setdefault(name.format(layer=layer), []).append((row, layer))
    return found


def save_adapter(
    lm: LanguageModel, directory: str | os.PathLike, base_model: str | None = None
) -> None:
    """Writes the low-rank adapters of a model as a folder that PEFT opens.

    Args:
      lm: a model with adapters; of its other parameters nothing is written.
      directory: created if missing.
      base_model: folder or hub id of the model without adapters, which the folder then names.

    Raises:
      UserError: if the model has no adapters, or the directory cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    modules = _modules(lm.config)
    pairs = {name: _pair(rows, unnest(lm.params)) for name, rows in modules.items()}
    pairs = {name: pair for name, pair in pairs.items() if pair is not None}
    if not pairs:
        raise UserError("lm: has no LoRA adapter to save. Call jaxlm.peft.lora first.")
    rank = max(left.shape[0] for left, _ in pairs.values())
    tensors = {}
    for name, (left, right) in pairs.items():
        more = (0, rank - left.shape[0])
        padded = np.pad(left, [more, (0, 0)]), np.pad(right, [(0, 0), more])
        for letter, matrix in zip("AB", padded, strict=True):
            tensors[f"{ROOT}{name}.lora_{letter}.weight"] = np.ascontiguousarray(matrix)
    settings = write_settings(
        rank,
        lm.config.lora_scale,
        base_model=base_model,
        task="CAUSAL_LM" if lm.config.head == "lm" else None,
        targets=_targets(list(modules), list(pairs)),
        transposed=not any(row.transpose for name in pairs for row, _ in modules[name]),
    )
    folder = file_path(directory, "directory")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="saving-") as name:
            temporary = Path(name)
            save_file(tensors, temporary / WEIGHTS, {"format": "pt"})
            (temporary / CONFIG).write_text(settings, encoding="utf-8")
            replace_contents(
                temporary, folder, last=CONFIG, stale=lambda path: path.name in (CONFIG, WEIGHTS)
            )
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{folder}: the adapter cannot be written ({reason}). Choose another folder."
        ) from error


def _pair(rows: list[tuple[Name, int | None]], flat: dict[str, Any]) -> Any:
    """A [r, in] and B [out, r] of one HF module, or None where none of its kernels has any."""
    parts = []
    for row, layer in rows:
        stem = row.path.removesuffix(KERNEL)
        if stem + LEFT in flat:
            at = ... if layer is None else layer
            left, right = (np.asarray(flat[stem + name][at]).T for name in (LEFT, RIGHT))
            parts.append((row, left, right))
    if not parts:
        return None
    first, _, one = parts[0]
    whole = np.concatenate([left for _, left, _ in parts])
    blocks = np.zeros((first.part[1] * one.shape[0], whole.shape[0]), one.dtype)
    start = 0
    for row, left, right in parts:
        stop = start + left.shape[0]
        for ours, theirs in runs(row, right.shape[0], 0, right.shape[0]):
            blocks[theirs, start:stop] = right[ours]
        start = stop
    return whole, blocks


def _targets(modules: list[str], chosen: list[str]) -> list[str]:
    """The last parts of the chosen names, where these alone end so; else the whole names."""
    ends = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    meant = [name for name in modules if name.rsplit(".", 1)[-1] in ends]
    return ends if len(meant) == len(chosen) else sorted(chosen)


def load_adapter(
    lm: LanguageModel, directory: str | os.PathLike, *, dtype="float32"
) -> LanguageModel:
    """Reads a LoRA folder of PEFT, or of `save_adapter`, into a model.

    Args:
      lm: the base model; its kernels may be packed.
      directory: folder with adapter_config.json and adapter_model.safetensors.
      dtype: of the adapters.

    Returns:
      A model like that of `jaxlm.peft.lora`.

    Raises:
      UserError: if the folder is incomplete, holds another kind of adapter or one with settings
        that are not supported, or is for another model; or if the model has an adapter.
    """
    refuse_second(lm)
    folder = file_path(directory, "adapter")
    rank, scale = read_settings(folder)
    tensors = _read_tensors(folder)
    modules, shapes = _modules(lm.config), param_shapes(lm.config)
    new: dict[str, Any] = {}
    for name in sorted({name.rsplit(".lora_", 1)[0] for name in tensors}):
        rows = _find(modules, name, family(lm.config.family).PREFIX)
        if rows is None:
            raise UserError(
                f"{folder}: {name} is no module of this {lm.config.family} model. Give an adapter "
                "of this model."
            )
        size_in = shapes[rows[0][0].path][-2]
        size_out = shapes[rows[0][0].path][-1] * rows[0][0].part[1]
        left = _tensor(folder, tensors, name + ".lora_A.weight", (rank, size_in), dtype)
        right = _tensor(folder, tensors, name + ".lora_B.weight", (size_out, rank), dtype)
        for row, layer in rows:
            size = shapes[row.path][-1]
            part = np.empty((rank, size), right.dtype)
            for ours, theirs in runs(row, size, 0, size):
                part[:, ours] = right.T[:, theirs]
            stem = row.path.removesuffix(KERNEL)
            for path, value in ((stem + LEFT, left.T), (stem + RIGHT, part)):
                new.setdefault(path, {})[layer] = value
    flat = unnest(lm.params)
    for path, by_layer in new.items():
        if None not in by_layer and len(by_layer) < lm.config.num_layers:
            missing = next(i for i in range(lm.config.num_layers) if i not in by_layer)
            raise UserError(
                f"{folder}: {path} is missing in layer {missing}. Give an adapter of all layers."
            )
        stack = [by_layer[layer] for layer in sorted(by_layer, key=lambda i: i or 0)]
        flat[path] = jnp.asarray(stack[0] if None in by_layer else np.stack(stack), dtype)
    return lm.replace(config=lm.config.replace(lora_scale=scale), params=nest(flat))


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors by their names without the root."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file, and pickles are never read. Give an adapter with it."
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: is truncated or not a safetensors file. Download it again."
        ) from error
    for name in tensors:
        if not name.startswith(ROOT) or not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise UserError(
                f"{path}: holds {name}, which is no matrix of plain LoRA. Give such an adapter."
            )
    return {name.removeprefix(ROOT): tensor for name, tensor in tensors.items()}


def _find(modules: dict[str, Any], name: str, prefix: str) -> Any:
    """The kernels of a module by its name with or without the family's prefix."""
    known = (name, name.removeprefix(prefix), prefix + name)
    return next((modules[option] for option in known if option in modules), None)


def _tensor(
    folder: Path, tensors: dict[str, np.ndarray], name: str, shape: tuple[int, int], dtype: Any
) -> np.ndarray:
    """One matrix, in a dtype; UserError where it does not fit or holds what is no finite number."""
    if name not in tensors:
        raise UserError(f"{folder / WEIGHTS}: has no {name}. Download it again.")
    if tensors[name].shape != shape:
        raise UserError(
            f"{folder}: {name} must have the shape {list(shape)} (got "
            f"{list(tensors[name].shape)}). Give an adapter of this model."
        )
    tensor = tensors[name]
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UserError(
            f"{folder / WEIGHTS}: {name} holds no floating-point numbers (got {tensor.dtype}). "
            "Download it again."
        )
    check_finite(tensor, name, folder / WEIGHTS)
    with np.errstate(over="ignore"):
        tensor = tensor.astype(dtype)
    check_finite(tensor, f"{name} as {tensor.dtype}", folder / WEIGHTS)
    return tensor
