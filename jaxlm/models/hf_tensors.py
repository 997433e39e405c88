"""The map between the tensors of a HF checkpoint and our leaves, in both directions.

Our leaves stack layers, are transposed from torch's Linear, and split what some families fuse.
This module does not know the file format: a file is an object with `get_slice(name)[index]`.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.artifacts.arrays import all_finite, check_finite
from jaxlm.artifacts.processes import to_host
from jaxlm.core.errors import UserError
from jaxlm.core.paths import LAYERS
from jaxlm.core.precision import Packed
from jaxlm.models.config import ModelConfig
from jaxlm.models.families import Name
from jaxlm.models.initialise import param_shapes

PIECE = 2**23
"""Number of elements that are read from a file at once."""
GROUP = 32
"""Number of weights that share a scale in tensors of integers."""
_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
# Old checkpoints hold tensors that are not weights: tables that follow from the configuration, and
# parts of BERT's pretraining that a masked language model does not use.
_HARMLESS = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|masked_bias|position_ids|token_type_ids|(attn|attention)\.bias)"
    r"|(.*\.)?pooler\.dense\.(weight|bias)|cls\.seq_relationship\.(weight|bias)"
)


class Stored(NamedTuple):
    """A tensor in a file: its name there, its shape, and its dtype as safetensors names it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def is_stacked(path: str) -> bool:
    """Return whether a leaf of ours holds all layers."""
    return path.startswith(LAYERS + ".")


def _absent(config: ModelConfig, path: str, layer: int) -> bool:
    """Return whether a layer has no tensor for a leaf, and the forward pass does not use it."""
    return not config.first_norm and layer == 0 and path.startswith("layers.attention_norm.")


def _layers(config: ModelConfig, path: str) -> range:
    """Return the layers that have a tensor for a leaf; 0 stands for a leaf outside the layers."""
    return range(_absent(config, path, 0), config.num_layers if is_stacked(path) else 1)


def hf_names(config: ModelConfig, module: ModuleType) -> Iterator[tuple[Name, int, str]]:
    """Yield the names of all parameters, each with its layer and the HF tensor of that layer."""
    shapes = param_shapes(config)
    for row in module.names(config):
        if row.path in shapes:
            name = row.hf.removeprefix(module.PREFIX) if config.head == "none" else row.hf
            for layer in _layers(config, row.path):
                yield row, layer, name.format(layer=layer)


