r"""Whether training behaves like a kernel: is the function linear on its way, do gradients stay?

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
from scipy import stats

from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.core.programs import held, is_array
from jaxlm.typing import Params, PRNGKey


def linearize(f: Callable[..., Array], params: Params) -> Callable[..., Array]:
    r"""The first-order Taylor expansion of a function in its parameters.

    $$f_{lin}(\theta', x) = f(\theta, x) + \langle \nabla_\theta f(\theta, x), \theta' - \theta
    \rangle$$

    Args:
        f: `f(params, x) -> array`.
        params: θ. Leaves that are no floats are the same in both.

    Returns:
        `f_lin(params, x)`, like f; one forward-mode pass beside f itself.

    References:
        Lee et al. 2019, arXiv:1902.06720.

    >>> f_lin = linearize(lambda params, x: params**2 * x, 3.0)
    >>> float(f_lin(4.0, 1.0))
    15.0
    """

    def f_lin(other: Params, x: Any) -> Array:
        value, tangent = value_and_tangent(f, params, other, x)
        return value + tangent

    return f_lin


def value_and_tangent(
    f: Callable[..., Array], params: Params, other: Params, x: Any
) -> tuple[Array, Array]:
    """f at `params` and its derivative along `other - params`, in one pass; see `linearize`.

    Raises:
        UserError: the parameter sets differ in structure or shape.
    """
    same_shapes(params, other)
    f, params = held(f, params)
    moved, fixed = paths.split(params, None)
    direction = jax.tree.map(
        lambda new, old: (new - old).astype(old.dtype),
        paths.split(held(f, other)[1], None)[0],
        moved,
    )
    return jax.jvp(lambda part: f(paths.merge(part, fixed), x), (moved,), (direction,))


def linearization_score(initial: float, final: float, linearized: float) -> float | None:
    r"""Share of the improvement by training that the linearized function recovers.

    $(a_{lin} - a_0) / (a_{FT} - a_0)$ of accuracies at θ_0, at θ_FT and of $f_{lin}(θ_{FT})$. The
    paper asks for more than one half.

    Returns:
        The share; None where training improved nothing, so that there is nothing to recover.

    >>> linearization_score(0.5, 0.9, 0.8)
    0.75
    """
    if not final > initial:
        return None
    return round((linearized - initial) / (final - initial), 12)


def gain_p_value(before: Any, after: Any) -> float:
    """The exact McNemar test, one-sided: could `after` be better than `before` by chance?

    Of the examples of which one is right and the other wrong, as many as there are or more would be
    gained with this probability if gains and losses were equally likely.

    Args:
        before, after: [N], whether each example is right.

    >>> gain_p_value([0, 0, 0, 0, 1], [1, 1, 1, 1, 1])
    0.0625
    """
    first, second = np.asarray(before, bool), np.asarray(after, bool)
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, alternative="greater").pvalue)


def random_move(params: Params, other: Params, key: PRNGKey) -> Params:
    """`params` moved as far as `other` is, leaf by leaf, but in random directions."""

    def move(key, first, second):
        z = jax.random.normal(key, jnp.shape(first), jnp.float32)
        length = jnp.linalg.norm(jnp.ravel(jnp.asarray(second, jnp.float32) - first))
        return (first + length * z / jnp.linalg.norm(jnp.ravel(z))).astype(second.dtype)

    return _leafwise(move, key, params, other)


def shuffled(params: Params, key: PRNGKey) -> Params:
    """The numbers of every leaf in another order: random features of the same scales."""

    def deal(key, leaf):
        return jax.random.permutation(key, jnp.ravel(leaf)).reshape(jnp.shape(leaf))

    return _leafwise(deal, key, params)


def _leafwise(function: Callable[..., Array], key: PRNGKey, *trees: Params) -> Params:
    """A function of a key and leaves, over the leaves that are floats."""
    moved, fixed = zip(*(paths.split(tree, None) for tree in trees), strict=True)
    leaves, structure = jax.tree.flatten(moved[0])
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))
    return paths.merge(jax.tree.map(function, keys, *moved), fixed[0])


class KernelChange(NamedTuple):
    r"""How far one kernel is from another.

    Attributes:
        mean: of $|K' - K| / |K|$ over entries, without those that move away from zero. The paper
            calls features fixed where this is below 2.
        median: of the same.
        frobenius: $\|K' - K\|_F / \|K\|_F$, which small entries do not blow up.
        alignment: $\langle K, K' \rangle / (\|K\|_F \|K'\|_F)$, which ignores scale.
        left_out: share of those that move away from zero: up to rounding, K is zero and K' not K.
    """

    mean: float
    median: float
    frobenius: float
    alignment: float
    left_out: float = 0.0


def kernel_change(before: Any, after: Any) -> KernelChange:
    """The change from one kernel to another of the same examples.

    Args:
        before: K at the first parameters, any shape.
        after: K' at others.

    Raises:
        UserError: the shapes differ, an entry is not finite, or `before` is zero.

    >>> kernel_change(np.array([[1.0, 2.0]]), np.array([[2.0, 2.0]])).mean
    0.5
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.shape != second.shape:
        raise UserError(
            f"the kernels have shapes {list(first.shape)} and {list(second.shape)}: compute both "
            "of the same examples."
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise UserError("a kernel has entries that are not finite: compute it in float32.")
    norm = np.linalg.norm(first)
    if norm == 0:
        raise UserError("the first kernel is zero: there is no relative change.")
    size, moved = np.abs(first), np.abs(second - first)
    given = np.asarray(before).dtype
    rounding = np.finfo(given if given == np.float64 else np.float32).eps
    # A zero, or what rounding made of one, has no relative change, and would be all of the mean.
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


def fixed_features(
    kernel_fn: Callable[[Params], Any], params: Params, other: Params
) -> KernelChange:
    """The change of the kernel between two parameter sets: the paper's test of fixed features.

    Args:
        kernel_fn: `params -> K`, for example `lambda p: ntk(f, p, x)`.
        params: at the beginning of training.
        other: at its end.

    Raises:
        UserError: see `kernel_change`; or the parameter sets differ in structure or shape.
    """
    same_shapes(params, other)
    return kernel_change(kernel_fn(params), kernel_fn(other))


class Drift(NamedTuple):
    """The kernel along a trajectory of T parameter sets.

    Attributes:
        from_first: change of each kernel from the first, T entries.
        from_previous: change of each from the one before it, T - 1 entries.
    """

    from_first: tuple[KernelChange, ...]
    from_previous: tuple[KernelChange, ...]


def kernel_drift(kernel_fn: Callable[[Params], Any], trajectory: Iterable[Params]) -> Drift:
    """How the kernel moves along a trajectory.

    Three kernels and one parameter set are held at a time.

    Args:
        kernel_fn: see `fixed_features`.
        trajectory: parameter sets; may be a generator that reads checkpoints.

    Raises:
        UserError: the trajectory is empty; or as `kernel_change`.
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
        raise UserError("the trajectory is empty: give at least one parameter set.")
    return Drift(tuple(from_first), tuple(from_previous))


def _arrays(tree: Params) -> list[paths.Leaf]:
    return [leaf for leaf in paths.flatten(tree)[0] if is_array(leaf.value)]


def same_shapes(params: Params, other: Params) -> None:
    """Raises UserError for parameter sets that differ in structure or shape, with a path."""
    first, second = (
        {(leaf.path, leaf.layer): jnp.shape(leaf.value) for leaf in _arrays(tree)}
        for tree in (params, other)
    )
    for place in [*first, *second]:
        shapes = [found.get(place) for found in (first, second)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"the parameter sets differ at {place[0] or 'their root'} (shapes {shapes[0]} and "
                f"{shapes[1]}): give two of the same model."
            )
