r"""Measures of kernel behaviour: is f linear along the way, and are its features fixed?

Training from $\theta_0$ to $\theta_t$ shows kernel behaviour where $f(x; \theta_t)$ is close to its
linearization at $\theta_0$ and the kernel at $\theta_t$ close to that at $\theta_0$ (Malladi et al.
2022, arXiv:2210.05643).
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.core.programs import held, is_array
from jaxlm.typing import Params, PRNGKey


def linearize(f: Callable[..., Array], params: Params) -> Callable[..., Array]:
    r"""Return the first-order Taylor expansion of a function in its parameters.

    $$f_{lin}(\theta', x) = f(\theta, x) + \langle \nabla_\theta f(\theta, x), \theta' - \theta
    \rangle$$

    Args:
      f: `f(params, x) -> array`.
      params: θ. Leaves that are not floats must be the same in θ'.

    Returns:
      `f_lin(params, x)`, like f; it costs one forward-mode pass, which includes f. It raises
      UserError if its parameters differ from θ in structure or shape.

    References:
      Lee et al. 2019, arXiv:1902.06720.

    >>> f_lin = linearize(lambda params, x: params**2 * x, 3.0)
    >>> float(f_lin(4.0, 1.0))
    15.0
    """

    def f_lin(other: Params, x: Any) -> Array:
        _check_same_shapes(params, other)
        function, start = held(f, params)
        moved, fixed = paths.split(start, None)
        direction = jax.tree.map(
            lambda new, old: (new - old).astype(old.dtype),
            paths.split(held(f, other)[1], None)[0],
            moved,
        )
        value, tangent = jax.jvp(
            lambda part: function(paths.merge(part, fixed), x), (moved,), (direction,)
        )
        return value + tangent

    return f_lin


def linearization_score(initial: float, final: float, linearized: float) -> float | None:
    r"""Return the share of the improvement by training that the linearized function recovers.

    The share is $(a_{lin} - a_0) / (a_{FT} - a_0)$, where the accuracies are those at θ_0, at θ_FT
    and of $f_{lin}(θ_{FT})$. The paper asks for more than one half.

    Returns:
      The share; None if training did not improve the accuracy.

    >>> linearization_score(0.5, 0.9, 0.8)
    0.75
    """
    if not final > initial:
        return None
    return round((linearized - initial) / (final - initial), 12)


def gain_p_value(before: Any, after: Any) -> float:
    """Return the one-sided p-value of the exact McNemar test that `after` is better than `before`.

    Only examples where exactly one of the two is right count. The p-value is the probability of at
    least as many gains if gains and losses are equally likely.

    Args:
      before, after: [N], whether each example is right.

    >>> gain_p_value([0, 0, 0, 0, 1], [1, 1, 1, 1, 1])
    0.0625
    """
    from scipy import stats

    first, second = np.asarray(before, bool), np.asarray(after, bool)
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, alternative="greater").pvalue)


def random_move(params: Params, other: Params, key: PRNGKey) -> Params:
    """Return `params` with each leaf moved in a random direction, as far as it is from `other`."""

    def move(key, first, second):
        z = jax.random.normal(key, jnp.shape(first), jnp.float32)
        length = jnp.linalg.norm(jnp.ravel(jnp.asarray(second, jnp.float32) - first))
        return (first + length * z / jnp.linalg.norm(jnp.ravel(z))).astype(second.dtype)

    return _leafwise(move, key, params, other)


def shuffled(params: Params, key: PRNGKey) -> Params:
    """Return `params` with the entries of every leaf permuted: random features, equal scales."""

    def permute(key, leaf):
        return jax.random.permutation(key, jnp.ravel(leaf)).reshape(jnp.shape(leaf))

    return _leafwise(permute, key, params)


def _leafwise(function: Callable[..., Array], key: PRNGKey, *trees: Params) -> Params:
    """Map `function(key, *leaves)` over the float leaves of trees."""
    moved, fixed = zip(*(paths.split(tree, None) for tree in trees), strict=True)
    leaves, structure = jax.tree.flatten(moved[0])
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))
    return paths.merge(jax.tree.map(function, keys, *moved), fixed[0])


class KernelChange(NamedTuple):
    r"""How far one kernel is from another.

    Attributes:
      mean: mean of $|K' - K| / |K|$ over entries, except those that move away from zero. The paper
        calls features fixed where this is below 2.
      median: median of the same entries.
      frobenius: $\|K' - K\|_F / \|K\|_F$, which small entries do not blow up.
      alignment: $\langle K, K' \rangle / (\|K\|_F \|K'\|_F)$, which ignores scale.
      left_out: share of the entries that move away from zero: K is zero up to rounding, and
        K' differs.
    """

    mean: float
    median: float
    frobenius: float
    alignment: float
    left_out: float = 0.0


def kernel_change(before: Any, after: Any) -> KernelChange:
    """Return the change from one kernel to another of the same examples.

    Args:
      before: K, of any shape.
      after: K', of the same shape.

    Raises:
      UserError: if the shapes differ, an entry is not finite, or `before` is zero.

    >>> kernel_change(np.array([[1.0, 2.0]]), np.array([[2.0, 2.0]])).mean
    0.5
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.shape != second.shape:
        raise UserError(
            f"after: must have the shape of before, {list(first.shape)} (got "
            f"{list(second.shape)}). Compute both of the same examples."
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise UserError("kernel: not finite (got NaN or infinity). Compute it in float32.")
    norm = np.linalg.norm(first)
    if norm == 0:
        raise UserError("before: must not be all zeros (got zeros). Give another kernel.")
    size, moved = np.abs(first), np.abs(second - first)
    given = np.asarray(before).dtype
    rounding = np.finfo(given if given == np.float64 else np.float32).eps
    # An entry that is zero up to rounding has no relative change: it would dominate the mean.
    there = (size > rounding * size.max()) | (moved == 0)
    relative = moved[there] / np.where(size[there] > 0, size[there], 1)
    other = np.linalg.norm(second)
    return KernelChange(
        mean=float(relative.mean()),
        median=float(np.median(relative)),
        frobenius=float(np.linalg.norm(moved) / norm),
        alignment=float((first * second).sum() / (norm * other)) if other else 0.0,
        left_out=float(1 - there.mean()),
    )


class Drift(NamedTuple):
    """How a kernel moves along a trajectory of T parameter sets.

    Attributes:
      from_first: change of each kernel from the first, T entries.
      from_previous: change of each from the one before it, T - 1 entries.
    """

    from_first: tuple[KernelChange, ...]
    from_previous: tuple[KernelChange, ...]


def kernel_drift(kernel_fn: Callable[[Params], Any], trajectory: Iterable[Params]) -> Drift:
    """Return how the kernel moves along a trajectory.

    Three kernels and one parameter set are held at a time.

    Args:
      kernel_fn: `params -> K`, for example `lambda p: ntk(f, p, x)`.
      trajectory: parameter sets; may be a generator that reads checkpoints.

    Raises:
      UserError: if the trajectory is empty; or as `kernel_change`.
    """
    first: Any = None
    previous: Any = None
    from_first, from_previous = [], []
    for params in trajectory:
        kernel = np.asarray(kernel_fn(params))
        if first is None:
            first = kernel
        else:
            from_previous.append(kernel_change(previous, kernel))
        from_first.append(kernel_change(first, kernel))
        previous = kernel
    if not from_first:
        raise UserError("trajectory: is empty (got nothing). Give at least one parameter set.")
    return Drift(tuple(from_first), tuple(from_previous))


def _check_same_shapes(params: Params, other: Params) -> None:
    """Raise UserError if parameter sets differ in structure or shape, naming a path."""
    first, second = (
        {
            (leaf.path, leaf.layer): jnp.shape(leaf.value)
            for leaf in paths.flatten(tree)[0]
            if is_array(leaf.value)
        }
        for tree in (params, other)
    )
    for place in [*first, *second]:
        if first.get(place) != second.get(place):
            raise UserError(
                f"params: differ from the first ones at {place[0] or 'their root'} (got shape "
                f"{second.get(place)} and {first.get(place)}). Give two of the same model."
            )
