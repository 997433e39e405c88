"""Directions, the view that perturbs along one of them, and the loss measured there.

The directions of an estimate are never stored. Each element of z_j is a function of (key, path,
layer, index); it is computed where a weight is read and again where the weight is updated.
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
from jaxlm.core.dtypes import wide_dtype
from jaxlm.core.errors import UserError
from jaxlm.core.precision import Packed
from jaxlm.zo.samplers import Sampler
from jaxlm.zo.sites import Site

SHARED_PASS = 4
"""Directions of a factored sampler that share one forward pass, each with its own activations."""


def direction_key(key: Array, direction: Any) -> Array:
    """Derive the key of one direction from the key of an estimate."""
    return jax.random.fold_in(jax.random.fold_in(key, 0), direction)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perturbation:
    """The view `W + scale z`, which a model reads while its loss is measured along z.

    Attributes:
      key: key of the direction z.
      scale: ε or -ε; under a `vmap` over it both signs share one draw of z.
      sampler: distribution of z.
      select: parameters that are perturbed.
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
        # Rows gathered by another view: the sampler must see that the rest of the leaf is unknown.
        gathered = isinstance(leaf, views.GatheredRows)
        site = Site(path, views.shape_of(leaf, rows), layer, rows, leaf if gathered else seen)
        z = self.scale * drawn_once(self.sampler.sample(self.key, site))
        if isinstance(z, views.LowRank):
            return views.add_factors(path, seen, z, rows)
        return views.add(seen, z)


def drawn_once(z: Any) -> Any:
    """Return z such that all its uses read the bits of one draw."""
    # Vectors and factors are broadcast over rows. XLA would fuse the draw into the broadcast and
    # repeat it for each row.
    if isinstance(z, views.LowRank) or z.ndim <= 1:
        z = jax.tree.map(prng.prevent_recompute, z)
    # In a fusion the compiler may contract products and sums of the draw into fused multiply-adds,
    # and the forward pass and the update would see other last bits. The barrier prevents that.
    return lax.optimization_barrier(z)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Directions:
    """The n = `count` directions of one estimate: its key, and the sampler of each, stacked."""

    key: Array
    samplers: Sampler
    count: int = dataclasses.field(metadata={"static": True})

    def at(self, j: Any) -> tuple[Array, Any]:
        """Return the key and the sampler of direction j."""
        return direction_key(self.key, j), jax.tree.map(lambda x: x[j], self.samplers)

    def combine(self, coefficients: Float[Array, "n"], site: Site) -> Float[Array, "..."]:
        """Return `Σ_j c_j z_j` at a site, in at least float32."""

        def term(j):
            key, sampler = self.at(j)
            z = drawn_once(sampler.direction(key, site))
            return coefficients[j] * (z.dense() if isinstance(z, views.LowRank) else z)

        # A loop rather than an unrolled sum, so that one z is alive at a time.
        if self.count == 1:
            return term(0)
        return lax.fori_loop(1, self.count, lambda j, total: total + term(j), term(0))


def directions(
    key: Array, sampler: Sampler, params: Any, select: paths.Select, count: int
) -> Directions:
    """Return the directions of the estimate with this key."""
    _refuse_shards(params, select)

    def one(j):
        return sampler.along(direction_key(key, j), params, select)

    return Directions(key, lax.map(one, jnp.arange(count)), count)


def _refuse_shards(params, select):
    """Raise UserError if the leaves may be shards inside `shard_map`."""
    # `shard_map` shows each device its own array, and noise is a function of the index in that
    # array, so all shards would draw the same noise. Arrays that vary between devices carry a mark
    # in their type, unless `check_vma=False`: then even the axis index has none.
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return
    if not _varying(lax.axis_index(mesh.manual_axes[0])):
        raise UserError(
            "params: shards cannot be told from whole parameters inside shard_map with "
            f"check_vma=False (got the axes {mesh.manual_axes}), and all shards would draw the "
            "same noise. Leave check_vma=True, or pass sharded arrays under jit."
        )
    for leaf in trained(params, select):
        if varying := _varying(leaf.value):
            raise UserError(
                f"params: {leaf.path} differs between the devices of shard_map (got the axes "
                f"{tuple(sorted(varying))}), and all shards would draw the same noise. Pass "
                "sharded arrays under jit, outside of shard_map."
            )


