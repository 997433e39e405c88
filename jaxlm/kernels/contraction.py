"""The definition of a kernel, and the contraction of two lists of gradients to a kernel."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlm.core import paths
from jaxlm.core.dtypes import wide_dtype
from jaxlm.core.errors import UserError
from jaxlm.kernels.kinds import Kind, kind_of

TILES = 4
"""Row tiles of a symmetric kernel. More tiles save more flops and make smaller products."""

Axes = Literal["full", "trace", "diagonal"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """What defines a kernel, besides f, the parameters and the examples.

    The kind is bound to the parameters; `over` is what happens to the class axis.
    """

    kind: Kind
    over: Axes = dataclasses.field(default="full", metadata={"static": True})
    select: paths.Select = dataclasses.field(default=None, metadata={"static": True})

    def leaves(self, params: Any) -> list[paths.Leaf]:
        """Return the selected leaves, in the order of the tree."""
        return paths.flatten(paths.split(params, self.select)[0])[0]


def kernel_spec(
    params: Any,
    kind: str | Kind = "sgd",
    trace_axes: Sequence[int] = (),
    diagonal_axes: Sequence[int] = (),
    select: paths.Select = None,
) -> KernelSpec:
    """Return the spec that the arguments of `ntk` describe."""
    return KernelSpec(
        kind_of(kind).bind(params, select), class_axis(trace_axes, diagonal_axes), select
    )


def class_axis(trace_axes: Sequence[int], diagonal_axes: Sequence[int]) -> Axes:
    """Return what happens to the class axis of f.

    >>> class_axis((), ()), class_axis((-1,), ()), class_axis((), (1,))
    ('full', 'trace', 'diagonal')
    """
    for name, axes in (("trace_axes", trace_axes), ("diagonal_axes", diagonal_axes)):
        for axis in axes:
            if axis not in (1, -1):
                raise UserError(
                    f"{name}: must name the class axis of f's value [N, C] (got {axis}). Give "
                    "(-1,) or ()."
                )
    if trace_axes and diagonal_axes:
        raise UserError(
            "diagonal_axes: must be empty where the class axis is traced (got trace_axes "
            f"{tuple(trace_axes)}). Give one of the two."
        )
    return "trace" if trace_axes else "diagonal" if diagonal_axes else "full"


def contract(left: list[Array], right: list[Array], over: Axes) -> Array:
    """Return ⟨left, right⟩ summed over leaves, at the highest precision and in at least float32.

    [N, C, S, p] and [M, C, S, p] per leaf give [N, C, M, C], for "trace" [N, M] (the mean over C),
    for "diagonal" [N, M, C].
    """
    dtype = wide_dtype(jnp.result_type(*left, *right))
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
    """Return `contract(features, features, over)`, computing little more than half of it."""
    count = features[0].shape[0]
    if count < 2 * TILES:
        return contract(features, features, over)
    # Strip i holds the rows of tile i and all columns from tile i on. The columns left of it are
    # transposes of strips above, so only (1 + 1 / TILES) / 2 of the flops are spent.
    size, where = -(-count // TILES), column_axis(over)
    starts = range(0, count, size)
    strips = [
        contract([a[i : i + size] for a in features], [a[i:] for a in features], over)
        for i in starts
    ]

    def below(j, i):
        at, rows = starts[i] - starts[j], strips[i].shape[0]
        return transpose(lax.slice_in_dim(strips[j], at, at + rows, axis=where), over)

    rows = [
        jnp.concatenate([*(below(j, i) for j in range(i)), strip], axis=where)
        for i, strip in enumerate(strips)
    ]
    return jnp.concatenate(rows, axis=0)


def column_axis(over: Axes) -> int:
    """Return the axis of a kernel that runs over the examples of x'."""
    return 2 if over == "full" else 1


def transpose(kernel: Array, over: Axes) -> Array:
    """Return K(x', x) from K(x, x') of a symmetric kind."""
    order = {"full": (2, 3, 0, 1), "trace": (1, 0), "diagonal": (1, 0, 2)}
    return kernel.transpose(order[over])
