"""Method "ntk_vector_products": products of the Jacobian with one vector at a time.

With J1 and J2 the Jacobians at x1 and x2, K = J1 J2ᵀ. Forward mode computes J1 u at the cost of a
forward pass, reverse mode J2ᵀ v at that of a backward pass, without a matrix of gradients. φ2 is
applied to the gradients of one example at a time; for "signgd", where φ1 is a sign as well, so are
the gradients on the left. Time is that of N2 C backward passes of one example and N2 C passes over
all of x1.

References: Novak et al., "Fast Finite Width Neural Tangent Kernel", arXiv:2206.08720 (NTK-vector
products).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxlm.core import paths
from jaxlm.core.dtypes import wide, wide_dtype
from jaxlm.core.errors import UserError
from jaxlm.core.programs import held
from jaxlm.kernels.contraction import KernelSpec, contract, kernel_spec
from jaxlm.kernels.jacobian import as_slices, gradients
from jaxlm.kernels.kinds import SGD, Kind


class _Restricted:
    """f as a function of the selected parameters, and the features of its gradients."""

    def __init__(self, f, params, spec: KernelSpec):
        self.f, self.params, self.spec = f, params, spec
        self.taken, self.rest = paths.split(params, spec.select)

    def value(self, x):
        return lambda taken: self.f(paths.merge(taken, self.rest), x)

    def gradients(self, row) -> list[Array]:
        """Return the gradients at one example, [1, C, S, p] per leaf."""
        batch = jax.tree.map(lambda a: a[None], row)
        return gradients(self.f, self.params, batch, self.spec.select)

    def right(self, row) -> list[Array]:
        """Return φ2 at one example, [C, S, p] per leaf."""
        return [a[0] for a in self.spec.kind.right(self.gradients(row))]

    def tangent(self, rows: list[Array]) -> Any:
        """Return a tree like the selected parameters, from one array [S, p] per leaf."""
        leaves, structure = jax.tree.flatten(self.taken)
        shaped = [
            a.reshape(leaf.shape).astype(leaf.dtype) for a, leaf in zip(rows, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, shaped)

    def products(self, x1) -> Callable[[list[Array]], Float[Array, "N C"]]:
        """Return the function u [S, p] per leaf -> ⟨φ1(∇f_c(x_n)), u⟩ for all n and c."""
        if not self.spec.kind.signed[0]:
            # `jax.linearize` runs the forward pass once for all columns.
            _, push = jax.linearize(self.value(x1), self.taken)
            return lambda u: wide(push(self.tangent(u)))

        def by_row(u):
            u = [a[None, None] for a in u]

            def product(row):
                left = self.spec.kind.left(self.gradients(row))
                return contract(left, u, "full")[0, :, 0, 0]

            return lax.map(product, x1)

        return by_row


def block(f: Callable[..., Array], params: Any, x1: Any, x2: Any, spec: KernelSpec) -> Array:
    """Return the kernel of a block of examples, column by column; `x2=None` means `x1`."""
    restricted = _Restricted(f, params, spec)
    with jax.default_matmul_precision("highest"):
        product = restricted.products(x1)

        def column(row):
            by_output = lax.map(product, restricted.right(row))  # [d, n, c]
            if spec.over == "full":
                return by_output
            same = jnp.diagonal(by_output, axis1=0, axis2=2)
            return same.mean(-1) if spec.over == "trace" else same

        columns = lax.map(column, x1 if x2 is None else x2)
    if spec.over == "full":
        return columns.transpose(2, 3, 0, 1)
    return jnp.moveaxis(columns, 0, 1)


def kernel_vector_product(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any,
    v: Float[ArrayLike, "..."],
    *,
    kind: str | Kind = "sgd",
    select: paths.Select = None,
) -> Float[Array, "N C"]:
    """Return `(K v)[n, c] = Σ_{m,d} K[n, c, m, d] v[m, d]` without forming K.

    For "sgd" this is one backward pass over x2 and one forward-mode pass over x1. For other kinds
    φ2 is not linear, so each gradient at x2 is formed, one example at a time. The function is pure:
    apply `jax.jit` and, for several vectors, `jax.vmap` to it.

    Args:
      f: `f(params, x) -> [N, C]`, where row n depends on example n alone.
      params: any pytree.
      x1: a pytree of arrays whose axis 0 is N.
      x2: the same with M; None means `x1`.
      v: [M, C].
      kind, select: see `ntk`.

    Returns:
      [N, C], in at least float32.

    Raises:
      UserError: if v does not have the shape of f's value at x2.

    >>> f = lambda params, x: x @ params
    >>> kernel_vector_product(f, jnp.ones((2, 1)), jnp.eye(2), None, jnp.ones((2, 1))).tolist()
    [[1.0], [1.0]]
    """
    f, params = held(f, params)
    restricted = _Restricted(f, params, kernel_spec(params, kind, select=select))
    x2 = x1 if x2 is None else x2
    shape = jax.eval_shape(restricted.value(x2), restricted.taken).shape
    if jnp.shape(v) != shape:
        raise UserError(
            f"v: must have the shape of f's value at x2, {shape} (got {jnp.shape(v)}). Give one "
            "number per example and output."
        )
    with jax.default_matmul_precision("highest"):
        return restricted.products(x1)(_combination(restricted, x2, jnp.asarray(v)))


def _combination(restricted: _Restricted, x2, v) -> list[Array]:
    """Return `Σ_{m,d} v[m, d] φ2(∇f_d(x_m))`, [S, p] per leaf."""
    if isinstance(restricted.spec.kind, SGD):
        value, pull = jax.vjp(restricted.value(x2), restricted.taken)
        leaves = paths.flatten(restricted.taken)[0]
        pulled = jax.tree.leaves(pull(v.astype(value.dtype))[0])
        return [as_slices(*pair, 0) for pair in zip(leaves, pulled, strict=True)]

    def add(total, row):
        x, weights = row
        terms = [jnp.tensordot(weights.astype(a.dtype), a, 1) for a in restricted.right(x)]
        return [a + term.astype(a.dtype) for a, term in zip(total, terms, strict=True)], None

    shapes = jax.eval_shape(restricted.right, jax.tree.map(lambda a: a[0], x2))
    start = [jnp.zeros(s.shape[1:], wide_dtype(s)) for s in shapes]
    return lax.scan(add, start, (x2, v))[0]
