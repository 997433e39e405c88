"""Update rules that work in the factors of low-rank directions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxlm.core import paths, views
from jaxlm.core.views import LowRank
from jaxlm.zo.perturbation import Directions, settled
from jaxlm.zo.rules import Rule, at_least_zero, below_one
from jaxlm.zo.sites import Site
from jaxlm.zo.structured import Factored, LowRankSampler, Subspace, is_matrix


def factored_momentum(decay: float = 0.9) -> Rule:
    r"""Momentum of a low-rank estimate in its new factor: LOZO-M.

    While V stays, $u = N V^\top$ [out, in] with $N \leftarrow \beta N + (1 - \beta) \overline{g
    U}$, [out, r], that begins as $\overline{g U}$ of the first step; where V changes, N is carried
    to the new one, $N \leftarrow N V_{old}^\top V_{new} / in$. Leaves that are no matrices have a
    momentum of their own size. Needs the sampler `low_rank`.

    References: arXiv:2410.07698.
    """
    below_one(decay=decay)

    def init(setup):
        sampler = setup.sampler
        if not isinstance(sampler, LowRankSampler):
            raise ValueError(_needs("factored_momentum", "low_rank", sampler))
        return new_factors(sampler, setup.params, setup.select, jnp.zeros_like)

    def update(drawn, params, state):
        now, before = drawn.now, drawn.directions(jnp.maximum(drawn.last, 0))
        slopes = drawn.projected_grad
        first = drawn.last < 0

        def moved(site, old):
            new = mean_new_factor(now, slopes, site)
            if is_matrix(site):
                old = carried(now, before, site, old)
            return jnp.where(first, new, decay * old + (1 - decay) * new)

        state = over_layers(moved, state, params)

        def block(site):
            own = own_part(state, site.path, site.layer)
            if not is_matrix(site):
                return views.take(own, site.rows)
            return with_lazy(*lazy_of(now), site, own).dense()

        return state, block

    return Rule(f"factored_momentum(decay={decay})", init, update)


def carried(now: Directions, before: Directions, site: Site, old: Array) -> Array:
    """N of the step before at the V of this one: as it is while V stays."""
    (sampler, key), (old_sampler, old_key) = lazy_of(now), lazy_of(before)
    new, last = sampler.lazy_factor(key, site), old_sampler.lazy_factor(old_key, site)
    if sampler.new_side(site.path) == "left":
        moved = old @ (last @ new.T) / new.shape[1]
    else:
        moved = (new.T @ last) @ old / new.shape[0]
    return jnp.where(jnp.any(new != last), moved, old)


def orthogonalized(*, vector_scale: float = 1e-5) -> Rule:
    r"""$u = P\,\mathrm{NS}(G)$ for matrices, $G = 1/n \sum_j g_j u_j$ [r, in]: ZO-Muon.

    NS makes the singular values of G near 1 by five Newton-Schulz steps. Needs the sampler
    `subspace`, whose $z_j = P u_j$.

    Args:
      vector_scale: what the estimate of other leaves is multiplied by; the authors' code trains
        them at a learning rate of 1e-7 beside 1e-2.

    References: arXiv:2602.17155; Jordan et al., "Muon: An optimizer for hidden layers", 2024.
    """
    at_least_zero(vector_scale=vector_scale)

    def init(setup):
        if not isinstance(setup.sampler, Subspace):
            raise ValueError(_needs("orthogonalized", "subspace", setup.sampler))
        return ()

    def update(drawn, params, state):
        del params
        now, slopes = drawn.now, drawn.projected_grad

        def block(site):
            if not is_matrix(site):
                return vector_scale * now.combine(slopes / now.count, site)
            mean = mean_new_factor(now, slopes, site._replace(rows=None))
            return with_lazy(*lazy_of(now), site, newton_schulz(mean)).dense()

        return state, block

    return Rule(f"orthogonalized(vector_scale={vector_scale})", init, update)


def _needs(rule: str, wanted: str, sampler: Any) -> str:
    return f"the rule {rule} needs the sampler {wanted}, not {sampler}"


def newton_schulz(x: Float[Array, "m n"], steps: int = 5) -> Float[Array, "m n"]:
    """A matrix with the singular vectors of x and singular values of about 1."""
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T, steps).T
    x = x / (jnp.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def mean_new_factor(directions: Directions, slopes: Array, site: Site) -> Array:
    """`1/n Σ_j g_j U_j` of the factors of a matrix that differ; of another leaf that of the z_j."""
    if not is_matrix(site):
        return directions.combine(slopes / directions.count, site)
    total: Any = 0.0
    for j in range(directions.count):
        key, sampler = directions.at(j)
        new = settled(sampler.new_factor(key, site))  # type: ignore[attr-defined]
        total += slopes[j] / directions.count * new
    return total


def lazy_of(directions: Directions) -> tuple[Any, Array]:
    """A sampler and a key that give the lazy factor of all directions."""
    key, sampler = directions.at(0)
    return sampler, key


def with_lazy(sampler: Factored, key: Array, site: Site, new: Array) -> LowRank:
    """A whole factor in the place of the new one, beside the lazy one, at the rows of a site."""
    lazy = settled(sampler.lazy_factor(key, site))
    if sampler.new_side(site.path) == "right":
        return LowRank(lazy, new)
    return LowRank(views.take(new, site.rows), lazy)


def leaf_name(leaf: paths.Leaf) -> str:
    """What the memory of a leaf is kept under: its path, with the layer where layers are apart."""
    return paths.indexed(*paths.identity(leaf.path, leaf.layer))


def own_part(memory: dict[str, Array], path: str, layer: Any) -> Any:
    """The memory of a leaf, of one layer where it is stacked; None where there is none.

    A model asks by path and layer, whether its layers are a stack or a list; and of a list by a
    layer that is traced, where each has the same shape.
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


