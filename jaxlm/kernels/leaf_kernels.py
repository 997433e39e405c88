r"""The kernel of one parameter, from the factors of its per-example gradients.

The gradient of a matrix at one example is $A^\top B$, where A [T, I] holds its inputs and B [T, O]
the cotangents of its outputs. There are two contractions of such gradients:

| contraction | computes                                  | flops for a pair                  |
|-------------|-------------------------------------------|-----------------------------------|
| paired      | Σ_ts (A_i A_jᵀ)_ts (B_i B_jᵀ)_ts          | 2 T² (I + O)                      |
| chunked     | some columns of all A_iᵀ B_i at a time    | 2 I O, and 2 T I O per example    |

The gradient of an embedding table [V, D] is a short list of rows: a lookup uses the rows of its
ids, and a head restricted to some tokens uses the rows of those tokens. Two rows have a product
where their ids are equal ("matches"). If matching costs more than forming the whole table, as for
positions and small vocabularies, some rows of all gradients are formed at a time ("chunked"). A
head over the whole vocabulary is a matrix; if the table is tied, cross products of both uses count.

`jaxlm.kernels.cost` chooses the contraction. All examples are in one batch, those of x before those
of x'. The factors are a [N, T, ...] and b [C, N, T, ...].
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlm.core.dtypes import wide, wide_dtype
from jaxlm.kernels import cost
from jaxlm.kernels.contraction import Axes, contract, transpose
from jaxlm.kernels.kinds import SGD, Kind, Moments

HIGHEST = lax.Precision.HIGHEST


class LeafKernel(NamedTuple):
    """The contribution of one layer of a leaf to the kernel.

    Attributes:
      kernel: the kernel of that layer; without signs, possibly the sum over several layers.
      tops: with signs, max|g| in that layer of the examples of x [N, C] and of x' [M, C].
    """

    kernel: Array
    tops: tuple[Array, Array] | None = None


class Chunks(NamedTuple):
    """Gradients that are formed chunk by chunk.

    Attributes:
      make: returns the chunk [N, C, p] of one entry of `parts`.
      parts: an array with one entry per chunk on axis 0.
    """

    make: Callable[[Array], Array]
    parts: Array


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Which kernel is computed, and which examples of a batch belong to which side.

    Attributes:
      kind: bound to the parameters.
      over: what happens to the class axis.
      first: N, the number of examples of x, which come first in a batch; None where x' is x.
    """

    kind: Kind
    over: Axes
    first: int | None

    @property
    def linear(self) -> bool:
        """Whether the kernel is an inner product of the gradients themselves."""
        return isinstance(self.kind, SGD)

    @property
    def signed(self) -> bool:
        """Whether a sign is taken on either side."""
        return any(self.kind.signed)

    @property
    def inner(self) -> Axes:
        """The axes of the kernel of one layer.

        A layer of pure noise may be left out for some outputs and not for others, so the trace of a
        sign kernel is taken only at the end, in `join`.
        """
        return "diagonal" if self.signed and self.over == "trace" else self.over

    def each(self, function: Callable[..., Any], *batches: Any) -> tuple[Any, Any]:
        """Return `function` of the examples of x, and of the examples of x', both on axis 0."""
        if self.first is None:
            value = function(*batches)
            return value, value
        left = jax.tree.map(lambda a: a[: self.first], batches)
        right = jax.tree.map(lambda a: a[self.first :], batches)
        return function(*left), function(*right)

    def counts(self, batch: Array) -> tuple[int, int]:
        """Return the number of examples on each side."""
        count = batch.shape[0]
        return (count, count) if self.first is None else (self.first, count - self.first)

    def sign(self, chunk: Array, top: Array) -> Array:
        """Return the sign where |g| > τ top, else zero; NaN where the top is not finite."""
        top = top[..., None]
        kept = jnp.abs(chunk).astype(top.dtype) > self.kind.threshold * top
        return jnp.where(kept, jnp.sign(chunk), 0) + (0 * top).astype(chunk.dtype)

    def contract(self, left: Array, right: Array, tops: Any, moments: Moments | None) -> Array:
        """Return φ1 of a chunk [N, C, p] of x contracted with φ2 of one [M, C, p] of x'.

        Args:
          left, right: chunks of gradients.
          tops: with signs, max|g| of the whole leaf, [N, C] and [M, C].
          moments: Adam's, [p] each.
        """
        if self.kind.signed[0]:
            left = self.sign(left, tops[0])
        if self.kind.signed[1]:
            right = self.sign(right, tops[1])
        elif moments is not None:
            first, second, count = moments
            moments = Moments(first[None, None], second[None, None], count)
            right = self.kind.step(right, moments)  # type: ignore[attr-defined]
        return contract([left[:, :, None]], [right[:, :, None]], self.inner)

    def whole(self, gradients: Array, moments: Moments | None = None) -> LeafKernel:
        """Return the kernel of a leaf whose gradients [N, C, p] are one chunk."""
        left, right = self.each(lambda a: Chunks(lambda part: part, a[None]), gradients)
        if moments is not None:
            moments = Moments(moments.first[None], moments.second[None], moments.count)
        return self.chunked(left, right, moments)

    def chunked(self, left: Chunks, right: Chunks, moments: Moments | None = None) -> LeafKernel:
        """Return the kernel of a leaf from chunks of its gradients, one alive at a time.

        Args:
          left, right: chunks of the examples of x and of x'; the same object if x' is x.
          moments: Adam's, [k, p] for k chunks.
        """
        same = left is right

        def make(parts):
            chunk = left.make(parts[0])
            return chunk, chunk if same else right.make(parts[1])

        parts = (left.parts, right.parts)
        # A sign depends on the largest entry of the whole leaf, so every chunk is formed twice:
        # keeping the chunks would take the memory of whole gradients, which this method avoids.
        tops = _tops(make, parts) if self.signed else None

        def kernel(part):
            parts, pair = part
            left, right = make(parts)
            if moments is None:
                return self.contract(left, right, tops, None)
            first, second = pair
            return self.contract(left, right, tops, Moments(first, second, moments.count))

        pairs = None if moments is None else (moments.first, moments.second)
        return LeafKernel(_sum(kernel, (parts, pairs)), tops)

    def join(self, leaves: Sequence[LeafKernel]) -> Array:
        """Return the sum of all layers, without those that are noise compared to the others."""
        tops = [leaf.tops for leaf in leaves if leaf.tops is not None]
        if not tops:
            return sum(leaf.kernel for leaf in leaves)  # type: ignore[return-value]
        most = [jnp.stack([pair[side] for pair in tops]).max(0) for side in (0, 1)]
        total: Any = 0
        for leaf, pair in zip(leaves, tops, strict=True):
            # Not `t > ...`, which is false for NaN: a NaN must stay visible in the kernel.
            left, right = (~(t <= self.kind.threshold * m) for t, m in zip(pair, most, strict=True))
            if not self.kind.signed[0]:
                left = jnp.ones_like(left)
            if self.inner == "full":
                keep = left[:, :, None, None] & right[None, None]
            else:
                keep = left[:, None] & right[None]
            total += jnp.where(keep, leaf.kernel, 0)
        return total.mean(-1) if self.over == "trace" else total


