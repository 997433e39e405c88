"""How far two laws are apart: errors of means of test functions, and their order."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import ArrayLike, Float

from jaxlm.core.errors import UserError


def ou_moments(
    a: ArrayLike, sigma2: ArrayLike, t: ArrayLike, x0: ArrayLike
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    r"""Mean and variance of $dX = -aX\,dt + \sigma\,dW$, $X(0) = x_0$.

    $$x_0 e^{-at}, \qquad \frac{\sigma^2}{2a}(1 - e^{-2at})$$

    Args:
      a: not 0.
      sigma2: σ².
      t: time.
      x0: where it begins.

    Returns:
      (mean, variance), in float64, in the shape that the arguments broadcast to.

    >>> mean, variance = ou_moments(1.0, 2.0, 100.0, 3.0)
    >>> round(float(mean), 6), round(float(variance), 6)
    (0.0, 1.0)
    """
    a, sigma2, t, x0 = (np.asarray(value, np.float64) for value in (a, sigma2, t, x0))
    shape = np.broadcast_shapes(a.shape, sigma2.shape, t.shape, x0.shape)
    mean, variance = x0 * np.exp(-a * t), -sigma2 / (2 * a) * np.expm1(-2 * a * t)
    return np.broadcast_to(mean, shape), np.broadcast_to(variance, shape)


class WeakError(NamedTuple):
    """Differences of means.

    Attributes:
      error: |E g(X) - E g(Y)| for each of F test functions, with the shape of their values.
      standard_error: of that difference.
    """

    error: Float[np.ndarray, "F ..."]
    standard_error: Float[np.ndarray, "F ..."]


def weak_error(samples: Any, reference: Any, test_fns: Sequence[Callable[[Any], Any]]) -> WeakError:
    r"""$|\mathbb E\,g(X) - \mathbb E\,g(Y)|$ for each test function g, in float64.

    Args:
      samples: of X: a tree of arrays whose axis 0 counts them.
      reference: of Y, such a tree; or a sequence of numbers, the exact $\mathbb E\,g(Y)$ of each g.
      test_fns: g, from one sample to a number or an array, the same shape for all.

    Raises:
      UserError: exact values that are not as many as the functions.

    >>> found = weak_error(np.array([1.0, 3.0]), [2.5], [lambda x: x])
    >>> found.error.tolist(), found.standard_error.tolist()
    ([0.5], [1.0])
    """
    exact = all(np.ndim(leaf) == 0 for leaf in jax.tree.leaves(reference))
    if exact and len(reference) != len(test_fns):
        raise UserError(
            f"there are {len(reference)} exact values for {len(test_fns)} test functions: give one "
            "value for each."
        )
    errors, spreads = [], []
    for i, test_fn in enumerate(test_fns):
        mean, square = _mean(test_fn, samples)
        other = (float(reference[i]), 0.0) if exact else _mean(test_fn, reference)
        errors.append(np.abs(mean - other[0]))
        spreads.append(np.sqrt(square + other[1]))
    return WeakError(np.stack(errors), np.stack(spreads))


def _mean(test_fn: Callable[[Any], Any], samples: Any) -> tuple[Any, Any]:
    """The mean of a test function and the square of its standard error."""
    values = np.asarray(jax.vmap(test_fn)(samples), np.float64)
    return values.mean(0), values.var(0, ddof=1) / len(values)


def weak_order(errors: Any, steps: Any) -> float:
    """The p of errors ~ steps^p, by least squares of logarithms.

    >>> round(weak_order([4.0, 1.0, 0.25], [0.2, 0.1, 0.05]), 6)
    2.0
    """
    return float(np.polyfit(np.log(np.asarray(steps)), np.log(np.asarray(errors)), 1)[0])
