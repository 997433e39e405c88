"""Zeroth-order optimizers: an estimator, a sampler and an update rule, in the memory of inference.

One step draws z_j, measures slopes g_j along them (`jaxlm.zo.estimators`), turns them into a
direction u (`jaxlm.zo.rules`; for MeZO `1/n Σ_j g_j z_j`) and moves

    θ ← θ - η (u + λ θ)

in place, block by block, drawing z again. `zeroth_order` puts any three pieces together; `mezo` and
its successors in `jaxlm.zo.methods` are choices of them.

References: Malladi et al., arXiv:2305.17333. Differences from the authors' code: parameters are
never perturbed in place, the two losses are subtracted in float32, the reported loss is the mean of
both signs, and weight decay spares biases and norms by their path.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxlm.core import paths, prng
from jaxlm.zo import rules
from jaxlm.zo.estimators import (
    FORWARDS,
    Estimator,
    SPSAEstimate,
    central,
    check,
    spsa,
)
from jaxlm.zo.perturbation import directions
from jaxlm.zo.rules import Drawn, Rule, Setup
from jaxlm.zo.samplers import Gaussian, Sampler
from jaxlm.zo.sites import Site, over_blocks

NO_DECAY = r"(^|[._])(bias|scale)(\.value)?$|norm"
ScalarOrSchedule = float | Array | Callable[[Array], Any]
Rounding = Literal["nearest", "stochastic"]
SAMPLE = 8
"""Rows of a block on which `moved_fraction` is counted, evenly spaced: some in each shard."""


class ZerothOrderState(NamedTuple):
    """State of a zeroth-order optimizer.

    Attributes:
      step: updates made so far.
      key: typed PRNG key of the run; step t draws from `fold_in(key, t)`.
      loss_plus: [n], of the last step; NaN before the first.
      memory: of the update rule.
    """

    step: Int[Array, ""]
    key: Array
    loss_plus: Float[Array, "n"]
    memory: Any


class ZerothOrderInfo(NamedTuple):
    """What one step saw; with the run's key, the projected gradients replay it.

    Attributes:
      loss: as the estimator knows it: of `central`, the mean over both signs and all directions.
      loss_plus, loss_minus: [n], see `SPSAEstimate`.
      projected_grad: [n]; a direction along which it is not finite moves nothing.
      learning_rate: η of this step.
      moved_fraction: of the selected parameters, how many have another value after the step,
        counted on some rows of each; below 1 where the update is lost to rounding.
      aux: what the objective returned beside the loss, averaged; or None.
    """

    loss: Float[Array, ""]
    loss_plus: Float[Array, "n"]
    loss_minus: Float[Array, "n"]
    projected_grad: Float[Array, "n"]
    learning_rate: Float[Array, ""]
    moved_fraction: Float[Array, ""]
    aux: Any


def as_they_are(params: Any, state: ZerothOrderState) -> Any:
    """The parameters of `step` are those that a run has come to."""
    del state
    return params


class ZerothOrderOptimizer(NamedTuple):
    """Pure functions.

    Attributes:
      init: `init(params, key) -> state`.
      step: `step(loss_fn, params, state, batch) -> params, state, info`.
      update: `update(params, state, projected_grad) -> params, state, moved_fraction`: the part of
        a step that follows the forward passes.
      settings: what a trajectory of this optimizer must be replayed with, as JSON values.
      forwards: forward passes in a step; 0 for an estimator that is not in `estimators.FORWARDS`.
      finalize: `finalize(params, state) -> params`: the parameters that a run has come to, where
        those of `step` are not the whole of them.
      select: parameters that move.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    update: Callable[..., Any]
    settings: dict[str, Any]
    forwards: int
    finalize: Callable[..., Any] = as_they_are
    select: paths.Select = None


def value_at(learning_rate: ScalarOrSchedule, step: Any) -> Array:
    """η of a step."""
    value = learning_rate(step) if callable(learning_rate) else learning_rate
    return jnp.asarray(value, jnp.result_type(float))


def rates(learning_rate: ScalarOrSchedule) -> list[float]:
    """η at some steps, by which a trajectory knows a schedule."""
    return [float(value_at(learning_rate, step)) for step in (0, 1, 10, 100, 1000)]


