"""Read and write low-rank adapters as Hugging Face PEFT folders.

A folder names HF modules: `base_model.model.<module>.lora_A.weight` [r, in] and `lora_B.weight`
[out, r]. If a family fuses queries, keys and values in one module, the adapters of our three
kernels are written as one, with stacked A and block-diagonal B. An adapter that is read from such a
module gives all three kernels the same A.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.artifacts.arrays import check_finite, fingerprint
from jaxlm.artifacts.files import file_path
from jaxlm.artifacts.folder import replacing
from jaxlm.core.errors import UserError
from jaxlm.core.paths import path_predicate
from jaxlm.core.precision import Packed
from jaxlm.models import LanguageModel, ModelConfig, adapters, param_shapes
from jaxlm.models.families import Name, family
from jaxlm.models.hf_config import CONFIG as MODEL_CONFIG
from jaxlm.models.hf_config import FLAG, WIDTH, Kind, check_fields, damaged, optional, read_json
from jaxlm.models.hf_tensors import hf_names, is_stacked, runs
from jaxlm.models.initialise import nest, unnest
from jaxlm.peft.methods import refuse_second

WEIGHTS = "adapter_model.safetensors"
ROOT = "base_model.model."
KERNEL, LEFT, RIGHT = ".kernel", ".lora_a", ".lora_b"
CONFIG = "adapter_config.json"
# Settings of PEFT that change the result and are not supported; falsy values are harmless.
_REFUSED = (
    *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "kasa_config"),
    *("layer_replication", "lora_bias", "modules_to_save", "monteclora_config", "rank_pattern"),
    *("target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora"),
    "velora_config",
)
_FINITE = Kind("a finite number", lambda x: type(x) in (int, float) and -1e30 <= x <= 1e30)
_FIELDS = {"r": WIDTH, "lora_alpha": _FINITE, "use_rslora": optional(FLAG)}
# Initialisations that leave the base weights as they are; the others change them.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def _modules(config: ModelConfig) -> dict[str, list[tuple[Name, int]]]:
    """Return our kernels that each HF module holds, with their layers."""
    modules: dict[str, list[tuple[Name, int]]] = {}
    for row, layer, name in hf_names(config, family(config.family)):
        if row.path.endswith(KERNEL):
            modules.setdefault(name.removesuffix(".weight"), []).append((row, layer))
    return modules


def save_adapter(
    lm: LanguageModel, directory: str | os.PathLike, base_model: str | None = None
) -> None:
    """Save the low-rank adapters of a model as a folder that PEFT opens.

    Args:
      lm: a model with adapters; only these are written.
      directory: created if missing.
      base_model: folder or hub id of the model without adapters, named in adapter_config.json.

    Raises:
      UserError: the model has no adapters, or the directory cannot be written.
    """
    from safetensors.numpy import save_file

    modules, flat = _modules(lm.config), unnest(lm.params)
    pairs = {name: _pair(rows, flat) for name, rows in modules.items()}
    pairs = {name: pair for name, pair in pairs.items() if pair is not None}
    if not pairs:
        raise UserError("lm: has no LoRA adapter to save. Call jaxlm.peft.lora first.")
    rank = max(left.shape[0] for left, _ in pairs.values())
    tensors = {}
    for name, (left, right) in pairs.items():
        more = (0, rank - left.shape[0])  # one rank for all modules: zeros change no product
        padded = np.pad(left, [more, (0, 0)]), np.pad(right, [(0, 0), more])
        for letter, matrix in zip("AB", padded, strict=True):
            tensors[f"{ROOT}{name}.lora_{letter}.weight"] = np.ascontiguousarray(matrix)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if lm.config.head == "lm" else None,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": lm.config.lora_scale * rank,
        "target_modules": _targets(list(modules), list(pairs)),
        "lora_dropout": 0.0,
        "bias": "none",
        # whether HF keeps the weights as [in, out]
        "fan_in_fan_out": not any(row.transpose for name in pairs for row, _ in modules[name]),
        "inference_mode": True,
    }
    text = json.dumps(settings, indent=2) + "\n"
    folder = file_path(directory, "directory")
    with replacing(folder, last=CONFIG, stale=lambda path: path.name in (CONFIG, WEIGHTS)) as place:
        save_file(tensors, place / WEIGHTS, {"format": "pt"} | _base_digest(lm))
        (place / CONFIG).write_text(text, encoding="utf-8")


def _pair(rows: list[tuple[Name, int]], flat: dict[str, Any]) -> Any:
    """Return A [r, in] and B [out, r] of one HF module, or None if it has no adapter."""
    parts = []
    for row, layer in rows:
        stem = row.path.removesuffix(KERNEL)
        if stem + LEFT in flat:
            at = layer if is_stacked(row.path) else ...
            left, right = (np.asarray(flat[stem + name][at]).T for name in (LEFT, RIGHT))
            parts.append((row, left, right))
    if not parts:
        return None
    first, _, one = parts[0]
    whole = np.concatenate([left for _, left, _ in parts])
    blocks = np.zeros((first.whole(one.shape[0]), whole.shape[0]), one.dtype)
    start = 0
    for row, left, right in parts:
        stop = start + left.shape[0]
        for ours, theirs in runs(row, right.shape[0], 0, right.shape[0]):
            blocks[theirs, start:stop] = right[ours]
        start = stop
    return whole, blocks


def _targets(modules: list[str], chosen: list[str]) -> list[str]:
    """Return the chosen names' last parts if no other name ends in one, else the whole names."""
    ends = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    meant = [name for name in modules if name.rsplit(".", 1)[-1] in ends]
    return ends if len(meant) == len(chosen) else sorted(chosen)


