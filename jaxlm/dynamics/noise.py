"""The noise of gradients: its size relative to the gradient, measured during a run."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core.dtypes import wide, wide_dtype
from jaxlm.core.errors import UserError
from jaxlm.typing import Batch, LossFn, Params

__all__ = [
    "NoiseStats",
    "NoiseSums",
    "RunningNoise",
    "grad_noise_stats",
    "value_and_grad_with_noise",
]

TYPICAL_CLOSENESS = math.sqrt(2)


class NoiseStats(NamedTuple):
    r"""Squared size of the gradient, and the variance of its noise.

    Attributes:
        G: $\|\nabla L\|^2$, an unbiased estimate, which may be below 0 where noise is large.
        N: $\mathrm{tr}\,\Sigma$ of the gradient of one batch, an unbiased estimate.
    """

    G: Float[Array, ""]
    N: Float[Array, ""]

    @property
    def ratio(self) -> Float[Array, ""]:
        """N/G; infinite where G is not above 0."""
        positive = self.G > 0
        return jnp.where(positive, self.N / jnp.where(positive, self.G, 1), jnp.inf)

    def critical_batch_size(
        self, batch_size: float | int, closeness: float | int = TYPICAL_CLOSENESS
    ) -> Float[Array, ""]:
        r"""Return the batch size up to which the linear rule can hold, $(C^2 - 1)\, B N / G$.

        At equilibrium the squared norms of a scale-invariant model, trained by SGD and by its
        equation, have the ratio $(G + N) / N$. They are C-close only if $N / G \ge 1 / (C^2 - 1)$,
        and N falls as 1/B. G is assumed not to depend on B.

        Args:
            batch_size: B, the size of the batches that were measured.
            closeness: C, above 1; with the default the rule holds as long as N is at least G.

        References:
            Li, Malladi, Arora 2021, arXiv:2102.12470.
        """
        return (closeness**2 - 1) * batch_size * self.ratio


class NoiseSums(NamedTuple):
    """The sums that gradient accumulation keeps for `NoiseStats`: one gradient and two scalars.

    Attributes:
        batches: m, the number of gradients so far.
        gradient: their sum, in at least float32; divided by m, the gradient for the optimizer.
        square: the sum of their squared distances from their mean.
    """

    batches: Float[Array, ""]
    gradient: Params
    square: Float[Array, ""]

    @classmethod
    def zeros(cls, params: Params) -> "NoiseSums":
        """Return the sums before the first gradient."""
        zeros = jax.tree.map(
            lambda x: jnp.zeros(jnp.shape(x), wide_dtype(jnp.result_type(x))), params
        )
        return cls(jnp.zeros((), jnp.float32), zeros, _square(zeros))

    def add(self, grads: Params) -> "NoiseSums":
        """Return the sums with the gradient of one more batch, at the same parameters."""
        m = self.batches
        # Distances from the mean so far (Welford): a difference of squared norms would cancel if
        # the noise is small compared to the gradient.
        away = jax.tree.map(
            lambda total, g: (g - total / jnp.maximum(m, 1)).astype(total.dtype),
            self.gradient,
            grads,
        )
        total = jax.tree.map(lambda total, g: total + g, self.gradient, grads)
        return NoiseSums(m + 1, total, self.square + m / (m + 1) * _square(away))

    @property
    def stats(self) -> NoiseStats:
        r"""Estimates of G and N; NaN before the second gradient.

        $$\hat N = \frac1{m - 1} \sum_i \|g_i - \bar g\|^2, \qquad
        \hat G = \|\bar g\|^2 - \hat N / m$$
        """
        m = self.batches
        N = self.square / (m - 1)
        return NoiseStats(_square(self.gradient) / m**2 - N / m, N)


class RunningNoise(NamedTuple):
    """Weighted sums of G and N over the steps of a run, and that of the weights."""

    G: Float[Array, ""]
    N: Float[Array, ""]
    weight: Float[Array, ""]

    @classmethod
    def zeros(cls) -> "RunningNoise":
        """Return the averages before the first step."""
        return cls(*jnp.zeros(3, jnp.float32))

    def add(self, stats: NoiseStats, decay: float | int = 0.99) -> "RunningNoise":
        """Add a step; the weights of the steps before it are multiplied by `decay`."""
        # The sums keep their dtype, so that they can be the carry of a `lax.scan`.
        G, N = (
            jnp.asarray(decay * old + new, old.dtype)
            for old, new in ((self.G, stats.G), (self.N, stats.N))
        )
        return RunningNoise(G, N, decay * self.weight + 1)

    @property
    def stats(self) -> NoiseStats:
        """The averages; NaN before the first step."""
        return NoiseStats(self.G / self.weight, self.N / self.weight)


def grad_noise_stats(per_batch_grads: Params) -> NoiseStats:
    r"""Estimate G and N from the gradients of m batches at the same parameters.

    See `NoiseSums.stats` for the formula. In a run, m is the number of micro-batches or workers, or
    2 for SVAG. The estimate of a single step is noisy: average over steps with `RunningNoise`. To
    avoid the memory of m gradients, add them one at a time to `NoiseSums`, as
    `value_and_grad_with_noise` does.

    Args:
        per_batch_grads: leaves [m, ...], of m >= 2 batches drawn independently.

    References:
        Li, Malladi, Arora 2021, arXiv:2102.12470.

    >>> stats = grad_noise_stats({"w": jnp.array([[3.0, 1.0], [1.0, 1.0]])})
    >>> float(stats.G), float(stats.N), float(stats.critical_batch_size(8))
    (4.0, 2.0, 4.0)
    """
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(per_batch_grads)}
    m = next(iter(counts))[0] if len(counts) == 1 and counts != {()} else 0
    if m < 2:
        axes = sorted(count[0] if count else 0 for count in counts)
        raise UserError(
            "per_batch_grads: must have a common leading axis of at least 2 gradients (got axes of "
            f"{axes}). Stack the gradients of two or more batches."
        )
    total = jax.tree.map(lambda g: wide(g).sum(0), per_batch_grads)
    away = jax.tree.map(lambda g, total: g - (total / m)[None], per_batch_grads, total)
    return NoiseSums(jnp.asarray(m, jnp.float32), total, _square(away)).stats


def value_and_grad_with_noise(loss_fn: LossFn, *, has_aux: bool = False) -> Callable[..., Any]:
    """Return a function that accumulates the gradient of m micro-batches and measures its noise.

    In addition to gradient accumulation this costs two norms. Memory: two gradients.

    Args:
        loss_fn: `(params, batch, *rest) -> loss`, or `(loss, aux)` with `has_aux`.
        has_aux: as in `jax.value_and_grad`.

    Returns:
        `fn(params, batches, *rest, key=None, **options)`, with leaves of `batches` [m, B, ...],
        that returns `((loss, stats), grads)`: means over the micro-batches, and the `NoiseStats` of
        one of them, of size B; or `((loss, stats, aux), grads)` with leaves of `aux` [m, ...]. A
        key is split among the micro-batches.

    >>> fn = value_and_grad_with_noise(lambda w, x: jnp.mean(w * x))
    >>> (loss, stats), grad = fn(2.0, jnp.array([[1.0, 3.0], [4.0, 4.0]]))
    >>> float(loss), float(stats.G), float(stats.N), float(grad)
    (6.0, 8.0, 2.0, 3.0)
    """

    def value_and_grad(
        params: Params, batches: Batch, *rest: Any, key: Any = None, **options: Any
    ) -> Any:
        m = len(jax.tree.leaves(batches)[0])
        keys = None if key is None else jax.random.split(key, m)

        def add(sums, part):
            batch, own_key = part
            given = options if own_key is None else {**options, "key": own_key}
            value, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(
                params, batch, *rest, **given
            )
            return sums.add(grads), value if has_aux else (value, None)

        sums, (losses, aux) = jax.lax.scan(add, NoiseSums.zeros(params), (batches, keys))
        grads = jax.tree.map(
            lambda total, leaf: (total / m).astype(jnp.result_type(leaf)), sums.gradient, params
        )
        value = losses.mean(), sums.stats
        return ((*value, aux) if has_aux else value), grads

    return value_and_grad


def _square(tree: Params) -> Float[Array, ""]:
    """Return the squared norm of all leaves together."""
    return sum(
        (jnp.square(wide(leaf)).sum() for leaf in jax.tree.leaves(tree)),
        start=jnp.zeros((), jnp.float32),
    )
