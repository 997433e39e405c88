"""Load and save models in the Hugging Face layout: config.json, safetensors, tokenizer files.

Only safetensors and JSON are read; never pickle, never remote code.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxlm.artifacts.files import file_path
from jaxlm.artifacts.folder import replacing
from jaxlm.artifacts.processes import barrier, is_main_process
from jaxlm.core.checks import one_of, show
from jaxlm.core.errors import UserError, out_of_memory
from jaxlm.core.paths import flatten, path_predicate
from jaxlm.core.precision import MATRICES, Packed, dequantize, pack
from jaxlm.models import adapters, gguf
from jaxlm.models.attention import IMPLEMENTATIONS
from jaxlm.models.config import ModelConfig
from jaxlm.models.families import family
from jaxlm.models.hf_config import (
    CONFIG,
    INDEX,
    WEIGHTS,
    damaged,
    is_of_a_model,
    modern_name,
    read_config,
    read_json,
    weight_files,
)
from jaxlm.models.hf_tensors import GROUP, Checkpoint, Stored, Target, targets
from jaxlm.models.hf_tokenizer import has_tokenizer, read_tokenizer
from jaxlm.models.initialise import nest, param_shapes
from jaxlm.models.language_model import LanguageModel
from jaxlm.sharding import param_shardings

SHIPPED = Path(__file__).parent.parent / "assets" / "model"
CACHE = Path("~/.cache/jaxlm")
"""Folder of the models in `MADE`."""
MADE = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Models that a script makes, with the hub's id."""
Read = Callable[[tuple[slice, ...]], np.ndarray]


def from_pretrained(
    name_or_path: str | os.PathLike | None = None,
    param_dtype="float32",
    mesh: Mesh | None = None,
    *,
    compute_dtype=None,
    attention: str = "xla",
    remat: str = "dots",
    bits: Literal[8, 4] | None = None,
) -> LanguageModel:
    """Load a model from a local folder or the Hugging Face hub.

    Args:
      name_or_path: folder with config.json, one or several safetensors files and optionally a
        tokenizer; or the id of such a repository on the hub; or a GGUF file, see
        `jaxlm.models.gguf`; or "smollm2"; or None for the small model that comes with the package.
      param_dtype: dtype of every parameter, whatever the files have; "auto" for the dtype that most
        of the stored parameters have, float32 for a GGUF file.
      mesh: a mesh of `jaxlm.sharding.make_mesh`. Each device gets its part of a parameter, by
        the rules of `jaxlm.sharding`, straight from the files. None loads onto the default device,
        one parameter at a time.
      compute_dtype, attention, remat: see `ModelConfig`.
      bits: 8 or 4 packs matrices into that many bits, one layer at a time as they are read; see
        `jaxlm.core.precision.quantize`. Those of type Q8_0 or Q4_0 in a GGUF file keep their
        integers.

    Returns:
      The model. `tokenizer` is None if the folder has none. The tensors of the checkpoint decide
      whether `config.head` of an encoder is "mlm", "classifier" or "none"; "token_classifier" is
      named by `architectures` in config.json.

    Raises:
      UserError: the folder is missing, the architecture is unknown, a file is truncated or missing,
        weights contradict the configuration or are not finite, an option is unknown, or the
        parameters do not fit into memory.
    """
    choices = model_choices(compute_dtype, attention, remat)
    one_of("bits", bits, (8, 4, None))
    place = SHIPPED if name_or_path is None else local_model(name_or_path)
    config, tokenizer, checkpoint = _read_model(place)
    assert checkpoint is not None
    dtype = float_dtype(param_dtype, checkpoint)
    config = checkpoint.match(config).replace(**choices)
    checkpoint.check(config)
    is_matrix = path_predicate(MATRICES)
    flat: dict[str, Any] = {}
    with _enough_memory(place, config, dtype):
        for path, shape in param_shapes(config).items():
            read = partial(checkpoint.read, config, path, dtype)
            if bits is not None and is_matrix(path):
                if checkpoint.is_packed(config, path, bits):
                    leaf = checkpoint.read_packed(config, path, bits, dtype)
                else:
                    leaf = _pack(read, path, shape, mesh, bits)
                flat[path] = jax.device_put(
                    leaf, None if mesh is None else param_shardings({path: leaf}, mesh)[path]
                )
            else:
                flat[path] = _load(read, path, shape, mesh)
    return LanguageModel(config, nest(flat), tokenizer)


