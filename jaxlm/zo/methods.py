"""MeZO and its successors by name: choices of estimator, sampler and update rule."""

from typing import Any

from jaxlm.zo import factored, rules
from jaxlm.zo.estimators import one_sided
from jaxlm.zo.optimizers import ScalarOrSchedule, ZerothOrderOptimizer, zeroth_order
from jaxlm.zo.samplers import Rademacher, Sampler
from jaxlm.zo.structured import low_rank, subspace

SIGNS = Rademacher()


def mezo(
    learning_rate: ScalarOrSchedule, *, eps: float = 1e-3, num_directions: int = 1, **options: Any
) -> ZerothOrderOptimizer:
    """Memory-efficient zeroth-order SGD: central differences, `u = 1/n Σ_j g_j z_j`.

    Args:
      learning_rate: η, or an optax schedule of the step.
      eps: ε; 1e-3 suits all parameters, 1e-1 prefixes, 1e-2 LoRA.
      num_directions: n; a larger n wants a larger η.
      **options: `sampler` (Gaussian), `weight_decay`, `select`, `decay`, `rounding` of
        `zeroth_order`.

    >>> import jax, jax.numpy as jnp
    >>> opt = mezo(0.1)
    >>> params = {"w": jnp.ones(3)}
    >>> state = opt.init(params, jax.random.key(0))
    >>> loss = lambda params, batch: ((params["w"] - batch) ** 2).sum()
    >>> params, state, info = opt.step(loss, params, state, jnp.zeros(3))
    >>> int(state.step)
    1
    """
    return zeroth_order(learning_rate, eps=eps, num_directions=num_directions, **options)


def mezo_momentum(
    learning_rate: ScalarOrSchedule, *, momentum: float = 0.9, horizon: int = 20, **options: Any
) -> ZerothOrderOptimizer:
    """MeZO with momentum that is replayed from scalars; see `rules.replayed_momentum`."""
    rule = rules.replayed_momentum(momentum, horizon=horizon)
    return zeroth_order(learning_rate, rule=rule, **options)


def mezo_adam(
    learning_rate: ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    floor: float = 1e-8,
    horizon: int = 20,
    **options: Any,
) -> ZerothOrderOptimizer:
    """MeZO-Adam in constant memory, its moments replayed from scalars; see `rules.replayed_adam`.

    `floor` is Adam's eps. With moments in memory it is
    `optax.chain(scale_by_spsa(...), optax.adam(...))`.
    """
    rule = rules.replayed_adam(b1, b2, eps=floor, horizon=horizon)
    return zeroth_order(learning_rate, rule=rule, **options)


def meazo(
    learning_rate: ScalarOrSchedule, *, decay_rate: float = 0.99, **options: Any
) -> ZerothOrderOptimizer:
    """MeZO with slopes divided by their running size, one scalar of state.

    See `rules.normalized_by_average`; `decay_rate` is its β. η is then the length of a step in
    units of z, whatever the loss.
    """
    rule = rules.normalized_by_average(decay_rate)
    return zeroth_order(learning_rate, rule=rule, **options)


def fzoo(
    learning_rate: ScalarOrSchedule,
    *,
    num_directions: int = 8,
    sampler: Sampler = SIGNS,
    **options: Any,
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
        sampler=sampler,
        num_directions=num_directions,
        **options,
    )


def lozo(
    learning_rate: ScalarOrSchedule, *, rank: int = 2, interval: int = 50, **options: Any
) -> ZerothOrderOptimizer:
    """MeZO along low-rank directions whose right factor stays for `interval` steps.

    See `low_rank`.
    """
    return zeroth_order(learning_rate, sampler=low_rank(rank, interval=interval), **options)


def lozo_momentum(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    rank: int = 2,
    interval: int = 50,
    **options: Any,
) -> ZerothOrderOptimizer:
    """LOZO-M: `lozo` with momentum of the left factor; see `factored.factored_momentum`."""
    return zeroth_order(
        learning_rate,
        sampler=low_rank(rank, interval=interval),
        rule=factored.factored_momentum(momentum),
        **options,
    )


def zo_muon(
    learning_rate: ScalarOrSchedule,
    *,
    rank: int = 64,
    interval: int = 100,
    num_directions: int = 4,
    vector_scale: float = 1e-5,
    **options: Any,
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
        num_directions=num_directions,
        **options,
    )
