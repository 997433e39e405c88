r"""How a row of a gradient store is written: 32, 16, 8 or 1 bits a number.

    float32   the numbers
    float16   2^k, and the numbers over 2^k in half precision; max|x| / 2^k is in [1, 2)
    int8      s = max|x| / 127, and x / s rounded to nearest
    1bit      ||x||, and the signs: x is read as sign(x) ||x|| / sqrt(dim)

The first number of a row of the last three is a float32. It belongs to the row alone, so that a
small gradient is kept as well as a large one: gradients that were cast to half precision lose what
is below 6e-8.

References: Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning",
arXiv:2402.04333 (half precision); Ananta et al., "QLESS: A Quantized Approach for Data Valuation
and Selection in Large Language Model Fine-Tuning", arXiv:2502.01703 (8 bits to 1).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from jaxlm.core.errors import UserError

Rows = Float[np.ndarray, "N dim"]
Packed = UInt8[np.ndarray, "N width"]

HEAD = 4  # bytes of the number before a row


class Encoding(NamedTuple):
    """A way to write rows.

    Attributes:
      width: bytes of a row of `dim` numbers.
      encode: [N, dim] float32 to bytes [N, width].
      decode: bytes [N, width] and dim to [N, dim] float32.
    """

    width: Callable[[int], int]
    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray, int], np.ndarray]


def encoding(dtype: str) -> Encoding:
    """The encoding of a name.

    Raises:
      UserError: if there is none.
    """
    if dtype not in ENCODINGS:
        raise UserError(f"dtype={dtype!r} is no encoding of rows; give {', '.join(ENCODINGS)}")
    return ENCODINGS[dtype]


def _join(heads: np.ndarray, bodies: np.ndarray) -> Packed:
    return np.concatenate([_bytes(heads.astype("<f4")[:, None]), _bytes(bodies)], axis=1)


def _bytes(values: np.ndarray) -> Packed:
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)


def _head(packed: Packed) -> np.ndarray:
    return np.ascontiguousarray(packed[:, :HEAD]).view("<f4")


def _body(packed: Packed, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(packed[:, HEAD:]).view(dtype)


def _largest(rows: Rows) -> np.ndarray:
    return np.abs(rows).max(axis=1, initial=0)


def _encode_float32(rows: Rows) -> Packed:
    return _bytes(rows.astype("<f4", copy=False))


def _decode_float32(packed: Packed, dim: int) -> Rows:
    return np.ascontiguousarray(packed).view("<f4").astype(np.float32, copy=False)


def _encode_float16(rows: Rows) -> Packed:
    exponents = np.maximum(np.frexp(_largest(rows))[1] - 1, np.finfo(np.float32).minexp)
    bodies = np.ldexp(rows, -exponents[:, None]).astype("<f2")
    return _join(np.ldexp(np.float32(1), exponents), bodies)


def _decode_float16(packed: Packed, dim: int) -> Rows:
    return _body(packed, "<f2").astype(np.float32) * _head(packed)


def _encode_int8(rows: Rows) -> Packed:
    scale = (_largest(rows) / np.float32(127)).astype(np.float32)
    unit = np.where(scale == 0, np.float32(1), scale)[:, None]
    values = np.clip(np.rint(rows / unit), -127, 127)
    return _join(scale, values.astype(np.int8))


def _decode_int8(packed: Packed, dim: int) -> Rows:
    return _body(packed, "i1").astype(np.float32) * _head(packed)


def _encode_1bit(rows: Rows) -> Packed:
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    return _join(norms, np.packbits(rows >= 0, axis=1, bitorder="little"))


def _decode_1bit(packed: Packed, dim: int) -> Rows:
    bits = np.unpackbits(packed[:, HEAD:], axis=1, count=dim, bitorder="little")
    size = _head(packed) / np.float32(dim**0.5)
    return (2 * bits.astype(np.float32) - 1) * size


ENCODINGS = {
    "float32": Encoding(lambda dim: 4 * dim, _encode_float32, _decode_float32),
    "float16": Encoding(lambda dim: HEAD + 2 * dim, _encode_float16, _decode_float16),
    "int8": Encoding(lambda dim: HEAD + dim, _encode_int8, _decode_int8),
    "1bit": Encoding(lambda dim: HEAD + (dim + 7) // 8, _encode_1bit, _decode_1bit),
}
