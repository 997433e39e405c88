"""Perturbations of few factors, of a few layers, of small weights, or rescaled by group.

Each draws its numbers from a `base` sampler.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxlm.core import paths, views
from jaxlm.core.views import LowRank
from jaxlm.zo.samplers import Gaussian, Sampler, register
from jaxlm.zo.sites import Site

OUT_FIRST = r"(^|[._])(embeddings?|weight)(\.(value|values|scale))?$"
"""Paths of matrices that are stored [out, in], as those of PyTorch are; others are [in, out]."""


def is_matrix(site: Site) -> bool:
    """Whether the leaf of a site, of one layer, has two axes."""
    return len(site.shape) == 2


def _selected(params: Any, select: paths.Select) -> list[paths.Leaf]:
    takes = paths.leaf_predicate(select)
    return [leaf for leaf in paths.flatten(params)[0] if takes(leaf.path, leaf.value)]


@dataclasses.dataclass(frozen=True)
class Factored(Sampler):
    """What low-rank samplers share: two factors for a matrix, dense noise for everything else.

    One factor is new for each direction, the other one, the lazy one, stays for an interval.

    Attributes:
      rank: r; a matrix that is smaller gets less, see `rank_of`.
      interval: steps for which the lazy factor stays.
      base: of the entries.
      out_first: a regular expression, the paths of matrices that are [out, in].
      lazy: key of the lazy factor; None for that of the direction.
    """

    rank: int
    interval: int
    base: Sampler
    out_first: str | None = OUT_FIRST
    lazy: Any = None
    factored = True

    def at(self, key, step) -> Any:
        return dataclasses.replace(self, lazy=jax.random.fold_in(key, step // self.interval))

    def sample(self, key, site):
        return self.factors(key, site) if is_matrix(site) else self.base.sample(key, site)

    def factors(self, key: Array, site: Site) -> LowRank:
        """The two factors of z at a matrix."""
        new, lazy = self.new_factor(key, site), self.lazy_factor(key, site)
        return LowRank(new, lazy) if self.new_side(site.path) == "left" else LowRank(lazy, new)

    def new_side(self, path: str) -> Literal["left", "right"]:
        """Which factor of a matrix is new for each direction."""
        raise TypeError(f"{type(self).__name__} has no method new_side")

    def new_factor(self, key: Array, site: Site) -> Array:
        """The factor that is new for each direction."""
        raise TypeError(f"{type(self).__name__} has no method new_factor")

    def lazy_factor(self, key: Array, site: Site) -> Array:
        """The factor that stays for an interval."""
        raise TypeError(f"{type(self).__name__} has no method lazy_factor")

    def rank_of(self, path: str, shape: tuple[int, ...]) -> int:
        """The rank at a matrix."""
        raise TypeError(f"{type(self).__name__} has no method rank_of")

    def _out_first(self, path: str) -> bool:
        return self.out_first is not None and re.search(self.out_first, path) is not None

    def _lazy_key(self, key):
        return key if self.lazy is None else self.lazy

    def _entries(self, key, site, side, rank=None):
        """Numbers of a factor: [*rows, rank] or [rank, columns]."""
        rank = self.rank_of(site.path, site.shape) if rank is None else rank
        left = side == "left"
        shape = (site.shape[0], rank) if left else (rank, site.shape[1])
        rows = site.rows if left else None
        return self.base.sample(key, Site(f"{site.path}.{side}", shape, site.layer, rows))


def _other(side: str) -> str:
    return "right" if side == "left" else "left"


@register("base", "lazy")
@dataclasses.dataclass(frozen=True)
class LowRankSampler(Factored):
    """U V^T; see `low_rank`."""

    scale: float | None = None

    def new_side(self, path):
        return "left" if self._out_first(path) else "right"

    def new_factor(self, key, site):
        scale = self.scale
        if scale is None:
            scale = 1 / math.sqrt(self.rank_of(site.path, site.shape))
        return scale * self._entries(key, site, self.new_side(site.path))

    def lazy_factor(self, key, site):
        return self._entries(self._lazy_key(key), site, _other(self.new_side(site.path)))

    def rank_of(self, path, shape):
        # Of a table whose rows were taken behind another view, the number of rows is not known.
        return min(self.rank, shape[1])


@register("base", "lazy")
@dataclasses.dataclass(frozen=True)
class Subspace(Factored):
    """P u with orthonormal P; see `subspace`."""

    def new_side(self, path):
        return "right" if self._out_first(path) else "left"

    def new_factor(self, key, site):
        return self._entries(key, site, self.new_side(site.path))

    def lazy_factor(self, key, site):
        basis = self.basis(key, site)
        return views.take(basis, site.rows) if self._out_first(site.path) else basis.T

    def rank_of(self, path, shape):
        return min(self.rank, shape[0] if self._out_first(path) else shape[1])

    def basis(self, key: Array, site: Site) -> Float[Array, "out rank"]:
        """P: orthonormal columns, uniform among all of them where `base` is Gaussian."""
        if isinstance(site.value, views.GatheredRows):
            raise ValueError(f"{site.path}: a subspace cannot be drawn behind another view")
        side = _other(self.new_side(site.path))
        drawn = self._entries(self._lazy_key(key), site._replace(rows=None), side)
        return orthonormal(drawn if side == "left" else drawn.T)


def orthonormal(x: Float[Array, "n r"]) -> Float[Array, "n r"]:
    r"""Orthonormal columns from any n r numbers, r <= n: the first r columns of $H_1 \cdots H_r$.

    $H_j$ is the reflection that takes $x_{j:n,j}$ to a multiple of $e_j$, and column j has the sign
    that makes the multiple positive. Where x is Gaussian this is the Q, with a positive diagonal of
    R, of the QR decomposition of a Gaussian matrix, without its r steps one after another and
    without its condition: $H_1 \cdots H_r = I - W T W^\top$ is orthogonal whatever W is. Products
    alone, no solver of LAPACK: those can stop for ever in a program whose other threads wait for
    them.

    References: Stewart, "The efficient generation of random orthogonal matrices", 1980; Joffrain et
    al., "Accumulating Householder transformations, revisited", 2006.
    """
    n, r = x.shape
    row, column = jnp.arange(n)[:, None], jnp.arange(r)[None]
    x = jnp.where(row >= column, x, 0)
    size = jnp.abs(x).max(0, keepdims=True)
    x = x / jnp.where(size > 0, size, 1)
    first = jnp.diagonal(x)[None]
    sign = jnp.where(first < 0, -1, 1).astype(x.dtype)
    length = jnp.sqrt(jnp.square(x).sum(0, keepdims=True))
    # |v|^2 is 2 length (length + |first|), and |w|^2 is 2; a column of zeros is no reflection.
    square = length * (length + jnp.abs(first))
    v = x + jnp.where(row == column, sign * length, 0)
    w = v / jnp.sqrt(jnp.where(square > 0, square, 1))
    with jax.default_matmul_precision("highest"):
        # T^-1 is upper triangular with a diagonal of ones: inverses of blocks, twice as large in
        # each turn.
        above, t, block = w.T @ w, jnp.eye(r, dtype=x.dtype), 1
        while block < r:
            pair = (row[:r] // block % 2 == 0) & (row[:r] // block + 1 == column // block)
            t = t - t @ jnp.where(pair, above, 0) @ t
            block *= 2
        return -sign * (jnp.eye(n, r, dtype=x.dtype) - w @ (t @ w[:r].T))


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
        for leaf in _selected(params, select):
            layer = paths.identity(leaf.path, leaf.layer)[1]
            depth = leaf.value.shape[0] if leaf.stacked else (layer or 0) + 1
            if depth > self.num_layers or (leaf.stacked and depth < self.num_layers):
                raise ValueError(f"num_layers is {self.num_layers}, but {leaf.path} has {depth}")

    def sample(self, key, site):
        if self.active is None:
            raise ValueError("blocks of layers take turns by step: use them in an optimizer")
        layer = paths.identity(site.path, site.layer)[1]
        block = self.count - 1 if layer is None else layer // self.size
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
        for path in dict.fromkeys(leaf.path for leaf in _selected(params, select)):
            if paths.identity(path)[0] not in self.limits:
                raise ValueError(
                    f"{path} has no threshold: give magnitude the parameters that are trained, or "
                    f"leave {path} out by select"
                )

    def sample(self, key, site):
        path, layer = paths.identity(site.path, site.layer)
        limit = self.limits[path] if layer is None else self.limits[path][layer]
        value = site.value.value if isinstance(site.value, views.GatheredRows) else site.value
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
        for path in dict.fromkeys(leaf.path for leaf in _selected(params, select)):
            if group(path) not in self.norms:
                raise ValueError(
                    f"{path} has no norm: give one for {group(path)!r} beside those for "
                    f"{sorted(self.norms)}, or leave {path} out by select"
                )

    def _norm(self, site):
        norm = self.norms[group(site.path, site.layer)]
        layer = paths.identity(site.path, site.layer)[1]
        return norm if norm.ndim == 0 else norm[layer]

    def sample(self, key, site):
        return self.base.sample(key, site) / self._norm(site)

    def direction(self, key, site):
        return self.base.direction(key, site) * self._norm(site) ** self.power


def group(path: str, layer: Any = None) -> str:
    """Group of a path: "layers", of which each is one, "embed", or "head" for everything else."""
    if paths.is_declared(path) or paths.identity(path, layer)[1] is not None:
        return paths.LAYERS
    return "embed" if path.split(".", 1)[0] == "embed" else "head"


def low_rank(
    rank: int = 2,
    *,
    interval: int = 50,
    base: Sampler = Gaussian(),
    out_first: str | None = OUT_FIRST,
    scale: float | None = None,
) -> LowRankSampler:
    r"""$Z = U V^\top / \sqrt r$ for matrices, `base` for the rest; the noise of LOZO.

    Z is [out, in], its transpose where a matrix is [in, out]. U [out, r] is new for each direction,
    V [in, r] stays for `interval` steps. Both are drawn from `base`, so Z has mean 0 and covariance
    I, and the estimate is unbiased over draws of both; while V stays, its mean is the gradient
    projected on the span of V. A dense layer computes $x W + \epsilon (x V) U^\top$ and reads W
    once for both signs and all directions.

    Args:
      rank: r; of a matrix with fewer columns, their number.
      interval: steps of an optimizer for which V stays; alone, `spsa` draws both from its key.
      base: of the entries and of leaves that are no matrices.
      out_first: a regular expression, the paths of matrices that are [out, in]; those of embedding
        tables and of weights in the manner of PyTorch as it stands. None for no path; "" for all,
        which keeps V on the output side of a kernel.
      scale: s of $Z = s U V^\top$, None for $1 / \sqrt r$. The authors' code has 1, which makes the
        estimate of a matrix r times as long as that of a vector.

    References: Chen et al., "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank
    Structures", arXiv:2410.07698. The paper has s = 1 and divides the estimate by r: for matrices
    the same as here at an eps that is sqrt(r) times smaller.
    """
    _check(rank, interval)
    return LowRankSampler(rank, interval, base, out_first, scale=scale)


def subspace(
    rank: int = 64,
    *,
    interval: int = 100,
    base: Sampler = Gaussian(),
    out_first: str | None = OUT_FIRST,
) -> Subspace:
    r"""$Z = P u$ for matrices: P [out, r] orthonormal for `interval` steps, u [r, in] from `base`.

    Z is [out, in], its transpose where a matrix is [in, out]. The estimate is unbiased for the
    gradient projected on the span of P. The perturbation of ZO-Muon (arXiv:2602.17155); arguments
    as in `low_rank`, r at most the size of the output.
    """
    _check(rank, interval)
    return Subspace(rank, interval, base, out_first)


def _check(rank: int, interval: int) -> None:
    if rank < 1 or interval < 1:
        raise ValueError(f"rank and interval are at least 1, not {rank} and {interval}")


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

    def limits(leaf: paths.Leaf) -> Array:
        wide = jnp.abs(leaf.value.astype(jnp.promote_types(leaf.value.dtype, jnp.float32)))
        rows = wide.reshape(wide.shape[0] if leaf.stacked else 1, -1)
        kept = jnp.quantile(rows, fraction, axis=1, method="lower")
        return kept if leaf.stacked else kept[0]

    found: dict[str, Any] = {}
    listed: dict[str, dict[int, Array]] = {}
    for leaf in _selected(params, None):
        path, layer = paths.identity(leaf.path, leaf.layer)
        if layer is None:
            found[path] = limits(leaf)
        else:
            listed.setdefault(path, {})[layer] = limits(leaf)
    for path, own in listed.items():
        nothing = jnp.zeros_like(next(iter(own.values())))
        found[path] = jnp.stack([own.get(i, nothing) for i in range(max(own) + 1)])
    return Magnitude(base, found)


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
