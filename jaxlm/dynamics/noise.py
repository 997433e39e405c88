"""Noise of gradients: how large it is beside the gradient, and oracles whose noise is known."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core import paths, prng
from jaxlm.core.errors import UserError
from jaxlm.typing import Batch, LossFn, Params, PRNGKey

TYPICAL_CLOSENESS = math.sqrt(2)


class NoiseStats(NamedTuple):
    r"""Size of the gradient and of its noise, in squared units of the loss over the parameters.

    Attributes:
        G: $\|\nabla L\|^2$, an unbiased estimate, which may fall below 0 where noise is large.
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
        r"""The batch size up to which the linear scaling rule can hold, $(C^2 - 1)\, B N / G$.

        At equilibrium a scale-invariant model of SGD and that of its equation have squared norms in
        the ratio $(G + N) / N$; both are C-close only where $N / G \ge 1 / (C^2 - 1)$, and N falls
        as 1/B. G is taken to stay as it was measured.

        Args:
            batch_size: B, of the batches that were measured.
            closeness: C, above 1; with the default the rule ends where N falls to G.

        References:
            Li, Malladi, Arora 2021, arXiv:2102.12470.
        """
        return (closeness**2 - 1) * batch_size * self.ratio


class NoiseSums(NamedTuple):
    """What an accumulation of gradients needs to keep for `NoiseStats`: one gradient, two scalars.

    Attributes:
        batches: m, gradients so far.
        gradient: their sum, at least in float32; divided by m, the gradient for the optimizer.
        square: sum of their squared distances from their mean.
    """

    batches: Float[Array, ""]
    gradient: Params
    square: Float[Array, ""]

    @classmethod
    def zeros(cls, params: Params) -> "NoiseSums":
        """Before the first gradient."""
        none = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), _wide(x)), params)
        return cls(jnp.zeros((), jnp.float32), none, _square(none))

    def add(self, grads: Params) -> "NoiseSums":
        """With the gradient of one more batch, at the same parameters."""
        m = self.batches
        # Distances from the mean so far (Welford): a difference of squared norms would lose the
        # noise where it is small beside the gradient.
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
    """Averages of G and N over the steps of a run, each taken before their ratio.

    Attributes:
        G, N: weighted sums.
        weight: sum of the weights.
    """

    G: Float[Array, ""]
    N: Float[Array, ""]
    weight: Float[Array, ""]

    @classmethod
    def zeros(cls) -> "RunningNoise":
        """Before the first step."""
        return cls(*jnp.zeros(3, jnp.float32))

    def add(self, stats: NoiseStats, decay: float | int = 0.99) -> "RunningNoise":
        """With one more step; those before it count `decay` times what they did."""
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
    r"""G and N from the gradients of m batches at the same parameters; see `NoiseSums.stats`.

    In a run, m is the number of micro-batches, of workers, or of SVAG's two halves. One step says
    little then: average over steps by `RunningNoise`. To spare the memory of m gradients, add them
    one at a time to `NoiseSums`, as `value_and_grad_with_noise` does.

    Args:
        per_batch_grads: leaves [m, ...], of batches drawn independently.

    Raises:
        UserError: there are not at least two gradients.

    References:
        Li, Malladi, Arora 2021, arXiv:2102.12470.

    >>> stats = grad_noise_stats({"w": jnp.array([[3.0, 1.0], [1.0, 1.0]])})
    >>> float(stats.G), float(stats.N), float(stats.critical_batch_size(8))
    (4.0, 2.0, 4.0)
    """
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(per_batch_grads)}
    m = next(iter(counts))[0] if len(counts) == 1 and counts != {()} else 0
    if m < 2:
        raise UserError(
            "per_batch_grads has leaves without a common leading axis of 2 or more gradients; "
            "stack the gradients of at least two batches"
        )
    total = jax.tree.map(lambda g: g.astype(_wide(g)).sum(0), per_batch_grads)
    away = jax.tree.map(lambda g, total: g - (total / m)[None], per_batch_grads, total)
    return NoiseSums(jnp.asarray(m, jnp.float32), total, _square(away)).stats


