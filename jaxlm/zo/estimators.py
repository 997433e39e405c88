"""Gradients from forward passes alone.

Simultaneous perturbation measures the slope of a loss along random directions z_j:

    g_j = (L(θ + ε z_j) - L(θ - ε z_j)) / 2ε,        ∇L ≈ 1/n Σ_j g_j z_j.

`spsa` draws the directions and hands them to an estimator, which measures g_j: `central` as above,
or `one_sided`, `forward_gradient`, `residual_feedback`, `population`. The result is n scalars and a
key; the directions are never stored.

An objective with a keyword `view` sees `W + ε z` one layer at a time and needs the memory of
inference; one without is called on a perturbed copy of the parameters, one copy alive at a time.

References: Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient
approximation", 1992; Malladi et al., "Fine-Tuning Language Models with Just Forward Passes",
arXiv:2305.17333.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from jaxlm.core import paths
from jaxlm.zo.perturbation import Directions, Measurement, directions, is_traced, width
from jaxlm.zo.samplers import Gaussian, Sampler
from jaxlm.zo.sites import over_blocks


class Slopes(NamedTuple):
    """What an estimator finds.

    Attributes:
      loss: the loss, as this estimator knows it.
      plus: [n], losses at θ + ε z_j.
      minus: [n], losses that they are compared with.
      projected_grad: [n], g_j.
      aux: what the objective returned beside the loss, averaged; or None.
    """

    loss: Float[Array, ""]
    plus: Float[Array, "n"]
    minus: Float[Array, "n"]
    projected_grad: Float[Array, "n"]
    aux: Any


class Previous(NamedTuple):
    """What an estimator knows of the step before.

    Attributes:
      plus: [n], its losses at θ + ε z_j.
      known: [n], where there are such losses; elsewhere `plus` means nothing.
    """

    plus: Float[Array, "n"]
    known: Bool[Array, "n"]

    @classmethod
    def none(cls, num_directions: int, dtype: Any) -> "Previous":
        """Before the first step."""
        return cls(jnp.zeros(num_directions, dtype), jnp.zeros(num_directions, bool))

    def after(self, plus: Float[Array, "n"], slope: Float[Array, "n"]) -> "Previous":
        """With the losses of one more step, where they and their slopes are finite."""
        good = jnp.isfinite(plus) & jnp.isfinite(slope)
        kept = jnp.where(good, plus.astype(self.plus.dtype), self.plus)
        return Previous(kept, self.known | good)


Estimator = Callable[[Measurement, Float[Array, ""], Previous], Slopes]
"""`estimator(measurement, eps, previous) -> Slopes`."""


def _mean(aux, axes):
    wide = jax.tree.map(lambda x: x.astype(jnp.result_type(x, jnp.float32)), aux)
    return jax.tree.map(lambda x: x.mean(axes), wide)


def central(measurement: Measurement, eps: Array, previous: Previous) -> Slopes:
    """`g_j = (L(θ + ε z_j) - L(θ - ε z_j)) / 2ε`: two forward passes, error O(ε²)."""
    del previous
    scales = jnp.stack([eps, -eps])
    losses, aux = measurement.along(scales)
    plus, minus = losses[:, 0], losses[:, 1]
    slope = (plus - minus) / (scales[0] - scales[1])
    return Slopes(losses.mean(), plus, minus, slope, _mean(aux, (0, 1)))


def one_sided(measurement: Measurement, eps: Array, previous: Previous) -> Slopes:
    """`g_j = (L(θ + ε z_j) - L(θ)) / ε`: n + 1 forward passes, error O(ε); `minus` is L(θ)."""
    del previous
    loss, aux = measurement.loss()
    losses, _ = measurement.along(eps[None])
    plus = losses[:, 0]
    return Slopes(loss, plus, jnp.full_like(plus, loss), (plus - loss) / eps, _mean(aux, ()))


def forward_gradient(measurement: Measurement, eps: Array, previous: Previous) -> Slopes:
    """`g_j = z_j·∇L(θ)` exactly, by forward-mode differentiation; ε is not used.

    One pass that carries values and derivatives, 1.5 times the products of two forward passes.

    References: Baydin et al., "Gradients without Backpropagation", arXiv:2202.08587.
    """
    del eps, previous
    losses, slopes, aux = measurement.slopes()
    return Slopes(losses.mean(), losses, losses, slopes, _mean(aux, 0))


def residual_feedback(measurement: Measurement, eps: Array, previous: Previous) -> Slopes:
    """`g_j = (L_t(θ_t + ε z_t) - L_{t-1}(θ_{t-1} + ε z_{t-1})) / ε`: one forward pass.

    The other loss is that of the step before, on its own batch; the first step moves nothing.

    References: arXiv:2305.17333, definition 8 (where z is left out in print).
    """
    losses, aux = measurement.along(eps[None])
    plus = losses[:, 0]
    before = jnp.where(previous.known, previous.plus.astype(plus.dtype), plus)
    return Slopes(plus.mean(), plus, before, (plus - before) / eps, _mean(aux, (0, 1)))


def population(measurement: Measurement, eps: Array, previous: Previous) -> Slopes:
    """`g_j = (L(θ + ε z_j) - mean) / std` over the n members: evolution strategies.

    The slopes have no unit, so a loss may be any negative reward; n is 2 or more.

    References: Qiu et al., "Evolution Strategies at Scale", arXiv:2509.24372.
    """
    del previous
    losses, aux = measurement.along(eps[None])
    plus = losses[:, 0]
    score = standardized(plus)
    return Slopes(plus.mean(), plus, plus, score, _mean(aux, (0, 1)))


def standardized(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """`(x - mean) / std` of what is finite, NaN for the rest; 0 where all are equal."""
    known = jnp.isfinite(x)
    mean, spread = x.mean(where=known), x.std(where=known)
    score = jnp.where(spread > 0, (x - mean) / jnp.where(spread > 0, spread, 1), 0)
    return jnp.where(known, score, jnp.nan)


FORWARDS: dict[Estimator, Callable[[int], int]] = {
    central: lambda n: 2 * n,
    one_sided: lambda n: n + 1,
    forward_gradient: lambda n: 2 * n,
    residual_feedback: lambda n: n,
    population: lambda n: n,
}
"""Forward passes of an estimate of n directions; a forward-mode pass is counted as two."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SPSAEstimate:
    """A gradient estimate as n scalars and a key; `materialize` makes the gradient of it.

    Attributes:
      loss: the loss; of `central`, the mean over all 2n evaluations.
      loss_plus: [n], at θ + ε z_j.
      loss_minus: [n], what they are compared with: the losses at θ - ε z_j, or as the estimator
        says.
      projected_grad: [n], g_j.
      key: typed key of all n directions.
      aux: what the objective returned beside the loss, averaged over the evaluations; or None.
      sampler: of the directions.
      eps: ε.
      select: parameters that were perturbed.
    """

    loss: Float[Array, ""]
    loss_plus: Float[Array, "n"]
    loss_minus: Float[Array, "n"]
    projected_grad: Float[Array, "n"]
    key: Array
    aux: Any
    sampler: Sampler
    eps: float | Array
    select: paths.Select = dataclasses.field(default=None, metadata={"static": True})

    def directions(self, params: Any) -> Directions:
        """The z_j, drawn where they are asked for."""
        count = self.projected_grad.shape[0]
        return directions(self.key, self.sampler, params, self.select, count)


