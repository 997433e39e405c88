"""The kernel of an embedding table [V, D], of which an example uses few rows.

A look-up uses the rows of its ids, a head of some tokens those of its tokens. The gradient is then
a list of rows, and two of them meet where ids are equal ("matches"). Where that costs more than the
whole table, as for positions and small vocabularies, some rows of the table are made at a time
("chunked"). A head over the whole vocabulary is a dense layer; if its table is looked up as well,
the products of both uses count.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlm.kernels import cost, gram, rules
from jaxlm.kernels.sides import Pieces, Sides, Slice


class Rows(NamedTuple):
    """Gradients of a table as rows; rows with one id are to be added.

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
    """Of a look-up, ids [N, T] and b [C, N, T, D]."""
    return Rows(ids.astype(jnp.int32), b.swapaxes(0, 1))


def restricted(a: Array, b: Array, rows: Array) -> Rows:
    """Of a head of some tokens, a [N, K, D], b [C, N, K, W] and rows [W]."""
    values = jnp.einsum("nkd,cnkw->ncwd", a, b, precision=rules.HIGHEST)
    ids = jnp.broadcast_to(rows.astype(jnp.int32)[None], (a.shape[0], rows.shape[0]))
    return Rows(ids, values)


def joined(parts: list[Rows]) -> Rows | None:
    """One list of all rows; None of none."""
    if not parts:
        return None
    ids = jnp.concatenate([part.ids for part in parts], axis=1)
    return Rows(ids, jnp.concatenate([part.values for part in parts], axis=2))


def table(
    sides: Sides,
    shape: tuple[int, int],
    rows: Rows | None,
    head: Head | None,
    method: str,
    moments: Any = None,
) -> Slice:
    """The kernel of a table.

    Args:
      sides: what is made.
      shape: (V, D).
      rows: of look-ups and of a head of some tokens, or None.
      head: over the whole vocabulary, or None.
      method: "matches" or "chunked", for the rows.
      moments: for Adam (first [V * D], second [V * D], count).
    """
    if not sides.linear and head is not None:
        return chunked(sides, shape, rows, head, moments)
    if rows is None:
        assert head is not None
        return Slice(_head(sides, head))
    if method == "chunked":
        own = chunked(sides, shape, rows, None, moments)
    elif sides.linear:
        own = Slice(rules.paired(sides, _equal, rows.ids, rows.values))
    elif sides.signed:
        own = _signs(sides, _merged(rows))
    else:
        own = Slice(_adam(sides, shape, _merged(rows), moments))
    if head is None:
        return own
    return Slice(own.kernel + _head(sides, head) + _between(sides, rows, head))


def _equal(one, others):
    return one[:, None, None] == others[None]


def _head(sides, head):
    return rules.paired_dense(sides, head.a, head.b.swapaxes(0, 1))


def _between(sides, rows, head):
    """Look-ups of x with the head at x', and the head at x with look-ups of x'."""
    left, right = sides.each(lambda *pair: pair, rows, head)
    forth = _cross(sides, left[0], right[1])
    back = forth if sides.first is None else _cross(sides, right[0], left[1])
    return forth + gram.transpose(back, sides.inner)


CROSSED = {"full": "ctmk,mekt->cme", "diagonal": "ctmk,mckt->mc", "trace": "ctmk,mckt->m"}


def _cross(sides, rows, head):
    """`Σ_tk head.b[m, d, k, id_t] ⟨head.a[m, k], values[n, c, t]⟩`."""

    def row(one):
        products = jnp.einsum("ctd,mkd->ctmk", one.values, head.a, precision=rules.HIGHEST)
        taken = jnp.take(head.b, one.ids, axis=3, mode="clip")
        return jnp.einsum(CROSSED[sides.inner], products, taken, precision=rules.HIGHEST)

    _, outputs, length, _ = rows.values.shape
    m, _, places, _ = head.b.shape
    out = rules.in_blocks(row, rows, 2 * m * places * outputs * length)
    return out / outputs if sides.inner == "trace" else out


