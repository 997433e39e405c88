"""Curvature of a loss, and the learning rate that theory gives zeroth-order descent for it.

With n directions in d dimensions, descent is slower than with gradients by

    gamma = (d r + d - 2) / (n (d + 2)) + 1,    r = tr(H) / ||H||,

r the effective rank of the Hessian, and takes the learning rate eta / gamma where gradients would
take eta = 1 / ||H|| (Malladi et al., arXiv:2305.17333, theorem 1). The theory bounds the Hessian
near the parameters by a positive H; here H is the Hessian of one batch where the parameters are.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Loss = Callable[[Any], jax.Array]


class Curvature(NamedTuple):
    """What is measured, and what follows.

    Attributes:
      trace, trace_error: of the Hessian, and the standard error of that.
      norm: the largest absolute eigenvalue.
      rank: the effective rank; at least 1, which negative eigenvalues could bring it below.
      sgd_learning_rate: 1 / ||H||.
    """

    trace: float
    trace_error: float
    norm: float
    rank: float
    sgd_learning_rate: float


@functools.partial(jax.jit, static_argnames="loss")
def hessian_product(loss: Loss, params: Any, vector: Any) -> Any:
    """H v, by a derivative of the gradient along v."""
    return jax.jvp(jax.grad(loss), (params,), (vector,))[1]


@jax.jit
def inner(a: Any, b: Any) -> jax.Array:
    """The inner product of two trees."""
    return sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@functools.partial(jax.jit, static_argnames="draw")
def _draw(draw: Callable[..., jax.Array], key: jax.Array, params: Any) -> Any:
    """A tree like `params` of random arrays."""
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
    """tr(H) as the mean of v H v over random signs v, and the standard error of the mean."""
    found = np.array([_sample(loss, params, k) for k in jax.random.split(key, probes)])
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(probes))


@jax.jit
def _unit(v: Any) -> tuple[Any, jax.Array]:
    """A tree over its length, and that."""
    length = jnp.sqrt(inner(v, v))
    return jax.tree.map(lambda x: x / length, v), length


def spectral_norm(loss: Loss, params: Any, key: jax.Array, steps: int = 30) -> float:
    """The largest absolute eigenvalue of H by power iteration, from below."""
    v, length = _unit(_draw(jax.random.normal, key, params))
    for _ in range(steps):
        v, length = _unit(hessian_product(loss, params, v))
    return float(length)


def slow_down(rank: float, parameters: int, directions: int = 1) -> float:
    """gamma, see above."""
    d, n = parameters, directions
    return (d * rank + d - 2) / (n * (d + 2)) + 1


def measure(
    loss: Loss, params: Any, key: jax.Array, *, probes: int = 64, steps: int = 30
) -> Curvature:
    """Trace, norm, effective rank and learning rate of `loss(params)`."""
    first, second = jax.random.split(key)
    trace, error = hutchinson_trace(loss, params, first, probes)
    norm = spectral_norm(loss, params, second, steps)
    return Curvature(trace, error, norm, max(1.0, trace / norm), 1 / norm)
