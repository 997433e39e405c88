"""LOZO whose steps add up in float32 factors, for parameters in few bits.

While the right factor V of `low_rank` stays, what a run has added to a matrix is N V, with N [in,
r] in float32. The model reads W + N V as a `LowRankSum`; W itself is rewritten once every
`interval` steps. So no step is lost to rounding, and a step costs no pass over the parameters.
Leaves that are no matrices have a float32 copy.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlm.core import paths, prng, views
from jaxlm.core.precision import Packed
from jaxlm.core.views import LowRank
from jaxlm.zo.estimators import check, spsa
from jaxlm.zo.factored import leaf_name, map_leaves, mean_direction, over_layers, own_part
from jaxlm.zo.optimizers import (
    ScalarOrSchedule,
    ZerothOrderOptimizer,
    first_state,
    info_of,
    rates,
    round_to,
    value_at,
    written,
)
from jaxlm.zo.perturbation import accepts, directions, materialized, settled
from jaxlm.zo.samplers import Gaussian, Sampler
from jaxlm.zo.sites import Site, over_blocks
from jaxlm.zo.structured import LowRankSampler, is_matrix, is_matrix_leaf, low_rank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residual:
    """The view `W + N V`, and the float32 copies of what is no matrix.

    Attributes:
      memory: N and copies, by the name of the leaf.
      sampler: that V is drawn from.
      key: any key; V does not depend on it.
    """

    memory: dict[str, Array]
    sampler: LowRankSampler
    key: Array

    def __call__(self, path: str, leaf: Any, layer, *, rows: prng.Rows = None) -> Any:
        if isinstance(leaf, Packed) or path not in self.memory:
            return views.take(leaf, rows)
        seen = views.take(leaf, rows)
        site = Site(path, leaf.shape, layer, rows, seen)
        own = own_part(self.memory, site)
        if not is_matrix(site):
            return own.astype(leaf.dtype)
        return views.add_factors(path, seen, self.factors(site, own), rows)

    def factors(self, site: Site, own: Array) -> LowRank:
        """N V at a site."""
        return LowRank(own, settled(self.sampler.factors(self.key, site)).right)


def lozo_residual(
    learning_rate: ScalarOrSchedule,
    *,
    rank: int = 2,
    interval: int = 50,
    base: Sampler = Gaussian(),
    eps: float = 1e-3,
    num_directions: int = 1,
    select: paths.Select = None,
) -> ZerothOrderOptimizer:
    """`lozo` with a float32 residual in factors, for bfloat16 parameters and for speed.

    `step` returns parameters without the residual; `finalize(params, state)` adds it, wherever they
    are evaluated or saved. Layers must be stacked. Every `interval` steps the residual is folded
    in with stochastic rounding.

    Args:
      learning_rate: η, or an optax schedule of the step.
      rank, interval, base: see `low_rank`.
      eps: ε.
      num_directions: n.
      select: parameters that are trained.
    """
    check(eps, num_directions)
    sampler = low_rank(rank, interval=interval, base=base)

    def residual(state):
        lazy = sampler.at(state.key, state.step)
        return Residual(state.memory, lazy, state.key)

    def init(params, key):
        paths.check_unique_hashes(params)
        paths.mask(params, select)
        sampler.check(params, select)

        def memory(leaf):
            wide = jnp.promote_types(leaf.value.dtype, jnp.float32)
            if is_matrix_leaf(leaf):
                return jnp.zeros((*leaf.value.shape[:-1], rank), wide)
            return jnp.array(leaf.value, wide)

        return first_state(num_directions, key, map_leaves(memory, params, select))

    def step(loss_fn, params, state, batch):
        base = residual(state)

        def seen(params, batch, *, key, view=None):
            options = {"key": key} if accepts(loss_fn, "key") else {}
            view = views.compose(base, view)
            if accepts(loss_fn, "view"):
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
        )
        rate = value_at(learning_rate, state.step)
        params, state, moved = update(params, state, est.projected_grad)
        return params, state, info_of(est, rate, moved)

    def update(params, state, projected_grad):
        slopes = jnp.where(jnp.isfinite(projected_grad), projected_grad, 0)
        key = jax.random.fold_in(state.key, state.step)
        now = directions(key, residual(state).sampler, params, select, num_directions)
        rate = value_at(learning_rate, state.step)

        def moved(site, own):
            u = mean_direction(now, slopes, site)
            return own - rate * (u.left if is_matrix(site) else u)

        memory = over_layers(moved, state.memory, params)
        state = state._replace(memory=memory)
        full = (state.step + 1) % interval == 0
        params = lax.cond(full, folded, lambda params, state: params, params, state)

        def emptied(leaf):
            own = memory[leaf_name(leaf)]
            return jnp.where(full, 0, own) if is_matrix_leaf(leaf) else own

        memory = map_leaves(emptied, params, select)
        return params, state._replace(step=state.step + 1, memory=memory), jnp.ones(())

    def folded(params, state):
        base, takes = residual(state), paths.chooser(select)
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 2)

        def whole(leaf):
            if not takes(leaf.path, leaf.value):
                return leaf.value

            def block(site):
                own = own_part(state.memory, site)
                if not is_matrix(site):
                    return own.astype(site.value.dtype), jnp.zeros(())
                new = site.value.astype(own.dtype) + base.factors(site, own).dense()
                return round_to(new, site, "stochastic", key), jnp.zeros(())

            return over_blocks(block, leaf)[0]

        return paths.map_with_path(whole, params)

    settings = {
        "learning_rate": rates(learning_rate),
        "eps": eps,
        "sampler": repr(sampler),
        "rule": "residual",
        "num_directions": num_directions,
        "select": written(select),
    }
    return ZerothOrderOptimizer(init, step, update, settings, 2 * num_directions, folded, select)
