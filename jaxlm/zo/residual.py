r"""LOZO with updates that accumulate in float32 factors, for low-precision parameters.

While the factor V of `low_rank` stays, the sum of all updates of a matrix is $N V^\top$ [out, in],
with N [out, r] in float32. The model reads W plus this residual as a `LowRankSum`; W itself is
rewritten once every `interval` steps. So no update is lost to rounding, and a step makes no pass
over the parameters. Leaves that are not matrices have a float32 copy.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxlm.core import paths, prng, views
from jaxlm.core.precision import Packed
from jaxlm.zo.checks import real
from jaxlm.zo.estimators import Slopes, central, check, spsa
from jaxlm.zo.factored import (
    leaf_name,
    mean_new_factor,
    memory_at,
    new_factors,
    over_layers,
    remembered,
    with_reused,
)
from jaxlm.zo.optimizers import (
    ScalarOrSchedule,
    ZerothOrderOptimizer,
    concrete,
    described,
    first_state,
    hold,
    info_of,
    rates,
    release,
    round_to,
    value_at,
)
from jaxlm.zo.perturbation import Measurement, accepts, directions, materialized, width
from jaxlm.zo.samplers import Gaussian, Sampler
from jaxlm.zo.sites import Site, over_blocks
from jaxlm.zo.structured import OUT_FIRST, Factored, LowRankSampler, is_matrix, low_rank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residual:
    r"""The view $W + N V^\top$ of matrices, and the float32 copies of other leaves.

    `memory` holds N and the copies by the name of the leaf; `sampler` draws V, whatever the key.
    """

    memory: dict[str, Array]
    sampler: LowRankSampler
    key: Array

    def __call__(self, path: str, leaf: Any, layer, *, rows: prng.Rows = None) -> Any:
        seen = views.take(leaf, rows)
        if isinstance(leaf, Packed):
            return seen
        own = memory_at(self.memory, path, layer)
        if own is None:
            return seen
        site = Site(path, leaf.shape, layer, rows, seen)
        if not is_matrix(site):
            return views.take(own, rows).astype(leaf.dtype)
        factors = with_reused(self.key, self.sampler, site, own)
        return views.add_factors(path, seen, factors, rows)


def lozo_residual(
    learning_rate: ScalarOrSchedule,
    *,
    rank: int = 2,
    interval: int = 50,
    base: Sampler = Gaussian(),
    eps: float = 1e-3,
    num_directions: int = 1,
    select: paths.Select = None,
    out_first: str | None = OUT_FIRST,
) -> ZerothOrderOptimizer:
    """`lozo` with a float32 residual in factors, for bfloat16 parameters and for speed.

    `step` returns parameters without the residual; `finalize(params, state)` adds it, before they
    are evaluated or saved. Every `interval` steps the residual is added to the parameters with
    stochastic rounding. Memory: that of `lozo` for a loss with a keyword `view`; one copy of the
    parameters more for a loss without it.

    Args:
      learning_rate: η, or an optax schedule of the step.
      rank: see `low_rank`, as for `interval`, `base` and `out_first`.
      interval: number of steps between rewrites of the parameters.
      base: distribution of the entries of the factors.
      eps: ε.
      num_directions: n.
      select: parameters to train.
      out_first: a regular expression that matches the paths of matrices stored [out, in].

    Returns:
      The optimizer, see `zeroth_order`.
    """
    check(eps, num_directions)
    if not callable(learning_rate):
        real("learning_rate", learning_rate, least=0.0)
    sampler = low_rank(rank, interval=interval, base=base, out_first=out_first)
    rate_at = functools.partial(value_at, learning_rate)

    def residual(state):
        return Residual(state.memory, sampler.at(state.key, state.step), state.key)

    def init(params, key):
        paths.check_unique_hashes(params)
        paths.mask(params, select)
        sampler.check(params, select)
        memory = new_factors(sampler, params, select, jnp.array)
        return first_state(num_directions, key, memory, width(params, select))

    def step(loss_fn, params, state, batch):
        base = residual(state)
        lean = accepts(loss_fn, "view", params, batch)

        # The perturbation is a view on top of the residual's view, so the loss reads
        # W + N V^T + ε z without a copy. A loss without a view gets the sum as an array.

        def seen(params, batch, *, key, view=None):
            options = {"key": key} if accepts(loss_fn, "key", params, batch) else {}
            view = views.compose(base, view)
            if lean:
                return loss_fn(params, batch, view=view, **options)
            return loss_fn(materialized(view, params), batch, **options)

        est = spsa(
            seen,
            params,
            batch,
            key=jax.random.fold_in(state.key, state.step),
            eps=eps,
            sampler=base.sampler,
            num_directions=num_directions,
            select=select,
            estimator=central if lean else one_by_one,
        )
        rate = lax.optimization_barrier(rate_at(state.step, width(params, select)))
        params, state, moved = update(params, state, est.projected_grad, rate)
        return params, state.after(est), info_of(est, rate, moved)

    def update(params, state, projected_grad, learning_rate=None):
        dtype = width(params, select)
        rate = rate_at(state.step, dtype) if learning_rate is None else learning_rate
        finite = jnp.isfinite(projected_grad)
        slopes = jnp.where(finite, projected_grad, 0).astype(dtype)
        key = jax.random.fold_in(state.key, state.step)
        now = directions(key, residual(state).sampler, params, select, num_directions)

        # The direction U V^T shares V with the residual, so a step adds to N alone.
        def moved(site, own):
            step = mean_new_factor(now, slopes, site).astype(own.dtype)
            return jnp.where(finite.any(), own - jnp.asarray(rate, own.dtype) * step, own)

        memory = over_layers(moved, state.memory, params)
        fraction = moved_fraction(sampler, params, state.memory, memory)
        last = jnp.where(finite.any(), state.step, state.last)
        state = state._replace(memory=memory, last=last)
        # V changes with the next step, so the residual has to be added to the parameters now. Both
        # branches are one program: `cond` skips the pass over the parameters in all other steps.
        full = (state.step + 1) % interval == 0

        def fold(arrays, state):
            return hold(folded(release(arrays), state))  # `cond` accepts arrays alone

        arrays = lax.cond(full, fold, lambda arrays, state: arrays, hold(params), state)
        memory = {
            leaf_name(leaf): jnp.where(full & is_matrix(site), 0, memory[leaf_name(leaf)])
            for leaf, site in remembered(params, memory)
        }
        state = state._replace(step=state.step + 1, memory=memory)
        return release(arrays), state, fraction

    def folded(params, state):
        base, takes = residual(state), paths.leaf_predicate(select)
        # The same stream as stochastic rounding in `zeroth_order`: 0 draws directions, 1 is the
        # key of the loss, 2 rounds.
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 2)

        def whole(leaf):
            if not takes(leaf.path, leaf.value):
                return leaf.value

            def block(site):
                own = memory_at(state.memory, site.path, site.layer)
                if not is_matrix(site):
                    return views.take(own, site.rows).astype(site.value.dtype), jnp.zeros(())
                added = with_reused(base.key, base.sampler, site, own).dense()
                new = site.value.astype(own.dtype) + added
                return round_to(new, site, "stochastic", key), jnp.zeros(())

            return over_blocks(block, leaf)[0]

        return paths.map_with_path(whole, params)

    settings = {
        "learning_rate": rates(learning_rate),
        "eps": concrete(eps),
        "sampler": described(sampler),
        "rule": "residual",
        "num_directions": num_directions,
        "select": select,
    }
    return ZerothOrderOptimizer(
        init, step, update, settings, 2 * num_directions, folded, select, rate_at
    )


def one_by_one(measurement: Measurement, eps: Array, previous: Any) -> Slopes:
    """`central` for a loss that is called on copies of the parameters, one copy at a time."""
    # `seen` has a keyword `view`, so a measurement would run both signs in one pass, with a copy of
    # the parameters for each.
    return central(dataclasses.replace(measurement, one_by_one=True), eps, previous)


def moved_fraction(
    sampler: Factored, params: Any, old: dict[str, Array], new: dict[str, Array]
) -> Float[Array, ""]:
    """Return the fraction of trained parameters that changed; a matrix changes by rows of N."""
    moved, total = jnp.zeros((), jnp.float32), 0.0
    for leaf, site in remembered(params, new):
        changed = old[leaf_name(leaf)] != new[leaf_name(leaf)]
        if is_matrix(site):
            changed = changed.any(-1 if sampler.new_side(leaf.path) == "left" else -2)
        moved += changed.mean(dtype=jnp.float32) * leaf.value.size
        total += leaf.value.size
    return moved / total
