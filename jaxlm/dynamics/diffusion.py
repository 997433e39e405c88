"""What multiplies the Brownian increment: a diagonal, a matrix, or any linear function."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm.core.errors import UserError


class NoiseOperator(NamedTuple):
    """A linear function that turns white noise into noise of the state.

    It stands for a matrix of as many rows as the state has elements, which is never made.

    Attributes:
      mv: maps a tree of `structure` to a tree like the state.
      structure: `jax.ShapeDtypeStruct`s of the white noise.

    >>> rows = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> noise = NoiseOperator(lambda z: rows @ z, jax.ShapeDtypeStruct((2,), jnp.float32))
    >>> noise.mv(jnp.ones(2)).tolist()
    [1.0, 1.0, 2.0]
    """

    mv: Callable[[Any], Any]
    structure: Any

    def in_structure(self) -> Any:
        """`structure`, as operators of lineax give it."""
        return self.structure


def as_operator(noise: Any, x: Any) -> NoiseOperator:
    """One form for all that a diffusion may return.

    Args:
      noise: the diagonal of a matrix, as a tree like x whose leaves may be scalars; or a matrix
        [d, r], where x is one vector [d]; or a `NoiseOperator`; or an operator of lineax.
      x: the state, a tree of floats.

    Raises:
      UserError: it is none of these.
    """
    if hasattr(noise, "mv") and hasattr(noise, "in_structure"):
        return NoiseOperator(noise.mv, noise.in_structure())
    shapes, wanted = jax.tree.map(np.shape, noise), jax.tree.map(np.shape, x)
    if _is_diagonal(noise, x):
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)
        return NoiseOperator(lambda z: jax.tree.map(jnp.multiply, noise, z), like)
    if isinstance(x, jax.Array) and x.ndim == 1 and np.shape(noise)[:-1] == x.shape:
        white = jax.ShapeDtypeStruct(np.shape(noise)[1:], x.dtype)
        return NoiseOperator(lambda z: jnp.matmul(noise, z, precision="highest"), white)
    raise UserError(
        f"the noise has shapes {shapes} where the state has {wanted}: give a tree like the state, "
        "a matrix [d, r] for a state [d], or a NoiseOperator."
    )


def _is_diagonal(noise: Any, x: Any) -> bool:
    found: Any = jax.tree.structure(noise)
    if found != jax.tree.structure(x):
        return False
    pairs = zip(jax.tree.leaves(noise), jax.tree.leaves(x), strict=True)
    return all(np.shape(scale) in ((), np.shape(leaf)) for scale, leaf in pairs)


def example_noise(
    losses: Callable[[Any], Float[Array, " n"]], x: Any, batch_size: float | int
) -> NoiseOperator:
    r"""Noise of a minibatch gradient, from n examples and no matrix.

    $$z \mapsto \frac{1}{\sqrt{n B}} \sum_i (z_i - \bar z)\, \nabla l_i(x), \qquad
    \mathrm{Cov} = \frac1B \cdot \frac1n \sum_i (g_i - \bar g)(g_i - \bar g)^\top$$

    the covariance of the mean of B gradients drawn with replacement. A draw is one backward pass
    of a weighted loss: neither a d by d matrix nor n gradients are made.

    Args:
      losses: x -> loss of each example, [n].
      x: parameters, a tree of floats.
      batch_size: B.

    Returns:
      The operator at x, with white noise [n].

    References:
      Wu et al. 2020, arXiv:1906.07405 (weights in place of a matrix root); Li, Malladi, Arora 2021,
      arXiv:2102.12470.
    """
    values, pull = jax.vjp(losses, x)
    (n,) = values.shape
    scale = (n * batch_size) ** -0.5

    def mv(z):
        return pull((z - z.mean()) * scale)[0]

    return NoiseOperator(mv, jax.ShapeDtypeStruct((n,), values.dtype))


def is_additive(diffusion: Callable[[Any, Any], Any], t: Any, x: Any) -> bool:
    """Whether the noise is the same at every state: x does not enter its computation.

    Derivatives are traced, not computed, so that `0 * x` counts as depending on x.

    Args:
      diffusion: `(t, x)` -> noise, as `as_operator` takes it.
      t: a time.
      x: a state.

    >>> is_additive(lambda t, x: jnp.full_like(x, 0.3), 0.0, jnp.ones(2))
    True
    >>> is_additive(lambda t, x: 0.3 * x, 0.0, jnp.ones(2))
    False
    """
    seen: list[bool] = []

    @jax.custom_jvp
    def watch(y):
        return y

    @functools.partial(watch.defjvp, symbolic_zeros=True)
    def _watch_jvp(primals, tangents):
        zero = jax.custom_derivatives.SymbolicZero
        seen.extend(not isinstance(leaf, zero) for leaf in jax.tree.leaves(tangents))
        return primals[0], tangents[0]

    def noise(x):
        operator = as_operator(diffusion(t, x), x)
        white = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), operator.structure)
        return watch(operator.mv(white))

    jax.eval_shape(lambda x: jax.jvp(noise, (x,), (x,)), x)
    return not any(seen)