def runs(row: Name, length: int, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
    """Yield where [start:stop] of our last axis, of `length`, lies on that of the HF tensor.

    For each contiguous run, its slice of the part and its slice of the tensor.
    """
    index, count = row.part
    size = length // row.groups
    unit = size // row.span
    for group in range(start // size, -(-stop // size)):
        low, high = max(start, group * size), min(stop, (group + 1) * size)
        shift = (group * (count - row.span) + index) * unit
        yield slice(low - start, high - start), slice(low + shift, high + shift)


def _shape(row: Name, ours: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the HF tensor that holds one layer of our leaf."""
    whole = (*ours[:-1], row.whole(ours[-1]))
    return whole[::-1] if row.transpose else whole


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder or GGUF file, read by our paths.

    `open` is called again for every `PIECE` elements, since the pages of a mapped file stay in
    memory until it is closed. `bits` has the number of bits of the tensors that are stored as
    `jaxlm.core.precision.Packed` is, in groups of `GROUP`, and `integers` reads one: its values
    [out, in] and scales [out, groups].
    """

    folder: Path
    module: ModuleType
    tensors: Mapping[str, Stored]
    open: Callable[[Path], AbstractContextManager[Any]]
    bits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    integers: Callable[[str], tuple[np.ndarray, np.ndarray]] | None = None

    @property
    def dtype(self) -> str:
        """The dtype that most of the stored numbers have."""
        sizes = dict.fromkeys(_FLOATS, 0)
        for stored in self.tensors.values():
            if stored.dtype in sizes:
                sizes[stored.dtype] += math.prod(stored.shape)
        return _FLOATS[max(sizes, key=sizes.__getitem__)]

    def find(self, config: ModelConfig, path: str, layer: int = 0) -> tuple[Name, str] | None:
        """Return the first name of a leaf that the checkpoint has, with or without the prefix."""
        # Some checkpoints store a tied table under the name of the head alone.
        paths = [path]
        if path == "embed.tokens.embedding" and config.tie_embeddings:
            paths.append("lm_head.embedding")
        rows = self.module.names(config)
        for row in (row for path in paths for row in rows if row.path == path):
            name = row.hf.format(layer=layer)
            for known in (name, name.removeprefix(self.module.PREFIX)):
                if known in self.tensors:
                    return row, known
        return None

    def match(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration with the head and the tying that the tensors show."""
        config = self._match_head(config)
        if config.head not in ("classifier", "token_classifier"):
            untied = config.tie_embeddings and config.head != "none" and self._untied(config)
            return config.replace(
                label_names=(), tie_embeddings=config.tie_embeddings and not untied
            )
        names, count = config.label_names, config.num_labels
        if names and (len(names) != count or len({*names}) != count):
            raise UserError(
                f"{self.folder}/config.json: id2label must name each of {count} classes once (got "
                f"{', '.join(names)}). Correct it."
            )
        return config

    def _match_head(self, config: ModelConfig) -> ModelConfig:
        if config.head == "token_classifier":
            # Its tensors may be those of a classifier on one token, so config.json tells them.
            if (kernel := self.find(config, "classifier.kernel")) is not None:
                return config.replace(num_labels=self.tensors[kernel[1]].shape[0])
            config = config.replace(head="lm" if config.kind == "decoder" else "none")
        classifier = config.replace(head="classifier", pooled=True)
        if config.kind == "decoder":
            score = self.find(config, "classifier.kernel")
            if score is None or self.find(config, "lm_head.embedding"):
                return config
            count = self.tensors[score[1]].shape[0]
            return config.replace(head="classifier", pooling="last", num_labels=count)
        bias = self.find(classifier, "classifier.bias")
        shared = config.pooler == "mlm"
        if self.find(config, "mlm.dense.kernel") and not (shared and bias):
            return config.replace(head="mlm")
        pooler = "mlm.dense.kernel" if shared else "pooler.kernel"
        if bias and self.find(classifier, pooler):
            return classifier.replace(num_labels=self.tensors[bias[1]].shape[0])
        return config.replace(pooled=self.find(config, pooler) is not None)

    def _untied(self, config: ModelConfig) -> bool:
        """Return whether an output table is stored that differs from the input table."""
        # That happens if only the head of a tied model was trained and then merged. transformers
        # uses the stored table in this case, too.
        apart = config.replace(tie_embeddings=False)
        paths = ("embed.tokens.embedding", "lm_head.embedding")
        tables = [self.find(apart, path) for path in paths]
        if None in tables:
            return False
        one, other = (self.tensors[name] for _, name in tables)  # type: ignore[misc]
        if one.shape != other.shape:
            return True
        size, rows = one.shape[0], max(1, PIECE // math.prod(one.shape[1:]))
        slices = [slice(low, min(low + rows, size)) for low in range(0, size, rows)]
        return not all(np.array_equal(self._piece(one, s), self._piece(other, s)) for s in slices)

    def _piece(self, stored: Stored, *index: slice) -> np.ndarray:
        with self.open(stored.file) as file:
            return file.get_slice(stored.name)[index]

    def check(self, config: ModelConfig) -> None:
        """Compare every leaf with what is stored, before any tensor is read.

        Tensors of another head are left out with a warning.
        """
        for path, shape in param_shapes(config).items():
            for layer in _layers(config, path):
                self._check(config, path, layer, shape[1:] if is_stacked(path) else shape)
            layers = config.num_layers
            if is_stacked(path) and (more := self.find(config, path, layers)) is not None:
                raise UserError(
                    f"{self.folder}: holds {more[1]}, but its configuration has {layers} layers. "
                    "Correct config.json, or download the model again."
                )
        self._check_unused(config)

    def _check_unused(self, config: ModelConfig) -> None:
        shapes, prefix = param_shapes(config), self.module.PREFIX
        used = set()
        for row in self.module.names(config):
            if row.path in shapes or (row.path == "lm_head.embedding" and config.head != "none"):
                for layer in _layers(config, row.path):
                    name = row.hf.format(layer=layer)
                    used |= {name, name.removeprefix(prefix)}
        parts = {name.rpartition(".")[0] for name in used}
        others = []
        for name in sorted({*self.tensors} - used):
            if _HARMLESS.fullmatch(name):
                continue
            of_a_part = name.rpartition(".")[0] in parts or re.search(r"\.\d+\.", name)
            if not of_a_part and not name.startswith(prefix):
                others.append(name)
                continue
            raise UserError(
                f"{self.folder}: {name} is not used by a {config.family} model with this "
                "configuration. Correct config.json, or remove the tensor."
            )
        if others:
            warnings.warn(
                f"{self.folder}: {', '.join(others[:8])} belong to another head than "
                f"'{config.head}' and are left out",
                stacklevel=4,
            )

    def _check(self, config: ModelConfig, path: str, layer: int, shape: tuple[int, ...]) -> None:
        match = self.find(config, path, layer)
        if match is None:
            names = (row.hf for row in self.module.names(config) if row.path == path)
            raise UserError(
                f"{self.folder}: has no tensor {next(names).format(layer=layer)}, which a "
                f"{config.family} model needs. Correct config.json, or download the model again."
            )
        row, name = match
        stored, wanted = self.tensors[name], _shape(row, shape)
        if stored.shape != wanted:
            raise UserError(
                f"{self.folder}: {name} must have the shape {list(wanted)} of the configuration "
                f"(got {list(stored.shape)}). Correct config.json, or download the model again."
            )
        if stored.dtype not in _FLOATS:
            raise UserError(
                f"{self.folder}: {name} has a dtype that is not supported (got {stored.dtype}). "
                f"Convert it to one of {', '.join(_FLOATS)}."
            )

    def is_packed(self, config: ModelConfig, path: str, bits: int) -> bool:
        """Return whether a matrix of ours is stored in that many bits, in every layer."""
        found = [self.find(config, path, layer) for layer in _layers(config, path)]
        return all(
            match is not None and match[0].part == (0, 1) and self.bits.get(match[1]) == bits
            for match in found
        )

    def read_packed(
        self, config: ModelConfig, path: str, bits: Literal[8, 4], dtype: Any
    ) -> Packed:
        """Read a matrix that `is_packed`: its integers as they are, and scales of a dtype."""
        assert self.integers is not None
        values, scales = [], []
        for layer in _layers(config, path):
            match = self.find(config, path, layer)
            assert match is not None
            whole, scale = self.integers(match[1])
            with np.errstate(over="ignore"):  # the check finds an overflow
                scales.append(scale.astype(dtype))
            _check_held(scales[-1], scale, match[1], self.folder)
            values.append(whole)
        axis = -2 if path.endswith("kernel") else -1
        whole, scale = (np.stack(x) if is_stacked(path) else x[0] for x in (values, scales))
        if axis == -2:
            whole, scale = whole.swapaxes(-2, -1), scale.swapaxes(-2, -1)
        return Packed(whole, scale, bits, axis, param_shapes(config)[path][axis])

    def read(
        self, config: ModelConfig, path: str, dtype: Any, index: tuple[slice, ...]
    ) -> np.ndarray:
        """Read the part `index` of one of our leaves; nothing else is read from the files."""
        shape = param_shapes(config)[path]
        bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        host = np.empty([stop - start for start, stop in bounds], dtype)
        first = bounds.pop(0)[0] if is_stacked(path) else 0
        *outer, (start, stop) = bounds
        for layer, block in enumerate(host if is_stacked(path) else host[None], first):
            if _absent(config, path, layer):
                block[...] = path.endswith("scale")
                continue
            match = self.find(config, path, layer)
            assert match is not None
            row, stored = match[0], self.tensors[match[1]]
            rows = max(1, PIECE // math.prod(stored.shape[1:]))
            for ours, theirs in runs(row, shape[-1], start, stop):
                part, into = (*(slice(*pair) for pair in outer), theirs), block[..., ours]
                if row.transpose:
                    part, into = part[::-1], into.T
                for low in range(part[0].start, part[0].stop, rows):
                    high = min(low + rows, part[0].stop)
                    piece = self._piece(stored, slice(low, high), *part[1:])
                    place = into[low - part[0].start : high - part[0].start]
                    with np.errstate(over="ignore"):  # the check below finds an overflow
                        place[...] = piece
                    _check_held(place, piece, stored.name, stored.file)
        return host


def _check_held(held: np.ndarray, stored: np.ndarray, name: str, file: Path) -> None:
    """Refuse numbers that are not finite, in a file or in the dtype that is to hold them."""
    if not all_finite(held):
        check_finite(stored, name, file)
        raise UserError(
            f"{file}: {name} holds numbers that {held.dtype} cannot (got {np.abs(stored).max()}). "
            "Choose a wider param_dtype."
        )


@dataclasses.dataclass(frozen=True)
class Target:
    """A HF tensor to write: its shape and dtype, and the leaves and layers that fill it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: list[tuple[Name, int]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def gather(self, flat: Mapping[str, Any]) -> np.ndarray:
        """Return the tensor in host memory; only the layers that it holds are copied there."""
        tensor = np.empty(self.shape, self.dtype)
        for row, layer in self.parts:
            leaf = flat[row.path]
            value = to_host(leaf[layer] if is_stacked(row.path) else leaf)
            whole = tensor.T if row.transpose else tensor
            for ours, theirs in runs(row, value.shape[-1], 0, value.shape[-1]):
                whole[..., theirs] = value[..., ours]
        return tensor


def targets(config: ModelConfig, module: ModuleType, flat: Mapping[str, Any]) -> dict[str, Target]:
    """Return the tensor to write under each HF name."""
    result: dict[str, Target] = {}
    shapes = param_shapes(config)
    for row, layer, name in hf_names(config, module):
        shape, leaf = shapes[row.path], flat.get(row.path)
        if leaf is None or leaf.shape != shape:
            raise UserError(f"params: have no {row.path} of shape {list(shape)}. Give those of lm.")
        ours = shape[1:] if is_stacked(row.path) else shape
        empty = Target(_shape(row, ours), leaf.dtype, [])
        result.setdefault(name, empty).parts.append((row, layer))
    return result