def _sum(function, parts):
    """Return the sum of `function` over axis 0 of `parts`, one part at a time."""
    first = functools.partial(jax.tree.map, lambda a: a[0])
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        return function(first(parts))
    shape = jax.eval_shape(lambda parts: function(first(parts)), parts)
    start = jnp.zeros(shape.shape, shape.dtype)
    return lax.scan(lambda total, part: (total + function(part), None), start, parts)[0]


def _tops(make, parts):
    """Return max|g| over all chunks, of each side."""

    def largest(part):
        return [wide(jnp.abs(p)).max(-1, initial=0) for p in make(part)]

    shapes = jax.eval_shape(lambda parts: largest(jax.tree.map(lambda a: a[0], parts)), parts)
    start = [jnp.zeros(s.shape, s.dtype) for s in shapes]

    def step(tops, part):
        return [jnp.maximum(*pair) for pair in zip(tops, largest(part), strict=True)], None

    return tuple(lax.scan(step, start, parts)[0])


def product(subscripts: str, *operands: Array) -> Array:
    """Return `einsum` at the highest precision and in at least float32."""
    dtype = wide_dtype(jnp.result_type(*operands))
    return jnp.einsum(subscripts, *operands, precision=HIGHEST, preferred_element_type=dtype)


# --- Matrices, biases and scales.


