"""Read a GGUF file of llama.cpp as if it were a model folder in the Hugging Face layout.

llama.cpp changes some tensors when it converts a model, and this is undone: rows of queries and
keys of Llama are reordered, norms of Gemma hold their offset, matrices of GPT-2 are transposed.

A file is data from outside: its counts are compared with the bytes that are there before anything
is allocated, and anything unknown is refused.

References: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the changes are those of
llama.cpp's convert_hf_to_gguf.py.
"""

import contextlib
import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from jaxlm.core.checks import MOST, show
from jaxlm.core.errors import UserError
from jaxlm.models.config import ModelConfig
from jaxlm.models.gguf_tokenizer import TOKENIZER, read_tokenizer, special_ids
from jaxlm.models.hf_config import FIELDS, check_fields, damaged, parse_config, whole
from jaxlm.models.hf_tensors import GROUP, Checkpoint, Stored
from jaxlm.models.rotary import frequencies

MOST_METADATA = 2**27
"""Largest position at which the tensors may begin, in bytes; large vocabularies take 2**24."""
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
TYPES = ("F32", "F16", "BF16", *QUANTISED)
PACKED = {"Q8_0": 8, "Q4_0": 4}
"""Bits of the types whose blocks, of `GROUP` weights and a scale, are groups of `Packed`."""

# The type code of a value -> its character in `struct`.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9

_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONS = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_LLAMA = (_SIZES, _OPTIONS)
_GPT2_SIZES = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_GEMMA2_SIZES = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# general.architecture, which is also the model_type -> the required keys and the optional keys,
# each with its field of config.json.
ARCHITECTURES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "llama": _LLAMA,  # and Mistral, whose window llama.cpp does not have
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "olmo2": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": (_SIZES | _GEMMA2_SIZES, _OPTIONS),
    "gpt2": (_GPT2_SIZES, {}),
}
_ROPE = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
_CHECKED = ("rope.dimension_count", "attention.value_length")  # must be the size of a head
_IGNORED = ("vocab_size", "rope.scaling.finetuned")  # follow from the rest, or do not matter


def read_model(path: Path) -> tuple[ModelConfig, Any, Checkpoint]:
    """Return the configuration, the tokenizer or None, and the tensors of a GGUF file."""
    metadata, tensors = _read(path)
    hf = _hf_config(path, metadata, tensors)
    config, module = parse_config(hf, str(path))
    if (factors := tensors.pop("rope_freqs.weight", None)) is not None:
        config, module = _with_llama3_rope(path, hf, factors)
    named = _rename(path, config, module, tensors)
    stored = {hf: Stored(path, part.name, part.shape, "F32") for hf, part in named.items()}
    parts = {part.name: part for part in named.values()}
    file = SimpleNamespace(get_slice=parts.__getitem__)  # as an open safetensors file
    checkpoint = Checkpoint(
        path,
        module,
        stored,
        lambda _: contextlib.nullcontext(file),
        {hf: PACKED[part.type.name] for hf, part in named.items() if part.type.name in PACKED},
        lambda hf: named[hf].integers(),
    )
    return config, read_tokenizer(path, metadata, config), checkpoint


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of a file, dequantised where it is read.

    `sizes` is the shape in the file, longest stride first, whose rows (last axis) take `row_bytes`
    each from byte `start` on. To get the Hugging Face tensor, put the rows in the order `rows`,
    transpose, and subtract `offset`.
    """

    path: Path
    name: str
    type: Any  # a GGMLQuantizationType of the package gguf
    sizes: tuple[int, ...]
    start: int
    row_bytes: int
    rows: np.ndarray | None = None
    transpose: bool = False
    offset: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes[::-1] if self.transpose else self.sizes

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Return a part in float32; only its rows are read."""
        index = (*index, *[slice(None)] * (len(self.sizes) - len(index)))
        if self.transpose:
            return dataclasses.replace(self, transpose=False)[index[::-1]].T
        first, *rest = index
        if len(self.sizes) == 1:  # one row
            return self._dequantised((None,))[0][self.rows if self.rows is not None else ...][first]
        rows = first if self.rows is None else self.rows[first]
        return self._dequantised(rows)[:, *rest]

    def integers(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the integers and the scales of a matrix of `PACKED`, row by row.

        A block is d in float16 and the integers q; its weights are d q, and s of `Packed` is
        2^(b-1) d. A byte of Q4_0, too, holds two integers that are half a block apart.
        """
        blocks = self._stored(... if self.rows is None else self.rows)
        blocks = blocks.reshape(len(blocks), self.sizes[-1] // GROUP, -1)
        unit = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
        bits = PACKED[self.type.name]
        values = blocks[..., 2:].reshape(len(blocks), -1)
        return values.view(np.int8) if bits == 8 else values, unit * 2 ** (bits - 1)

    def _stored(self, rows: Any) -> np.ndarray:
        # A file is mapped again for every part, so that its pages leave the memory.
        shape = (*self.sizes[:-1], self.row_bytes)
        return np.ascontiguousarray(np.memmap(self.path, np.uint8, "r", self.start, shape)[rows])

    def _dequantised(self, rows: Any) -> np.ndarray:
        from gguf.quants import dequantize

        with np.errstate(all="ignore"):  # numbers that are not finite are found by the caller
            return dequantize(self._stored(rows), self.type) - np.float32(self.offset)


class _Header:
    """The bytes before the tensors, read from the front of a file."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 0

    def take(self, count: int) -> bytes:
        """Return the next bytes; refuse more than there are."""
        end = self.at + count
        if end > len(self.data):
            raise damaged(self.path, f"is truncated (got {len(self.data)} bytes)")
        if end > MOST_METADATA:
            most = f"(got more than {MOST_METADATA >> 20} MiB)"
            raise damaged(self.path, f"has more metadata than a model needs {most}")
        self.at, start = end, self.at
        return self.data[start:end]

    def number(self, code: str) -> Any:
        """Return the next number, of a type of `struct`."""
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        # 1e-5 in float32 is 9.99999975e-6 as a double; the shortest decimal is what was meant.
        return float(str(np.float32(value))) if code == "f" else value

    def text(self) -> str:
        """Return the next string."""
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise damaged(self.path, "holds a string that is not UTF-8") from None

    def value(self, key: str) -> Any:
        """Return the next value of the metadata, which begins with its type."""
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == _STRING:
                return [self.text() for _ in range(count)]
            if kind in _SCALARS:
                code = np.dtype("<" + _SCALARS[kind])
                return np.frombuffer(self.take(count * code.itemsize), code).tolist()
        raise damaged(self.path, f"{key} has a type that is not supported (got {kind})")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """Return the metadata and the tensors of a file, by their names in it."""
    try:
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            raise damaged(path, "is empty (got 0 bytes)")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_header(_Header(data, path))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path}: cannot be read ({reason}). Give a file that you may read."
        ) from None


