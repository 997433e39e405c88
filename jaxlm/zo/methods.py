"""MeZO and its successors by name: combinations of estimator, sampler and update rule.

To add a method, write a function with its whole signature here; a line in
`jaxlm.train.zeroth_order` gives it a name in configurations. The arguments that all methods share,
from `eps` to `mesh`, are documented at `mezo`.
"""

from typing import NamedTuple

from jax.sharding import Mesh
from jaxtyping import Array

from jaxlm.core import paths
from jaxlm.core.checks import integer
from jaxlm.zo import factored, rules
from jaxlm.zo.checks import MOST_COPIES
from jaxlm.zo.estimators import one_sided
from jaxlm.zo.optimizers import (
    Rounding,
    ScalarOrSchedule,
    ZerothOrderOptimizer,
    no_bias_or_norm,
    zeroth_order,
)
from jaxlm.zo.samplers import Gaussian, Rademacher, Sampler
from jaxlm.zo.structured import low_rank, subspace

GAUSSIAN = Gaussian()
SIGNS = Rademacher()


class Shared(NamedTuple):
    """The arguments that all methods share, see `mezo`."""

    eps: float | Array
    num_directions: int
    sampler: Sampler
    weight_decay: float | Array
    select: paths.Select
    decay: paths.Select
    rounding: Rounding
    mesh: Mesh | None


def mezo(
    learning_rate: ScalarOrSchedule,
    *,
    eps: float | Array = 1e-3,
    num_directions: int = 1,
    sampler: Sampler = GAUSSIAN,
    weight_decay: float | Array = 0.0,
    select: paths.Select = None,
    decay: paths.Select = no_bias_or_norm,
    rounding: Rounding = "nearest",
    mesh: Mesh | None = None,
) -> ZerothOrderOptimizer:
    """Memory-efficient zeroth-order SGD: central differences, `u = 1/n Σ_j g_j z_j`.

    Two forward passes for each direction.

    Args:
      learning_rate: η, or an optax schedule of the step.
      eps: ε; 1e-3 suits all parameters, 1e-1 prefixes, 1e-2 LoRA.
      num_directions: n; a larger n allows a larger η.
      sampler: distribution of z.
      weight_decay: λ, applied to the parameters that `decay` matches.
      select: parameters to train, a regular expression or predicate on paths.
      decay: parameters to decay; by default all but those named bias, scale or norm.
      rounding: how parameters below float32 are rounded after an update, see `zeroth_order`.
      mesh: spread the directions over its axis `data`, see `spsa`.

    Returns:
      The optimizer, see `zeroth_order`.

    References: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes",
    arXiv:2305.17333.

    >>> import jax, jax.numpy as jnp
    >>> opt = mezo(0.1)
    >>> params = {"w": jnp.ones(3)}
    >>> state = opt.init(params, jax.random.key(0))
    >>> loss = lambda params, batch: ((params["w"] - batch) ** 2).sum()
    >>> params, state, info = opt.step(loss, params, state, jnp.zeros(3))
    >>> int(state.step)
    1
    """
    shared = Shared(eps, num_directions, sampler, weight_decay, select, decay, rounding, mesh)
    return zeroth_order(learning_rate, **shared._asdict())


def mezo_momentum(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    horizon: int = 20,
    eps: float | Array = 1e-3,
    num_directions: int = 1,
    sampler: Sampler = GAUSSIAN,
    weight_decay: float | Array = 0.0,
    select: paths.Select = None,
    decay: paths.Select = no_bias_or_norm,
    rounding: Rounding = "nearest",
    mesh: Mesh | None = None,
) -> ZerothOrderOptimizer:
    """MeZO with momentum that is replayed from scalars; see `rules.replayed_momentum`.

    Args:
      learning_rate: η; the other arguments that are not listed here are those of `mezo`.
      momentum: decay rate of the mean over estimates.
      horizon: number of past estimates, which are drawn again in each step.
    """
    shared = Shared(eps, num_directions, sampler, weight_decay, select, decay, rounding, mesh)
    rule = rules.replayed_momentum(momentum, horizon=horizon)
    return zeroth_order(learning_rate, rule=rule, **shared._asdict())


def mezo_adam(
    learning_rate: ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    floor: float = 1e-8,
    horizon: int = 20,
    eps: float | Array = 1e-3,
    num_directions: int = 1,
    sampler: Sampler = GAUSSIAN,
    weight_decay: float | Array = 0.0,
    select: paths.Select = None,
    decay: paths.Select = no_bias_or_norm,
    rounding: Rounding = "nearest",
    mesh: Mesh | None = None,
) -> ZerothOrderOptimizer:
    """MeZO-Adam in constant memory: moments are replayed from scalars; see `rules.replayed_adam`.

    For moments in memory use `optax.chain(scale_by_spsa(...), optax.adam(...))`.

    Args:
      learning_rate: η; the other arguments that are not listed here are those of `mezo`.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      floor: Adam's ε, added to the root of the second moment.
      horizon: number of past estimates, which are drawn again in each step.
    """
    shared = Shared(eps, num_directions, sampler, weight_decay, select, decay, rounding, mesh)
    rule = rules.replayed_adam(b1, b2, floor=floor, horizon=horizon)
    return zeroth_order(learning_rate, rule=rule, **shared._asdict())