def dense(
    pairing: Pairing,
    a: Array,
    b: Array,
    contraction: str,
    moments: Moments | None = None,
    last: Any = None,
) -> LeafKernel:
    """Return the kernel of a matrix [I, O].

    Args:
      pairing: which kernel.
      a: [N, T, I].
      b: [C, N, T, O].
      contraction: "paired" or "chunked". A feature other than the gradient itself is always
        chunked, since it is not a product of factors.
      moments: Adam's, [I * O] each.
      last: whether this is the last layer, a boolean array; None for no.
    """
    if not pairing.linear:
        return dense_chunked(pairing, a, b, moments)
    if a.shape[1] == 1:
        return LeafKernel(dense_paired(pairing, a, b))

    def general():
        if contraction == "paired":
            return dense_paired(pairing, a, b)
        return dense_chunked(pairing, a, b).kernel

    if last is None:
        return LeafKernel(general())

    # If f reads one position, the cotangents above the last attention are nonzero there alone, and
    # one position suffices. The scan over layers compiles one body, so the choice is made at run
    # time; the positions are examined in the last layer only.
    def places():
        return (b != 0).any((0, 3))

    def at_one():
        index = places().argmax(1)
        a_one = jnp.take_along_axis(a, index[:, None, None], 1)
        b_one = jnp.take_along_axis(b, index[None, :, None, None], 2)
        return dense_paired(pairing, a_one, b_one)

    one = lax.cond(last, lambda: places().sum(1).max() <= 1, lambda: jnp.zeros((), bool))
    return LeafKernel(lax.cond(one, at_one, general))


def dense_chunked(
    pairing: Pairing, a: Array, b: Array, moments: Moments | None = None
) -> LeafKernel:
    """Return `dense`, forming some columns of all gradients at a time, or rows if I > O."""
    outputs, count, length, width = b.shape
    inputs = a.shape[2]
    by_row = inputs > width
    across, along = (width, inputs) if by_row else (inputs, width)
    size = cost.part_size(along, count * outputs * across, cost.MAX_CHUNK_ENTRIES)
    steps = -(-along // size)
    rest = steps * size - along
    if by_row:
        a = jnp.pad(a, [(0, 0), (0, 0), (0, rest)])
    else:
        b = jnp.pad(b, [(0, 0), (0, 0), (0, 0), (0, rest)])

    def chunks(a, b):  # b [N, T, C, O]
        n = a.shape[0]

        def make(start):
            if by_row:
                part, columns = lax.dynamic_slice_in_dim(a, start, size, 2), b
            else:
                part, columns = a, lax.dynamic_slice_in_dim(b, start, size, 3)
            columns = columns.reshape(n, length, -1)
            return product("ntp,nti->npi", columns, part).reshape(n, outputs, -1)

        return Chunks(make, jnp.arange(steps, dtype=jnp.int32) * size)

    def in_chunks(m):
        m = m.reshape(inputs, width)
        if by_row:
            return jnp.pad(m, [(0, rest), (0, 0)]).reshape(steps, -1, width).swapaxes(1, 2)
        return jnp.pad(m.T, [(0, rest), (0, 0)]).reshape(steps, -1, inputs)

    if moments is not None:
        first, second = (in_chunks(m).reshape(steps, -1) for m in moments[:2])
        moments = Moments(first, second, moments.count)
    left, right = pairing.each(chunks, a, jnp.moveaxis(b, 0, 2))
    return pairing.chunked(left, right, moments)


def dense_paired(pairing: Pairing, a: Array, b: Array) -> Array:
    """Return `dense` by products of factors."""
    return paired(pairing, functools.partial(product, "ti,msi->tms"), a, b.swapaxes(0, 1))


PRODUCTS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "full": ("ctd,mesd->ctmes", (0, 3), (1, 4)),
    "diagonal": ("ctd,mcsd->ctms", (0,), (1, 3)),
    "trace": ("ctd,mcsd->tms", (), (0, 2)),
}
"""For each choice of axes: the einsum of products of b, the axes along which the weights [t, m, s]
are broadcast, and the axes that are summed."""


