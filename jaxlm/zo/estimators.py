"""Gradient estimates from forward passes alone.

Simultaneous perturbation measures the slope of a loss along random directions z_j:

    g_j = (L(θ + ε z_j) - L(θ - ε z_j)) / 2ε,        ∇L ≈ 1/n Σ_j g_j z_j.

`spsa` draws the directions and passes them to an estimator, which measures the slopes g_j. An
estimator is a function `(measurement, eps, previous) -> Slopes` under the decorator `estimator`,
which states how many forward passes it takes. `central` is the formula above; `one_sided`,
`forward_gradient`, `residual_feedback` and `population` are the others. An estimate is n scalars
and a key; the directions are never stored.

A loss with a keyword `view` reads `W + ε z` one layer at a time and needs the memory of inference.
A loss without it is called on a perturbed copy of the parameters, one copy at a time.

References: Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient
approximation", 1992; Malladi et al., "Fine-Tuning Language Models with Just Forward Passes",
arXiv:2305.17333.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from jaxlm.core import paths
from jaxlm.core.checks import integer
from jaxlm.core.errors import UserError
from jaxlm.zo.checks import real
from jaxlm.zo.perturbation import Directions, Measurement, directions, width
from jaxlm.zo.samplers import Gaussian, Sampler
from jaxlm.zo.sites import over_blocks


class Slopes(NamedTuple):
    """The result of an estimator; `loss` is its value of the loss, `aux` the mean of the outputs.

    `plus` are losses at θ + ε z_j; `minus`, the losses that they are compared with.
    """

    loss: Float[Array, ""]
    plus: Float[Array, "n"]
    minus: Float[Array, "n"]
    projected_grad: Float[Array, "n"]
    aux: Any


class Previous(NamedTuple):
    """Losses of the last step at θ + ε z_j; they are undefined where `known` is False."""

    plus: Float[Array, "n"]
    known: Bool[Array, "n"]

    @classmethod
    def none(cls, num_directions: int, dtype: Any) -> "Previous":
        """The value before the first step."""
        return cls(jnp.zeros(num_directions, dtype), jnp.zeros(num_directions, bool))

    def after(self, plus: Float[Array, "n"], slope: Float[Array, "n"]) -> "Previous":
        """Replace the losses by those of a new step where they and their slopes are finite."""
        good = jnp.isfinite(plus) & jnp.isfinite(slope)
        kept = jnp.where(good, plus.astype(self.plus.dtype), self.plus)
        return Previous(kept, self.known | good)


Estimator = Callable[[Measurement, Float[Array, ""], Previous], Slopes]
"""`estimator(measurement, eps, previous) -> Slopes`, with an attribute `forwards`."""

Function = TypeVar("Function", bound=Callable[..., Slopes])


def estimator(forwards: Callable[[int], int]) -> Callable[[Function], Function]:
    """Decorate an estimator with its cost.

    Args:
      forwards: number of directions -> number of forward passes; a forward-mode pass counts twice.
    """

    def decorate(function):
        function.forwards = forwards
        return function

    return decorate


def forward_passes(estimator: Estimator, num_directions: int) -> int:
    """Return the number of forward passes of one estimate, which the estimator states."""
    count = getattr(estimator, "forwards", None)
    if count is None:
        name = getattr(estimator, "__name__", type(estimator).__name__)
        raise UserError(
            f"estimator: has no attribute `forwards` (got {name}). Decorate it with "
            "zo.estimator(lambda n: NUMBER_OF_FORWARD_PASSES)."
        )
    return count(num_directions)


def _mean(aux, axes):
    wide = jax.tree.map(lambda x: x.astype(jnp.result_type(x, jnp.float32)), aux)
    return jax.tree.map(lambda x: x.mean(axes), wide)


@estimator(lambda n: 2 * n)
def central(measurement: Measurement, eps: Array, previous: Previous) -> Slopes:
    """`g_j = (L(θ + ε z_j) - L(θ - ε z_j)) / 2ε`: 2n forward passes, error O(ε²)."""
    del previous
    scales = jnp.stack([eps, -eps])
    losses, aux = measurement.along(scales)
    plus, minus = losses[:, 0], losses[:, 1]
    slope = (plus - minus) / (scales[0] - scales[1])
    return Slopes(losses.mean(), plus, minus, slope, _mean(aux, (0, 1)))


@estimator(lambda n: n + 1)
def one_sided(measurement: Measurement, eps: Array, previous: Previous) -> Slopes:
    """`g_j = (L(θ + ε z_j) - L(θ)) / ε`: n + 1 forward passes, error O(ε); `minus` is L(θ)."""
    del previous
    loss, aux = measurement.loss()
    losses, _ = measurement.along(eps[None])
    plus = losses[:, 0]
    return Slopes(loss, plus, jnp.full_like(plus, loss), (plus - loss) / eps, _mean(aux, ()))


@estimator(lambda n: 2 * n)
def forward_gradient(measurement: Measurement, eps: Array, previous: Previous) -> Slopes:
    """`g_j = z_j·∇L(θ)` exactly, by forward-mode differentiation; ε is not used.

    One pass carries values and derivatives, at 1.5 times the products of two forward passes.

    References: Baydin et al., "Gradients without Backpropagation", arXiv:2202.08587.
    """
    del eps, previous
    losses, slopes, aux = measurement.slopes()
    return Slopes(losses.mean(), losses, losses, slopes, _mean(aux, 0))


@estimator(lambda n: n)
def residual_feedback(measurement: Measurement, eps: Array, previous: Previous) -> Slopes:
    """`g_j = (L_t(θ_t + ε z_t) - L_{t-1}(θ_{t-1} + ε z_{t-1})) / ε`: n forward passes.

    The second loss is that of the previous step, on its own batch; the first step moves nothing.

    References: arXiv:2305.17333, definition 8 (the printed formula omits z).
    """
    losses, aux = measurement.along(eps[None])
    plus = losses[:, 0]
    before = jnp.where(previous.known, previous.plus.astype(plus.dtype), plus)
    return Slopes(plus.mean(), plus, before, (plus - before) / eps, _mean(aux, (0, 1)))


@estimator(lambda n: n)
def population(measurement: Measurement, eps: Array, previous: Previous) -> Slopes:
    """`g_j = (L(θ + ε z_j) - mean) / std` over the n members: evolution strategies.

    The slopes have no unit, so the loss may be any negative reward; n must be at least 2.

    References: Qiu et al., "Evolution Strategies at Scale", arXiv:2509.24372.
    """
    del previous
    losses, aux = measurement.along(eps[None])
    plus = losses[:, 0]
    score = standardized(plus)
    return Slopes(plus.mean(), plus, plus, score, _mean(aux, (0, 1)))


def standardized(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """`(x - mean) / std` of the finite values, NaN for the others; 0 if all are equal."""
    known = jnp.isfinite(x)
    mean, spread = x.mean(where=known), x.std(where=known)
    score = jnp.where(spread > 0, (x - mean) / jnp.where(spread > 0, spread, 1), 0)
    return jnp.where(known, score, jnp.nan)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SPSAEstimate:
    """A gradient estimate as n scalars and a key; `materialize` turns it into a gradient.

    Attributes:
      loss: the loss; for `central`, the mean of all 2n evaluations.
      loss_plus: [n], losses at θ + ε z_j.
      loss_minus: [n], losses that `loss_plus` is compared with: for `central`, at θ - ε z_j.
      projected_grad: [n], g_j.
      key: typed key of all n directions.
      aux: the mean of the auxiliary outputs over the evaluations; None if there are none.
      sampler: distribution of the directions.
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
        """The directions z_j, which are drawn where they are read."""
        count = self.projected_grad.shape[0]
        return directions(self.key, self.sampler, params, self.select, count)


