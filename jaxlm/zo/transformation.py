"""The SPSA estimate as an optax transformation, for chains with any rule; it holds a gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.core import paths
from jaxlm.zo.estimators import Estimator, central, check, materialize, spsa
from jaxlm.zo.samplers import Gaussian, Sampler


class ScaleBySpsaState(NamedTuple):
    """State of `scale_by_spsa`.

    Attributes:
      step: estimates made so far.
      key: typed PRNG key of the run; estimate t draws from `fold_in(key, t)`.
      loss: mean loss of the last estimate; NaN before the first.
      projected_grad, loss_plus: [n], of the last estimate.
    """

    step: Int[Array, ""]
    key: Array
    loss: Float[Array, ""]
    projected_grad: Float[Array, "n"]
    loss_plus: Float[Array, "n"]


def scale_by_spsa(
    eps: float = 1e-3,
    *,
    sampler: Sampler = Gaussian(),
    num_directions: int = 1,
    select: paths.Select = None,
    estimator: Estimator = central,
    key: Array | None = None,
):
    """The SPSA estimate as the first link of an optax chain.

    `update(None, state, params, *, value_fn)` ignores the incoming updates and returns
    `1/n Σ_j g_j z_j`. `value_fn(params)`, or `value_fn(params, *, view)`, is the loss on the
    current batch. Memory: one gradient beside the parameters.

    Args:
      eps, sampler, num_directions, select, estimator: see `spsa`.
      key: typed PRNG key of the run, kept in the state; `jax.random.key(0)` if None.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    >>> import optax
    >>> tx = optax.chain(scale_by_spsa(1e-3), optax.sgd(0.1, momentum=0.9))
    >>> params = {"w": jnp.ones(3)}
    >>> loss = lambda params: (params["w"] ** 2).sum()
    >>> updates, state = tx.update(None, tx.init(params), params, value_fn=loss)
    """
    import optax

    check(eps, num_directions)

    def init(params):
        paths.check_unique_hashes(params)
        paths.mask(params, select)
        run_key = jax.random.key(0) if key is None else key
        unknown = jnp.full(num_directions, jnp.nan, jnp.float32)
        return ScaleBySpsaState(jnp.zeros((), jnp.int32), run_key, unknown[0], unknown, unknown)

    def update(updates, state, params=None, *, value_fn, **extra):
        del updates, extra
        if params is None:
            raise ValueError("scale_by_spsa needs update(None, state, params, value_fn=...)")
        est = spsa(
            value_fn,
            params,
            key=jax.random.fold_in(state.key, state.step),
            eps=eps,
            sampler=sampler.at(state.key, state.step),
            num_directions=num_directions,
            select=select,
            estimator=estimator,
            previous=state.loss_plus,
        )
        state = ScaleBySpsaState(
            state.step + 1, state.key, est.loss, est.projected_grad, est.loss_plus
        )
        return materialize(est, params), state

    return optax.GradientTransformationExtraArgs(init, update)