def paired(
    pairing: Pairing,
    weigh: Callable[[Any, Any], Array],
    a: Any,
    b: Array,
    right: Array | None = None,
) -> Array:
    """Return `K[n, c, m, d] = Σ_ts weigh(a_n, a_m)_ts ⟨b_nct, b_mds⟩`.

    Args:
      pairing: which kernel.
      weigh: maps `a` of one example of x and `a` of all examples of x' to weights [T, M, S].
      a: a pytree of arrays whose axis 0 is N.
      b: [N, C, T, D].
      right: replaces b at x', [M, C, S, D]; by default b itself.
    """
    (a_left, b_left), (a_right, b_right) = pairing.each(lambda *pair: pair, a, b)
    b_right = b_right if right is None else right
    subscripts, spread, axes = PRODUCTS[pairing.inner]

    def row(one):
        products = product(subscripts, one[1], b_right)
        weights = weigh(one[0], a_right).astype(products.dtype)
        summed = (products * jnp.expand_dims(weights, spread)).sum(axes)
        return summed.T if pairing.inner == "diagonal" else summed

    _, outputs, length, _ = b.shape
    products = {"full": outputs**2, "diagonal": outputs, "trace": 1}[pairing.inner] + 1
    size = length * b_right.shape[0] * b_right.shape[2] * products
    out = map_examples(row, (a_left, b_left), size)
    return out / outputs if pairing.inner == "trace" else out


def map_examples(function: Callable[[Any], Array], examples: Any, size: int) -> Array:
    """Map over examples of `size` entries each, in batches of `cost.MAX_PAIR_ENTRIES` entries."""
    count = jax.tree.leaves(examples)[0].shape[0]
    batch = cost.part_size(count, size, cost.MAX_PAIR_ENTRIES)
    if batch == count:
        return jax.vmap(function)(examples)
    return lax.map(function, examples, batch_size=batch)


def summed(
    pairing: Pairing,
    op: str,
    a: Array,
    b: Array,
    rows: Array | None,
    moments: Moments | None = None,
) -> LeafKernel:
    """Return the kernel of a norm's scale, or of a bias; `rows` are the entries that are used."""
    if op == "scale":
        gradients = product("nto,cnto->nco", a, b)
    else:
        gradients = b.sum(2, dtype=wide_dtype(b)).swapaxes(0, 1)
    if rows is not None:
        # Rows may repeat: their gradients are added in the column of the first occurrence.
        same = rows[:, None] == rows[None, :]
        first = same.argmax(1) == jnp.arange(rows.shape[0])
        once = (same & first[None]).astype(gradients.dtype)
        gradients = product("ncw,wv->ncv", gradients, once)
        if moments is not None:
            index = rows.astype(jnp.int32)
            moments = Moments(moments.first[index], moments.second[index], moments.count)
    return pairing.whole(gradients, moments)


# --- Tables.


