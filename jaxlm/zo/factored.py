"""Update rules that work in the factors of low-rank directions."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxlm.core import paths, views
from jaxlm.core.views import LowRank
from jaxlm.zo.perturbation import Directions
from jaxlm.zo.rules import Rule, Setup
from jaxlm.zo.sites import Site
from jaxlm.zo.structured import Factored, LowRankSampler, Subspace, is_matrix, is_matrix_leaf


def factored_momentum(decay: float = 0.9) -> Rule:
    r"""Momentum of a low-rank estimate in its left factor: LOZO-M.

    While V stays, $u = N V^\top$ with $N \leftarrow \beta N + (1 - \beta) \overline{g U}$, [in, r];
    where it changes, N is carried to the new one, $N \leftarrow N V_{old}^\top V_{new} / out$.
    Leaves that are no matrices have a momentum of their own size. Needs the sampler `low_rank`.

    References: arXiv:2410.07698.
    """

    def init(setup):
        rank = _rank(setup, LowRankSampler, "factored_momentum", "low_rank")

        def zeros(leaf):
            shape = leaf.value.shape
            return jnp.zeros((*shape[:-1], rank) if is_matrix_leaf(leaf) else shape)

        return map_leaves(zeros, setup.params, setup.select)

    def update(drawn, params, state):
        now, before = drawn.now, drawn.directions(jnp.maximum(drawn.step - 1, 0))
        slopes = drawn.projected_grad

        def moved(site, old):
            new = mean_direction(now, slopes, site)
            if is_matrix(site):
                right, last = now.z(0, site).right, before.z(0, site).right
                changed = jnp.any(right != last)
                old = jnp.where(changed, old @ (last @ right.T) / right.shape[1], old)
                new = new.left
            return decay * old + (1 - decay) * new

        state = over_layers(moved, state, params)

        def block(site):
            own = own_part(state, site)
            return LowRank(own, now.z(0, site).right).dense() if is_matrix(site) else own

        return state, block

    return Rule(f"factored_momentum(decay={decay})", init, update)


def orthogonalized(*, vector_scale: float = 1e-5) -> Rule:
    r"""$u = P\,\mathrm{NS}(G)$ for matrices, $G = 1/n \sum_j g_j u_j$ [r, out]: ZO-Muon.

    NS makes the singular values of G near 1 by five Newton-Schulz steps. Needs the sampler
    `subspace`, whose $z_j = P u_j$.

    Args:
      vector_scale: what the estimate of other leaves is multiplied by; the authors' code trains
        them at a learning rate of 1e-7 beside 1e-2.

    References: arXiv:2602.17155; Jordan et al., "Muon: An optimizer for hidden layers", 2024.
    """

    def init(setup):
        _rank(setup, Subspace, "orthogonalized", "subspace")
        return ()

    def update(drawn, params, state):
        del params
        now, slopes = drawn.now, drawn.projected_grad

        def block(site):
            if not is_matrix(site):
                return vector_scale * now.combine(slopes / now.count, site)
            mean = mean_direction(now, slopes, site, right=True)
            return LowRank(mean.left, newton_schulz(mean.right)).dense()

        return state, block

    return Rule(f"orthogonalized(vector_scale={vector_scale})", init, update)


def newton_schulz(x: Float[Array, "r n"], steps: int = 5) -> Float[Array, "r n"]:
    """A matrix with the singular vectors of x and singular values of about 1, for r <= n."""
    x = x / (jnp.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def mean_direction(
    directions: Directions, slopes: Array, site: Site, *, right: bool = False
) -> Any:
    """`1/n Σ_j g_j z_j`; of factored z the mean of the factor that differs, and the other one."""
    if not is_matrix(site):
        return directions.combine(slopes / directions.count, site)
    means = []
    for j in range(directions.count):
        z = directions.z(j, site)
        means.append(slopes[j] / directions.count * (z.right if right else z.left))
    return LowRank(z.left, sum(means)) if right else LowRank(sum(means), z.right)


def _rank(setup: Setup, kind: type[Factored], rule: str, name: str) -> int:
    if not isinstance(setup.sampler, kind):
        raise ValueError(f"the rule {rule} needs the sampler {name}, not {setup.sampler}")
    return setup.sampler.rank


def leaf_name(where: Site | paths.Leaf) -> str:
    """What the memory of a leaf is kept under: its path, with the layer where layers are apart."""
    return f"{where.path}.{where.layer}" if isinstance(where.layer, int) else where.path


def own_part(memory: dict[str, Array], site: Site) -> Array:
    """The memory of a site."""
    own = memory[leaf_name(site)]
    own = own if site.layer is None or isinstance(site.layer, int) else own[site.layer]
    return views.take(own, site.rows)


def map_leaves(
    function: Callable[[paths.Leaf], Array], params: Any, select: paths.Select
) -> dict[str, Array]:
    """`function(leaf)` of the selected leaves, by name."""
    takes = paths.chooser(select)
    leaves = [leaf for leaf in paths.flatten(params)[0] if takes(leaf.path, leaf.value)]
    return {leaf_name(leaf): function(leaf) for leaf in leaves}


def over_layers(
    function: Callable[[Site, Array], Array], memory: dict[str, Array], params: Any
) -> dict[str, Array]:
    """`function(site, own)` for every leaf with a memory, layer after layer: its new memory."""

    def one(leaf):
        value, own = leaf.value, memory[leaf_name(leaf)]
        if not leaf.stacked:
            return function(Site(leaf.path, value.shape, leaf.layer, None, value), own)

        def at(item):
            layer, value, own = item
            return function(Site(leaf.path, value.shape, layer, None, value), own)

        return lax.map(at, (jnp.arange(value.shape[0]), value, own))

    leaves = [leaf for leaf in paths.flatten(params)[0] if leaf_name(leaf) in memory]
    return {leaf_name(leaf): one(leaf) for leaf in leaves}
