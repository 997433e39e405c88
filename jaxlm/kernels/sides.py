"""The two sides of a kernel whose examples pass a model in one batch.

The rules of `factorized` make pieces of gradients [N, C, p], of the examples of x and of x'; here
stands what becomes of two such pieces.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlm.kernels import gram


class Slice(NamedTuple):
    """The part of the kernel that one layer of a leaf has.

    Attributes:
      kernel: of that layer, or the sum of many where no sign is taken.
      tops: max|g| of the layer for the examples of x [N, C] and of x' [M, C]; None without signs.
    """

    kernel: Array
    tops: tuple[Array, Array] | None = None


class Pieces(NamedTuple):
    """Gradients piece by piece.

    Attributes:
      make: of the part of a piece in `parts`, the piece [N, C, p].
      parts: pytree of arrays whose axis 0 is the number of pieces.
    """

    make: Callable[[Any], Array]
    parts: Any


@dataclasses.dataclass(frozen=True)
class Sides:
    """What kind of kernel is made, and which examples stand on which side; static.

    Attributes:
      first: N, the examples of x, which come first in a batch; None where x' is x.
      over: what becomes of the class axis.
      kind: one of `gram.KINDS`.
      threshold: τ of signs.
      constants: b1, b2 and eps of Adam.
    """

    first: int | None
    over: gram.Axes
    kind: str
    threshold: float = 0.0
    constants: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def linear(self) -> bool:
        """Whether the kernel is an inner product of the gradients themselves."""
        return self.kind == "sgd"

    @property
    def signed(self) -> bool:
        """Whether signs are taken on either side."""
        return self.kind in ("signgd", "asymmetric_signgd")

    @property
    def inner(self) -> gram.Axes:
        """The axes of the kernel of a slice: with signs, an output may lose a slice."""
        return "diagonal" if self.signed and self.over == "trace" else self.over

    def each(self, function: Callable[..., Any], *batches: Any, axis: int = 0) -> tuple[Any, Any]:
        """`function` of the examples of x, and of those of x'."""
        if self.first is None:
            value = function(*batches)
            return value, value
        n = self.first
        left = [jax.tree.map(lambda a: lax.slice_in_dim(a, 0, n, axis=axis), b) for b in batches]
        right = [jax.tree.map(lambda a: lax.slice_in_dim(a, n, None, axis=axis), b) for b in batches]
        return function(*left), function(*right)

    def contract(self, left: Array, right: Array) -> Array:
        """⟨left, right⟩ of [N, C, p] and [M, C, p]."""
        return gram.contract([left[:, :, None]], [right[:, :, None]], self.inner)

    def features(self, pieces: tuple[Array, Array], tops: Any, moments: Any) -> Array:
        """φ1 of the pieces of x with φ2 of those of x'; `moments` are (first [p], second [p], count)."""
        left, right = pieces
        if self.kind == "signgd":
            left = self.sign(left, tops[0])
        if self.signed:
            right = left if tops[0] is tops[1] and self.kind == "signgd" else self.sign(right, tops[1])
        elif self.kind == "adam":
            right = self.adam(right, moments)
        return self.contract(left, right)

    def adam(self, piece: Array, moments: Any) -> Array:
        """Adam's steps on [N, C, p]."""
        first, second, count = moments
        fixed = gram.Moments([first[None]], [second[None]], count, *self.constants)
        return gram.adam_steps([piece[:, :, None]], fixed)[0][:, :, 0]

    def sign(self, piece: Array, top: Array) -> Array:
        """sign(g) where |g| > τ top, else zero; NaN where the top is not finite."""
        top = top[..., None]
        kept = jnp.abs(piece).astype(top.dtype) > self.threshold * top
        return jnp.where(kept, jnp.sign(piece), 0) + (0 * top).astype(piece.dtype)

    def whole(self, piece: Array, moments: Any) -> Slice:
        """The kernel of a leaf whose gradients [N, C, p] are one piece."""
        return self.chunked(*self.each(lambda a: Pieces(lambda p: p, a[None]), piece), _lead(moments))

    def chunked(self, left: Pieces, right: Pieces, moments: Any = None) -> Slice:
        """The kernel of a leaf whose gradients are made piece by piece, so that one is alive.

        Signs need the largest entry first, so every piece is then made twice.

        Args:
          left, right: of the examples of x and of x', the same object where x' is x.
          moments: (first [k, p], second [k, p], count) of k pieces, for Adam.
        """
        same = left is right

        def make(parts):
            one = left.make(parts[0])
            return one, one if same else right.make(parts[1])

        parts = (left.parts, None if same else right.parts)
        tops = _tops(make, parts, same) if self.signed else None
        count = None if moments is None else moments[2]

        def kernel(part):
            parts, rows = part
            return self.features(make(parts), tops, None if rows is None else (*rows, count))

        rows = None if moments is None else moments[:2]
        return Slice(_sum(kernel, (parts, rows)), tops)

    def join(self, slices: Sequence[Slice]) -> Array:
        """The kernel from all slices, without those that are noise beside the others."""
        tops = [s.tops for s in slices if s.tops is not None]
        if not tops:
            return sum(s.kernel for s in slices)  # type: ignore[return-value]
        most = [jnp.stack([pair[side] for pair in tops]).max(0) for side in (0, 1)]
        total: Any = 0
        for part in slices:
            assert part.tops is not None
            left, right = (~(t <= self.threshold * m) for t, m in zip(part.tops, most, strict=True))
            if self.kind == "asymmetric_signgd":
                left = jnp.ones_like(left)
            if self.inner == "full":
                keep = left[:, :, None, None] & right[None, None]
            else:
                keep = left[:, None] & right[None]
            total += jnp.where(keep, part.kernel, 0)
        return total.mean(-1) if self.over == "trace" else total


def _lead(moments):
    return None if moments is None else (moments[0][None], moments[1][None], moments[2])


def _sum(function, parts):
    """The sum of `function` over axis 0 of `parts`, one after another."""
    first = jax.tree.map(lambda a: a[0], parts)
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        return function(first)
    shape = jax.eval_shape(function, first)
    start = jnp.zeros(shape.shape, shape.dtype)
    return lax.scan(lambda total, part: (total + function(part), None), start, parts)[0]


def _tops(make, parts, same):
    """max|g| over all pieces, of either side."""

    def largest(piece):
        return jnp.abs(piece).astype(gram.wide(piece.dtype)).max(-1, initial=0)

    def step(tops, part):
        pieces = make(part)
        left = jnp.maximum(tops[0], largest(pieces[0]))
        return (left, None if same else jnp.maximum(tops[1], largest(pieces[1]))), None

    first = jax.eval_shape(make, jax.tree.map(lambda a: a[0], parts))
    zeros = [jnp.zeros(s.shape[:2], gram.wide(s.dtype)) for s in first]
    left, right = lax.scan(step, (zeros[0], None if same else zeros[1]), parts)[0]
    return left, left if same else right
