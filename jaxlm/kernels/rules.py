r"""The kernel of one parameter from what passed its use, without its gradients.

The gradient of a matrix at one example is $A^\top B$: what went in, A [T, I], and the cotangents of
what came out, B [T, O]. There are two ways to the inner products of such gradients:

| way     | what is made                                     | operations for a pair             |
|---------|--------------------------------------------------|-----------------------------------|
| paired  | Σ_ts (A_i A_jᵀ)_ts (B_i B_jᵀ)_ts                 | 2 T² (I + O)                      |
| chunked | some columns of all A_iᵀ B_i, then forgotten     | 2 I O, and 2 T I O an example     |

`jaxlm.kernels.cost` chooses. Factors are a [N, T, ...] and b [C, N, T, ...], the examples of x
before those of x'.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlm.kernels import cost, gram
from jaxlm.kernels.sides import Pieces, Sides, Slice

HIGHEST = lax.Precision.HIGHEST


def dense(
    sides: Sides, a: Array, b: Array, method: str, moments: Any = None, last: Any = None
) -> Slice:
    """The kernel of a matrix [I, O].

    Args:
      sides: what is made.
      a: [N, T, I].
      b: [C, N, T, O].
      method: "paired" or "chunked"; features other than the gradient are always chunked.
      moments: for Adam (first [I * O], second [I * O], count).
      last: whether this is the last layer, where a function of one position has one place with a
        cotangent that is not zero; a boolean array, or None for no.
    """
    if not sides.linear:
        return chunked(sides, a, b, moments)
    if a.shape[1] == 1:
        return Slice(paired_dense(sides, a, b))

    def general():
        if method == "paired":
            return paired_dense(sides, a, b)
        return chunked(sides, a, b).kernel

    if last is None:
        return Slice(general())

    def places():
        return (b != 0).any((0, 3))

    def at_one():
        index = places().argmax(1)
        a_one = jnp.take_along_axis(a, index[:, None, None], 1)
        b_one = jnp.take_along_axis(b, index[None, :, None, None], 2)
        return paired_dense(sides, a_one, b_one)

    one = lax.cond(last, lambda: places().sum(1).max() <= 1, lambda: jnp.zeros((), bool))
    return Slice(lax.cond(one, at_one, general))


def chunked(sides: Sides, a: Array, b: Array, moments: Any = None) -> Slice:
    """`dense` by some columns of all gradients at a time, or rows where there are more of them."""
    outputs, count, length, width = b.shape
    inputs = a.shape[2]
    by_row = inputs > width
    across, along = (width, inputs) if by_row else (inputs, width)
    size = cost.chunk(count * outputs * across, along)
    steps = -(-along // size)
    rest = steps * size - along
    if by_row:
        a = jnp.pad(a, [(0, 0), (0, 0), (0, rest)])
    else:
        b = jnp.pad(b, [(0, 0), (0, 0), (0, 0), (0, rest)])

    def pieces(a, b):  # b [N, T, C, O]
        n = a.shape[0]

        def make(start):
            if by_row:
                part, columns = lax.dynamic_slice_in_dim(a, start, size, 2), b
            else:
                part, columns = a, lax.dynamic_slice_in_dim(b, start, size, 3)
            columns = columns.reshape(n, length, -1)
            piece = lax.dot_general(columns, part, (((1,), (1,)), ((0,), (0,))), precision=HIGHEST)
            return piece.reshape(n, outputs, -1)  # [N, C, (O, I)]

        return Pieces(make, jnp.arange(steps, dtype=jnp.int32) * size)

    left, right = sides.each(pieces, a, jnp.moveaxis(b, 0, 2))
    return sides.chunked(left, right, _parts(moments, inputs, width, by_row, steps, rest))


def _parts(moments, inputs, width, by_row, steps, rest):
    """Moments in the order of the pieces."""
    if moments is None:
        return None

    def parts(m):
        m = m.reshape(inputs, width)
        if by_row:
            return jnp.pad(m, [(0, rest), (0, 0)]).reshape(steps, -1, width).swapaxes(1, 2)
        return jnp.pad(m.T, [(0, rest), (0, 0)]).reshape(steps, -1, inputs)

    first, second = (parts(m).reshape(steps, -1) for m in moments[:2])
    return first, second, moments[2]


def paired_dense(sides: Sides, a: Array, b: Array) -> Array:
    """`dense` by products of factors."""
    dtype = gram.wide(a.dtype)

    def products(a_i, a_j):
        return jnp.einsum("ti,msi->tms", a_i, a_j, precision=HIGHEST, preferred_element_type=dtype)

    return paired(sides, products, a, b.swapaxes(0, 1))


PRODUCTS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "full": ("ctd,mesd->ctmes", (0, 3), (1, 4)),
    "diagonal": ("ctd,mcsd->ctms", (0,), (1, 3)),
    "trace": ("ctd,mcsd->tms", (), (0, 2)),
}
"""For each choice of axes the products of b, where the weights [t, m, s] spread, and the sum."""


def paired(
    sides: Sides, weigh: Callable[[Any, Any], Array], a: Any, b: Array, right: Array | None = None
) -> Array:
    """`K[n, c, m, d] = Σ_ts weigh(a_n, a_m)_ts ⟨b_nct, b_mds⟩`.

    Args:
      sides: what is made.
      weigh: of one example of x and all of x', [T, M, S].
      a: what `weigh` sees of the examples, N first.
      b: [N, C, T, D].
      right: what stands for b at x', [M, C, S, D]; that of `b` if None.
    """
    (a_left, b_left), (a_right, b_right) = sides.each(lambda *pair: pair, a, b)
    b_right = b_right if right is None else right
    product, spread, summed = PRODUCTS[sides.inner]
    dtype = gram.wide(b.dtype)

    def row(one):
        weights = weigh(one[0], a_right).astype(dtype)
        found = jnp.einsum(
            product, one[1], b_right, precision=HIGHEST, preferred_element_type=dtype
        )
        found = (found * jnp.expand_dims(weights, spread)).sum(summed)
        return found.T if sides.inner == "diagonal" else found

    _, outputs, length, _ = b.shape
    products = {"full": outputs**2, "diagonal": outputs, "trace": 1}[sides.inner] + 1
    size = length * b_right.shape[0] * b_right.shape[2] * products
    out = in_blocks(row, (a_left, b_left), size)
    return out / outputs if sides.inner == "trace" else out


def in_blocks(function: Callable[[Any], Array], examples: Any, size: int) -> Array:
    """`function` of every example, as many at once as `size` numbers for each allow."""
    count = jax.tree.leaves(examples)[0].shape[0]
    batch = cost.rows(size, count)
    if batch == count:
        return jax.vmap(function)(examples)
    return lax.map(function, examples, batch_size=batch)


def summed(
    sides: Sides, op: str, a: Array, b: Array, rows: Array | None, moments: Any = None
) -> Slice:
    """The kernel of a bias, of which `rows` may be used alone, or of the scale of a norm."""
    if op == "scale":
        piece = jnp.einsum("nto,cnto->nco", a, b, precision=HIGHEST)
    else:
        piece = b.sum(2).swapaxes(0, 1)
    if rows is not None:
        same = rows[:, None] == rows[None, :]
        first = same.argmax(1) == jnp.arange(rows.shape[0])
        once = (same & first[None]).astype(piece.dtype)
        piece = jnp.einsum("ncw,wv->ncv", piece, once, precision=HIGHEST)
        if moments is not None:
            index = rows.astype(jnp.int32)
            moments = (moments[0][index], moments[1][index], moments[2])
    return sides.whole(piece, moments)
