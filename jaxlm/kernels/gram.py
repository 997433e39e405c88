r"""What every method shares: what becomes of a gradient, and how two are contracted.

A kernel is an inner product of features of two gradients,

    K[n, c, m, d] = ⟨φ1(∇f_c(x_n)), φ2(∇f_d(x'_m))⟩,

| kind               | φ1(g)   | φ2(g)                            | what moves by one step on x' |
|--------------------|---------|----------------------------------|------------------------------|
| sgd                | g       | g                                | f(x), by SGD                 |
| asymmetric_signgd  | g       | sign g                           | f(x), by SignGD              |
| signgd             | sign g  | sign g                           | its symmetric surrogate      |
| adam               | g       | m̂ / (√v̂ + ε), moments with g in  | f(x), by Adam                |

Gradients are lists with one array [N, C, S, p] a leaf: N examples, C outputs, and S slices of p
numbers, a slice being one layer of a stacked leaf, or the leaf.

References: Malladi et al., "A Kernel-Based View of Language Model Fine-Tuning", arXiv:2210.05643.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxlm.core.errors import UserError
from jaxlm.gradients import adam

KINDS = ("sgd", "signgd", "asymmetric_signgd", "adam")
SYMMETRIC = ("sgd", "signgd")
TILES = 4
"""Parts of the rows of a symmetric kernel; of their pairs only the upper half is computed."""

Axes = Literal["full", "trace", "diagonal"]


def axes(trace_axes: Sequence[int], diagonal_axes: Sequence[int]) -> Axes:
    """What becomes of the class axis of f, from the arguments of the public functions.

    >>> axes((), ()), axes((-1,), ()), axes((), (1,))
    ('full', 'trace', 'diagonal')

    Raises:
      UserError: for axis 0, an axis that [N, C] has not, or one that is both traced and diagonal.
    """
    for name, given in (("trace_axes", trace_axes), ("diagonal_axes", diagonal_axes)):
        for axis in given:
            if axis in (0, -2):
                raise UserError(
                    f"{name}={tuple(given)} has the axis of examples, 0; only the class axis, -1, "
                    "can be traced or made diagonal"
                )
            if axis not in (1, -1):
                raise UserError(
                    f"{name}={tuple(given)} has axis {axis}, but f's value has two, [N, C]; "
                    "give (-1,) or ()"
                )
    if trace_axes and diagonal_axes:
        raise UserError("the class axis is in trace_axes and in diagonal_axes; leave it in one")
    return "trace" if trace_axes else "diagonal" if diagonal_axes else "full"


def wide(dtype: Any) -> Any:
    """The dtype of a kernel of gradients of a dtype: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Adam's moments, one pair of arrays [S, p] a leaf, and the constants of its next step."""

    first: list[Array]
    second: list[Array]
    count: Array
    b1: float = dataclasses.field(metadata={"static": True})
    b2: float = dataclasses.field(metadata={"static": True})
    eps: float = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """φ1 and φ2 of a kind.

    Attributes:
      moments: of Adam; None for other kinds.
      kind: one of `KINDS`.
      sign_threshold: τ of `signs`; None for that of the dtype.
    """

    moments: Moments | None = None
    kind: str = dataclasses.field(default="sgd", metadata={"static": True})
    sign_threshold: float | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def symmetric(self) -> bool:
        """Whether φ1 is φ2."""
        return self.kind in SYMMETRIC

    def left(self, gradients: list[Array]) -> list[Array]:
        """φ1, the features of x."""
        return signs(gradients, self.sign_threshold) if self.kind == "signgd" else gradients

    def right(self, gradients: list[Array]) -> list[Array]:
        """φ2, the features of x', the examples that a step is made on."""
        if self.kind == "adam":
            assert self.moments is not None
            return adam_steps(gradients, self.moments)
        return gradients if self.kind == "sgd" else signs(gradients, self.sign_threshold)


def threshold_of(dtype: Any) -> float:
    """τ by default: some roundings, where noise ends."""
    return 1e-12 if dtype == jnp.float64 else 1e-6


def _kept(gradients, threshold):
    """For each leaf what counts as not zero [N, C, S, p], and the largest entries [N, C, S]."""
    if threshold is None:
        threshold = threshold_of(jnp.result_type(*gradients))
    sizes = [jnp.abs(g).astype(wide(g.dtype)) for g in gradients]
    tops = [size.max(-1, initial=0) for size in sizes]
    top = jnp.stack([t.max(-1, initial=0) for t in tops]).max(0)
    for size, largest in zip(sizes, tops, strict=True):
        noise = largest <= threshold * top[..., None]
        yield (size > threshold * largest[..., None]) & ~noise[..., None], largest


