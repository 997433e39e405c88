"""Structured perturbations: low-rank, of some layers, of small weights, or rescaled by group.

Each sampler draws its numbers from a `base` sampler. Groups of parameters are each layer, "embed"
and "head"; their norms for `variance_modified` are `tree_norms` or `probed_norms`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxlm.core import paths, views
from jaxlm.core.checks import integer, real, show
from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError
from jaxlm.core.views import LowRank
from jaxlm.zo.checks import MOST_COPIES
from jaxlm.zo.estimators import Estimator, central, spsa
from jaxlm.zo.perturbation import trained
from jaxlm.zo.samplers import Gaussian, Sampler, register
from jaxlm.zo.sites import Site

OUT_FIRST = r"(^|[._])(embeddings?|weight)(\.(value|values|scale))?$"
"""Paths of matrices that are stored [out, in], as in PyTorch; others are [in, out]."""


def is_matrix(site: Site) -> bool:
    """Return whether one layer of the leaf has two axes."""
    return len(site.shape) == 2


@dataclasses.dataclass(frozen=True)
class Factored(Sampler):
    """Base of low-rank samplers: two factors for a matrix, dense noise for all other leaves.

    One factor is new for each direction; the other one, drawn from `reuse_key` if it is given,
    stays for `interval` steps. `base` draws the entries.
    """

    rank: int
    interval: int
    base: Sampler
    out_first: str | None = OUT_FIRST
    reuse_key: Any = None
    factored = True

    def at(self, key, step) -> Any:
        return dataclasses.replace(self, reuse_key=jax.random.fold_in(key, step // self.interval))

    def sample(self, key, site):
        return self.factors(key, site) if is_matrix(site) else self.base.sample(key, site)

    def factors(self, key: Array, site: Site) -> LowRank:
        """Return the two factors of z at a matrix."""
        new, reused = self.new_factor(key, site), self.reused_factor(key, site)
        return LowRank(new, reused) if self.new_side(site.path) == "left" else LowRank(reused, new)

    def new_side(self, path: str) -> Literal["left", "right"]:
        """Return the side of the factor that is new for each direction."""
        raise NotImplementedError

    def new_factor(self, key: Array, site: Site) -> Array:
        """Draw the factor that is new for each direction."""
        raise NotImplementedError

    def reused_factor(self, key: Array, site: Site) -> Array:
        """Draw the factor that stays for an interval."""
        raise NotImplementedError

    def rank_of(self, path: str, shape: tuple[int, ...]) -> int:
        """Return the rank at a matrix."""
        raise NotImplementedError

    def _out_first(self, path: str) -> bool:
        return self.out_first is not None and re.search(self.out_first, path) is not None

    def _reuse_key(self, key):
        return key if self.reuse_key is None else self.reuse_key

    def _entries(self, key, site, side, rank=None):
        """Draw the entries of a factor: [*rows, rank] or [rank, columns]."""
        rank = self.rank_of(site.path, site.shape) if rank is None else rank
        left = side == "left"
        shape = (site.shape[0], rank) if left else (rank, site.shape[1])
        rows = site.rows if left else None
        return self.base.sample(key, Site(f"{site.path}.{side}", shape, site.layer, rows))


def _other(side: str) -> str:
    return "right" if side == "left" else "left"


@register("base", "reuse_key")
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

    def reused_factor(self, key, site):
        return self._entries(self._reuse_key(key), site, _other(self.new_side(site.path)))

    def rank_of(self, path, shape):
        # By columns alone: the number of rows is unknown for rows gathered by another view.
        return min(self.rank, shape[1])


@register("base", "reuse_key")
@dataclasses.dataclass(frozen=True)
class Subspace(Factored):
    """P u with orthonormal P; see `subspace`."""

    def new_side(self, path):
        return "right" if self._out_first(path) else "left"

    def new_factor(self, key, site):
        return self._entries(key, site, self.new_side(site.path))

    def reused_factor(self, key, site):
        basis = self.basis(key, site)
        return views.take(basis, site.rows) if self._out_first(site.path) else basis.T

    def rank_of(self, path, shape):
        return min(self.rank, shape[0] if self._out_first(path) else shape[1])

    def basis(self, key: Array, site: Site) -> Float[Array, "out rank"]:
        """Return P, whose orthonormal columns are uniformly distributed if `base` is Gaussian."""
        if isinstance(site.value, views.GatheredRows):
            raise UserError(
                f"{site.path}: a subspace needs the whole matrix (got rows gathered by another "
                "view). Use zo.low_rank, or leave the parameter out by `select`."
            )
        side = _other(self.new_side(site.path))
        drawn = self._entries(self._reuse_key(key), site._replace(rows=None), side)
        return orthonormal(drawn if side == "left" else drawn.T)


def orthonormal(x: Float[Array, "n r"]) -> Float[Array, "n r"]:
    r"""Turn any [n, r] numbers, r <= n, into the first r orthonormal columns of $H_1 \cdots H_r$.

    $H_j$ is the reflection that maps $x_{j:n,j}$ to a multiple of $e_j$, and column j has the sign
    that makes the multiple positive. For Gaussian x the result is distributed as the Q, with a
    positive diagonal of R, of the QR decomposition of a Gaussian matrix. It is computed without r
    sequential steps and for any condition of x, since $H_1 \cdots H_r = I - W T W^\top$ is
    orthogonal for every W.

    References: Stewart, "The efficient generation of random orthogonal matrices", 1980; Joffrain et
    al., "Accumulating Householder transformations, revisited", 2006.
    """
    # Matrix products alone: a LAPACK call can hang in a program whose other threads wait for it.
    n, r = x.shape
    row, column = jnp.arange(n)[:, None], jnp.arange(r)[None]
    x = jnp.where(row >= column, x, 0)
    size = jnp.abs(x).max(0, keepdims=True)
    x = x / jnp.where(size > 0, size, 1)
    first = jnp.diagonal(x)[None]
    sign = jnp.where(first < 0, -1, 1).astype(x.dtype)
    length = jnp.sqrt(jnp.square(x).sum(0, keepdims=True))
    # |v|^2 = 2 length (length + |first|), and |w|^2 = 2; a column of zeros gives no reflection.
    square = length * (length + jnp.abs(first))
    v = x + jnp.where(row == column, sign * length, 0)
    w = v / jnp.sqrt(jnp.where(square > 0, square, 1))
    with jax.default_matmul_precision("highest"):
        # T^-1 is upper triangular with unit diagonal. Invert it by blocks that double in size.
        above, t, block = w.T @ w, jnp.eye(r, dtype=x.dtype), 1
        while block < r:
            pair = (row[:r] // block % 2 == 0) & (row[:r] // block + 1 == column // block)
            t = t - t @ jnp.where(pair, above, 0) @ t
            block *= 2
        return -sign * (jnp.eye(n, r, dtype=x.dtype) - w @ (t @ w[:r].T))


@register("base", "active")
@dataclasses.dataclass(frozen=True)
class Blocks(Sampler):
    """z on some layers at a time; see `layer_blocks`."""

    num_layers: int
    size: int
    base: Sampler
    active: Any = None

    @property
    def count(self) -> int:
        """Number of blocks: those of layers, and one of all other parameters."""
        return -(-self.num_layers // self.size) + 1

    def at(self, key, step):
        return dataclasses.replace(self, active=jnp.asarray(step) % self.count)

    def check(self, params, select):
        for leaf in trained(params, select):
            layer = paths.identity(leaf.path, leaf.layer)[1]
            depth = leaf.value.shape[0] if leaf.stacked else (layer or 0) + 1
            if depth > self.num_layers or (leaf.stacked and depth < self.num_layers):
                raise UserError(
                    f"num_layers: must be the depth of {leaf.path}, {depth} (got "
                    f"{self.num_layers}). Correct it."
                )

    def sample(self, key, site):
        if self.active is None:
            raise UserError(
                "sampler: layer_blocks chooses its block by the step (got none). Use it in an "
                "optimizer, or call its method `at` first."
            )
        layer = paths.identity(site.path, site.layer)[1]
        block = self.count - 1 if layer is None else layer // self.size
        drawn = functools.partial(self.base.sample, key, site)

        def nothing():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(drawn))

        return lax.cond(self.active == block, drawn, nothing)


@register("base", "limits")
@dataclasses.dataclass(frozen=True)
class Magnitude(Sampler):
    """z on small weights alone; see `magnitude`."""

    base: Sampler
    limits: Mapping[str, Array]

    def check(self, params, select):
        for path in dict.fromkeys(leaf.path for leaf in trained(params, select)):
            if paths.identity(path)[0] not in self.limits:
                raise UserError(
                    f"{path}: has no threshold (got thresholds of {show(sorted(self.limits))}). "
                    "Give zo.magnitude all trained parameters, or leave it out by `select`."
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
        for path in dict.fromkeys(leaf.path for leaf in trained(params, select)):
            if group(path) not in self.norms:
                raise UserError(
                    f"{path}: has no norm (got norms of {sorted(self.norms)}). Give one for "
                    f"{group(path)!r}, or leave it out by `select`."
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
    """Return the group of a path: "layers" (one group for each layer), "embed" or "head"."""
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

    Z is [out, in], and transposed for a matrix that is stored [in, out]. U [out, r] is new for each
    direction, V [in, r] stays for `interval` steps. Both are drawn from `base`, so Z has mean 0 and
    covariance I, and the estimate is unbiased over draws of both. While V stays, the mean of the
    estimate is the gradient projected on the span of V. A dense layer computes $x W + \epsilon (x
    V) U^\top$ and reads W once for both signs and all directions.

    Args:
      rank: r; at most the number of columns of a matrix.
      interval: number of steps for which V stays; `spsa` alone draws both factors from its key.
      base: distribution of the entries, and of leaves that are not matrices.
      out_first: a regular expression that matches the paths of matrices stored [out, in], by
        default embedding tables and PyTorch's weights. None matches no path; "" matches all, which
        keeps V on the output side of a kernel.
      scale: s of $Z = s U V^\top$; None for $1 / \sqrt r$. The authors' code uses 1, which makes
        the estimate of a matrix r times as long as that of a vector.

    References: Chen et al., "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank
    Structures", arXiv:2410.07698. The paper has s = 1 and divides the estimate by r, which equals
    this at an eps that is sqrt(r) times smaller, for matrices.
    """
    _check_factors(rank, interval)
    return LowRankSampler(rank, interval, base, out_first, scale=scale)