def model_choices(compute_dtype: Any, attention: str, remat: str) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that a user and not a checkpoint chooses, checked."""
    one_of("attention", attention, tuple(IMPLEMENTATIONS))
    one_of("remat", remat, get_args(ModelConfig.__annotations__["remat"]))
    dtype = None if compute_dtype is None else str(jnp.dtype(compute_dtype))
    return {"compute_dtype": dtype, "attention": attention, "remat": remat}


def float_dtype(param_dtype: Any, checkpoint: Checkpoint | None = None) -> np.dtype:
    """Return a floating-point dtype by its name, "auto" for that of a checkpoint."""
    if isinstance(param_dtype, str) and param_dtype == "auto":
        if checkpoint is None:
            raise UserError(
                "param_dtype: there are no files that give it (got auto). Choose float32 or "
                "bfloat16."
            )
        param_dtype = checkpoint.dtype
    try:
        dtype = jnp.dtype(param_dtype)
        if param_dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            return dtype
    except TypeError:
        pass
    raise UserError(
        f"param_dtype: must be a floating-point type (got {show(param_dtype)}). Choose one of "
        "auto, float32, bfloat16, float16, float64."
    )


@contextlib.contextmanager
def _enough_memory(place: Path, config: ModelConfig, dtype: np.dtype) -> Iterator[None]:
    """Raise UserError if memory runs out, with the sizes of the parameters in several dtypes."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if out_of_memory(error) is None:
            raise
        count = sum(math.prod(shape) for shape in param_shapes(config).values())
        sizes: dict[str, float] = {f"param_dtype={dtype}": dtype.itemsize}
        sizes |= {"param_dtype=bfloat16": 2, "bits=8": 1, "bits=4": 0.5}
        asked, *less = (f"{count * size / 1e9:.3g} GB with {how}" for how, size in sizes.items())
        raise UserError(
            f"{place}: the parameters do not fit into memory (got {asked}). Choose less: about "
            f"{', '.join(less)}. The --dry-run of a command prints what else it needs."
        ) from error


def shapes_from_pretrained(
    name_or_path: str | os.PathLike | None = None,
    param_dtype="float32",
    *,
    bits: Literal[8, 4] | None = None,
) -> LanguageModel:
    """Load a model with shapes in place of parameters, for planning.

    The folder needs no weights. Without them, `architectures` in config.json gives the head of an
    encoder. With them, only shapes are read, except that two stored copies of a tied table are
    compared.

    Args:
      name_or_path, param_dtype, bits: see `from_pretrained`.

    Returns:
      The model of `from_pretrained` whose parameters are `jax.ShapeDtypeStruct`s.

    Raises:
      UserError: see `from_pretrained`.
    """
    place = SHIPPED if name_or_path is None else local_model(name_or_path, weights=False)
    config, tokenizer, checkpoint = _read_model(place, weights=False)
    dtype = float_dtype(param_dtype, checkpoint)
    if checkpoint is not None:
        config = checkpoint.match(config)
        checkpoint.check(config)
    elif config.kind == "encoder" and config.head != "token_classifier":
        named = " ".join(read_json(place / CONFIG).get("architectures") or ())
        config = config.replace(head="mlm" if re.search("MaskedLM|PreTraining", named) else "none")
    flat: dict[str, Any] = {}
    is_matrix = path_predicate(MATRICES)
    for path, shape in param_shapes(config).items():
        flat[path] = jax.ShapeDtypeStruct(shape, dtype)
        if bits is not None and is_matrix(path):
            stored = checkpoint is not None and checkpoint.is_packed(config, path, bits)
            one = partial(pack, path, bits=bits, group_size=GROUP if stored else None)
            flat[path] = jax.eval_shape(
                one if len(shape) == 2 else partial(lax.map, one), flat[path]
            )
    return LanguageModel(config, nest(flat), tokenizer)