class Rows(NamedTuple):
    """Gradients of a table as a list of rows; rows with the same id are to be added.

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


def lookup_rows(ids: Array, b: Array) -> Rows:
    """Return the rows of a lookup, from ids [N, T] and b [C, N, T, D]."""
    return Rows(ids.astype(jnp.int32), b.swapaxes(0, 1))


def head_rows(a: Array, b: Array, rows: Array) -> Rows:
    """Return the rows of a restricted head, from a [N, K, D], b [C, N, K, W] and rows [W]."""
    values = product("nkd,cnkw->ncwd", a, b)
    ids = jnp.broadcast_to(rows.astype(jnp.int32)[None], (a.shape[0], rows.shape[0]))
    return Rows(ids, values)


def concatenate_rows(parts: list[Rows]) -> Rows | None:
    """Return one list of all rows, or None if there are none."""
    if not parts:
        return None
    ids = jnp.concatenate([part.ids for part in parts], axis=1)
    return Rows(ids, jnp.concatenate([part.values for part in parts], axis=2))


def table(
    pairing: Pairing,
    shape: tuple[int, int],
    rows: Rows | None,
    head: Head | None,
    contraction: str,
    moments: Moments | None = None,
) -> LeafKernel:
    """Return the kernel of a table.

    Args:
      pairing: which kernel.
      shape: (V, D).
      rows: rows of lookups and of a restricted head, or None.
      head: over the whole vocabulary, or None.
      contraction: "matches" or "chunked", for the rows.
      moments: Adam's, [V * D] each.
    """
    if not pairing.linear and head is not None:
        return table_chunked(pairing, shape, rows, head, moments)
    if rows is None:
        assert head is not None
        return LeafKernel(_head(pairing, head))
    if contraction == "chunked":
        result = table_chunked(pairing, shape, rows, None, moments)
    elif pairing.linear:
        result = LeafKernel(paired(pairing, _equal, rows.ids, rows.values))
    elif pairing.signed:
        result = _sign_matches(pairing, _merged(rows))
    else:
        result = LeafKernel(_adam_matches(pairing, shape, _merged(rows), moments))
    if head is None:
        return result
    return LeafKernel(result.kernel + _head(pairing, head) + _between(pairing, rows, head))


def _equal(one, others):
    return one[:, None, None] == others[None]


def _head(pairing, head):
    return dense_paired(pairing, head.a, head.b.swapaxes(0, 1))


def _between(pairing, rows, head):
    """Return the cross terms: lookups at x with the head at x', plus the reverse."""
    left, right = pairing.each(lambda *pair: pair, rows, head)
    forth = _cross(pairing, left[0], right[1])
    back = forth if pairing.first is None else _cross(pairing, right[0], left[1])
    return forth + transpose(back, pairing.inner)


CROSSED = {"full": "ctmk,mekt->cme", "diagonal": "ctmk,mckt->mc", "trace": "ctmk,mckt->m"}


def _cross(pairing, rows, head):
    """Return `Σ_tk head.b[m, d, k, id_t] ⟨head.a[m, k], values[n, c, t]⟩`."""

    def row(one):
        products = product("ctd,mkd->ctmk", one.values, head.a)
        taken = jnp.take(head.b, one.ids, axis=3, mode="clip")
        return product(CROSSED[pairing.inner], products, taken)

    _, outputs, length, _ = rows.values.shape
    m, _, places, _ = head.b.shape
    out = map_examples(row, rows, 2 * m * places * outputs * length)
    return out / outputs if pairing.inner == "trace" else out