def _varying(x):
    """Return the mesh axes along which an array in `shard_map` varies; empty if unchecked."""
    kind = jax.typeof(x)
    axes = getattr(kind, "manual_axis_type", None)  # before JAX 0.10.1, the attribute `vma`
    return getattr(kind, "vma", ()) if axes is None else axes.varying


def trained(params: Any, select: paths.Select) -> list[paths.Leaf]:
    """Return the leaves that move: non-empty arrays of real floats that `select` matches."""
    takes = paths.leaf_predicate(select)
    return [leaf for leaf in paths.flatten(params)[0] if takes(leaf.path, leaf.value)]


def width(params: Any, select: paths.Select) -> np.dtype:
    """Return the dtype of slopes, losses and η: the widest of the trained leaves and float32.

    JAX's default dtype depends on a setting of the process; this does not.
    """
    return jnp.result_type(jnp.float32, *(leaf.value.dtype for leaf in trained(params, select)))


def accepts(function: Callable, keyword: str, *given: Any) -> bool:
    """Return whether a function called with `given` has a free parameter of that name."""
    try:
        signature = inspect.signature(function)
        taken = signature.bind_partial(*given).arguments
    except (TypeError, ValueError):
        return False
    # A keyword bound by `functools.partial` belongs to the user, but stays in the signature.
    inner: Any = function
    while inner is not None:
        if keyword in getattr(inner, "keywords", ()):
            return False
        inner = getattr(inner, "func", None) or getattr(inner, "__wrapped__", None)
    return keyword in signature.parameters and keyword not in taken


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A loss `loss_fn(params, *args, [key], [view])` and the directions along which it is measured.

    See `spsa`. With `one_by_one`, no two passes run together.
    """

    loss_fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    directions: Directions
    select: paths.Select = None
    materialize_params: bool = False
    mesh: Mesh | None = None
    one_by_one: bool = False

    @property
    def lean(self) -> bool:
        """Whether the loss reads its parameters through a view."""
        return self._accepts("view") and not self.materialize_params

    @property
    def together(self) -> bool:
        """Whether passes run together; without views, each would need a copy of the parameters."""
        return self.lean and not self.one_by_one

    def _accepts(self, keyword: str) -> bool:
        return accepts(self.loss_fn, keyword, self.params, *self.args)

    def loss(self, view: Perturbation | None = None) -> tuple[Array, Any]:
        """Return the loss under a view, in at least float32, and its auxiliary output or None."""
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
            raise UserError(
                f"loss_fn: must return a scalar (got an array of shape {jnp.shape(loss)}). "
                "Return its mean."
            )
        dtype = jnp.result_type(loss)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(f"loss_fn: must return a float (got {dtype}). Convert it to float32.")
        return jnp.asarray(loss, wide_dtype(dtype)), aux

    def along(self, scales: Float[Array, "s"]) -> tuple[Float[Array, "n s"], Any]:
        """Return the losses at `θ + scale z_j` and the auxiliary outputs, both stacked.

        With a view all scales share one pass, and so do a few directions of a factored sampler.
        """

        def one(j):
            def at(scale):
                return self.loss(self._view(j, scale))

            def alone(scale):
                # Without the barrier XLA hoists the draw of z out of the loop over signs and keeps
                # all of it: a third copy of the parameters.
                return self.loss(self._view(*lax.optimization_barrier((j, scale))))

            return jax.vmap(at)(scales) if self.together else lax.map(alone, scales)

        return self._over_directions(one)

    def slopes(self) -> tuple[Float[Array, "n"], Float[Array, "n"], Any]:
        """Return losses at θ, their derivatives along z_j and the auxiliary outputs, stacked."""

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
        # Factored directions read each weight once for the whole batch of them. Dense ones would
        # need a perturbed layer each, so they run one after another.
        together = self.together and self.directions.samplers.factored
        indices = jnp.arange(self.directions.count)

        def some(indices):
            return lax.map(one, indices, batch_size=SHARED_PASS if together else None)

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
    """Return a copy of the parameters as a view shows them."""

    def dense(seen):
        return seen.dense() if isinstance(seen, views.LowRankSum) else seen

    def leaf_view(leaf):
        if leaf.stacked:
            layers = jnp.arange(leaf.value.shape[0])
            one = jax.vmap(lambda value, layer: dense(view(leaf.path, value, layer)))
            return one(leaf.value, layers)
        return dense(view(leaf.path, leaf.value, leaf.layer))

    return paths.map_with_path(leaf_view, params)