def map_leaves(
    function: Callable[[paths.Leaf], Array], params: Any, select: paths.Select
) -> dict[str, Array]:
    """`function(leaf)` of the selected leaves, by name."""
    takes = paths.leaf_predicate(select)
    leaves = [leaf for leaf in paths.flatten(params)[0] if takes(leaf.path, leaf.value)]
    return {leaf_name(leaf): function(leaf) for leaf in leaves}


def new_factors(
    sampler: Factored, params: Any, select: paths.Select, vector: Callable[..., Array]
) -> dict[str, Array]:
    """Zeros in the shape of the new factor of a matrix; `vector(value, dtype)` of another leaf."""

    def own(leaf):
        value = leaf.value
        wide = jnp.promote_types(value.dtype, jnp.float32)
        shape = value.shape[leaf.stacked :]
        if len(shape) != 2:
            return vector(value, wide)
        rank = sampler.rank_of(leaf.path, shape)
        left = sampler.new_side(leaf.path) == "left"
        new = (shape[0], rank) if left else (rank, shape[1])
        return jnp.zeros((*value.shape[: leaf.stacked], *new), wide)

    return map_leaves(own, params, select)


def remembered(params: Any, memory: dict[str, Array]) -> list[tuple[paths.Leaf, Site]]:
    """The leaves that have a memory, each with the site of the whole leaf, or of one layer."""
    return [
        (leaf, Site(leaf.path, leaf.value.shape[leaf.stacked :], leaf.layer, None, leaf.value))
        for leaf in paths.flatten(params)[0]
        if leaf_name(leaf) in memory
    ]


def over_layers(
    function: Callable[[Site, Array], Array], memory: dict[str, Array], params: Any
) -> dict[str, Array]:
    """`function(site, own)` for every leaf with a memory, layer after layer: its new memory."""

    def one(leaf, site):
        own = memory[leaf_name(leaf)]
        if not leaf.stacked:
            return function(site, own)

        def at(item):
            layer, value, own = item
            return function(site._replace(layer=layer, value=value), own)

        return lax.map(at, (jnp.arange(len(leaf.value)), leaf.value, own))

    return {leaf_name(leaf): one(leaf, site) for leaf, site in remembered(params, memory)}
