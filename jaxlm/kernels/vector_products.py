"""Kernels without a matrix of gradients: products of the Jacobian with one vector at a time.

With J1 and J2 the Jacobians at x1 and x2, K = J1 J2ᵀ. Forward mode gives J1 u for the price of a
forward pass and reverse mode J2ᵀ v for that of a backward pass, so a column of K, or K v, needs the
memory of the activations and of a few copies of the parameters. A sign of x' is taken of one
gradient at a time; where φ1 is a sign as well (`signgd`) the left gradients are formed one by one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.core.programs import held
from jaxlm.kernels import gram
from jaxlm.kernels.arguments import features_of
from jaxlm.kernels.jacobian import as_slices, gradients


class _Sides:
    """f restricted to the selected parameters, with the features of either side."""

    def __init__(self, f, params, select, features):
        self.f, self.params, self.select, self.features = f, params, select, features
        self.taken, self.rest = paths.split(params, select)

    def value(self, x):
        """f at a batch, as a function of the selected parameters."""
        return lambda taken: self.f(paths.merge(taken, self.rest), x)

    def right(self, row) -> list[Array]:
        """φ2 at one example, [C, S, p] a leaf."""
        found = self._gradients(row)
        return [a[0] for a in self.features.right(found)]

    def left(self, row) -> list[Array]:
        """φ1 at one example, [1, C, S, p] a leaf."""
        return self.features.left(self._gradients(row))

    def _gradients(self, row):
        batch = jax.tree.map(lambda a: a[None], row)
        return gradients(self.f, self.params, batch, self.select)

    def tangent(self, rows: list[Array]) -> Any:
        """A tree like the selected parameters from one array [..., S, p] a leaf."""
        leaves, structure = jax.tree.flatten(self.taken)
        shaped = [
            a.reshape(*a.shape[:-2], *leaf.shape).astype(leaf.dtype)
            for a, leaf in zip(rows, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, shaped)

    def products(self, x1) -> Callable[[list[Array]], Float[Array, "N C"]]:
        """u [S, p] a leaf -> ⟨φ1(∇f_c(x_n)), u⟩ for all n and c."""
        if self.features.kind == "signgd":

            def by_row(u):
                u = [a[None, None] for a in u]
                return lax.map(lambda row: gram.contract(self.left(row), u, "full")[0, :, 0, 0], x1)

            return by_row

        _, push = jax.linearize(self.value(x1), self.taken)

        def push_forward(u):
            out = push(self.tangent(u))
            return out.astype(gram.wide(out.dtype))

        return push_forward


def ntk_vector_products(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    kind: str = "sgd",
    trace_axes: Sequence[int] = (),
    diagonal_axes: Sequence[int] = (),
    select: paths.Select = None,
    sign_threshold: float | int | None = None,
    adam_state: Any = None,
    b1: float | int = 0.9,
    b2: float | int = 0.999,
    eps: float | int = 1e-8,
) -> Array:
    """The kernel column by column: a backward pass at x', then forward mode along φ2 at all of x.

    Time is that of N2 C backward passes of one example and N2 C passes over all of x1, without a
    product of matrices of gradients; memory that of the activations of x1 and 2 C copies of the
    parameters. The method of choice for few examples and large models. Pure; `jax.jit` is the
    caller's.

    Args:
      f: `f(params, x) -> [N, C]`, row n depending on example n alone.
      params: any pytree of floats.
      x1, x2: pytrees of arrays whose axis 0 is N1 and N2; `x2=None` stands for `x1`.
      kind, trace_axes, diagonal_axes, select, sign_threshold, adam_state, b1, b2, eps: see `ntk`.

    Returns:
      [N1, C, N2, C]; traced [N1, N2]; diagonal [N1, N2, C]. float32, or float64 for gradients of
      that dtype.

    >>> f = lambda params, x: x @ params
    >>> ntk_vector_products(f, jnp.ones((2, 1)), jnp.eye(2), trace_axes=(-1,)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]

    References: Novak et al., "Fast Finite Width Neural Tangent Kernel", arXiv:2206.08720
    (NTK-vector products).
    """
    over = gram.axes(trace_axes, diagonal_axes)
    f, params = held(f, params)
    features = features_of(kind, params, select, sign_threshold, adam_state, b1, b2, eps)
    return block(f, params, x1, x2, features, over, select)


def block(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any,
    features: gram.Features,
    over: gram.Axes,
    select: paths.Select,
) -> Array:
    """`ntk_vector_products` of checked arguments."""
    sides = _Sides(f, params, select, features)
    with jax.default_matmul_precision("highest"):
        product = sides.products(x1)

        def column(row):
            found = lax.map(product, sides.right(row))  # [d, n, c]
            if over == "full":
                return found
            own = jnp.diagonal(found, axis1=0, axis2=2)
            return own.mean(-1) if over == "trace" else own

        columns = lax.map(column, x1 if x2 is None else x2)
    if over == "full":
        return columns.transpose(2, 3, 0, 1)
    return jnp.moveaxis(columns, 0, 1)


def kernel_vector_product(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any,
    v: Float[ArrayLike, "..."],
    *,
    kind: str = "sgd",
    select: paths.Select = None,
    sign_threshold: float | int | None = None,
    adam_state: Any = None,
    b1: float | int = 0.9,
    b2: float | int = 0.999,
    eps: float | int = 1e-8,
) -> Float[Array, "N C"]:
    """`(K v)[n, c] = Σ_{m,d} K[n, c, m, d] v[m, d]`, without K.

    For `sgd` one backward pass over x2 and one forward-mode pass over x1. Other kinds have no
    linear φ2, so each gradient at x2 is formed, one example at a time. Pure; `jax.jit` and, for
    several vectors, `jax.vmap` are the caller's.

    Args:
      f: `f(params, x) -> [N, C]`, row n depending on example n alone.
      params: any pytree of floats.
      x1: a pytree of arrays whose axis 0 is N.
      x2: the same with M; None stands for `x1`.
      v: [M, C], one number for every example of x2 and output.
      kind, select, sign_threshold, adam_state, b1, b2, eps: see `ntk`.

    Returns:
      At least float32.

    Raises:
      UserError: if v is not of the shape of f's value at x2.

    >>> f = lambda params, x: x @ params
    >>> kernel_vector_product(f, jnp.ones((2, 1)), jnp.eye(2), None, jnp.ones((2, 1))).tolist()
    [[1.0], [1.0]]
    """
    f, params = held(f, params)
    features = features_of(kind, params, select, sign_threshold, adam_state, b1, b2, eps)
    sides = _Sides(f, params, select, features)
    x2 = x1 if x2 is None else x2
    shape = jax.eval_shape(sides.value(x2), sides.taken).shape
    if jnp.shape(v) != shape:
        raise UserError(
            f"v is {jnp.shape(v)}, but f's value at x2 is {shape}; give one number each"
        )
    with jax.default_matmul_precision("highest"):
        return sides.products(x1)(_combination(sides, x2, jnp.asarray(v)))


def _combination(sides: _Sides, x2, v) -> list[Array]:
    """`Σ_{m,d} v[m, d] φ2(∇f_d(x_m))`, [S, p] a leaf."""
    if sides.features.kind == "sgd":
        value, pull = jax.vjp(sides.value(x2), sides.taken)
        leaves = zip(
            paths.flatten(sides.taken)[0],
            jax.tree.leaves(pull(v.astype(value.dtype))[0]),
            strict=True,
        )
        return [as_slices(leaf, value, 0) for leaf, value in leaves]

    def add(total, row):
        x, weights = row
        terms = [jnp.tensordot(weights.astype(a.dtype), a, 1) for a in sides.right(x)]
        return [a + term.astype(a.dtype) for a, term in zip(total, terms, strict=True)], None

    shapes = jax.eval_shape(sides.right, jax.tree.map(lambda a: a[0], x2))
    start = [jnp.zeros(s.shape[1:], gram.wide(s.dtype)) for s in shapes]
    return lax.scan(add, start, (x2, v))[0]