def load_adapter(
    lm: LanguageModel, directory: str | os.PathLike, *, dtype="float32"
) -> LanguageModel:
    """Load a LoRA folder that PEFT or `save_adapter` wrote.

    Args:
      lm: the base model; its kernels may be packed.
      directory: folder with adapter_config.json and adapter_model.safetensors.
      dtype: dtype of the adapters.

    Returns:
      A model as `jaxlm.peft.lora` returns it.

    Raises:
      UserError: the folder is incomplete, holds another kind of adapter or unsupported settings, or
        is for another model; or the model has an adapter already.
    """
    refuse_second(lm)
    folder = file_path(directory, "adapter")
    rank, scale = _read_settings(folder)
    tensors = _read_tensors(folder)
    modules, shapes = _modules(lm.config), param_shapes(lm.config)
    new: dict[str, Any] = {}
    for name in sorted({name.rsplit(".lora_", 1)[0] for name in tensors}):
        rows = _find(modules, name, family(lm.config.family).PREFIX)
        if rows is None:
            raise UserError(
                f"{folder}: {name} is not a module of this {lm.config.family} model. Give an "
                "adapter of this model."
            )
        size_in = shapes[rows[0][0].path][-2]
        size_out = rows[0][0].whole(shapes[rows[0][0].path][-1])
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
        layers = range(lm.config.num_layers if is_stacked(path) else 1)
        for layer in layers:
            if layer not in by_layer:
                raise UserError(
                    f"{folder}: {path} is missing in layer {layer}. Give an adapter of all layers."
                )
        stack = np.stack([by_layer[layer] for layer in layers])
        flat[path] = jnp.asarray(stack if is_stacked(path) else stack[0], dtype)
    return lm.replace(config=lm.config.replace(lora_scale=scale), params=nest(flat))


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter of PEFT and no model."""
    return (folder / CONFIG).is_file() and not (folder / MODEL_CONFIG).exists()


def adapter_base(folder: Path) -> str:
    """Return the folder or hub id of the model without the adapter in a folder."""
    name = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(
            f"base: {folder / CONFIG} does not name the model without the adapter (got {name!r}). "
            "Name it: --base=FOLDER, or base=FOLDER in Python."
        )
    return name


def _base_digest(lm: LanguageModel) -> dict[str, str]:
    """Return a digest of the model without adapters, by the dtype that it has; none if packed."""
    # The head of a run may be new, so that its base has none.
    new = path_predicate(rf"^(pooler|classifier)\.|{adapters.LORA}")
    base = {path: leaf for path, leaf in unnest(lm.params).items() if not new(path)}
    if any(isinstance(leaf, Packed) for leaf in base.values()):
        return {}
    return {f"base_{base['embed.tokens.embedding'].dtype}": fingerprint(base)}


def check_base(lm: LanguageModel, folder: Path) -> None:
    """Raise UserError if `save_adapter` wrote a folder for a model with other weights.

    Other programs write no digest, and weights of another dtype cannot be compared.
    """
    from safetensors import SafetensorError, safe_open

    known: dict[str, str] = {}
    with (
        contextlib.suppress(SafetensorError, OSError),
        safe_open(folder / WEIGHTS, "numpy") as file,
    ):
        known = file.metadata() or {}
    if any(key.startswith("base_") for key in known):
        for key, digest in _base_digest(lm).items():
            if known.get(key, digest) != digest:
                raise UserError(
                    f"base: its weights are not those that the adapter {folder} was trained on "
                    "(got others). Give the model that it began with."
                )


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Return the tensors by their names without the root."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file, and pickles are never read. Give a safetensors file."
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise damaged(path, "is truncated or not a safetensors file") from error
    for name in tensors:
        if not name.startswith(ROOT) or not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise UserError(
                f"{path}: holds {name}, which is not a matrix of plain LoRA. Give plain LoRA."
            )
    return {name.removeprefix(ROOT): tensor for name, tensor in tensors.items()}


def _find(modules: dict[str, Any], name: str, prefix: str) -> Any:
    """Return the kernels of a module, named with or without the family's prefix."""
    known = (name, name.removeprefix(prefix), prefix + name)
    return next((modules[option] for option in known if option in modules), None)


