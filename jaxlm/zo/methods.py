"""MeZO and its successors by name: choices of estimator, sampler and update rule.

What they have in common, from `eps` to `mesh`, is that of `zeroth_order`.
"""

from jax.sharding import Mesh
from jaxtyping import Array

from jaxlm.core import paths
from jaxlm.zo import factored, rules
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

    Args:
      learning_rate: η, or an optax schedule of the step.
      eps: ε; 1e-3 suits all parameters, 1e-1 prefixes, 1e-2 LoRA.
      num_directions: n; a larger n wants a larger η.
      sampler: distribution of z.
      weight_decay: λ, on the parameters that `decay` takes.
      select: parameters that are trained, a regular expression or predicate on paths.
      decay: parameters that are decayed; by default all but those named bias, scale or norm.
      rounding: of parameters below float32 after an update, see `zeroth_order`.
      mesh: spreads the directions over its axis `data`, see `spsa`.

    >>> import jax, jax.numpy as jnp
    >>> opt = mezo(0.1)
    >>> params = {"w": jnp.ones(3)}
    >>> state = opt.init(params, jax.random.key(0))
    >>> loss = lambda params, batch: ((params["w"] - batch) ** 2).sum()
    >>> params, state, info = opt.step(loss, params, state, jnp.zeros(3))
    >>> int(state.step)
    1
    """
    return zeroth_order(
        learning_rate,
        eps=eps,
        num_directions=num_directions,
        sampler=sampler,
        weight_decay=weight_decay,
        select=select,
        decay=decay,
        rounding=rounding,
        mesh=mesh,
    )


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
    """MeZO with momentum that is replayed from scalars; see `rules.replayed_momentum`."""
    return zeroth_order(
        learning_rate,
        rule=rules.replayed_momentum(momentum, horizon=horizon),
        eps=eps,
        num_directions=num_directions,
        sampler=sampler,
        weight_decay=weight_decay,
        select=select,
        decay=decay,
        rounding=rounding,
        mesh=mesh,
    )


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
    """MeZO-Adam in constant memory, its moments replayed from scalars; see `rules.replayed_adam`.

    `floor` is Adam's eps. With moments in memory it is
    `optax.chain(scale_by_spsa(...), optax.adam(...))`.
    """
    return zeroth_order(
        learning_rate,
        rule=rules.replayed_adam(b1, b2, eps=floor, horizon=horizon),
        eps=eps,
        num_directions=num_directions,
        sampler=sampler,
        weight_decay=weight_decay,
        select=select,
        decay=decay,
        rounding=rounding,
        mesh=mesh,
    )


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
    """MeZO with slopes divided by their running size, two scalars of state.

    See `rules.normalized_by_average`; `decay_rate` is its β. η is then the length of a step in
    units of z, whatever the loss.
    """
    return zeroth_order(
        learning_rate,
        rule=rules.normalized_by_average(decay_rate),
        eps=eps,
        num_directions=num_directions,
        sampler=sampler,
        weight_decay=weight_decay,
        select=select,
        decay=decay,
        rounding=rounding,
        mesh=mesh,
    )


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

    See `rules.normalized_by_spread`. n + 1 forward passes a step.

    References: Dang et al., "FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language
    Models towards Adam-Scale Speed", arXiv:2506.09034.
    """
    if num_directions < 2:
        raise ValueError(f"fzoo needs num_directions of 2 or more, not {num_directions}")
    return zeroth_order(
        learning_rate,
        estimator=one_sided,
        rule=rules.normalized_by_spread(),
        eps=eps,
        num_directions=num_directions,
        sampler=sampler,
        weight_decay=weight_decay,
        select=select,
        decay=decay,
        rounding=rounding,
        mesh=mesh,
    )


def lozo(
    learning_rate: ScalarOrSchedule,
    *,
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
    """MeZO along low-rank directions whose right factor stays for `interval` steps.

    See `low_rank`.
    """
    return zeroth_order(
        learning_rate,
        sampler=low_rank(rank, interval=interval),
        eps=eps,
        num_directions=num_directions,
        weight_decay=weight_decay,
        select=select,
        decay=decay,
        rounding=rounding,
        mesh=mesh,
    )


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
    """LOZO-M: `lozo` with momentum of the left factor; see `factored.factored_momentum`."""
    return zeroth_order(
        learning_rate,
        sampler=low_rank(rank, interval=interval),
        rule=factored.factored_momentum(momentum),
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

    See `subspace` and `factored.orthogonalized`. n + 1 forward passes a step.

    References: arXiv:2602.17155.
    """
    return zeroth_order(
        learning_rate,
        estimator=one_sided,
        sampler=subspace(rank, interval=interval),
        rule=factored.orthogonalized(vector_scale=vector_scale),
        eps=eps,
        num_directions=num_directions,
        weight_decay=weight_decay,
        select=select,
        decay=decay,
        rounding=rounding,
        mesh=mesh,
    )
