"""Directions, the view that moves along one, and the loss measured there.

The directions of an estimate are never stored: each element of z_j is a function of (key, path,
layer, index), made where a weight is read and made again where it is updated.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from jaxlm.core import paths, prng, views
from jaxlm.core.errors import UserError
from jaxlm.core.precision import Packed
from jaxlm.zo.samplers import Sampler
from jaxlm.zo.sites import Site

TOGETHER = 4
"""Directions of a factored sampler that run in one pass."""


def direction_key(key: Array, direction: Any) -> Array:
    """The key of direction j of an estimate, from that of the estimate."""
    return jax.random.fold_in(jax.random.fold_in(key, 0), direction)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perturbation:
    """The view `W + scale z`: what a model reads while its loss is measured along z.

    Attributes:
      key: of the direction z.
      scale: ε, or -ε; a vmap over it runs both signs with z drawn once.
      sampler: distribution of z.
      select: parameters that move.
    """

    key: Array
    scale: Float[Array, ""]
    sampler: Sampler
    select: paths.Select = dataclasses.field(default=None, metadata={"static": True})

    def __call__(self, path: str, leaf: Any, layer, *, rows: prng.Rows = None) -> Any:
        if isinstance(leaf, Packed):
            return views.unpack(
                leaf, lambda name, part, rows: self(f"{path}.{name}", part, layer, rows=rows), rows
            )
        seen = views.take(leaf, rows)
        weight = seen.weight if isinstance(seen, views.LowRankSum) else seen
        if not paths.leaf_predicate(self.select)(path, weight):
            return seen
        lost = isinstance(leaf, views.GatheredRows)
        site = Site(path, views.shape_of(leaf, rows), layer, rows, leaf if lost else seen)
        z = self.scale * settled(self.sampler.sample(self.key, site))
        if isinstance(z, views.LowRank):
            return views.add_factors(path, seen, z, rows)
        return views.add(seen, z)


def settled(z: Any) -> Any:
    """z as it is, drawn once and with the same last bits wherever it is used.

    The barrier keeps fusions from changing bits. What is broadcast, vectors and factors, is
    `prng.prevent_recompute`, or it would be drawn again for each row.
    """
    if isinstance(z, views.LowRank) or z.ndim <= 1:
        z = jax.tree.map(prng.prevent_recompute, z)
    return lax.optimization_barrier(z)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Directions:
    """The n directions of one estimate.

    Attributes:
      key: of the estimate.
      samplers: the sampler of each direction, stacked.
      count: n.
    """

    key: Array
    samplers: Sampler
    count: int = dataclasses.field(metadata={"static": True})

    def at(self, j: Any) -> tuple[Array, Sampler]:
        """Key and sampler of direction j."""
        return direction_key(self.key, j), jax.tree.map(lambda x: x[j], self.samplers)

    def z(self, j: Any, site: Site) -> Any:
        """Direction j at a site, as it enters the estimate; see `Sampler.direction`."""
        key, sampler = self.at(j)
        return settled(sampler.direction(key, site))

    def combine(self, coefficients: Float[Array, "n"], site: Site) -> Float[Array, "..."]:
        """`Σ_j c_j z_j` at a site, at least in float32."""

        def term(j):
            z = self.z(j, site)
            return coefficients[j] * (z.dense() if isinstance(z, views.LowRank) else z)

        if self.count == 1:
            return term(0)
        return lax.fori_loop(1, self.count, lambda j, total: total + term(j), term(0))


def directions(
    key: Array, sampler: Sampler, params: Any, select: paths.Select, count: int
) -> Directions:
    """The directions of the estimate that `key` gives at `params`.

    Raises:
      UserError: inside `shard_map`, where the parameters are, or may be, parts of larger ones.
    """
    _refuse_parts(params, select)

    def one(j):
        return sampler.along(direction_key(key, j), params, select)

    return Directions(key, lax.map(one, jnp.arange(count)), count)


def _refuse_parts(params, select):
    """Raises UserError where the leaves may be one device's parts, which would share their noise.

    `shard_map` shows each device an array of its own, and noise is a function of the index in that
    array. What varies between devices is marked in the type, unless `check_vma=False`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return
    if not _varying(lax.axis_index(mesh.manual_axes[0])):
        raise UserError(
            f"params: inside shard_map with check_vma=False over {mesh.manual_axes}, sharded "
            "parameters cannot be told from whole ones, and every shard would draw the same "
            "noise. Leave check_vma=True, or call from outside with sharded arrays under jit."
        )
    for leaf in trained(params, select):
        if varying := _varying(leaf.value):
            raise UserError(
                f"params: {leaf.path} differs between the devices of shard_map (got "
                f"{tuple(sorted(varying))}), and every shard would draw the same noise. Call from "
                "outside of shard_map with sharded arrays under jit."
            )


def _varying(x):
    """The axes of a mesh along which an array inside `shard_map` differs; empty if unchecked."""
    kind = jax.typeof(x)
    axes = getattr(kind, "manual_axis_type", None)  # before JAX 0.10.1, the attribute `vma`
    return getattr(kind, "vma", ()) if axes is None else axes.varying


def trained(params: Any, select: paths.Select) -> list[paths.Leaf]:
    """The leaves that move: those that `select` takes and that are real floats, at least one."""
    takes = paths.leaf_predicate(select)
    return [leaf for leaf in paths.flatten(params)[0] if takes(leaf.path, leaf.value)]


