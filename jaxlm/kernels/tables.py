"""The kernel of an embedding table [V, D], of which an example uses few rows.

A look-up touches the rows of its ids; a head restricted to some tokens touches those. Gradients are
then a list of rows, and two of them meet where ids are equal ("matches"). Where that costs more than
the table itself, for positions and small vocabularies, some rows of the table at a time are made
("chunked"). A head over the whole vocabulary is a dense layer; if its table is also looked up, the
products of the two uses count as well.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlm.kernels import cost, rules
from jaxlm.kernels.sides import Pieces, Sides, Slice


class Rows(NamedTuple):
    """Gradients of a table as rows; several rows of one id are to be added.

    Attributes:
      ids: int32 [N, U].
      values: [N, C, U, D].
    """

    ids: Array
    values: Array


class Head(NamedTuple):
    """Factors of a head over the whole vocabulary.

    Attributes:
      a: [N, K, D].
      b: [N, C, K, V].
    """

    a: Array
    b: Array


def looked_up(ids: Array, b: Array) -> Rows:
    """Of a look-up: ids [N, T], b [C, N, T, D]."""
    return Rows(ids.astype(jnp.int32), b.swapaxes(0, 1))


def restricted(a: Array, b: Array, rows: Array) -> Rows:
    """Of a head of some tokens: a [N, K, D], b [C, N, K, W], rows [W]."""
    values = jnp.einsum("nkd,cnkw->ncwd", a, b, precision=rules.HIGHEST)
    ids = jnp.broadcast_to(rows.astype(jnp.int32)[None], (a.shape[0], rows.shape[0]))
    return Rows(ids, values)


def both(parts: list[Rows]) -> Rows | None:
    """One list of all rows."""
    if not parts:
        return None
    return Rows(*(jnp.concatenate(x, axis) for x, axis in zip(zip(*parts, strict=True), (1, 2), strict=True)))


def table(
    sides: Sides, shape: tuple[int, int], rows: Rows | None, head: Head | None, method: str, moments: Any
) -> Slice:
    """The kernel of a table.

    Args:
      sides: what is made.
      shape: (V, D).
      rows: of look-ups and restricted heads, or None.
      head: over the whole vocabulary, or None.
      method: "matches" or "chunked", for the rows.
      moments: for Adam (first [V * D], second [V * D], count).
    """
    if not sides.linear and head is not None:
        return chunked(sides, shape, rows, head, moments)
    if rows is None:
        return _head(sides, head)
    if method == "chunked":
        own = chunked(sides, shape, rows, None, moments)
    elif sides.linear:
        own = Slice(rules.paired(sides, _equal, rows.ids, rows.values))
    else:
        own = _matches(sides, shape, rows, moments)
    if head is None:
        return own
    return Slice(own.kernel + _head(sides, head).kernel + _between(sides, rows, head))


def _equal(one, others):
    return one[:, None, None] == others[None]


def _head(sides, head):
    return rules.paired_dense(sides, head.a, head.b.swapaxes(0, 1))


def _between(sides, rows, head):
    """Look-ups of x with the head at x', and the head at x with look-ups of x'."""
    (rows_left, head_left), (rows_right, head_right) = sides.each(lambda *pair: pair, rows, head)
    crossed = _cross(sides, rows_left, head_right)
    if sides.first is None:
        mirrored = crossed
    else:
        mirrored = _cross(sides, rows_right, head_left)
    order = {"full": (2, 3, 0, 1), "trace": (1, 0), "diagonal": (1, 0, 2)}[sides.inner]
    return crossed + mirrored.transpose(order)


def _cross(sides, rows, head):
    """`Σ_tk head.b[m, d, k, id_t] ⟨head.a[m, k], values[n, c, t]⟩`."""
    lines = {"full": "ctmk,mekt->cme", "diagonal": "ctmk,mckt->mc", "trace": "ctmk,mckt->m"}

    def row(one):
        products = jnp.einsum("ctd,mkd->ctmk", one.values, head.a, precision=rules.HIGHEST)
        picked = jnp.take(head.b, one.ids, axis=3, mode="clip")
        return jnp.einsum(lines[sides.inner], products, picked, precision=rules.HIGHEST)

    n, outputs, _, _ = rows.values.shape
    size = head.b.shape[0] * head.b.shape[2] * outputs * rows.ids.shape[1] * 2
    out = lax.map(row, rows, batch_size=cost.rows(size, n))
    return out / outputs if sides.inner == "trace" else out


def chunked(
    sides: Sides, shape: tuple[int, int], rows: Rows | None, head: Head | None, moments: Any
) -> Slice:
    """`table` by some rows of all gradients at a time."""
    vocab, width = shape
    some = (rows or head)[0].shape[0] * (rows.values if rows is not None else head.b).shape[1]
    size = cost.chunk_of_table(some * width, vocab)
    count = -(-vocab // size)

    def pieces(rows, head):
        def make(part):
            start, weights = part
            piece = None
            if rows is not None:
                n, outputs = rows.values.shape[:2]
                at = rows.ids - start
                at = jnp.where((at >= 0) & (at < size), at, size)
                zeros = jnp.zeros((n, size, outputs, width), rows.values.dtype)
                values = rows.values.swapaxes(1, 2)
                piece = jax.vmap(lambda z, i, v: z.at[i].add(v, mode="drop"))(zeros, at, values)
                piece = piece.swapaxes(1, 2)
            if head is not None:
                more = jnp.einsum("nckv,nkd->ncvd", weights, head.a, precision=rules.HIGHEST)
                piece = more if piece is None else piece + more
            return piece.reshape(*piece.shape[:2], -1)

        weights = None
        if head is not None:
            weights = jnp.pad(head.b, [(0, 0)] * 3 + [(0, count * size - vocab)])
            weights = jnp.moveaxis(weights.reshape(*weights.shape[:3], count, size), 3, 0)
        return Pieces(make, (jnp.arange(count, dtype=jnp.int32) * size, weights))

    if moments is not None:
        first, second = (
            jnp.pad(m, (0, (count * size - vocab) * width)).reshape(count, -1) for m in moments[:2]
        )
        moments = (first, second, moments[2])
    return sides.chunked(*sides.each(pieces, rows, head), moments)


def _matches(sides, shape, rows, moments):
    """Features of lists of rows that are not linear."""
    rows = _merged(rows)
    values, ids = rows.values, rows.ids
    if sides.signed:
        n, outputs = values.shape[:2]
        left, right = sides.each(
            lambda a: jnp.abs(a).max((2, 3)).astype(jnp.promote_types(a.dtype, jnp.float32)), values
        )
        flat = values.reshape(n, outputs, -1)
        all_tops = left if sides.first is None else jnp.concatenate([left, right])
        signs = sides.sign(flat, all_tops).reshape(values.shape)
        b = signs if sides.kind == "signgd" else values
        kernel = rules.paired(sides, _equal, ids, b, sides.each(lambda a: a, signs)[1])
        return Slice(kernel, (left, right))
    return Slice(_adam(sides, shape, rows, moments))


def _adam(sides, shape, rows, moments):
    """Adam moves every row, those without gradient by their momentum alone."""
    width = shape[1]
    first, second = (m.reshape(shape)[rows.ids] for m in moments[:2])  # [N, U, D]
    zero = jnp.zeros((1, 1, rows.ids.size * width), rows.values.dtype)
    resting = sides.adam(zero, (first.ravel(), second.ravel(), moments[2]))
    resting = resting.reshape(*rows.ids.shape, width)

    def step(piece, first, second):
        flat = piece.reshape(1, piece.shape[0], -1)
        return sides.adam(flat, (first.ravel(), second.ravel(), moments[2])).reshape(piece.shape)

    def moved(values, first, second, resting, ids):
        there = _first(ids)[:, None, :, None]
        return jnp.where(there, jax.vmap(step)(values, first, second) - resting[:, None], 0)

    right = sides.each(moved, rows.values, first, second, resting, rows.ids)[1]
    met = rules.paired(sides, _equal, rows.ids, rows.values, right)
    base = jnp.einsum("ncud,nud->nc", rows.values, resting, precision=rules.HIGHEST)
    base = sides.each(lambda a: a, base)[0]
    if sides.inner == "full":
        return met + base[:, :, None, None]
    if sides.inner == "diagonal":
        return met + base[:, None]
    return met + base.mean(1)[:, None]


def _first(ids):
    """Whether an id comes here first in its list; [N, U]."""
    same = ids[:, :, None] == ids[:, None, :]
    return same.argmax(2) == jnp.arange(ids.shape[1])[None]


def _merged(rows: Rows) -> Rows:
    """Rows of one id added where it comes first, the others zero."""
    same = rows.ids[:, :, None] == rows.ids[:, None, :]
    keep = same & _first(rows.ids)[:, :, None]
    values = jnp.einsum("nuw,ncwd->ncud", keep.astype(rows.values.dtype), rows.values, precision=rules.HIGHEST)
    return Rows(rows.ids, values)