def subspace(
    rank: int = 64,
    *,
    interval: int = 100,
    base: Sampler = Gaussian(),
    out_first: str | None = OUT_FIRST,
) -> Subspace:
    r"""$Z = P u$ for matrices: P [out, r] orthonormal for `interval` steps, u [r, in] from `base`.

    Z is [out, in], and transposed for a matrix that is stored [in, out]. The estimate is unbiased
    for the gradient projected on the span of P. The perturbation of ZO-Muon (arXiv:2602.17155).

    Args:
      rank: r; at most the output size of a matrix.
      interval: number of steps for which P stays.
      base: distribution of u, and of leaves that are not matrices.
      out_first: see `low_rank`.
    """
    _check_factors(rank, interval)
    return Subspace(rank, interval, base, out_first)


def _check_factors(rank: int, interval: int) -> None:
    integer("rank", rank, most=MOST_COPIES)
    integer("interval", interval)


def layer_blocks(num_layers: int, *, size: int = 1, base: Sampler = Gaussian()) -> Blocks:
    """Perturb `size` consecutive layers in a step, and all other parameters in a step of their own.

    The blocks take turns; over a cycle they give one estimate of the whole gradient.

    References: Park et al., "Elucidating Subspace Perturbation in Zeroth-Order Optimization",
    arXiv:2501.19099 (block coordinate descent).
    """
    integer("size", size, most=num_layers)
    return Blocks(num_layers, size, base)