def first_state(num_directions: int, key: Array, memory: Any) -> ZerothOrderState:
    """The state before the first step."""
    unknown = jnp.full(num_directions, jnp.nan, jnp.result_type(float))
    return ZerothOrderState(jnp.zeros((), jnp.int32), key, unknown, memory)


def info_of(est: SPSAEstimate, learning_rate: Array, moved_fraction: Array) -> ZerothOrderInfo:
    """What a step saw, from its estimate and its update."""
    return ZerothOrderInfo(
        loss=est.loss,
        loss_plus=est.loss_plus,
        loss_minus=est.loss_minus,
        projected_grad=est.projected_grad,
        learning_rate=learning_rate,
        moved_fraction=moved_fraction,
        aux=est.aux,
    )


def written(select: paths.Select) -> str | None:
    """A selection as a trajectory knows it; all functions alike, since they cannot be written."""
    return select if isinstance(select, str | None) else "a function"


def zeroth_order(
    learning_rate: ScalarOrSchedule,
    *,
    eps: float = 1e-3,
    estimator: Estimator = central,
    sampler: Sampler = Gaussian(),
    rule: Rule | None = None,
    num_directions: int = 1,
    weight_decay: float = 0.0,
    select: paths.Select = None,
    decay: paths.Select = lambda path: not paths.matcher(NO_DECAY)(path),
    rounding: Rounding = "nearest",
    mesh: Mesh | None = None,
) -> ZerothOrderOptimizer:
    """Any estimator with any sampler and any update rule.

    Args:
      learning_rate: η, or an optax schedule of the step.
      eps: ε; 1e-3 suits all parameters, 1e-1 prefixes, 1e-2 LoRA.
      estimator: how slopes are measured, see `jaxlm.zo.estimators`.
      sampler: distribution of z.
      rule: what is made of them, see `jaxlm.zo.rules`; None for `rules.sgd()`.
      num_directions: n; a larger n wants a larger η.
      weight_decay: λ, on the parameters that `decay` takes.
      select: parameters that are trained, a regular expression or predicate on paths.
      decay: parameters that are decayed; by default all but those named bias, scale or norm.
      rounding: of parameters below float32 after the update: to nearest, or up or down at random
        such that the mean is exact.
      mesh: spreads the directions over its axis `data`, see `spsa`.

    Returns:
      `init`, `step` and what belongs to them. `step` is pure; `jit_step` compiles it with donated
      buffers, so that its memory is that of the forward passes.

    Raises:
      ValueError: if eps is not positive; from init if `select` takes nothing or sampler, rule and
        parameters do not fit.

    >>> from jaxlm import zo
    >>> opt = zeroth_order(
    ...     0.1, estimator=zo.one_sided, sampler=zo.rademacher(), num_directions=4
    ... )
    >>> params = {"w": jnp.ones(3)}
    >>> state = opt.init(params, jax.random.key(0))
    >>> loss = lambda params, batch: ((params["w"] - batch) ** 2).sum()
    >>> params, state, info = opt.step(loss, params, state, jnp.zeros(3))
    >>> opt.forwards
    5
    """
    check(eps, num_directions, mesh)
    rule = rules.sgd() if rule is None else rule

    def init(params, key):
        paths.check_unique_hashes(params)
        paths.mask(params, select)
        sampler.check(params, select)
        memory = rule.init(Setup(params, select, sampler, num_directions))
        return first_state(num_directions, key, memory)

    def step(loss_fn, params, state, batch):
        est = spsa(
            loss_fn,
            params,
            batch,
            key=jax.random.fold_in(state.key, state.step),
            eps=eps,
            sampler=sampler.at(state.key, state.step),
            num_directions=num_directions,
            select=select,
            estimator=estimator,
            previous=state.loss_plus,
            mesh=mesh,
        )
        rate = value_at(learning_rate, state.step)
        params, state, moved = update(params, state, est.projected_grad)
        state = state._replace(loss_plus=est.loss_plus.astype(state.loss_plus.dtype))
        return params, state, info_of(est, rate, moved)

    def update(params, state, projected_grad):
        finite = jnp.isfinite(projected_grad)
        slopes = jnp.where(finite, projected_grad, 0)

        def drawn_at(step):
            key = jax.random.fold_in(state.key, step)
            return directions(key, sampler.at(state.key, step), params, select, num_directions)

        memory, block = rule.update(
            Drawn(slopes, finite, state.step, drawn_at), params, state.memory
        )
        params, moved = descend(
            block,
            params,
            value_at(learning_rate, state.step),
            weight_decay=weight_decay,
            select=select,
            decay=decay,
            rounding=rounding,
            key=jax.random.fold_in(jax.random.fold_in(state.key, state.step), 2),
        )
        return params, state._replace(step=state.step + 1, memory=memory), moved

    settings = {
        "learning_rate": rates(learning_rate),
        "eps": eps,
        "sampler": repr(sampler),
        "rule": rule.name,
        "num_directions": num_directions,
        "weight_decay": weight_decay,
        "select": written(select),
        "rounding": rounding,
    }
    forwards = FORWARDS.get(estimator, lambda n: 0)(num_directions)
    return ZerothOrderOptimizer(init, step, update, settings, forwards, select=select)


