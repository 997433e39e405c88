"""The only place where a parameter is read: through the view before its use, the tap after it.

`params` is a nested dict that is read by full paths; inside the scan it holds one layer.
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
from jaxlm.core.dtypes import wide
from jaxlm.core.paths import lookup
from jaxlm.core.precision import Packed
from jaxlm.models.config import ModelConfig

HEAD_BLOCK = 2**24
"""Most elements of an output table that `head` reads at once, and size of its blocks of rows."""


def gelu(x: Array) -> Array:
    r"""Return $x \Phi(x) = x (1 + \mathrm{erf}(x / \sqrt 2)) / 2$, in at least float32."""
    # With erf, as in PyTorch: `jax.nn.gelu` uses erfc, whose derivative is slower.
    y = wide(x)
    return (0.5 * y * (1 + lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class Context:
    """What every read of a parameter needs: configuration, view, tap and layer."""

    config: ModelConfig
    view: Any = None
    tap: Any = None
    layer: Array | None = None

    def read(self, params, path: str, rows=None) -> Any:
        """Return the leaf at `path` as the model sees it, or None if there is none."""
        leaf = lookup(params, path)
        if leaf is None:
            return None
        seen = views.apply(self.view, path, leaf, self.layer, rows=rows)
        dtype = self.config.compute_dtype
        return seen if dtype is None else jax.tree.map(lambda x: x.astype(dtype), seen)

    def out(self, path: str, op: taps.Op, x: Array, y: Array, rows=None) -> Array:
        return taps.apply(self.tap, path, op, x, y, self.layer, rows=rows)


def matmul(x, kernel):
    """Return `x @ kernel`."""
    # With all leading axes in one, XLA's gradient on a CPU is twice as fast.
    rows = x.reshape(-1, x.shape[-1]) @ kernel
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def dense(params, path: str, x, ctx: Context):
    """Return `x @ kernel + config.lora_scale (x @ lora_a) @ lora_b + bias`.

    The kernel is [in, out]; bias and adapter are optional.
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
    """Return `x + bias`, or `x` if the tree has no bias at `path`."""
    bias = ctx.read(params, path + ".bias")
    if bias is None:
        return x
    return ctx.out(path + ".bias", "bias", x, x + _broadcast(bias, x))


def norm(params, path: str, x, ctx: Context):
    """Apply LayerNorm or RMSNorm to the last axis, with scale and bias if the tree has them."""
    # In at least float32, and rounded once at the end. Gemma adds an offset of 1 to scales that may
    # be 1e-3, which a sum in bfloat16 would lose.
    y = wide(x)
    if ctx.config.norm == "layernorm":
        y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + ctx.config.norm_eps)
    scale = ctx.read(params, path + ".scale")
    if scale is not None:
        scale = _broadcast(scale.astype(y.dtype) + ctx.config.norm_offset, y)
        y = ctx.out(path + ".scale", "scale", y, y * scale)
    return add_bias(params, path, y, ctx).astype(x.dtype)


def embed(params, path: str, ids_BxT, ctx: Context):
    """Return rows of an embedding table; only these rows pass through the view."""
    y = ctx.read(params, path + ".embedding", rows=ids_BxT)
    return ctx.out(path + ".embedding", "embed", ids_BxT, y)


def head(params, path: str, x, ctx: Context, token_ids=None):
    """Return the logits `x @ embedding.T` of all tokens, or of `token_ids`.

    With a view or a packed leaf, a table of more than 2**24 elements is read in blocks of rows, so
    that memory never holds a second full table. Without a view, the transposed table
    `output_kernel` of `jaxlm.models.generation.decoding_params` is read instead if it exists.
    """
    leaf = lookup(params, path + ".embedding")
    if ctx.view is None and token_ids is None and "output_kernel" in params:
        y = matmul(x, ctx.read(params, "output_kernel"))
        return ctx.out(path + ".embedding", "head", x, y)
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