def value_and_grad_with_noise(loss_fn: LossFn, *, has_aux: bool = False) -> Callable[..., Any]:
    """Gradient of m micro-batches, one after another, with G and N beside it.

    A step of a run that accumulates gradients, and pays nothing but two norms for knowing its
    noise. Memory: two gradients.

    Args:
        loss_fn: `(params, batch, *rest) -> loss`, or `(loss, aux)` with `has_aux`.
        has_aux: as in `jax.value_and_grad`.

    Returns:
        `fn(params, batches, *rest, key=None, **options)`, with leaves of `batches` [m, B, ...],
        that returns `((loss, stats), grads)`: means over the micro-batches, and the `NoiseStats` of
        one of them, of size B; or `((loss, stats, aux), grads)` with leaves of `aux` [m, ...]. Each
        micro-batch has its own key.

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

        def add(sums: NoiseSums, one: Any) -> tuple[NoiseSums, Any]:
            batch, own_key = one
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


def gaussian_example_weights(key: PRNGKey, n: int, batch_size: float | int) -> Float[Array, " n"]:
    r"""Weights of examples under which the full gradient has Gaussian noise of a batch of B.

    $$d_i = 1 + \sqrt{n / B}\,(\xi_i - \bar\xi), \qquad \xi_i \sim N(0, 1)$$

    The gradient of $\frac1n \sum_i d_i L_i$ is the full gradient plus noise of distribution $N(0,
    \Sigma_1 / B)$, where $\Sigma_1$ is the covariance of gradients over the n examples: that of a
    batch drawn with replacement, Gaussian instead of its own shape. One weighted pass over all
    examples, and no root of a matrix.

    Args:
        key: draw anew for each step.
        n: size of the data set.
        batch_size: B.

    Returns:
        float32, of mean 1.

    Raises:
        UserError: n or the batch size is below 1.

    References:
        Li, Malladi, Arora 2021, arXiv:2102.12470 (noisy gradient descent).

    >>> gaussian_example_weights(jax.random.key(0), 4, 2).shape
    (4,)
    """
    if n < 1 or batch_size < 1:
        raise UserError(
            f"n={n} examples in batches of {batch_size:g} make no noise; give both from 1"
        )
    xi = jax.random.normal(key, (n,), jnp.float32)
    return 1 + math.sqrt(n / batch_size) * (xi - xi.mean())


def ngos(
    grad_fn: Callable[[Params], Params],
    sqrt_cov_fn: Callable[[Params], Any],
    sigma: float | int,
    *,
    draw: Callable[..., Array] = jax.random.normal,
) -> Callable[[PRNGKey, Params], Params]:
    r"""A noisy gradient oracle with a scale parameter.

    $$g = \nabla f(x) + \sigma\, \Sigma(x)^{1/2} z$$

    A batch k times as large has $\sigma / \sqrt k$.

    Args:
        grad_fn: `x -> ∇f(x)`.
        sqrt_cov_fn: `x -> Σ(x)^(1/2)`: a pytree like x, the diagonal, or for x of shape [d] a
            matrix [d, r].
        sigma: σ.
        draw: `(key, shape, dtype) -> z` of mean 0 and variance 1; `jax.random.rademacher` for noise
            that is not Gaussian.

    Returns:
        `oracle(key, x) -> g`, like x.

    References:
        Malladi et al. 2022, arXiv:2205.10287.

    >>> oracle = ngos(lambda x: 2 * x, jnp.ones_like, 0.0)
    >>> oracle(jax.random.key(0), jnp.ones(2)).tolist()
    [2.0, 2.0]
    """

    def oracle(key: PRNGKey, x: Params) -> Params:
        def noisy(leaf: paths.Leaf, gradient: Array, root: Any) -> Array:
            leaf_key = prng.leaf_key(key, leaf.path, leaf.layer)
            shape = jnp.shape(leaf.value)
            if jnp.ndim(root) == 2 and len(shape) == 1:
                z = draw(leaf_key, jnp.shape(root)[1:], _wide(root))
                noise = jnp.matmul(root, z, precision=jax.lax.Precision.HIGHEST)
            else:
                noise = root * draw(leaf_key, shape, _wide(leaf.value))
            return (gradient + sigma * noise).astype(gradient.dtype)

        return paths.map_with_path(noisy, x, grad_fn(x), sqrt_cov_fn(x))

    return oracle


def _wide(x: Any) -> Any:
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def _square(tree: Params) -> Float[Array, ""]:
    """Squared norm of all leaves together."""
    return sum(
        (jnp.square(leaf.astype(_wide(leaf))).sum() for leaf in jax.tree.leaves(tree)),
        start=jnp.zeros((), jnp.float32),
    )
