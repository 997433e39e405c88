"""The only places where a parameter is read: through the view before use and the tap after.

`params` is a nested dict that resolves whole paths; inside the scan it holds one layer's slice.
Shapes: B batch, T length, D model width, V vocabulary.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlm.core import taps, views
from jaxlm.core.paths import lookup
from jaxlm.core.precision import Packed
from jaxlm.models.config import ModelConfig

HEAD_BLOCK = 2**24


def gelu(x: Array) -> Array:
    r"""$x \Phi(x) = x (1 + \mathrm{erf}(x / \sqrt 2)) / 2$, in at least float32.

    By erf, as in PyTorch; `jax.nn.gelu` takes erfc, whose derivative is slower.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class Context:
    """What every read of a parameter carries along: configuration, view, tap and layer."""

    config: ModelConfig
    view: Any = None
    tap: Any = None
    layer: Array | None = None

    def read(self, params, path: str, rows=None) -> Any:
        """The leaf at `path` as the model sees it, or None where the tree has no such leaf."""
        leaf = lookup(params, path)
        if leaf is None:
            return None
        seen = views.apply(self.view, path, leaf, self.layer, rows=rows)
        dtype = self.config.compute_dtype
        return seen if dtype is None else jax.tree.map(lambda x: x.astype(dtype), seen)

    def out(self, path: str, op: taps.Op, x: Array, y: Array, rows=None) -> Array:
        return taps.apply(self.tap, path, op, x, y, self.layer, rows=rows)


def matmul(x, kernel):
    """`x @ kernel` over one flat axis of rows, of which XLA's CPU gradient is twice as fast."""
    rows = x.reshape(-1, x.shape[-1]) @ kernel
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def dense(params, path: str, x, ctx: Context):
    """`x @ kernel + s (x @ lora_a) @ lora_b + bias`; only the kernel [in, out] is always there.

    s is `config.lora_scale`.
    """
    y = _product(params, path + ".kernel", x, ctx)
    if lookup(params, path + ".lora_a") is not None:
        low = _product(params, path + ".lora_a", x, ctx)
        low = _product(params, path + ".lora_b", low, ctx)
        y = (y + ctx.config.lora_scale * low).astype(y.dtype)
    return add_bias(params, path, y, ctx)


def _product(params, path, x, ctx):
    matrix = ctx.read(params, path)
    y = matrix.dot(x) if isinstance(matrix, views.LowRankSum) else matmul(x, matrix)
    return ctx.out(path, "dense", x, y)


def add_bias(params, path: str, x, ctx: Context):
    """`x + bias`, or `x` where the tree has no bias at `path`."""
    bias = ctx.read(params, path + ".bias")
    if bias is None:
        return x
    return ctx.out(path + ".bias", "bias", x, x + _broadcast(bias, x))


def norm(params, path: str, x, ctx: Context):
    """LayerNorm or RMSNorm over the last axis; scale and bias if stored.

    All of it is in at least float32 and rounded once, at the end: an offset is 1 where the scale
    that is stored may be 1e-3, of which bfloat16 would keep nothing in their sum.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if ctx.config.norm == "layernorm":
        wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + ctx.config.norm_eps)
    scale = ctx.read(params, path + ".scale")
    if scale is not None:
        scale = _broadcast(scale.astype(wide.dtype) + ctx.config.norm_offset, wide)
        wide = ctx.out(path + ".scale", "scale", wide, wide * scale)
    return add_bias(params, path, wide, ctx).astype(x.dtype)


def embed(params, path: str, ids_BxT, ctx: Context):
    """Rows of an embedding table; only the rows in use pass through the view."""
    y = ctx.read(params, path + ".embedding", rows=ids_BxT)
    return ctx.out(path + ".embedding", "embed", ids_BxT, y)


def head(params, path: str, x, ctx: Context, token_ids=None):
    """Logits `x @ embedding.T`, for all tokens or for `token_ids` only.

    A table of more than 2**24 elements is consumed in blocks of rows, so that neither a view nor a
    packed leaf ever makes a second one.
    """
    leaf = lookup(params, path + ".embedding")
    made = ctx.view is not None or isinstance(leaf, Packed)
    blocked = token_ids is None and made and leaf.size > HEAD_BLOCK
    if blocked:
        y = _blocked_head(params, path, x, ctx, leaf.shape)
    else:
        rows = ctx.read(params, path + ".embedding", rows=token_ids)
        y = matmul(x, rows.T)
    return ctx.out(path + ".embedding", "head", x, y, rows=token_ids)


def _blocked_head(params, path, x, ctx, shape):
    vocab, width = shape
    size = HEAD_BLOCK // width
    count = vocab // size

    def block(start, size):
        return x @ ctx.read(params, path + ".embedding", rows=(start, size)).T

    logits = lax.map(lambda i: block(i * size, size), jnp.arange(count))
    logits = jnp.moveaxis(logits, 0, -2).reshape(*x.shape[:-1], count * size)
    if vocab == count * size:
        return logits
    return jnp.concatenate([logits, block(count * size, vocab - count * size)], axis=-1)


def _broadcast(vector, x):
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
