r"""Weights in 8 or 4 bits, converted to floats where they are read.

A packed leaf takes the place of a matrix in the tree. All weights of one output share a scale, or
each group of weights has its own:

    W ≈ s v / 2^(b-1),        v in {-2^(b-1), ..., 2^(b-1) - 1},    b = 8 or 4,

rounded to nearest. s is the multiple ±c max|W| of the group with the least squared error; its sign
decides whether the extra integer -2^(b-1) serves the positive or the negative weights. s has the
size of a weight, and a step on s moves the largest weight of its group by the same amount.

The model reads a packed leaf through `jaxlm.core.views` like any other, one layer or some rows at a
time, with or without a view. Scales are leaves of the tree, such as
`layers.mlp.up_proj.kernel.scale`. They, biases and norms can be trained; the integers are fixed.

References: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
arXiv:2208.07339 (one scale an output); Kim et al., "Memory-Efficient Fine-Tuning of Compressed
Large Language Models via sub-4-bit Integer Quantization", arXiv:2305.14152 (training the scales).
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxlm.core import checks, paths
from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError
from jaxlm.typing import Params

MATRICES = r"^layers\..*\.kernel$|^(embed\.tokens|lm_head)\.embedding$"
GROUP_SIZE = 64
CLIPPING = np.linspace(0.7, 1.15, 13, dtype=np.float32)
"""Values of c that are tried."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale"),
    meta_fields=("bits", "axis", "length"),
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """A matrix in 8 or 4 bits, or a stack of matrices.

    Attributes:
      values: int8 [..., in, out]; or uint8 [..., in / 2, out], where the low bits of a byte hold
        an integer of the first half of a group, and its high bits one of the second half. `in` is
        padded to whole groups.
      scale: [..., groups, out], in the dtype that the model sees.
      bits: 8 or 4.
      axis: axis of `in`: -2 for kernels; -1 for embedding tables, which are [out, in].
      length: length of `in` without the padding.
    """

    values: Any
    scale: Any
    bits: int
    axis: int
    length: int

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.values.shape)
        shape[self.axis] = self.length
        return tuple(shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.scale.dtype

    def dense(self) -> Float[Array, "..."]:
        """Return the weights as an array: products in at least float32, rounded once."""
        values = _divide(self.values, self.axis, self.scale.shape[self.axis])
        if self.bits == 4:
            pair = (values & 15, values >> 4)
            values = jnp.concatenate(pair, axis=self.axis).astype(jnp.int8) - 8
        unit = wide(jnp.expand_dims(self.scale, self.axis)) / 2 ** (self.bits - 1)
        weights = _join((values.astype(unit.dtype) * unit).astype(self.dtype), self.axis)
        return lax.slice_in_dim(weights, 0, self.length, axis=weights.ndim + self.axis)


def _divide(x: Array, axis: int, count: int) -> Array:
    """Split an axis, counted from the end, into (count, rest)."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], count, x.shape[at] // count, *x.shape[at + 1 :])


def _join(x: Array, axis: int) -> Array:
    """Inverse of `_divide`."""
    at = x.ndim + axis
    return x.reshape(*x.shape[: at - 1], x.shape[at - 1] * x.shape[at], *x.shape[at + 1 :])


@functools.partial(jax.jit, static_argnames=("bits", "axis", "group_size"))
def _pack(matrix: Array, *, bits: Literal[8, 4], axis: int, group_size: int | None) -> Packed:
    length = matrix.shape[axis]
    group = min(group_size or length, length)
    group += group % 2  # even, since 4-bit integers are stored in pairs
    limit = 2 ** (bits - 1)
    widths = [(0, 0)] * matrix.ndim
    widths[axis] = (0, -length % group)
    padded = jnp.pad(wide(matrix), widths)
    weights = _divide(padded, axis, padded.shape[axis] // group)
    largest = jnp.abs(weights).max(axis, keepdims=True)

    def stored(factor):
        return (factor * largest).astype(matrix.dtype)

    def rounded(scale):
        unit = scale.astype(weights.dtype) / limit
        unit = jnp.where(unit == 0, 1, unit)  # a group of zeros
        values = jnp.clip(jnp.round(weights / unit), -limit, limit - 1)
        return values, jnp.square(values * unit - weights).sum(axis, keepdims=True)

    def better(best, factor):
        scale, error = best
        new = stored(factor)
        _, new_error = rounded(new)
        smaller = new_error < error
        return (jnp.where(smaller, new, scale), jnp.where(smaller, new_error, error)), None

    factors = jnp.asarray(np.concatenate([CLIPPING, -CLIPPING]), weights.dtype)
    start = (stored(1.0), rounded(stored(1.0))[1])
    (scale, _), _ = lax.scan(better, start, factors)
    values, _ = rounded(scale)
    values = values.astype(jnp.int8)
    if bits == 4:
        low, high = jnp.split((values + limit).astype(jnp.uint8), 2, axis)
        values = low | high << 4
    return Packed(_join(values, axis), jnp.squeeze(scale, axis), bits, axis, length)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, Packed)


def pack(
    path: str,
    matrix: Float[ArrayLike, "rows columns"],
    *,
    bits: Literal[8, 4],
    group_size: int | None = None,
) -> Packed:
    """Pack the matrix of one path; see `quantize`."""
    axis = -1 if path.endswith("embedding") else -2
    group = GROUP_SIZE if group_size is None and bits == 4 else group_size
    return _pack(jnp.asarray(matrix), bits=bits, axis=axis, group_size=group)


def quantize(
    params: Params,
    *,
    bits: Literal[8, 4],
    select: paths.Select = MATRICES,
    group_size: int | None = None,
) -> Params:
    """Pack the matrices of a tree, one layer of a stack at a time.

    Args:
      params: nested dict of arrays.
      bits: 8 or 4.
      select: a regular expression or predicate on paths; by default the kernels under `layers` and
        the token tables. Leaves that are not matrices stay as they are.
      group_size: number of weights that share a scale, even. The default is all weights of an
        output in 8 bits, and 64 in 4 bits.

    Returns:
      The same tree with `Packed` leaves, which every function of the model accepts. Each group has
      a scale in the dtype of the matrix.

    >>> params = {"layers": {"mlp": {"up_proj": {"kernel": jnp.ones((2, 96, 8))}}}}
    >>> packed = quantize(params, bits=4)["layers"]["mlp"]["up_proj"]["kernel"]
    >>> packed.values.shape, packed.scale.shape, packed.shape
    ((2, 64, 8), (2, 2, 8), (2, 96, 8))
    """
    checks.one_of("bits", bits, (8, 4))
    checks.integer("group_size", group_size, least=2)
    if group_size is not None and group_size % 2:
        raise UserError(f"group_size: must be even (got {group_size}). Correct it.")
    if any(map(_is_packed, jax.tree.leaves(params, is_leaf=_is_packed))):
        raise UserError("params: are quantized already (got packed leaves). Call dequantize first.")

    def packed(leaf: paths.Leaf, taken: bool) -> Any:
        if not taken or leaf.value.ndim - leaf.stacked < 2:
            return leaf.value
        one = functools.partial(pack, leaf.path, bits=bits, group_size=group_size)
        return lax.map(one, leaf.value) if leaf.stacked else one(leaf.value)

    return paths.map_with_path(packed, params, paths.mask(params, select))


def dequantize(params: Params) -> Params:
    """Return the tree with every packed leaf as the array that the model sees."""
    return jax.tree.map(
        lambda leaf: leaf.dense() if _is_packed(leaf) else leaf, params, is_leaf=_is_packed
    )