def descend(
    block: rules.Block,
    params: Any,
    learning_rate: Array,
    *,
    weight_decay: float = 0.0,
    select: paths.Select = None,
    decay: paths.Select = None,
    rounding: Rounding = "nearest",
    key: Array | None = None,
) -> tuple[Any, Float[Array, ""]]:
    """`θ - η (u + λ θ)` over layers and blocks of rows, and the fraction of θ that has moved.

    Under `jit` with donated parameters this happens in place: beside the parameters only one block
    and its noise are alive.

    Args:
      block: u at a site.
      params: θ.
      learning_rate: η.
      weight_decay: λ.
      select: parameters that move.
      decay: parameters that are decayed.
      rounding: see `zeroth_order`.
      key: of stochastic rounding.
    """
    takes, decays = paths.chooser(select), paths.matcher(decay)
    counts, sizes = [], []

    def leaf_update(leaf):
        if not takes(leaf.path, leaf.value):
            return leaf.value
        rate = weight_decay if decays(leaf.path) else 0.0

        def moved(site):
            update = block(site)
            old = site.value.astype(jnp.promote_types(site.value.dtype, update.dtype))
            # One product in each sum, so that no compiler has two ways to contract it.
            new = old - learning_rate * update
            if rate:
                new = new - learning_rate * rate * old
            rounded = round_to(new, site, rounding, key)
            value = jnp.where(new == old, site.value, rounded)
            changed = _some_rows(value) != _some_rows(site.value)
            return value, changed.mean() * value.size

        value, count = over_blocks(moved, leaf)
        counts.append(count)
        sizes.append(leaf.value.size)
        return value

    params = paths.map_with_path(leaf_update, params)
    total = float(sum(sizes))  # which may not fit an int of 32 bits
    return params, jnp.asarray(sum(counts) / total)


def _some_rows(value: Array) -> Array:
    rows = jnp.atleast_1d(value)
    return rows[:: max(1, rows.shape[0] // SAMPLE)]


def round_to(new: Array, site: Site, rounding: Rounding, key: Array | None) -> Array:
    """`new` in the dtype of the site: the nearest number, or one of its neighbours at random."""
    near = new.astype(site.value.dtype)
    if key is None or rounding == "nearest" or near.dtype == new.dtype:
        return near
    error = new - near.astype(new.dtype)
    other = jnp.nextafter(near, jnp.where(error > 0, jnp.inf, -jnp.inf).astype(near.dtype))
    gap = jnp.abs(other.astype(new.dtype) - near.astype(new.dtype))
    bits = prng.bits(site.key(key), site.shape, site.rows)
    uniform = (bits >> 8).astype(new.dtype) * 2.0**-24
    return jnp.where(uniform * gap < jnp.abs(error), other, near)


def jit_step(opt: ZerothOrderOptimizer, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `step(params, state, batch) -> params, state, info`, donating params and state.

    The arrays passed in are gone after the call; use what it returns.
    """
    return jax.jit(
        lambda params, state, batch: opt.step(loss_fn, params, state, batch),
        donate_argnums=(0, 1),
        keep_unused=True,
    )
