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

All examples are in one batch, those of x before those of x'. The factors are a [N, T, ...] and
b [C, N, T, ...].
"""

import dataclasses
import functools
import operator
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


class LeafKernel(NamedTuple):
    """The contribution of one layer of a leaf to the kernel.

    Attributes:
      kernel: the kernel of that layer; without signs, possibly the sum over several layers.
      tops: with signs, max|g| in that layer of the examples of x [N, C] and of x' [M, C].
    """

    kernel: Array
    tops: tuple[Array, Array] | None = None


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Which kernel is computed, and which examples of a batch belong to which side.

    `first` is N, the number of examples of x, which come first in a batch; None where x' is x.
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

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Return the examples of x, and those of x', both on axis 0."""
        if self.first is None:
            return batch, batch
        left = jax.tree.map(lambda a: a[: self.first], batch)
        return left, jax.tree.map(lambda a: a[self.first :], batch)

    def sign(self, chunk: Array, top: Array) -> Array:
        """Return the sign where |g| > τ top, else zero; NaN where the top is not finite."""
        top = top[..., None]
        kept = jnp.abs(chunk).astype(top.dtype) > self.kind.threshold * top
        return jnp.where(kept, jnp.sign(chunk), 0) + (0 * top).astype(chunk.dtype)

    def contract(self, left: Array, right: Array, tops: Any, moments: Moments | None) -> Array:
        """Return φ1 of a chunk [N, C, p] of x contracted with φ2 of one [M, C, p] of x'."""
        if self.kind.signed[0]:
            left = self.sign(left, tops[0])
        if self.kind.signed[1]:
            right = self.sign(right, tops[1])
        elif moments is not None:
            right = self.kind.step(right, moments)  # type: ignore[attr-defined]
        return contract([left[:, :, None]], [right[:, :, None]], self.inner)

    def chunked(
        self,
        form: Callable[..., Array],
        batch: tuple[Any, ...],
        starts: Array,
        moments: Moments | None = None,
    ) -> LeafKernel:
        """Return the kernel of a leaf whose gradients are formed chunk by chunk.

        `form(start, *side)` is the chunk [N, C, p] at one of the k `starts`, and the moments of
        Adam are [k, p]. One chunk of each side is alive at a time.
        """
        left, right = self.split(batch)

        def make(start):
            chunk = form(start, *left)
            return chunk, chunk if self.first is None else form(start, *right)

        def largest(start):
            return tuple(wide(jnp.abs(chunk)).max(-1, initial=0) for chunk in make(start))

        # A sign depends on the largest entry of the whole leaf, so every chunk is formed twice:
        # keeping the chunks would take the memory of whole gradients, which this method avoids.
        tops = _fold(jnp.maximum, largest, starts) if self.signed else None

        def kernel(part):
            start, moments = part
            left, right = make(start)
            return self.contract(left, right, tops, moments)

        return LeafKernel(_fold(operator.add, kernel, (starts, moments)), tops)

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


def _fold(combine, function, parts):
    """Return `function` of all parts on axis 0, combined from zero on, one part at a time."""
    first = jax.tree.map(lambda a: a[0], parts)
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        return function(first)
    shapes = jax.eval_shape(function, first)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def step(total, part):
        return jax.tree.map(combine, total, function(part)), None

    return lax.scan(step, start, parts)[0]


def product(subscripts: str, *operands: Array) -> Array:
    """Return `einsum` at the highest precision and in at least float32."""
    dtype = wide_dtype(jnp.result_type(*operands))
    highest = lax.Precision.HIGHEST
    return jnp.einsum(subscripts, *operands, precision=highest, preferred_element_type=dtype)


# --- Matrices, biases and scales.