def _tensor(
    folder: Path, tensors: dict[str, np.ndarray], name: str, shape: tuple[int, int], dtype: Any
) -> np.ndarray:
    """Return one matrix in a dtype; raise UserError if its shape or its numbers are wrong."""
    if name not in tensors:
        raise damaged(folder / WEIGHTS, f"has no {name}")
    tensor = tensors[name]
    if tensor.shape != shape:
        raise UserError(
            f"{folder}: {name} must have the shape {list(shape)} (got {list(tensor.shape)}). Give "
            "an adapter of this model."
        )
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        problem = f"{name} must have floating-point numbers (got {tensor.dtype})"
        raise damaged(folder / WEIGHTS, problem)
    check_finite(tensor, name, folder / WEIGHTS)
    with np.errstate(over="ignore"):
        tensor = tensor.astype(dtype)
    check_finite(tensor, f"{name} as {tensor.dtype}", folder / WEIGHTS)
    return tensor


def _read_settings(folder: Path) -> tuple[int, float]:
    """Return rank and scale of the adapters in a folder; refuse settings without support."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder / CONFIG}: there is no such file. Give a folder of PEFT.")
    config = read_json(folder / CONFIG)
    refused = {name: config.get(name) for name in _REFUSED if config.get(name)}
    if config.get("bias", "none") != "none":
        refused["bias"] = config["bias"]
    if config.get("init_lora_weights", True) not in _STARTS:
        refused["init_lora_weights"] = config["init_lora_weights"]
    if config.get("peft_type") != "LORA":
        refused = {"peft_type": config.get("peft_type")}
    if refused:
        name, value = next(iter(refused.items()))
        raise UserError(
            f"{folder / CONFIG}: {name} is not supported (got {value!r}). Give plain LoRA."
        )
    if config.get("r") is None or config.get("lora_alpha") is None:
        raise damaged(folder / CONFIG, "has no r or no lora_alpha")
    check_fields(config, _FIELDS, str(folder / CONFIG))
    rank = config["r"]
    return rank, config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
