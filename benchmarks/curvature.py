"""Curvature of a loss, and the learning rate that theory gives zeroth-order descent for it.

With n directions in d dimensions, zeroth-order descent is slower than gradient descent by

    gamma = (d r + d - 2) / (n (d + 2)) + 1,    r = tr(H) / ||H||,

where r is the effective rank of the Hessian, and its learning rate is eta / gamma where gradient
descent has eta = 1 / ||H|| (Malladi et al., arXiv:2305.17333, theorem 1). In the theory, a positive
H bounds the Hessian near the parameters; here H is the Hessian of one batch at the parameters.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Loss = Callable[[Any], jax.Array]


class Curvature(NamedTuple):
    """Curvature, and the learning rate that follows from it.

    Attributes:
      trace, trace_error: estimated trace of the Hessian, and its standard error.
      norm: the largest absolute eigenvalue.
      rank: the effective rank, clipped to 1 from below since negative eigenvalues could lower it.
      sgd_learning_rate: 1 / ||H||.
    """

    trace: float
    trace_error: float
    norm: float
    rank: float
    sgd_learning_rate: float


@functools.partial(jax.jit, static_argnames="loss")
def hessian_product(loss: Loss, params: Any, vector: Any) -> Any:
    """Return H v, the derivative of the gradient along v."""
    return jax.jvp(jax.grad(loss), (params,), (vector,))[1]


@jax.jit
def inner(a: Any, b: Any) -> jax.Array:
    """Return the inner product of two trees."""
    return sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@functools.partial(jax.jit, static_argnames="draw")
def _draw(draw: Callable[..., jax.Array], key: jax.Array, params: Any) -> Any:
    """Draw a tree like `params` of random arrays."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([draw(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def _signs(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.rademacher(key, shape, float)


def _sample(loss: Loss, params: Any, key: jax.Array) -> jax.Array:
    v = _draw(_signs, key, params)
    return inner(v, hessian_product(loss, params, v))


def hutchinson_trace(
    loss: Loss, params: Any, key: jax.Array, probes: int = 64
) -> tuple[float, float]:
    """Return tr(H) as the mean of v H v over random signs v, and its standard error."""
    found = np.array([_sample(loss, params, k) for k in jax.random.split(key, probes)])
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(probes))


@jax.jit
def _unit(v: Any) -> tuple[Any, jax.Array]:
    """Return a tree divided by its norm, and the norm."""
    length = jnp.sqrt(inner(v, v))
    return jax.tree.map(lambda x: x / length, v), length


def spectral_norm(loss: Loss, params: Any, key: jax.Array, steps: int = 30) -> float:
    """Return the largest absolute eigenvalue of H by power iteration, a lower bound."""
    v, length = _unit(_draw(jax.random.normal, key, params))
    for _ in range(steps):
        v, length = _unit(hessian_product(loss, params, v))
    return float(length)


def slow_down(rank: float, parameters: int, directions: int = 1) -> float:
    """Return gamma, see the module docstring."""
    d, n = parameters, directions
    return (d * rank + d - 2) / (n * (d + 2)) + 1


def measure(
    loss: Loss, params: Any, key: jax.Array, *, probes: int = 64, steps: int = 30
) -> Curvature:
    """Return trace, norm, effective rank and learning rate of `loss(params)`."""
    first, second = jax.random.split(key)
    trace, error = hutchinson_trace(loss, params, first, probes)
    norm = spectral_norm(loss, params, second, steps)
    return Curvature(trace, error, norm, max(1.0, trace / norm), 1 / norm)