def check(eps: float | Array, num_directions: int, mesh: Mesh | None = None) -> None:
    """Raises ValueError for an ε that is not positive, no direction, or too few for a mesh."""
    if not is_traced(eps) and not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive, not {eps}")
    if isinstance(num_directions, bool) or not isinstance(num_directions, int | np.integer):
        raise ValueError(f"num_directions must be a whole number, not {num_directions}")
    if num_directions < 1:
        raise ValueError(f"num_directions must be at least 1, not {num_directions}")
    if mesh is not None and num_directions % mesh.shape["data"]:
        raise ValueError(
            f"num_directions is {num_directions}: give a multiple of the {mesh.shape['data']} "
            "devices on the axis data"
        )


def spsa(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    key: Array,
    eps: float | Array = 1e-3,
    sampler: Sampler = Gaussian(),
    num_directions: int = 1,
    select: paths.Select = None,
    estimator: Estimator = central,
    previous: Previous | Float[Array, "n"] | None = None,
    materialize_params: bool = False,
    mesh: Mesh | None = None,
) -> SPSAEstimate:
    """Estimates the gradient of a loss by its slopes along random directions.

    Memory, with P the parameters: P plus one layer and its noise if `loss_fn` has a keyword `view`;
    2P if it has none, or with `materialize_params=True`.

    Args:
      loss_fn: `loss_fn(params, *args, [key], [view]) -> loss` or `(loss, aux)`, a scalar loss.
        `key` is passed if it is among the parameters and not bound, the same for all evaluations
        of the estimate.
      params: any pytree. Arrays of real floats move; whatever else is in it is held fixed.
      *args: what `loss_fn` takes besides, usually one batch.
      key: typed PRNG key of this estimate.
      eps: ε, in the units of the parameters.
      sampler: distribution of z.
      num_directions: n. With a view, directions of factored samplers run in one pass; others run
        one after another.
      select: a regular expression or predicate on paths; other parameters stay where they are.
      estimator: how the slopes are measured.
      previous: `loss_plus` of the step before, for `residual_feedback`.
      materialize_params: perturb a copy of the parameters even if `loss_fn` has a keyword `view`.
      mesh: spreads the directions over its axis `data`: each device measures its own on the whole
        batch, and n losses are all that the devices exchange. n is a multiple of the axis.

    Returns:
      The estimate, as scalars.

    Raises:
      ValueError: if eps is not positive, there is no direction, `mesh` does not divide them,
        `select` takes nothing, two parameters have one path, the sampler does not fit the
        parameters, or the loss is not one float.

    >>> loss = lambda params: (params["w"] ** 2).sum()
    >>> est = spsa(loss, {"w": jnp.ones(3)}, key=jax.random.key(0))
    >>> est.projected_grad.shape
    (1,)
    """
    check(eps, num_directions, mesh)
    paths.check_unique_hashes(params)
    paths.mask(params, select)
    sampler.check(params, select)
    drawn = directions(key, sampler, params, select, num_directions)
    measurement = Measurement(loss_fn, params, args, drawn, select, materialize_params, mesh)
    dtype = width(params, select)
    if previous is None:
        previous = Previous.none(num_directions, dtype)
    elif not isinstance(previous, Previous):
        previous = Previous(previous, jnp.isfinite(previous))
    slopes = estimator(measurement, jnp.asarray(eps, dtype), previous)
    return SPSAEstimate(
        loss=slopes.loss,
        loss_plus=slopes.plus,
        loss_minus=slopes.minus,
        projected_grad=slopes.projected_grad,
        key=key,
        aux=slopes.aux,
        sampler=sampler,
        eps=eps,
        select=select,
    )


