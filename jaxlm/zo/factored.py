"""Update rules for low-rank directions, and their state in factors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxlm.core import paths, views
from jaxlm.core.checks import show
from jaxlm.core.dtypes import wide_dtype
from jaxlm.core.errors import UserError
from jaxlm.core.views import LowRank
from jaxlm.zo.checks import decay_rates, real
from jaxlm.zo.perturbation import Directions, drawn_once
from jaxlm.zo.rules import Rule
from jaxlm.zo.sites import Site
from jaxlm.zo.structured import Factored, LowRankSampler, Subspace, is_matrix


def factored_momentum(momentum: float = 0.9) -> Rule:
    r"""Momentum of a low-rank estimate, kept in its new factor: LOZO-M.

    While V stays, $u = N V^\top$ [out, in] with $N \leftarrow \beta N + (1 - \beta) \overline{g
    U}$ [out, r], and N is $\overline{g U}$ after the first step. When V changes, N is projected on
    the new one: $N \leftarrow N V_{old}^\top V_{new} / in$. Leaves that are not matrices have dense
    momentum. Requires the sampler `low_rank`.

    Args:
      momentum: β.

    References: arXiv:2410.07698.
    """
    decay_rates(momentum=momentum)

    def init(setup):
        sampler = setup.sampler
        _require_sampler("factored_momentum", "low_rank", LowRankSampler, sampler)
        return new_factors(sampler, setup.params, setup.select, jnp.zeros_like)

    def update(drawn, params, state):
        now, before = drawn.now, drawn.directions(jnp.maximum(drawn.last, 0))
        key, sampler = now.at(0)
        slopes = drawn.projected_grad
        first = drawn.last < 0

        def moved(site, old):
            new = mean_new_factor(now, slopes, site)
            if is_matrix(site):
                old = projected(now, before, site, old)
            return jnp.where(first, new, momentum * old + (1 - momentum) * new)

        state = over_layers(moved, state, params)

        def block(site):
            own = memory_at(state, site.path, site.layer)
            if not is_matrix(site):
                return views.take(own, site.rows)
            return with_reused(key, sampler, site, own).dense()

        return state, block

    return Rule(f"factored_momentum(decay={momentum})", init, update)


def projected(now: Directions, before: Directions, site: Site, old: Array) -> Array:
    """Return N of the previous step, projected on the V of this step; N itself while V stays."""
    (key, sampler), (old_key, old_sampler) = now.at(0), before.at(0)
    new, last = sampler.reused_factor(key, site), old_sampler.reused_factor(old_key, site)
    if sampler.new_side(site.path) == "left":
        moved = old @ (last @ new.T) / new.shape[1]
    else:
        moved = (new.T @ last) @ old / new.shape[0]
    return jnp.where(jnp.any(new != last), moved, old)


def orthogonalized(*, vector_scale: float = 1e-5) -> Rule:
    r"""$u = P\,\mathrm{NS}(G)$ for matrices, $G = 1/n \sum_j g_j u_j$ [r, in]: ZO-Muon.

    NS, five Newton-Schulz steps, brings the singular values of G near 1. Requires the sampler
    `subspace`, whose $z_j = P u_j$.

    Args:
      vector_scale: factor of the estimate for leaves that are not matrices. The authors' code
        trains those at a learning rate of 1e-7 beside 1e-2.

    References: arXiv:2602.17155; Jordan et al., "Muon: An optimizer for hidden layers", 2024.
    """
    real("vector_scale", vector_scale, least=0.0)

    def init(setup):
        _require_sampler("orthogonalized", "subspace", Subspace, setup.sampler)
        return ()

    def update(drawn, params, state):
        del params
        now, slopes = drawn.now, drawn.projected_grad
        key, sampler = now.at(0)

        def block(site):
            if not is_matrix(site):
                return vector_scale * now.combine(slopes / now.count, site)
            mean = mean_new_factor(now, slopes, site._replace(rows=None))
            return with_reused(key, sampler, site, newton_schulz(mean)).dense()

        return state, block

    return Rule(f"orthogonalized(vector_scale={vector_scale})", init, update)


def _require_sampler(rule: str, name: str, kind: type, sampler: Any) -> None:
    if not isinstance(sampler, kind):
        raise UserError(
            f"sampler: must be zo.{name} under the rule {rule} (got {show(sampler)}). Give one."
        )


def newton_schulz(x: Float[Array, "m n"], steps: int = 5) -> Float[Array, "m n"]:
    """Return a matrix with the singular vectors of x and singular values of about 1."""
    # Muon's coefficients, which make the iteration steep at 0 rather than exact at 1.
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T, steps).T
    x = x / (jnp.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def mean_new_factor(directions: Directions, slopes: Array, site: Site) -> Array:
    """Return `1/n Σ_j g_j U_j` of the new factors of a matrix; of other leaves, of the z_j."""
    if not is_matrix(site):
        return directions.combine(slopes / directions.count, site)
    total: Any = 0.0
    for j in range(directions.count):
        key, sampler = directions.at(j)
        new = drawn_once(sampler.new_factor(key, site))
        total += slopes[j] / directions.count * new
    return total


def with_reused(key: Array, sampler: Any, site: Site, new: Array) -> LowRank:
    """Return the factors at the rows of a site, given a new factor for all rows.

    The key and the sampler may be those of any direction, since all share the reused factor.
    """
    reused = drawn_once(sampler.reused_factor(key, site))
    if sampler.new_side(site.path) == "right":
        return LowRank(reused, new)
    return LowRank(views.take(new, site.rows), reused)


def leaf_name(leaf: paths.Leaf) -> str:
    """Return the name of a leaf in a memory: its path, with its layer in an unstacked tree."""
    return paths.indexed(*paths.identity(leaf.path, leaf.layer))


def memory_at(memory: dict[str, Array], path: str, layer: Any) -> Any:
    """Return the memory of a leaf, of one layer if it is stacked; None if it has none.

    For a list of layers of equal shape the index may be traced.
    """
    path, layer = paths.identity(path, layer)
    if layer is None or path in memory:
        own = memory.get(path)
        return own if own is None or layer is None else own[layer]
    if not isinstance(layer, jax.core.Tracer):
        return memory.get(paths.indexed(path, int(layer)))
    listed: list[Array] = []
    while (name := paths.indexed(path, len(listed))) in memory:
        listed.append(memory[name])
    return jnp.stack(listed)[layer] if listed else None


def new_factors(
    sampler: Factored, params: Any, select: paths.Select, vector: Callable[..., Array]
) -> dict[str, Array]:
    """Return zeros for the new factor of each matrix, `vector(value, dtype)` for other leaves."""

    def own(leaf):
        value = leaf.value
        dtype = wide_dtype(value)
        shape = value.shape[leaf.stacked :]
        if len(shape) != 2:
            return vector(value, dtype)
        rank = sampler.rank_of(leaf.path, shape)
        left = sampler.new_side(leaf.path) == "left"
        new = (shape[0], rank) if left else (rank, shape[1])
        return jnp.zeros((*value.shape[: leaf.stacked], *new), dtype)

    takes = paths.leaf_predicate(select)
    leaves = [leaf for leaf in paths.flatten(params)[0] if takes(leaf.path, leaf.value)]
    return {leaf_name(leaf): own(leaf) for leaf in leaves}


def remembered(params: Any, memory: dict[str, Array]) -> list[tuple[paths.Leaf, Site]]:
    """Return the leaves that have a memory, each with a site of all its rows."""
    return [
        (leaf, Site(leaf.path, leaf.value.shape[leaf.stacked :], leaf.layer, None, leaf.value))
        for leaf in paths.flatten(params)[0]
        if leaf_name(leaf) in memory
    ]


def over_layers(
    function: Callable[[Site, Array], Array], memory: dict[str, Array], params: Any
) -> dict[str, Array]:
    """Return `function(site, own)` for every leaf that has a memory, layer by layer."""

    def one(leaf, site):
        own = memory[leaf_name(leaf)]
        if not leaf.stacked:
            return function(site, own)

        def at(item):
            layer, value, own = item
            return function(site._replace(layer=layer, value=value), own)

        return lax.map(at, (jnp.arange(len(leaf.value)), leaf.value, own))

    return {leaf_name(leaf): one(leaf, site) for leaf, site in remembered(params, memory)}