def magnitude(params: Any, fraction: float = 0.25, *, base: Sampler = Gaussian()) -> Magnitude:
    """Perturb small weights alone: z where |w| is at most a threshold, 0 elsewhere.

    Args:
      params: parameters whose quantiles are the thresholds, one for each leaf and layer. The mask
        follows the weights as they move.
      fraction: fraction of each leaf to perturb.
      base: distribution of z.

    References: Liu et al., "Sparse MeZO", arXiv:2402.15751.
    """
    real("fraction", fraction, above=0, most=1)

    def limits(leaf: paths.Leaf) -> Array:
        size = jnp.abs(wide(leaf.value))
        rows = size.reshape(len(size) if leaf.stacked else 1, -1)
        kept = jnp.quantile(rows, fraction, axis=1, method="lower")
        return kept if leaf.stacked else kept[0]

    thresholds: dict[str, Any] = {}
    listed: dict[str, dict[int, Array]] = {}
    for leaf in trained(params, None):
        path, layer = paths.identity(leaf.path, leaf.layer)
        if layer is None:
            thresholds[path] = limits(leaf)
        else:
            listed.setdefault(path, {})[layer] = limits(leaf)
    for path, own in listed.items():
        nothing = jnp.zeros_like(next(iter(own.values())))
        thresholds[path] = jnp.stack([own.get(i, nothing) for i in range(max(own) + 1)])
    return Magnitude(base, thresholds)