def dense(
    pairing: Pairing,
    a: Array,
    b: Array,
    contraction: str,
    moments: Moments | None = None,
    last: Any = None,
) -> LeafKernel:
    """Return the kernel of a matrix [I, O] from a [N, T, I] and b [C, N, T, O].

    A feature other than the gradient itself is always chunked, since it is not a product of
    factors. `last`, a boolean array, says whether this is the last layer; None for no.
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
    outputs, count, _, width = b.shape
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

    def form(start, a, b):  # b [N, T, C, O]
        if by_row:
            a = lax.dynamic_slice_in_dim(a, start, size, 2)
        else:
            b = lax.dynamic_slice_in_dim(b, start, size, 3)
        columns = b.reshape(*b.shape[:2], -1)
        return product("ntp,nti->npi", columns, a).reshape(len(a), outputs, -1)

    def in_chunks(m):
        m = m.reshape(inputs, width)
        if by_row:
            m = jnp.pad(m, [(0, rest), (0, 0)]).reshape(steps, -1, width).swapaxes(1, 2)
        else:
            m = jnp.pad(m.T, [(0, rest), (0, 0)])
        return m.reshape(steps, -1)

    starts = jnp.arange(steps, dtype=jnp.int32) * size
    moments = _by_chunk(moments, in_chunks, steps)
    return pairing.chunked(form, (a, jnp.moveaxis(b, 0, 2)), starts, moments)


def _by_chunk(moments, function, steps):
    """Return moments [k, p] of k chunks, with `function` applied to both."""
    if moments is None:
        return None
    first, second = map(function, moments[:2])
    return Moments(first, second, jnp.broadcast_to(moments.count, (steps,)))


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
    """Return `K[n, c, m, d] = Σ_ts weigh(a_n, a_m)_ts ⟨b_nct, b_mds⟩` of b [N, C, T, D].

    `weigh` maps a of one example of x and a of all examples of x' to weights [T, M, S]; `right`
    [M, C, S, D] replaces b at x'.
    """
    (a_left, b_left), (a_right, b_right) = pairing.split((a, b))
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
        once = _added(rows).astype(gradients.dtype)
        gradients = product("ncw,vw->ncv", gradients, once)
        if moments is not None:
            index = rows.astype(jnp.int32)
            moments = moments._replace(first=moments.first[index], second=moments.second[index])
    one_chunk = _by_chunk(moments, lambda m: m[None], 1)
    return pairing.chunked(lambda _, g: g, (gradients,), jnp.zeros(1, jnp.int32), one_chunk)


# --- Tables.


class Rows(NamedTuple):
    """Gradients of a table as a list of rows; rows with the same id are to be added."""

    ids: Array  # int32 [N, U]
    values: Array  # [N, C, U, D]


class Head(NamedTuple):
    """Factors of a head over the whole vocabulary."""

    a: Array  # [N, K, D]
    b: Array  # [N, C, K, V]


def lookup_rows(ids: Array, b: Array) -> Rows:
    """Return the rows of a lookup, from ids [N, T] and b [C, N, T, D]."""
    return Rows(ids.astype(jnp.int32), b.swapaxes(0, 1))


def head_rows(a: Array, b: Array, rows: Array) -> Rows:
    """Return the rows of a restricted head, from a [N, K, D], b [C, N, K, W] and rows [W]."""
    values = product("nkd,cnkw->ncwd", a, b)
    ids = jnp.broadcast_to(rows.astype(jnp.int32)[None], (a.shape[0], rows.shape[0]))
    return Rows(ids, values)


def table(
    pairing: Pairing,
    shape: tuple[int, int],
    parts: Sequence[Rows],
    head: Head | None,
    contraction: str,
    moments: Moments | None = None,
) -> LeafKernel:
    """Return the kernel of a table of `shape` [V, D].

    The table has rows of lookups and of a restricted head, contracted by "matches" or "chunked", or
    a head over the whole vocabulary, or both.
    """
    rows = None
    if parts:
        ids = jnp.concatenate([part.ids for part in parts], axis=1)
        rows = Rows(ids, jnp.concatenate([part.values for part in parts], axis=2))
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
    left, right = pairing.split((rows, head))
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

    def form(start, rows, head):
        chunk: Any = 0
        if rows is not None:
            chunk = _scatter(rows, start, size)
        if head is not None:
            b = lax.dynamic_slice_in_dim(head.b, start, size, 3)
            chunk += product("nckv,nkd->ncvd", b, head.a)
        return chunk.reshape(*chunk.shape[:2], -1)

    if head is not None:
        head = head._replace(b=jnp.pad(head.b, [(0, 0)] * 3 + [(0, rest)]))
    starts = jnp.arange(steps, dtype=jnp.int32) * size

    def in_chunks(moment):
        return jnp.pad(moment, (0, rest * width)).reshape(steps, -1)

    return pairing.chunked(form, (rows, head), starts, _by_chunk(moments, in_chunks, steps))


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
    kernel = paired(pairing, _equal, rows.ids, b, pairing.split(signs)[1])
    return LeafKernel(kernel, pairing.split(top))


def _adam_matches(pairing, shape, rows, moments):
    """Return the kernel of Adam, which moves rows without a gradient by their momentum.

    The step on x' is split in two: the step by momentum alone, needed at the rows that x uses, and
    the change that the gradient of x' makes to it, nonzero only in the rows that x' uses.
    """
    ids, values = rows
    first, second = (m.reshape(shape)[ids][:, None] for m in moments[:2])  # [N, 1, U, D]
    moments = moments._replace(first=first, second=second)
    resting = pairing.kind.step(jnp.zeros_like(values[:, :1]), moments)
    moved = pairing.kind.step(values, moments) - resting
    moved = jnp.where(_first(ids)[:, None, :, None], moved, 0)
    met = paired(pairing, _equal, ids, values, pairing.split(moved)[1])
    alone = pairing.split(product("ncud,nud->nc", values, resting[:, 0]))[0]
    if pairing.inner == "full":
        return met + alone[:, :, None, None]
    return met + (alone[:, None] if pairing.inner == "diagonal" else alone.mean(1)[:, None])


def _same(ids):
    return ids[..., :, None] == ids[..., None, :]


def _first(ids):
    """Return where an id occurs for the first time in its list, [..., U]."""
    return _same(ids).argmax(-1) == lax.broadcasted_iota(jnp.int32, ids.shape, ids.ndim - 1)


def _added(ids):
    """Return whether entry v is added to entry u, the first with its id, [..., u, v]."""
    return _same(ids) & _first(ids)[..., None]


def _merged(rows):
    """Return the rows with those of equal id summed at its first occurrence, and zero elsewhere."""
    once = _added(rows.ids).astype(rows.values.dtype)
    return Rows(rows.ids, product("nuw,ncwd->ncud", once, rows.values))