def signs(gradients: list[Array], threshold: float | None = None) -> list[Array]:
    """sign(g), with zero for what rounding makes of zero.

    An entry counts if |g| > τ max|g| of its slice, and a slice if its max|g| > τ max|g| of all
    leaves, both for this one example and output. The second is for slices that are noise
    altogether: the bias of keys moves every score of a query alike, so its gradient is zero, and
    comes out as rounding errors whose signs mean nothing.

    Args:
      gradients: [N, C, S, p] each.
      threshold: τ; by default 1e-6, and 1e-12 in float64. With 0 every number but zero has a sign,
        as in the authors' code.

    Returns:
      Like `gradients`: -1, 0, 1; NaN throughout a slice with an entry that is not finite.
    """
    rows = zip(gradients, _kept(gradients, threshold), strict=True)
    return [
        jnp.where(kept, jnp.sign(g), 0) + (0 * largest)[..., None].astype(g.dtype)
        for g, (kept, largest) in rows
    ]


def dropped(gradients: list[Array], threshold: float | None = None) -> Float[Array, "N"]:
    """The part of the entries other than zero that `signs` takes for zero, of each example."""
    lost = jnp.zeros((), jnp.float32)
    there = jnp.zeros((), jnp.float32)
    for g, (kept, _) in zip(gradients, _kept(gradients, threshold), strict=True):
        lost += ((g != 0) & ~kept).sum((1, 2, 3), dtype=jnp.float32)
        there += (g != 0).sum((1, 2, 3), dtype=jnp.float32)
    return lost / jnp.maximum(there, 1)


def adam_steps(gradients: list[Array], moments: Moments) -> list[Array]:
    """Adam's next step on each gradient, m̂ / (√v̂ + ε), without learning rate and sign."""
    constants = adam.Constants(moments.b1, moments.b2, moments.eps)
    rows = zip(gradients, moments.first, moments.second, strict=True)
    return [
        adam.step(g, first[None, None], second[None, None], moments.count, constants)[0]
        for g, first, second in rows
    ]


def contract(left: list[Array], right: list[Array], over: Axes) -> Array:
    """⟨left, right⟩ summed over leaves, at the highest precision and in at least float32.

    Args:
      left: [N, C, S, p] each.
      right: [M, C, S, p] each.
      over: what becomes of the class axis.

    Returns:
      [N, C, M, C], for "trace" [N, M] (the mean over C), for "diagonal" [N, M, C].
    """
    dtype = wide(jnp.result_type(*left, *right))
    return sum(_contract(a, b, over, dtype) for a, b in zip(left, right, strict=True))


def _contract(a, b, over, dtype):
    summed = (1, 2, 3) if over == "trace" else (2, 3)
    shared = (1,) if over == "diagonal" else ()
    small = jnp.promote_types(a.dtype, b.dtype)
    out = lax.dot_general(
        a.astype(small),
        b.astype(small),
        ((summed, summed), (shared, shared)),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    if over == "trace":
        return out / a.shape[1]
    return jnp.moveaxis(out, 0, -1) if over == "diagonal" else out


def contract_self(features: list[Array], over: Axes) -> Array:
    """`contract(features, features, over)`, of which little more than half is computed."""
    count = features[0].shape[0]
    size = -(-count // TILES)
    if count < 2 * TILES:
        return contract(features, features, over)
    strips = []
    for start in range(0, count, size):
        part = [a[start : start + size] for a in features]
        strips.append(contract(part, [a[start:] for a in features], over))
    return join_upper(strips, over, [strip.shape[0] for strip in strips])


def join_upper(strips: list[Array], over: Axes, sizes: list[int]) -> Array:
    """A symmetric kernel from its strips: rows of part i against all columns from part i on."""
    where = column_axis(over)

    def mirrored(j, i):
        start = sum(sizes[j:i])
        part = lax.slice_in_dim(strips[j], start, start + sizes[i], axis=where)
        return transpose(part, over)

    rows = [
        jnp.concatenate([*(mirrored(j, i) for j in range(i)), strip], axis=where)
        for i, strip in enumerate(strips)
    ]
    return jnp.concatenate(rows, axis=0)


def column_axis(over: Axes) -> int:
    """The axis of a kernel that runs over the examples of x'."""
    return 2 if over == "full" else 1


def transpose(kernel: Array, over: Axes) -> Array:
    """K(x', x) from K(x, x') of a symmetric kind."""
    order = {"full": (2, 3, 0, 1), "trace": (1, 0), "diagonal": (1, 0, 2)}
    return kernel.transpose(order[over])