def variance_modified(norms: Mapping[str, Array], base: Sampler = Gaussian()) -> Rescaled:
    r"""Perturb by $z / c$ and estimate by $c z$, c the norm of a group; the estimate is unbiased.

    Args:
      norms: c of each group, see `jaxlm.zo.tree_norms` and `jaxlm.zo.probed_norms`.
      base: distribution of z.

    References: arXiv:2305.17333, definition 6.
    """
    return Rescaled(base, norms, 1)


def expectation_modified(norms: Mapping[str, Array], base: Sampler = Gaussian()) -> Rescaled:
    r"""Perturb by $z / c$ and estimate by $z$: the gradient of each group divided by its c.

    References: arXiv:2305.17333, definition 7; arguments as in `variance_modified`.
    """
    return Rescaled(base, norms, 0)


def tree_norms(tree: Any, select: paths.Select = None) -> dict[str, Array]:
    r"""Return $\|x_g\|_2$ of each group of a tree of parameters or gradients.

    Returns:
      A scalar for "embed" and "head", [L] for "layers".
    """
    leaves = trained(tree, select)
    depth = _depth(leaves)
    squares: dict[str, Array] = {}
    for leaf in leaves:
        axes = tuple(range(1 if leaf.stacked else 0, leaf.value.ndim))
        square = jnp.square(wide(leaf.value)).sum(axes)
        name, layer = group(leaf.path), paths.identity(leaf.path, leaf.layer)[1]
        if layer is not None:
            square = jnp.zeros(depth, square.dtype).at[layer].set(square)
        squares[name] = squares[name] + square if name in squares else square
    return {name: jnp.sqrt(square) for name, square in squares.items()}


def _depth(leaves: list[paths.Leaf]) -> int:
    """Return the number of layers, stacked or listed; 0 if there are none."""
    listed = (paths.identity(leaf.path, leaf.layer)[1] for leaf in leaves if not leaf.stacked)
    depths = {layer + 1 for layer in listed if layer is not None}
    return max(depths | {leaf.value.shape[0] for leaf in leaves if leaf.stacked}, default=0)


def probed_norms(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    key: Array,
    select: paths.Select = None,
    base: Sampler = Gaussian(),
    eps: float | Array = 1e-3,
    num_directions: int = 1,
    estimator: Estimator = central,
    materialize_params: bool = False,
    mesh: Mesh | None = None,
) -> dict[str, Array]:
    r"""Estimate the gradient norm of each group by forward passes, as $|g|$ of a z on that group.

    It takes two forward passes for each group and direction. One draw of $|g| = |z\cdot\nabla_g L|$
    has the size of $\|\nabla_g L\|$ and a standard deviation as large.

    Args:
      loss_fn: see `spsa`, as for all arguments that are not listed here.
      select: parameters to probe.
      base: distribution of z.

    Returns:
      A scalar for "embed" and "head", [L] for "layers".

    References: arXiv:2305.17333, proposition 1.
    """
    matches = paths.path_predicate(select)
    leaves = trained(params, select)
    depth = _depth(leaves)

    def norm(name, sampler):
        def chosen(path):
            return matches(path) and group(path) == name

        est = spsa(
            loss_fn,
            params,
            *args,
            key=key,
            eps=eps,
            sampler=sampler,
            num_directions=num_directions,
            select=chosen,
            estimator=estimator,
            materialize_params=materialize_params,
            mesh=mesh,
        )
        return jnp.abs(est.projected_grad).mean()

    names = {group(leaf.path) for leaf in leaves} - ({paths.LAYERS} if depth else set())
    norms = {name: norm(name, base) for name in sorted(names)}
    if depth:
        blocks = layer_blocks(depth, base=base)

        def of_layer(layer):
            return norm(paths.LAYERS, dataclasses.replace(blocks, active=layer))

        norms[paths.LAYERS] = lax.map(of_layer, jnp.arange(depth))
    return norms