def meazo(
    learning_rate: ScalarOrSchedule,
    *,
    decay_rate: float = 0.99,
    eps: float | Array = 1e-3,
    num_directions: int = 1,
    sampler: Sampler = GAUSSIAN,
    weight_decay: float | Array = 0.0,
    select: paths.Select = None,
    decay: paths.Select = no_bias_or_norm,
    rounding: Rounding = "nearest",
    mesh: Mesh | None = None,
) -> ZerothOrderOptimizer:
    """MeZO with slopes divided by their running root mean square: two scalars of state.

    η is the length of a step in units of z, whatever the loss; see `rules.normalized_by_average`.

    Args:
      learning_rate: η; the other arguments that are not listed here are those of `mezo`.
      decay_rate: decay rate of the mean of squared slopes.

    References: MEAZO, arXiv:2605.03869.
    """
    shared = Shared(eps, num_directions, sampler, weight_decay, select, decay, rounding, mesh)
    rule = rules.normalized_by_average(decay_rate)
    return zeroth_order(learning_rate, rule=rule, **shared._asdict())


def fzoo(
    learning_rate: ScalarOrSchedule,
    *,
    eps: float | Array = 1e-3,
    num_directions: int = 8,
    sampler: Sampler = SIGNS,
    weight_decay: float | Array = 0.0,
    select: paths.Select = None,
    decay: paths.Select = no_bias_or_norm,
    rounding: Rounding = "nearest",
    mesh: Mesh | None = None,
) -> ZerothOrderOptimizer:
    """One-sided slopes along n random signs, divided by their standard deviation.

    n + 1 forward passes a step; see `rules.normalized_by_spread`.

    Args:
      learning_rate: η; the other arguments that are not listed here are those of `mezo`.
      num_directions: n, at least 2.

    References: Dang et al., "FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language
    Models towards Adam-Scale Speed", arXiv:2506.09034.
    """
    integer("num_directions", num_directions, least=2, most=MOST_COPIES)
    shared = Shared(eps, num_directions, sampler, weight_decay, select, decay, rounding, mesh)
    rule = rules.normalized_by_spread()
    return zeroth_order(learning_rate, estimator=one_sided, rule=rule, **shared._asdict())


def lozo(
    learning_rate: ScalarOrSchedule,
    *,
    rank: int = 2,
    interval: int = 50,
    momentum: float = 0.0,
    eps: float | Array = 1e-3,
    num_directions: int = 1,
    weight_decay: float | Array = 0.0,
    select: paths.Select = None,
    decay: paths.Select = no_bias_or_norm,
    rounding: Rounding = "nearest",
    mesh: Mesh | None = None,
) -> ZerothOrderOptimizer:
    """MeZO along low-rank directions with a factor that stays for `interval` steps.

    See `low_rank`, and `factored.factored_momentum` for the momentum.

    Args:
      learning_rate: η; the other arguments that are not listed here are those of `mezo`.
      rank: rank of the directions.
      interval: number of steps for which one factor stays.
      momentum: decay rate of the mean of the other factor; 0 keeps no memory.

    References: Chen et al., "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank
    Structures", arXiv:2410.07698.
    """
    sampler = low_rank(rank, interval=interval)
    shared = Shared(eps, num_directions, sampler, weight_decay, select, decay, rounding, mesh)
    rule = factored.factored_momentum(momentum) if momentum else None
    return zeroth_order(learning_rate, rule=rule, **shared._asdict())


def lozo_momentum(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    rank: int = 2,
    interval: int = 50,
    eps: float | Array = 1e-3,
    num_directions: int = 1,
    weight_decay: float | Array = 0.0,
    select: paths.Select = None,
    decay: paths.Select = no_bias_or_norm,
    rounding: Rounding = "nearest",
    mesh: Mesh | None = None,
) -> ZerothOrderOptimizer:
    """LOZO-M: `lozo` with the paper's momentum of 0.9."""
    return lozo(
        learning_rate,
        rank=rank,
        interval=interval,
        momentum=momentum,
        eps=eps,
        num_directions=num_directions,
        weight_decay=weight_decay,
        select=select,
        decay=decay,
        rounding=rounding,
        mesh=mesh,
    )


def zo_muon(
    learning_rate: ScalarOrSchedule,
    *,
    rank: int = 64,
    interval: int = 100,
    vector_scale: float = 1e-5,
    eps: float | Array = 1e-3,
    num_directions: int = 4,
    weight_decay: float | Array = 0.0,
    select: paths.Select = None,
    decay: paths.Select = no_bias_or_norm,
    rounding: Rounding = "nearest",
    mesh: Mesh | None = None,
) -> ZerothOrderOptimizer:
    """One-sided slopes in a subspace of each matrix, and an orthogonalized step in it.

    n + 1 forward passes a step; see `subspace` and `factored.orthogonalized`.

    Args:
      learning_rate: η; the other arguments that are not listed here are those of `mezo`.
      rank: dimension of the subspace.
      interval: number of steps for which the subspace stays.
      vector_scale: learning rate of leaves that are not matrices, relative to that of matrices.

    References: arXiv:2602.17155.
    """
    sampler = subspace(rank, interval=interval)
    shared = Shared(eps, num_directions, sampler, weight_decay, select, decay, rounding, mesh)
    rule = factored.orthogonalized(vector_scale=vector_scale)
    return zeroth_order(learning_rate, estimator=one_sided, rule=rule, **shared._asdict())