def _read_header(header: _Header) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    path = header.path
    magic = header.take(4)
    if magic != b"GGUF":
        raise UserError(
            f"{path}: is neither a GGUF file nor a folder (got {magic!r}). Give a model."
        )
    version = header.number("I")
    if version not in (2, 3):
        raise UserError(
            f"{path}: must be of GGUF version 2 or 3, little-endian (got {version}). Convert the "
            "model again."
        )
    num_tensors, num_keys = header.number("Q"), header.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = header.text()
        if key in metadata:
            raise damaged(path, f"has {show(key)} twice")
        metadata[key] = header.value(key)
    check_fields(metadata, {"general.alignment": whole(1, 2**16)}, str(path))
    listed = {}
    for _ in range(num_tensors):
        name = header.text()
        if name in listed:
            raise damaged(path, f"has {show(name)} twice")
        sizes = tuple(header.number("Q") for _ in range(min(header.number("I"), 5)))[::-1]
        listed[name] = (sizes, header.number("I"), header.number("Q"))
    alignment = metadata.get("general.alignment", 32)
    begin = -(-header.at // alignment) * alignment
    end = len(header.data)
    return metadata, {
        name: _check_tensor(path, name, sizes, type, begin + start, end)
        for name, (sizes, type, start) in listed.items()
    }


def _check_tensor(
    path: Path, name: str, sizes: tuple[int, ...], code: int, start: int, end: int
) -> _Tensor:
    """Return a listed tensor; refuse one that the file cannot hold."""
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise UserError("model: a GGUF file needs gguf. pip install 'jaxlm[gguf]'.") from None
    names = {int(known): known.name for known in GGMLQuantizationType}
    if names.get(code) not in TYPES:
        raise UserError(
            f"{path}: {name} has a type that is not supported (got {names.get(code, code)}). Use a "
            f"file with {', '.join(TYPES)}."
        )
    type = GGMLQuantizationType(code)
    block, block_bytes = GGML_QUANT_SIZES[type]
    if not 1 <= len(sizes) <= 4 or not all(1 <= n <= MOST for n in sizes) or sizes[-1] % block:
        shape = show(list(sizes))
        raise damaged(path, f"{name} has a shape that {type.name} cannot have (got {shape})")
    row_bytes = sizes[-1] // block * block_bytes
    if start + math.prod(sizes[:-1]) * row_bytes > end:
        problem = f"{name} ends beyond the file, which is truncated (got {end} bytes)"
        raise damaged(path, problem)
    return _Tensor(path, name, type, sizes, start, row_bytes)


def _hf_config(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, _Tensor]
) -> dict[str, Any]:
    """Return the fields of config.json."""
    where, architecture = str(path), metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: general.architecture is not supported (got {show(architecture)}). Choose one "
            f"of {', '.join(ARCHITECTURES)}."
        )
    check_fields(metadata, TOKENIZER, where)
    needed, optional = ARCHITECTURES[architecture]
    fields = {f"{architecture}.{key}": field for key, field in (needed | optional).items()}
    check_fields(metadata, {key: FIELDS[field] for key, field in fields.items()}, where)
    scaling = {f"{architecture}.{key}": field for key, field in _ROPE.items()}
    hf = {field: metadata[key] for key, field in fields.items() if key in metadata}
    for key in (f"{architecture}.{key}" for key in needed):
        if key not in metadata:
            raise UserError(f"{path}: has no {key}. Download it again, or convert the model again.")
    if "token_embd.weight" not in tensors:
        raise damaged(path, "has no token_embd.weight")
    if architecture != "gpt2":
        size = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        for key in (f"{architecture}.{key}" for key in _CHECKED):
            if metadata.get(key, size) != size:
                raise UserError(
                    f"{path}: {key} must be {size}, the size of a head (got "
                    f"{show(metadata[key])}). Use another model."
                )
        groups = hf.get("num_key_value_heads") or hf["num_attention_heads"]
        hf |= {"num_key_value_heads": groups, "head_dim": size}
        hf["attention_bias"] = "blk.0.attn_q.bias" in tensors
        hf["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if architecture == "gemma2":
        # The 27B model scales otherwise; llama.cpp, too, recognises it by its 46 layers.
        odd, width = hf["num_hidden_layers"] == 46, hf["hidden_size"] // hf["num_attention_heads"]
        hf["query_pre_attn_scalar"] = width if odd else hf["head_dim"]
    rope = {field: metadata[key] for key, field in scaling.items() if key in metadata}
    if rope.get("rope_type", "none") != "none":
        hf["rope_scaling"] = rope
    known = {*fields, *scaling, *(f"{architecture}.{key}" for key in (*_CHECKED, *_IGNORED))}
    for key, value in metadata.items():
        if key.startswith(f"{architecture}.") and key not in known and value:
            raise UserError(
                f"{path}: {show(key)} is not supported (got {show(value)}). Use a model without it."
            )
    ids = special_ids(metadata)
    eot = metadata.get("tokenizer.ggml.eot_token_id")
    ends = [ids["eos"], *([] if eot in (None, ids["eos"]) else [eot])]
    return hf | {
        "model_type": architecture,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": True,  # unless an output table is stored that differs
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 and ids["eos"] is not None else ids["eos"],
        "pad_token_id": ids["pad"],
    }


def _with_llama3_rope(
    path: Path, hf: dict[str, Any], factors: _Tensor
) -> tuple[ModelConfig, ModuleType]:
    """Return the configuration whose rotary frequencies a file divides by these factors.

    llama.cpp stores the factors of Llama 3.1 and later in place of the settings. Released models
    differ only in the largest factor, so that the settings follow from it.
    """
    values = factors[(slice(None),)].ravel()
    settings = {
        "rope_type": "llama3",
        "factor": round(float(values.max()), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, _ = parse_config(hf, str(path))
    config, module = parse_config({**hf, "rope_scaling": settings}, str(path))
    wanted = frequencies(plain.replace(rope_scaling=None)) / frequencies(config)
    if values.shape != wanted.shape or not np.allclose(values, wanted, rtol=1e-4, atol=0):
        raise UserError(
            f"{path}: rope_freqs.weight must be that of Llama 3 (got {show(values)}). Use a folder "
            "in the Hugging Face layout."
        )
    return config, module


def _rename(
    path: Path, config: ModelConfig, module: ModuleType, tensors: Mapping[str, _Tensor]
) -> dict[str, _Tensor]:
    """Return the tensors by their Hugging Face names; undo what llama.cpp changed."""
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    architecture = next((a for a, name in MODEL_ARCH_NAMES.items() if name == config.family), None)
    if architecture is None:
        raise UserError(
            f"{path}: general.architecture is not known to this version of gguf (got "
            f"{config.family}). pip install --upgrade gguf."
        )
    table = get_tensor_name_map(architecture, 1)  # the names of layer 0 give those of all
    names = {
        table.get_name(row.hf.format(layer=0), (".weight", ".bias")): row.hf
        for row in module.names(config)
    }
    renamed = {}
    for name, tensor in tensors.items():
        block = re.match(r"blk\.(\d+)\.", name)
        layer = block[1] if block else "0"
        hf = names.get(re.sub(r"^blk\.\d+\.", "blk.0.", name), name).format(layer=layer)
        if hf in renamed:  # "blk.1." and "blk.01."
            raise damaged(path, f"has {show(hf)} twice")
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
        part = name.split(".")[2] if block else ""
        if config.family == "llama" and part in heads and tensor.sizes[0] % (2 * heads[part]) == 0:
            # Pairs of rotary elements lie side by side in the file and half a head apart in HF.
            pairs = np.arange(tensor.sizes[0]).reshape(heads[part], -1, 2)
            tensor = dataclasses.replace(tensor, rows=pairs.swapaxes(1, 2).ravel())
        if config.family == "gpt2" and block and len(tensor.sizes) == 2:
            tensor = dataclasses.replace(tensor, transpose=True)
        if name.endswith("norm.weight"):
            tensor = dataclasses.replace(tensor, offset=config.norm_offset)
        renamed[hf] = tensor
    return renamed