def check(eps: float | Array, num_directions: int, mesh: Mesh | None = None) -> None:
    """Raise UserError for an ε or a number of directions that `spsa` cannot use."""
    real("eps", eps, above=0.0)
    integer("num_directions", num_directions)
    if mesh is not None and num_directions % mesh.shape["data"]:
        raise UserError(
            f"num_directions: must be a multiple of the {mesh.shape['data']} devices on the mesh "
            f"axis data (got {num_directions}). Give a multiple."
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
    """Estimate the gradient of a loss from its slopes along random directions.

    Memory, with P the size of the parameters: P plus one layer and its noise if `loss_fn` has a
    keyword `view`; 2P if it has none, or with `materialize_params=True`.

    Args:
      loss_fn: `loss_fn(params, *args, [key], [view]) -> loss` or `(loss, aux)`, a scalar loss. If
        it has a free parameter `key`, all evaluations of the estimate receive the same key.
      params: any pytree. Arrays of real floats are perturbed; all other leaves stay fixed.
      *args: further arguments of `loss_fn`, usually one batch.
      key: typed PRNG key of this estimate.
      eps: ε, in the units of the parameters.
      sampler: distribution of z.
      num_directions: n. With a view, directions of factored samplers share a pass; others run one
        after another.
      select: a regular expression or predicate on paths; other parameters stay fixed.
      estimator: how slopes are measured.
      previous: `loss_plus` of the previous step, for `residual_feedback`.
      materialize_params: perturb a copy of the parameters even if `loss_fn` has a keyword `view`.
      mesh: spread the directions over its axis `data`, whose size must divide n. Each device
        measures its own directions on the whole batch, and the devices exchange n losses.

    Returns:
      The estimate, as scalars.

    Raises:
      UserError: if a number is out of range, `select` matches nothing, two parameters have the
        same path, the sampler does not fit the parameters, or the loss is not one float.

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
    """Return the gradient estimate `1/n Σ_j g_j z_j` as a pytree like `params`.

    The sum is computed in at least float32 and rounded once to the dtype of each parameter.
    Parameters that were not perturbed get zeros, and leaves that are not numbers get None. Use it
    for optimizers that need a gradient in memory; those of `jaxlm.zo` update in place without it.
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
    """A drop-in replacement for `jax.value_and_grad` that uses forward passes alone.

    Args:
      loss_fn: see `spsa`.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      eps: ε.
      sampler: distribution of z.
      num_directions: n.
      select: parameters to perturb.
      estimator: how slopes are measured.
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