def materialize(est: SPSAEstimate, params: Any) -> Any:
    """Returns the gradient estimate `1/n Σ_j g_j z_j` as a pytree like `params`.

    Summed in at least float32 and rounded once to the dtype of each parameter. What the estimate
    did not perturb gets zeros, None where it is no number. For optimizers that need a gradient in
    memory; those of `jaxlm.zo` update in place without it.
    """
    takes, drawn = paths.leaf_predicate(est.select), est.directions(params)
    dtype = width(params, est.select)
    coefficients = est.projected_grad.astype(dtype) / drawn.count

    def gradient(leaf):
        if not takes(leaf.path, leaf.value):
            number = hasattr(leaf.value, "dtype") or isinstance(leaf.value, int | float | complex)
            return jnp.zeros_like(leaf.value) if number else None

        def block(site):
            return drawn.combine(coefficients, site).astype(site.value.dtype), jnp.zeros(())

        return over_blocks(block, leaf)[0]

    return paths.map_with_path(gradient, params)


def value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    eps: float | Array = 1e-3,
    sampler: Sampler = Gaussian(),
    num_directions: int = 1,
    select: paths.Select = None,
    estimator: Estimator = central,
    materialize_params: bool = False,
    mesh: Mesh | None = None,
) -> Callable[..., Any]:
    """A drop-in for `jax.value_and_grad` that uses forward passes alone.

    Args:
      loss_fn: see `spsa`.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      eps: ε.
      sampler: distribution of z.
      num_directions: n.
      select: parameters that are perturbed.
      estimator: how the slopes are measured.
      materialize_params: see `spsa`.
      mesh: see `spsa`.

    Returns:
      `f(params, *args, key) -> (loss, grads)`, or `((loss, aux), grads)` with `has_aux`, where
      `grads` is like `params`.
    """

    def function(params, *args, key):
        est = spsa(
            loss_fn,
            params,
            *args,
            key=key,
            eps=eps,
            sampler=sampler,
            num_directions=num_directions,
            select=select,
            estimator=estimator,
            materialize_params=materialize_params,
            mesh=mesh,
        )
        return ((est.loss, est.aux) if has_aux else est.loss), materialize(est, params)

    return function