def width(params: Any, select: paths.Select) -> np.dtype:
    """The dtype of scalars about the parameters that move: of the widest leaf, at least float32.

    Not JAX's default, which a setting of the whole process changes.
    """
    return jnp.result_type(jnp.float32, *(leaf.value.dtype for leaf in trained(params, select)))


def is_traced(value: Any) -> bool:
    """Whether a number is not known yet: under `jit` or `vmap`."""
    return isinstance(value, jax.core.Tracer)


def accepts(function: Callable, keyword: str, *given: Any) -> bool:
    """Whether a function called with `given` has a parameter of that name left to be filled.

    A keyword that `functools.partial` has bound is the user's, though the signature still shows it.
    """
    try:
        signature = inspect.signature(function)
        taken = signature.bind_partial(*given).arguments
    except (TypeError, ValueError):
        return False
    inner: Any = function
    while inner is not None:
        if keyword in getattr(inner, "keywords", ()):
            return False
        inner = getattr(inner, "func", None) or getattr(inner, "__wrapped__", None)
    return keyword in signature.parameters and keyword not in taken


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A loss, and the directions along which it is measured.

    Attributes:
      loss_fn: `loss_fn(params, *args, [key], [view]) -> loss` or `(loss, aux)`.
      params: where.
      args: what it takes besides.
      directions: the z_j.
      select: parameters that move.
      materialize_params: perturb a copy of the parameters even if `loss_fn` has a keyword `view`.
      mesh: over whose axis `data` the directions are spread; None for no axis.
    """

    loss_fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    directions: Directions
    select: paths.Select = None
    materialize_params: bool = False
    mesh: Mesh | None = None

    @property
    def lean(self) -> bool:
        """Whether the model reads its parameters through a view."""
        return self._accepts("view") and not self.materialize_params

    def _accepts(self, keyword: str) -> bool:
        return accepts(self.loss_fn, keyword, self.params, *self.args)

    def loss(self, view: Perturbation | None = None) -> tuple[Array, Any]:
        """The loss seen through a view, in at least float32, and the aux output or None."""
        params = self.params
        options: dict[str, Any] = {}
        if self._accepts("key"):
            options["key"] = jax.random.fold_in(self.directions.key, 1)
        if self.lean:
            options["view"] = view
        elif view is not None:
            params = materialized(view, params)
        out = self.loss_fn(params, *self.args, **options)
        loss, aux = out if isinstance(out, tuple) else (out, None)
        if jnp.shape(loss) != ():
            raise ValueError(f"the loss must be a scalar, not an array of shape {jnp.shape(loss)}")
        dtype = jnp.result_type(loss)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"the loss must be a float, not {dtype}")
        return jnp.asarray(loss, jnp.promote_types(dtype, jnp.float32)), aux

    def along(self, scales: Float[Array, "s"]) -> tuple[Float[Array, "n s"], Any]:
        """Losses at `θ + scale z_j`, and what else came out, stacked alike.

        With a view all scales run in one pass, and so do a few directions of a factored sampler.
        """

        def one(j):
            def at(scale):
                return self.loss(self._view(j, scale))

            def alone(scale):
                # Else XLA draws z before the loop over signs, and keeps all of it: P more.
                return self.loss(self._view(*lax.optimization_barrier((j, scale))))

            return jax.vmap(at)(scales) if self.lean else lax.map(alone, scales)

        return self._over_directions(one)

    def slopes(self) -> tuple[Float[Array, "n"], Float[Array, "n"], Any]:
        """Losses at θ, their exact derivatives along z_j, and what else came out, all stacked."""

        def one(j):
            def at(scale):
                loss, aux = self.loss(self._view(j, scale))
                return loss, (loss, aux)

            zero = jnp.zeros((), width(self.params, self.select))
            _, slope, (loss, aux) = jax.jvp(at, (zero,), (jnp.ones_like(zero),), has_aux=True)
            return loss, slope, aux

        return self._over_directions(one)

    def _view(self, j, scale):
        key, sampler = self.directions.at(j)
        return Perturbation(key, scale, sampler, self.select)

    def _over_directions(self, one):
        together = TOGETHER if self.lean and self.directions.samplers.factored else None
        indices = jnp.arange(self.directions.count)

        def some(indices):
            return lax.map(one, indices, batch_size=together)

        if self.mesh is None:
            return some(indices)

        def own(indices):
            return lax.all_gather(some(indices), "data", tiled=True)

        spread = jax.shard_map(
            own,
            mesh=self.mesh,
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec(),
            axis_names={"data"},
            check_vma=False,
        )
        return spread(indices)


def materialized(view: views.View, params: Any) -> Any:
    """A copy of the parameters as a view shows them."""

    def dense(seen):
        return seen.dense() if isinstance(seen, views.LowRankSum) else seen

    def leaf_view(leaf):
        if leaf.stacked:
            layers = jnp.arange(leaf.value.shape[0])
            one = jax.vmap(lambda value, layer: dense(view(leaf.path, value, layer)))
            return one(leaf.value, layers)
        return dense(view(leaf.path, leaf.value, leaf.layer))

    return paths.map_with_path(leaf_view, params)