def table_chunked(
    pairing: Pairing,
    shape: tuple[int, int],
    rows: Rows | None,
    head: Head | None,
    moments: Moments | None,
) -> LeafKernel:
    """Return `table`, forming some rows of the gradients of all examples at a time."""
    vocab, width = shape
    count, outputs = (rows.values if rows is not None else head.b).shape[:2]  # type: ignore[union-attr]
    size = cost.part_size(vocab, count * outputs * width, cost.MAX_TABLE_ENTRIES)
    steps = -(-vocab // size)
    rest = steps * size - vocab

    def chunks(rows, head):
        def make(start):
            chunk: Any = 0
            if rows is not None:
                chunk = _scatter(rows, start, size)
            if head is not None:
                b = lax.dynamic_slice_in_dim(head.b, start, size, 3)
                chunk += product("nckv,nkd->ncvd", b, head.a)
            return chunk.reshape(*chunk.shape[:2], -1)

        if head is not None:
            head = head._replace(b=jnp.pad(head.b, [(0, 0)] * 3 + [(0, rest)]))
        return Chunks(make, jnp.arange(steps, dtype=jnp.int32) * size)

    if moments is not None:
        first, second = (jnp.pad(m, (0, rest * width)).reshape(steps, -1) for m in moments[:2])
        moments = Moments(first, second, moments.count)
    return pairing.chunked(*pairing.each(chunks, rows, head), moments)


def _scatter(rows, start, size):
    """Return the gradients of `size` rows of the table, [N, C, size, D]."""
    n, outputs, length, width = rows.values.shape
    at = rows.ids - start
    here = (at >= 0) & (at < size)
    # One scatter for all examples: row r of example n is at n * size + r, and rows of other chunks
    # get an index past the end, so that `mode="drop"` ignores them.
    index = jnp.where(here, at + size * jnp.arange(n)[:, None], n * size)
    values = rows.values.swapaxes(1, 2).reshape(n * length, outputs * width)
    zeros = jnp.zeros((n * size, outputs * width), wide_dtype(values))
    chunk = zeros.at[index.reshape(-1)].add(values.astype(zeros.dtype), mode="drop")
    return chunk.reshape(n, size, outputs, width).swapaxes(1, 2)


def _sign_matches(pairing, rows):
    values = rows.values
    top = wide(jnp.abs(values)).max((2, 3), initial=0)
    signs = pairing.sign(values.reshape(*top.shape, -1), top).reshape(values.shape)
    b = signs if pairing.kind.signed[0] else values
    right = pairing.each(lambda a: a, signs)[1]
    kernel = paired(pairing, _equal, rows.ids, b, right)
    return LeafKernel(kernel, pairing.each(lambda a: a, top))


def _adam_matches(pairing, shape, rows, moments):
    """Return the kernel of Adam, which moves rows without a gradient by their momentum.

    The step on x' is split in two: the step by momentum alone, needed at the rows that x uses, and
    the change that the gradient of x' makes to it, nonzero only in the rows that x' uses.
    """
    ids, values = rows
    first, second = (m.reshape(shape)[ids][:, None] for m in moments[:2])  # [N, 1, U, D]
    moments = Moments(first, second, moments.count)
    resting = pairing.kind.step(jnp.zeros_like(values[:, :1]), moments)
    moved = pairing.kind.step(values, moments) - resting
    moved = jnp.where(_first(ids)[:, None, :, None], moved, 0)
    met = paired(pairing, _equal, ids, values, pairing.each(lambda a: a, moved)[1])
    alone = product("ncud,nud->nc", values, resting[:, 0])
    alone = pairing.each(lambda a: a, alone)[0]
    if pairing.inner == "full":
        return met + alone[:, :, None, None]
    return met + (alone[:, None] if pairing.inner == "diagonal" else alone.mean(1)[:, None])


def _first(ids):
    """Return where an id occurs for the first time in its list, [N, U]."""
    same = ids[:, :, None] == ids[:, None, :]
    return same.argmax(2) == jnp.arange(ids.shape[1])[None]


def _merged(rows):
    """Return the rows with those of equal id summed at its first occurrence, and zero elsewhere."""
    same = rows.ids[:, :, None] == rows.ids[:, None, :]
    once = (same & _first(rows.ids)[:, :, None]).astype(rows.values.dtype)
    return Rows(rows.ids, product("nuw,ncwd->ncud", once, rows.values))
