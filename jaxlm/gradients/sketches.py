"""Random linear maps from the numbers of one leaf to `dim`, by blocks and without a stored matrix.

Each is a function `(key, dim, g [N, ...]) -> [N, dim]` with E<Sx, Sy> = <x, y>. A leaf is read in
blocks along its flat index, and what is random in block i is drawn from `fold_in(key, i)`; the
blocks are added in this order. So a row of the result is a function of the key and of the same row
of `g`: the same, to the last bit, whichever rows stand beside it and wherever they are stored.

Second moments, for unit vectors at an angle whose cosine is c:

| map         | Var <Sx, Sy>                                    | operations a number       |
|-------------|-------------------------------------------------|---------------------------|
| gaussian    | (1 + c^2) / dim                                 | 2 dim, dim normal numbers |
| rademacher  | (1 + c^2 - 2 sum_i x_i^2 y_i^2) / dim           | 2 dim, dim / 32 words     |
| countsketch | at most that of rademacher, with heavier tails  | 2                         |
| srht        | about that, whatever single numbers are         | 160                       |
| kronecker   | about 1 / k_in + 1 / k_out for rank-one G       | k_in + k_out              |
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.gradients.dense_maps import each, gaussian, product, rademacher, scaled, signs, wide
from jaxlm.gradients.folds import countsketch, srht

Sketch = Callable[[Array, int, Array], Array]


def factors_of(dim: int) -> tuple[int, int]:
    """The two nearest factors of `dim`, the smaller one first."""
    small = next(k for k in range(math.isqrt(dim), 0, -1) if dim % k == 0)
    return small, dim // small


def sides(key: Array, dim: int, rows: int, columns: int, dtype) -> tuple[Array, Array]:
    """P_in [rows, k_in] and P_out [columns, k_out] of `kronecker`, of entries +-1."""
    small, large = factors_of(dim)
    into, out = (jax.random.fold_in(key, side) for side in range(2))
    return signs(into, rows, small, dtype), signs(out, columns, large, dtype)


def kronecker(key: Array, dim: int, g: Array) -> Float[Array, "N dim"]:
    """P_in^T G P_out of a matrix G, all but the last axis of which are rows; vectors are dense."""
    if g.ndim < 3:
        return rademacher(key, dim, g)
    matrices = g.reshape(len(g), math.prod(g.shape[1:-1]), g.shape[-1])
    dtype = jnp.promote_types(g.dtype, jnp.float32)
    left, right = sides(key, dim, matrices.shape[1], matrices.shape[2], dtype)
    return scaled(each(lambda x: product(left.T, product(wide(x), right)), matrices), dim)


def kronecker_factors(key: Array, dim: int, a: Array, b: Array) -> Float[Array, "N dim"]:
    """`kronecker` of sum_t a_t b_t^T, a [N, T, in] and b [N, T, out], which is never formed."""
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    left, right = sides(key, dim, a.shape[-1], b.shape[-1], dtype)

    def one(x):
        into, out = (side.astype(dtype) for side in x)
        return product(product(into, left).T, product(out, right))

    return scaled(each(one, (a, b)), dim)


SKETCHES: dict[str, Sketch] = {
    "countsketch": countsketch,
    "gaussian": gaussian,
    "kronecker": kronecker,
    "rademacher": rademacher,
    "srht": srht,
}