def local_model(name_or_path: str | os.PathLike, *, weights: bool = True) -> Path:
    """Return the folder or file of a model; a hub id is downloaded, if it is not there yet.

    Raises:
      UserError: see `from_pretrained`.
    """
    place = file_path(name_or_path, "model")
    if place.is_dir() or place.is_file():
        return place
    text = str(name_or_path)
    if text in MADE and (CACHE.expanduser() / text / CONFIG).is_file():
        return CACHE.expanduser() / text
    if text.startswith((".", "/", "~")) or text.endswith(".gguf") or text.count("/") > 1:
        raise UserError(
            f"model: there is no such folder or file (got {text}). Give a folder, a GGUF file or a "
            "hub id."
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(MADE.get(text, text), allow_patterns=patterns))
    except Exception as error:
        fix = "Check the name and the network."
        if text in MADE:
            fix = f"Run python scripts/get_{text}.py, which makes it."
        raise UserError(
            f"model: is not a folder, and cannot be downloaded from the hub (got {text}: "
            f"{type(error).__name__}). {fix}"
        ) from error


def _read_model(place: Path, *, weights: bool = True) -> tuple[ModelConfig, Any, Checkpoint | None]:
    """Return the configuration, the tokenizer or None, and the tensors of a folder or a GGUF file.

    The tensors may be None in a folder that needs no `weights`.
    """
    if place.is_file():
        return gguf.read_model(place)
    config, module = read_config(place)
    tokenizer = read_tokenizer(place) if has_tokenizer(place) else None
    if weights or any((place / name).is_file() for name in (WEIGHTS, INDEX)):
        return config, tokenizer, _open(place, module)
    return config, tokenizer, None


def _open(folder: Path, module: ModuleType) -> Checkpoint:
    """Read the headers of a model's files: which tensor is where."""
    from safetensors import SafetensorError, safe_open

    open_file = partial(safe_open, framework="numpy")
    tensors = {}
    for path in weight_files(folder):
        try:
            path.open("rb").close()  # so that a system error is not taken for a bad format
            with open_file(path) as file:
                for name in file.keys():  # noqa: SIM118 - the file is not a dict
                    part = file.get_slice(name)
                    shape = tuple(part.get_shape())
                    tensors[modern_name(name)] = Stored(path, name, shape, part.get_dtype())
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{path}: cannot be read ({reason}). Give a file that you may read."
            ) from error
        except SafetensorError as error:
            raise damaged(path, "is truncated or not a safetensors file") from error
    return Checkpoint(folder, module, tensors, open_file)


def _load(read: Read, path: str, shape: tuple[int, ...], mesh: Mesh | None) -> jax.Array:
    """Assemble an array from the parts that `read(index)` returns, one in host memory at a time."""
    if mesh is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    sharding = param_shardings({path: shape}, mesh)[path]
    arrays: list[jax.Array] = []
    first: dict[str, jax.Array] = {}  # a part that several devices hold is read once
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        same = first.get(str(index))
        arrays.append(jax.device_put(read(index) if same is None else same, device))
        first.setdefault(str(index), arrays[-1])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _pack(
    read: Read, path: str, shape: tuple[int, ...], mesh: Mesh | None, bits: Literal[8, 4]
) -> Packed:
    """Load and pack a leaf; only one layer of a stack at a time is in memory as floats."""

    def packed(read: Read, shape: tuple[int, ...]) -> Packed:
        return pack(path, _load(read, path, shape, mesh), bits=bits)

    def layer(i: int) -> Packed:
        return packed(lambda index: read((slice(i, i + 1), *index))[0], shape[1:])

    if len(shape) == 2:
        return packed(read, shape)
    return jax.tree.map(lambda *parts: jnp.stack(parts), *map(layer, range(shape[0])))


