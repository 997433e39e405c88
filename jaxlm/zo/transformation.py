"""The SPSA estimate as an optax transformation, for chains with any rule."""

import dataclasses
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.zo.checks import is_traced
from jaxlm.zo.estimators import Estimator, Previous, central, check, materialize, spsa
from jaxlm.zo.perturbation import width
from jaxlm.zo.samplers import Gaussian, Sampler


class ScaleBySpsaState(NamedTuple):
    """State of `scale_by_spsa`.

    An estimate without a finite slope changes `step` and `skipped` alone.

    Attributes:
      step: number of estimates made.
      key: typed PRNG key of the run; estimate t draws from `fold_in(key, t)`.
      loss: mean loss of the last estimate with a finite slope; 0 before the first.
      projected_grad: [n], slopes of that estimate, 0 where a slope is not finite.
      loss_plus: [n], the last losses at θ + ε z_j with finite slopes.
      known: [n], False where `loss_plus` has no such loss yet.
      skipped: number of estimates without a finite slope.
    """

    step: Int[Array, ""]
    key: Array
    loss: Float[Array, ""]
    projected_grad: Float[Array, "n"]
    loss_plus: Float[Array, "n"]
    known: Bool[Array, "n"]
    skipped: Int[Array, ""]


def scale_by_spsa(
    eps: float | Array = 1e-3,
    *,
    sampler: Sampler = Gaussian(),
    num_directions: Any = None,
    select: paths.Select = None,
    estimator: Estimator | None = None,
    key: Array | None = None,
    then: Any = None,
):
    """The SPSA estimate as the first transformation of an optax chain.

    `update(None, state, params, *, value_fn)` ignores the incoming updates and returns
    `1/n Σ_j g_j z_j`, in the dtype of each parameter. `value_fn(params)`, or `value_fn(params, *,
    view)`, is the loss on the current batch. Memory: one gradient beside the parameters.

    A slope that is not finite enters no state: the update is 0 along its direction, and the rest of
    a chain treats this 0 as a gradient. The transformation `then` does not run in a step without a
    finite slope: its state stays, and the update is 0.

    `optax.masked` and `optax.multi_transform` around this transformation pass `value_fn` a part of
    the parameters: use `select`, and mask later transformations. `optax.MultiSteps` around it would
    see one loss of every k; put it after this transformation, where it averages k estimates.

    Args:
      eps: ε; under `optax.inject_hyperparams` it is kept in the state.
      sampler: distribution of z.
      num_directions: n, None for 1; under `optax.inject_hyperparams` name it in `static_args`.
      select: parameters to perturb.
      estimator: how slopes are measured; None for `central`. Under `optax.inject_hyperparams` name
        it in `static_args`, and a `select` that is a function too.
      key: typed PRNG key of the run, kept in the state; `jax.random.key(0)` if None.
      then: an optax transformation that receives the estimate; None for the estimate alone.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    >>> import optax
    >>> tx = optax.chain(scale_by_spsa(1e-3), optax.sgd(0.1, momentum=0.9))
    >>> params = {"w": jnp.ones(3)}
    >>> loss = lambda params: (params["w"] ** 2).sum()
    >>> updates, state = tx.update(None, tx.init(params), params, value_fn=loss)
    """
    import optax

    measure = central if estimator is None else estimator
    # `inject_hyperparams` turns numbers into arrays; `operator.index` turns them back.
    n = 1 if num_directions is None else num_directions
    n = n if is_traced(n) else operator.index(n)
    check(eps, 1 if is_traced(n) else n)

    def init(params):
        if is_traced(n):
            raise UserError(
                "num_directions: must be known when a program is compiled (got a traced number). "
                'Give inject_hyperparams static_args="num_directions".'
            )
        paths.check_unique_hashes(params)
        if jax.tree.leaves(params):  # optax also initialises with an empty tree
            paths.mask(params, select)
        dtype = width(params, select)
        plus, known = Previous.none(n, dtype)
        zero = jnp.zeros((), jnp.int32)
        run_key = jax.random.key(0) if key is None else key
        state = ScaleBySpsaState(zero, run_key, jnp.zeros((), dtype), plus, plus, known, zero)
        return state if then is None else (state, then.init(params))

    def update(updates, state, params=None, *, value_fn, **extra):
        del updates
        if params is None:
            raise UserError(
                "params: needed to measure the loss (got None). Call update(None, state, params, "
                "value_fn=...)."
            )
        own, rest = (state, None) if then is None else state
        est = spsa(
            value_fn,
            params,
            key=jax.random.fold_in(own.key, own.step),
            eps=eps,
            sampler=sampler.at(own.key, own.step),
            num_directions=own.known.shape[0],
            select=select,
            estimator=measure,
            previous=Previous(own.loss_plus, own.known),
        )
        finite = jnp.isfinite(est.projected_grad)
        moves = finite.any()

        def where_it_moves(new, old):
            return jax.tree.map(lambda x, y: jnp.where(moves, x, y).astype(y.dtype), new, old)

        slopes = jnp.where(finite, est.projected_grad, 0)
        plus = Previous(own.loss_plus, own.known).after(est.loss_plus, est.projected_grad)
        loss, shown = where_it_moves((est.loss, slopes), (own.loss, own.projected_grad))
        skipped = own.skipped + ~moves
        own = ScaleBySpsaState(own.step + 1, own.key, loss, shown, *plus, skipped)
        gradient = materialize(dataclasses.replace(est, projected_grad=slopes), params)
        if then is None:
            return gradient, own
        chain = optax.with_extra_args_support(then)
        updates, after = chain.update(gradient, rest, params, value_fn=value_fn, **extra)
        nothing = jax.tree.map(jnp.zeros_like, updates)
        return where_it_moves(updates, nothing), (own, where_it_moves(after, rest))

    return optax.GradientTransformationExtraArgs(init, update)
