"""Perturbations of few factors, of a few layers, of small weights, or rescaled by group.

Each draws its numbers from a `base` sampler.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxlm.core import paths, views
from jaxlm.core.views import LowRank
from jaxlm.zo.samplers import Gaussian, Sampler, register
from jaxlm.zo.sites import Site


def is_matrix(site: Site) -> bool:
    """Whether the leaf of a site, of one layer, has two axes."""
    return len(site.shape) == 2


def is_matrix_leaf(leaf: paths.Leaf) -> bool:
    """Whether a leaf, or each layer of it, has two axes."""
    return leaf.value.ndim - leaf.stacked == 2


def _selected(params: Any, select: paths.Select) -> list[str]:
    takes = paths.chooser(select)
    return [leaf.path for leaf in paths.flatten(params)[0] if takes(leaf.path, leaf.value)]


def _matrices(params: Any, select: paths.Select) -> list[tuple[str, tuple[int, ...]]]:
    takes = paths.chooser(select)
    return [
        (leaf.path, leaf.value.shape[-2:])
        for leaf in paths.flatten(params)[0]
        if takes(leaf.path, leaf.value) and is_matrix_leaf(leaf)
    ]


@dataclasses.dataclass(frozen=True)
class Factored(Sampler):
    """What low-rank samplers share: two factors for a matrix, dense noise for everything else.

    Attributes:
      rank: r.
      interval: steps for which the lazy factor stays.
      base: of the entries.
      lazy: key of the lazy factor; None for that of the direction.
    """

    rank: int
    interval: int
    base: Sampler
    lazy: Any = None
    factored = True

    def at(self, key, step) -> Any:
        return dataclasses.replace(self, lazy=jax.random.fold_in(key, step // self.interval))

    def check(self, params, select):
        found = _matrices(params, select)
        if not found:
            raise ValueError(
                f"{type(self).__name__} needs a matrix among the selected parameters; there is none"
            )
        for path, shape in found:
            if self.rank > min(shape):
                raise ValueError(f"rank {self.rank} is more than {path} of shape {shape} has")

    def sample(self, key, site):
        return self.factors(key, site) if is_matrix(site) else self.base.sample(key, site)

    def factors(self, key: Array, site: Site) -> LowRank:
        """The two factors of z at a matrix."""
        raise TypeError(f"{type(self).__name__} has no method factors")

    def _entries(self, key, site, name, shape, rows=None):
        return self.base.sample(key, Site(f"{site.path}.{name}", shape, site.layer, rows))


@register("base", "lazy")
@dataclasses.dataclass(frozen=True)
class LowRankSampler(Factored):
    """U V^T; see `low_rank`."""

    def factors(self, key, site):
        rows, columns = site.shape
        lazy = key if self.lazy is None else self.lazy
        left = self._entries(key, site, "left", (rows, self.rank), site.rows)
        right = self._entries(lazy, site, "right", (self.rank, columns))
        return LowRank(left / np.sqrt(self.rank), right)


@register("base", "lazy")
@dataclasses.dataclass(frozen=True)
class Subspace(Factored):
    """P u with orthonormal P; see `subspace`."""

    def factors(self, key, site):
        right = self._entries(key, site, "right", (self.rank, site.shape[1]))
        return LowRank(views.take(self.basis(key, site), site.rows), right)

    def basis(self, key: Array, site: Site) -> Float[Array, "in rank"]:
        """P: the orthonormal columns that span those of a Gaussian matrix."""
        if isinstance(site.value, views.Taken):
            raise ValueError(f"{site.path}: a subspace cannot be drawn behind another view")
        lazy = key if self.lazy is None else self.lazy
        drawn = self._entries(lazy, site, "left", (site.shape[0], self.rank))
        product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
        return product(drawn, _orthonormalizer(product(drawn.T, drawn)))


def _orthonormalizer(gram: Float[Array, "r r"]) -> Float[Array, "r r"]:
    """The upper triangular T for which D T is orthonormal, D^T D being `gram`.

    Gram-Schmidt, twice for each column, in matrix products alone: the solvers of LAPACK can stop
    for ever in a program whose other threads wait for them.
    """

    def column(j, found):
        new = jax.nn.one_hot(j, gram.shape[0], dtype=gram.dtype)
        for _ in range(2):
            new = new - found @ (found.T @ (gram @ new))
        return found.at[:, j].set(new / jnp.sqrt(new @ gram @ new))

    with jax.default_matmul_precision("highest"):
        return lax.fori_loop(0, gram.shape[0], column, jnp.zeros_like(gram))


@register("base", "active")
@dataclasses.dataclass(frozen=True)
class Blocks(Sampler):
    """Some layers at a time; see `layer_blocks`."""

    num_layers: int
    size: int
    base: Sampler
    active: Any = None

    @property
    def count(self) -> int:
        """Blocks of layers, and one of all other parameters."""
        return -(-self.num_layers // self.size) + 1

    def at(self, key, step):
        return dataclasses.replace(self, active=jnp.asarray(step) % self.count)

    def check(self, params, select):
        for leaf in paths.flatten(params)[0]:
            depth = leaf.value.shape[0] if leaf.stacked else (leaf.layer or 0) + 1
            if depth > self.num_layers or (leaf.stacked and depth < self.num_layers):
                raise ValueError(f"num_layers is {self.num_layers}, but {leaf.path} has {depth}")

    def sample(self, key, site):
        if self.active is None:
            raise ValueError("blocks of layers take turns by step: use them in an optimizer")
        block = self.count - 1 if site.layer is None else site.layer // self.size
        drawn = functools.partial(self.base.sample, key, site)

        def nothing():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(drawn))

        return lax.cond(self.active == block, drawn, nothing)


@register("base", "limits")
@dataclasses.dataclass(frozen=True)
class Magnitude(Sampler):
    """Small weights alone; see `magnitude`."""

    base: Sampler
    limits: Mapping[str, Array]

    def check(self, params, select):
        for path in _selected(params, select):
            if path not in self.limits:
                raise ValueError(
                    f"{path} has no threshold: give magnitude the parameters that are trained, or "
                    f"leave {path} out by select"
                )

    def sample(self, key, site):
        limit = self.limits[site.path]
        limit = limit if limit.ndim == 0 else limit[site.layer]
        value = site.value.value if isinstance(site.value, views.Taken) else site.value
        z = jnp.asarray(self.base.sample(key, site))
        return jnp.where(jnp.abs(value) <= limit, z, 0)


@register("base", "norms")
@dataclasses.dataclass(frozen=True)
class Rescaled(Sampler):
    """z divided by the norm of its group; see `variance_modified`, `expectation_modified`."""

    base: Sampler
    norms: Mapping[str, Array]
    power: int

    def check(self, params, select):
        for path in _selected(params, select):
            if group(path) not in self.norms:
                raise ValueError(
                    f"{path} has no norm: give one for {group(path)!r} beside those for "
                    f"{sorted(self.norms)}, or leave {path} out by select"
                )

    def _norm(self, site):
        norm = self.norms[group(site.path)]
        return norm if norm.ndim == 0 else norm[site.layer]

    def sample(self, key, site):
        return self.base.sample(key, site) / self._norm(site)

    def direction(self, key, site):
        return self.base.direction(key, site) * self._norm(site) ** self.power


def group(path: str) -> str:
    """Group of a path: "layers", of which each is one, "embed", or "head" for everything else."""
    first = path.split(".", 1)[0]
    return first if first in (paths.LAYERS, "embed") else "head"


def low_rank(rank: int = 2, *, interval: int = 50, base: Sampler = Gaussian()) -> LowRankSampler:
    r"""$Z = U V^\top / \sqrt r$ for matrices, `base` for the rest; the noise of LOZO.

    U [in, r] is new for each direction, V [out, r] stays for `interval` steps. Both are drawn from
    `base`, so Z has mean 0 and covariance I, and the estimate is unbiased over draws of both; while
    V stays, its mean is the gradient projected on the span of V. A dense layer computes
    $x W + \epsilon (x U) V^\top$ and reads W once for both signs and all directions.

    Args:
      rank: r.
      interval: steps of an optimizer for which V stays; alone, `spsa` draws both from its key.
      base: of the entries and of leaves that are no matrices.

    References: Chen et al., "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank
    Structures", arXiv:2410.07698. The paper perturbs by U V^T and divides the estimate by r: the
    same as here at an eps that is sqrt(r) times smaller.
    """
    if rank < 1 or interval < 1:
        raise ValueError(f"rank and interval are at least 1, not {rank} and {interval}")
    return LowRankSampler(rank, interval, base)


def subspace(rank: int = 64, *, interval: int = 100, base: Sampler = Gaussian()) -> Subspace:
    r"""$Z = P u$ for matrices: P [in, r] orthonormal for `interval` steps, u [r, out] from `base`.

    The estimate is unbiased for the gradient projected on the span of P. The perturbation of
    ZO-Muon (arXiv:2602.17155); arguments as in `low_rank`.
    """
    if rank < 1 or interval < 1:
        raise ValueError(f"rank and interval are at least 1, not {rank} and {interval}")
    return Subspace(rank, interval, base)


def layer_blocks(num_layers: int, *, size: int = 1, base: Sampler = Gaussian()) -> Blocks:
    """Perturbs `size` consecutive layers in a step, all parameters outside of layers in another.

    The blocks take turns. Over a cycle the estimates add up to one of the whole gradient.

    References: Park et al., "Elucidating Subspace Perturbation in Zeroth-Order Optimization",
    arXiv:2501.19099 (block coordinate descent).
    """
    if not 1 <= size <= num_layers:
        raise ValueError(f"size is {size}: give 1 to {num_layers} layers")
    return Blocks(num_layers, size, base)


def magnitude(params: Any, fraction: float = 0.25, *, base: Sampler = Gaussian()) -> Magnitude:
    """Perturbs the weights that are small: z where |w| is at most a threshold, 0 elsewhere.

    Args:
      params: whose quantiles set the thresholds, one for each leaf and layer; the mask itself
        follows the weights as they move.
      fraction: of each leaf that is perturbed.
      base: of z.

    References: Liu et al., "Sparse MeZO", arXiv:2402.15751.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}: give more than 0 and at most 1")

    def limit(leaf: paths.Leaf) -> Array:
        wide = jnp.abs(leaf.value.astype(jnp.float32))
        rows = wide.reshape(wide.shape[0] if leaf.stacked else 1, -1)
        kept = jnp.quantile(rows, fraction, axis=1, method="lower")
        return kept if leaf.stacked else kept[0]

    takes = paths.chooser(None)
    leaves = [leaf for leaf in paths.flatten(params)[0] if takes(leaf.path, leaf.value)]
    if any(leaf.layer is not None for leaf in leaves):
        raise ValueError("layers are a list: give stacked layers")
    return Magnitude(base, {leaf.path: limit(leaf) for leaf in leaves})


def variance_modified(norms: Mapping[str, Array], base: Sampler = Gaussian()) -> Rescaled:
    r"""Perturbs by $z / c$ and estimates by $c z$, c the norm of a group: unbiased still.

    Args:
      norms: c of the groups, see `jaxlm.zo.tree_norms` and `jaxlm.zo.probed_norms`.
      base: of z.

    References: arXiv:2305.17333, definition 6.
    """
    return Rescaled(base, norms, 1)


def expectation_modified(norms: Mapping[str, Array], base: Sampler = Gaussian()) -> Rescaled:
    r"""Perturbs by $z / c$ and estimates by $z$: each group's gradient divided by its c.

    References: arXiv:2305.17333, definition 7; arguments as in `variance_modified`.
    """
    return Rescaled(base, norms, 0)
