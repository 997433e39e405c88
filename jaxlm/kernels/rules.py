r"""The kernel of one parameter from what passed its use, without keeping its gradients.

The gradient of a kernel matrix at one example is $A^\top B$, with what went in, A [T, I], and the
cotangent of what came out, B [T, O]. So there are two ways to an inner product of two:

    paired:   ⟨A_iᵀ B_i, A_jᵀ B_j⟩ = Σ_ts (A_i A_jᵀ)_ts (B_i B_jᵀ)_ts      2 T² (I + O) operations
    chunked:  form some columns of A_iᵀ B_i for all i, contract, forget     2 I O, and 2 T I O for each i

`jaxlm.kernels.cost` chooses. Factors have the shapes a [N, T, ...] and b [C, N, T, ...], examples
of x before those of x'.
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


def dense(sides: Sides, a: Array, b: Array, method: str, moments: Any, last: Any = None) -> Slice:
    """The kernel of a matrix [I, O].

    Args:
      sides: what is made.
      a: [N, T, I].
      b: [C, N, T, O].
      method: "paired" or "chunked"; only the second takes other features than the gradient.
      moments: for Adam (first [I * O], second [I * O], count).
      last: boolean, whether this is the last layer, in which a function of few positions may have
        one cotangent in each example that is not zero. None for no.
    """
    if not sides.linear:
        return chunked(sides, a, b, moments)
    general = {"paired": paired_dense, "chunked": chunked}[method]
    if a.shape[1] == 1:
        return paired_dense(sides, a, b)
    if last is None:
        return general(sides, a, b)

    def there():
        return (b != 0).any((0, 3))

    def at_one():
        index = there().argmax(1)
        a_one = jnp.take_along_axis(a, index[:, None, None], 1)
        b_one = jnp.take_along_axis(b, index[None, :, None, None], 2)
        return paired_dense(sides, a_one, b_one).kernel

    one = lax.cond(last, lambda: there().sum(1).max() <= 1, lambda: jnp.zeros((), bool))
    return Slice(lax.cond(one, at_one, lambda: general(sides, a, b).kernel))


def chunked(sides: Sides, a: Array, b: Array, moments: Any = None) -> Slice:
    """`dense` by some columns of all gradients at a time."""
    outputs, count, _, width = b.shape
    columns = cost.chunk(count * outputs * a.shape[2], width)
    size = -(-width // columns)

    def by_chunk(x):  # [..., O] -> [chunks, ..., columns]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size * columns - width)])
        return jnp.moveaxis(x.reshape(*x.shape[:-1], size, columns), -2, 0)

    def pieces(a, b):
        parts = by_chunk(b)  # [k, C, N, T, o]
        parts = parts.transpose(0, 2, 3, 1, 4).reshape(size, *a.shape[:2], outputs * columns)
        n = a.shape[0]

        def make(part):  # [N, T, C o]
            piece = lax.dot_general(part, a, (((1,), (1,)), ((0,), (0,))), precision=HIGHEST)
            return piece.reshape(n, outputs, -1)

        return Pieces(make, parts)

    if moments is not None:
        first, second = (
            by_chunk(m.reshape(a.shape[2], width)).swapaxes(1, 2).reshape(size, -1)
            for m in moments[:2]
        )
        moments = (first, second, moments[2])
    b_first = b.swapaxes(0, 1)
    left, right = sides.each(lambda a, b: pieces(a, b.swapaxes(0, 1)), a, b_first)
    return sides.chunked(left, right, moments)


def paired_dense(sides: Sides, a: Array, b: Array) -> Slice:
    """`dense` by products of factors."""

    def products(a_i, a_j):  # [T, I], [M, S, I]
        dtype = gram.wide(a_i.dtype)
        return jnp.einsum("ti,msi->tms", a_i, a_j, precision=HIGHEST, preferred_element_type=dtype)

    return Slice(paired(sides, products, a, b.swapaxes(0, 1)))


def paired(
    sides: Sides, weigh: Callable[[Any, Any], Array], a: Any, b: Array, b_right: Array | None = None
) -> Array:
    """`K[n, c, m, d] = Σ_ts weigh(a_n, a_m)_ts ⟨b_nct, b_mds⟩`.

    Args:
      sides: what is made.
      weigh: of one example's `a` and of those of all of x', [T, M, S].
      a: a pytree of arrays, N first.
      b: [N, C, T, O].
      b_right: the same for x' alone, [M, C, S, O]; by default that of `b`.
    """
    (a_left, b_left), (a_right, own) = sides.each(lambda *pair: pair, a, b)
    right = own if b_right is None else b_right
    product, spread, axes = PRODUCTS[sides.inner]
    dtype = gram.wide(b.dtype)

    def row(pair):
        a_i, b_i = pair
        weights = weigh(a_i, a_right).astype(dtype)
        found = jnp.einsum(product, b_i, right, precision=HIGHEST, preferred_element_type=dtype)
        found = (found * jnp.expand_dims(weights, spread)).sum(axes)
        return found.T if sides.inner == "diagonal" else found

    outputs = {"full": b.shape[1] ** 2, "diagonal": b.shape[1], "trace": 1}[sides.inner]
    size = b.shape[2] * right.shape[0] * right.shape[2] * (1 + outputs)
    out = lax.map(row, (a_left, b_left), batch_size=cost.rows(size, b_left.shape[0]))
    return out / b.shape[1] if sides.inner == "trace" else out


PRODUCTS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "full": ("ctd,mesd->ctmes", (0, 3), (1, 4)),
    "diagonal": ("ctd,mcsd->ctms", (0,), (1, 3)),
    "trace": ("ctd,mcsd->tms", (), (0, 2)),
}
"""For each choice of axes the products of B, where the weights [t, m, s] spread, and the sum."""


def summed(sides: Sides, op: str, a: Array, b: Array, rows: Array | None, moments: Any) -> Slice:
    """The kernel of a bias or of the scale of a norm, whose gradients are small."""
    if op == "scale":
        piece = jnp.einsum("nto,cnto->nco", a, b, precision=HIGHEST)
    else:
        piece = b.sum(2).swapaxes(0, 1)
    if rows is not None:
        piece = merged(piece, rows)
        if moments is not None:
            index = rows.astype(jnp.int32)
            moments = (moments[0][index], moments[1][index], moments[2])
    return sides.whole(piece, moments)


def merged(values: Array, rows: Array) -> Array:
    """[..., W] of rows with repetitions: the sum of each row where it comes first, zero elsewhere."""
    same = rows[:, None] == rows[None, :]
    first = same.argmax(1) == jnp.arange(rows.shape[0])
    return jnp.einsum("...w,wv->...v", values, (same & first[None]).astype(values.dtype), precision=HIGHEST)