def chunked(
    sides: Sides, shape: tuple[int, int], rows: Rows | None, head: Head | None, moments: Any
) -> Slice:
    """`table` by some rows of the table at a time, for all examples."""
    vocab, width = shape
    count, outputs = (rows.values if rows is not None else head.b).shape[:2]  # type: ignore[union-attr]
    size = cost.chunk_of_table(count * outputs * width, vocab)
    steps = -(-vocab // size)
    rest = steps * size - vocab

    def pieces(rows, head):
        def make(start):
            piece = 0
            if rows is not None:
                piece = _scatter(rows, start, size)
            if head is not None:
                b = lax.dynamic_slice_in_dim(head.b, start, size, 3)
                piece += jnp.einsum("nckv,nkd->ncvd", b, head.a, precision=rules.HIGHEST)
            return piece.reshape(*piece.shape[:2], -1)

        if head is not None:
            head = head._replace(b=jnp.pad(head.b, [(0, 0)] * 3 + [(0, rest)]))
        return Pieces(make, jnp.arange(steps, dtype=jnp.int32) * size)

    if moments is not None:
        first, second = (jnp.pad(m, (0, rest * width)).reshape(steps, -1) for m in moments[:2])
        moments = (first, second, moments[2])
    return sides.chunked(*sides.each(pieces, rows, head), moments)


def _scatter(rows, start, size):
    """The gradients of `size` rows of the table, [N, C, size, D]."""
    n, outputs, length, width = rows.values.shape
    at = rows.ids - start
    here = (at >= 0) & (at < size)
    index = jnp.where(here, at + size * jnp.arange(n)[:, None], n * size)
    values = rows.values.swapaxes(1, 2).reshape(n * length, outputs * width)
    zeros = jnp.zeros((n * size, outputs * width), values.dtype)
    piece = zeros.at[index.reshape(-1)].add(values, mode="drop")
    return piece.reshape(n, size, outputs, width).swapaxes(1, 2)


def _signs(sides, rows):
    values = rows.values
    top = jnp.abs(values).astype(gram.wide(values.dtype)).max((2, 3), initial=0)
    signs = sides.sign(values.reshape(*top.shape, -1), top).reshape(values.shape)
    b = signs if sides.kind == "signgd" else values
    right = sides.each(lambda a: a, signs)[1]
    kernel = rules.paired(sides, _equal, rows.ids, b, right)
    return Slice(kernel, sides.each(lambda a: a, top))


def _adam(sides, shape, rows, moments):
    """Adam moves every row, those without gradient by their momentum alone."""
    ids, values = rows
    first, second = (m.reshape(shape)[ids] for m in moments[:2])  # [N, U, D]

    def step(value, first, second):  # of the rows of one example
        flat = value.reshape(1, value.shape[0], -1)
        return sides.adam(flat, (first.ravel(), second.ravel(), moments[2])).reshape(value.shape)

    resting = jax.vmap(step)(jnp.zeros_like(values[:, :1]), first, second)
    moved = jax.vmap(step)(values, first, second) - resting
    moved = jnp.where(_first(ids)[:, None, :, None], moved, 0)
    met = rules.paired(sides, _equal, ids, values, sides.each(lambda a: a, moved)[1])
    alone = jnp.einsum("ncud,nud->nc", values, resting[:, 0], precision=rules.HIGHEST)
    alone = sides.each(lambda a: a, alone)[0]
    if sides.inner == "full":
        return met + alone[:, :, None, None]
    return met + (alone[:, None] if sides.inner == "diagonal" else alone.mean(1)[:, None])


def _first(ids):
    """Whether an id comes here first in its list, [N, U]."""
    same = ids[:, :, None] == ids[:, None, :]
    return same.argmax(2) == jnp.arange(ids.shape[1])[None]


def _merged(rows):
    """Rows of one id added where it comes first; the others are zero."""
    same = rows.ids[:, :, None] == rows.ids[:, None, :]
    once = (same & _first(rows.ids)[:, :, None]).astype(rows.values.dtype)
    values = jnp.einsum("nuw,ncwd->ncud", once, rows.values, precision=rules.HIGHEST)
    return Rows(rows.ids, values)