def save_pretrained(
    lm: LanguageModel,
    directory: str | os.PathLike,
    params=None,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Save a model in the HF layout; transformers opens it and computes the same logits.

    Everything is written to a temporary folder inside `directory` and then moved. The old
    config.json is removed first and the new one is moved last, so an interrupted save leaves the
    old model or no model, never parts of two. Sharded parameters are gathered one file at a time;
    only the main process writes. Packed weights are written as floats, and LoRA is merged.

    Args:
      lm: the model; its tokenizer is written too.
      directory: created if missing. If it holds a model, files that would be read with the new one
        are removed: safetensors, tokenizer, generation_config.json, adapter_config.json. Other
        files stay: a model card, pickles such as pytorch_model.bin, adapter weights. Remove them
        if another program would read them.
      params: parameters to write in place of `lm.params`.
      max_shard_size: largest size of a file, in bytes or like "200MB"; several files get an index.
        A tensor is never split.

    Raises:
      UserError: the directory cannot be written, `params` do not fit the model, or they have a
        prefix.
    """
    folder = file_path(directory, "directory")
    params = dequantize(lm.params if params is None else params)
    if adapters.has(params, adapters.PREFIX):
        raise UserError(
            "params: have a prefix, which a model folder cannot hold. Keep a checkpoint."
        )
    params = adapters.merge(lm.config, params)
    flat = {leaf.path: leaf.value for leaf in flatten(params)[0]}
    module = family(lm.config.family)
    tensors = targets(lm.config, module, flat)
    split = _split(tensors, max_shard_size)
    dtype, *_ = (str(target.dtype) for target in tensors.values())
    config = {**module.write_config(lm.config), "dtype": dtype}
    count = sum(math.prod(shape) for shape in param_shapes(lm.config).values())
    if not is_main_process():
        _write_weights(None, split, tensors, flat)
        barrier(str(folder))
        return
    with replacing(folder, last=CONFIG, stale=is_of_a_model) as place:
        _write_weights(place, split, tensors, flat)
        (place / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if not (folder / "README.md").exists():
            title = os.fsencode(folder.resolve().name).decode(errors="replace")
            text = _model_card(lm.config, title, dtype, count)
            (place / "README.md").write_text(text, encoding="utf-8")
        if lm.tokenizer is not None:
            lm.tokenizer.save_pretrained(place)
    barrier(str(folder))


def _split(tensors: dict[str, Target], max_shard_size: int | str) -> Any:
    """Decide which tensor goes into which file."""
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        return split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda target: target.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise UserError(
            f"max_shard_size: not a size (got {max_shard_size!r}). Give bytes, or a string: '5GB'."
        ) from error


def _write_weights(
    folder: Path | None, split: Any, tensors: dict[str, Target], flat: dict[str, Any]
) -> None:
    """Gather the tensors, in which every process takes part, and write them unless it is None."""
    from safetensors.numpy import save_file

    for file, names in split.filename_to_tensors.items():
        gathered = {name: tensors[name].gather(flat) for name in names}
        if folder is not None:
            save_file(gathered, folder / file, {"format": "pt"})
        del gathered  # before the next file is gathered: a file may take gigabytes
    if folder is not None and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


_AUTO = {
    "lm": "AutoModelForCausalLM",
    "mlm": "AutoModelForMaskedLM",
    "classifier": "AutoModelForSequenceClassification",
    "token_classifier": "AutoModelForTokenClassification",
    "none": "AutoModel",
}


def _model_card(config: ModelConfig, name: str, dtype: str, num_params: int) -> str:
    """Return the README.md of a saved model: what it is and how to open it."""
    auto = _AUTO[config.head]
    return f"""---
library_name: jaxlm
---

# {name}

A {config.family} {config.kind} of {num_params:,} parameters in {dtype}: {config.num_layers} layers
of width {config.hidden_size}, {config.num_heads} heads, a vocabulary of {config.vocab_size:,}.

It opens in jaxlm:

```python
import jaxlm

lm = jaxlm.from_pretrained("path/to/this/folder")
```

and in transformers:

```python
from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/folder")
```
"""
