"""The two sides of a kernel whose examples pass a model in one batch.

The rules of `factorized` make pieces of gradients [N, C, p] of the examples of x and of x'. Here is
what becomes of two such pieces, and of the kernels of all layers.
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
      kernel: of that layer; where no sign is taken, it may be the sum of many.
      tops: max|g| in that layer of the examples of x [N, C] and of x' [M, C]; None without signs.
    """

    kernel: Array
    tops: tuple[Array, Array] | None = None


class Pieces(NamedTuple):
    """Gradients piece by piece.

    Attributes:
      make: of one of `parts`, the piece [N, C, p].
      parts: an array with the number of pieces on axis 0.
    """

    make: Callable[[Array], Array]
    parts: Array


@dataclasses.dataclass(frozen=True)
class Sides:
    """What kind of kernel is made, and which examples stand on which side.

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
        """The axes of the kernel of one slice, which with signs one output may have and one not."""
        return "diagonal" if self.signed and self.over == "trace" else self.over

    def each(self, function: Callable[..., Any], *batches: Any) -> tuple[Any, Any]:
        """`function` of the examples of x, and of those of x'; batches have them on axis 0."""
        if self.first is None:
            value = function(*batches)
            return value, value
        left = jax.tree.map(lambda a: a[: self.first], batches)
        right = jax.tree.map(lambda a: a[self.first :], batches)
        return function(*left), function(*right)

    def counts(self, batch: Array) -> tuple[int, int]:
        """How many examples are on either side."""
        count = batch.shape[0]
        return (count, count) if self.first is None else (self.first, count - self.first)

    def features(self, left: Array, right: Array, tops: Any, moments: Any) -> Array:
        """φ1 of a piece of x and φ2 of that of x', contracted.

        Args:
          left, right: [N, C, p] and [M, C, p].
          tops: with signs, max|g| of the whole leaf [N, C] and [M, C].
          moments: for Adam, (first [p], second [p], count).
        """
        if self.kind == "signgd":
            left = self.sign(left, tops[0])
        if self.signed:
            right = self.sign(right, tops[1])
        elif self.kind == "adam":
            right = self.adam(right, moments)
        return gram.contract([left[:, :, None]], [right[:, :, None]], self.inner)

    def sign(self, piece: Array, top: Array) -> Array:
        """The sign where |g| > τ top, else zero; NaN where the top is not finite."""
        top = top[..., None]
        kept = jnp.abs(piece).astype(top.dtype) > self.threshold * top
        return jnp.where(kept, jnp.sign(piece), 0) + (0 * top).astype(piece.dtype)

    def adam(self, piece: Array, moments: Any) -> Array:
        """Adam's steps on [N, C, p]."""
        first, second, count = moments
        state = gram.Moments([first[None]], [second[None]], count, *self.constants)
        return gram.adam_steps([piece[:, :, None]], state)[0][:, :, 0]

    def whole(self, piece: Array, moments: Any = None) -> Slice:
        """The kernel of a leaf whose gradients [N, C, p] are one piece."""
        left, right = self.each(lambda a: Pieces(lambda part: part, a[None]), piece)
        if moments is not None:
            moments = (moments[0][None], moments[1][None], moments[2])
        return self.chunked(left, right, moments)

    def chunked(self, left: Pieces, right: Pieces, moments: Any = None) -> Slice:
        """The kernel of a leaf whose gradients are made piece by piece, one alive.

        Signs need the largest entry first, so that every piece is made twice.

        Args:
          left, right: of the examples of x and of x'; the same object where x' is x.
          moments: for Adam, (first [k, p], second [k, p], count) of the k pieces.
        """
        same = left is right

        def make(parts):
            piece = left.make(parts[0])
            return piece, piece if same else right.make(parts[1])

        parts = (left.parts, right.parts)
        tops = _tops(make, parts) if self.signed else None
        count = None if moments is None else moments[2]

        def kernel(part):
            parts, pair = part
            return self.features(*make(parts), tops, None if pair is None else (*pair, count))

        pairs = None if moments is None else tuple(moments[:2])
        return Slice(_sum(kernel, (parts, pairs)), tops)

    def join(self, slices: Sequence[Slice]) -> Array:
        """The kernel from all slices, without those that are noise beside the others."""
        tops = [part.tops for part in slices if part.tops is not None]
        if not tops:
            return sum(part.kernel for part in slices)  # type: ignore[return-value]
        most = [jnp.stack([pair[side] for pair in tops]).max(0) for side in (0, 1)]
        total: Any = 0
        for part, pair in zip(slices, tops, strict=True):
            left, right = (~(top <= self.threshold * m) for top, m in zip(pair, most, strict=True))
            if self.kind == "asymmetric_signgd":
                left = jnp.ones_like(left)
            if self.inner == "full":
                keep = left[:, :, None, None] & right[None, None]
            else:
                keep = left[:, None] & right[None]
            total += jnp.where(keep, part.kernel, 0)
        return total.mean(-1) if self.over == "trace" else total


def _sum(function, parts):
    """The sum of `function` over axis 0 of `parts`, one after another."""
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        return function(jax.tree.map(lambda a: a[0], parts))
    shape = jax.eval_shape(lambda parts: function(jax.tree.map(lambda a: a[0], parts)), parts)
    start = jnp.zeros(shape.shape, shape.dtype)
    return lax.scan(lambda total, part: (total + function(part), None), start, parts)[0]


def _tops(make, parts):
    """max|g| over all pieces, of either side."""

    def largest(part):
        return [jnp.abs(p).astype(gram.wide(p.dtype)).max(-1, initial=0) for p in make(part)]

    shapes = jax.eval_shape(lambda parts: largest(jax.tree.map(lambda a: a[0], parts)), parts)
    start = [jnp.zeros(s.shape, s.dtype) for s in shapes]

    def step(tops, part):
        return [jnp.maximum(*pair) for pair in zip(tops, largest(part), strict=True)], None

    return tuple(lax.scan(step, start, parts)[0])
