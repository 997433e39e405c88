"""What lies where: parameters know their mesh, and what is computed with them follows.

A program never asks how many devices there are. It is given parameters, finds the mesh that they
lie on, and puts its batches there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxlm.artifacts.processes import to_host
from jaxlm.sharding.mesh import AXES
from jaxlm.sharding.rules import DEFAULT, Rules, param_shardings


def mesh_of(tree: PyTree) -> Mesh | None:
    """The mesh that a tree lies on; None where it lies on one device without a mesh.

    >>> mesh_of({"w": jax.numpy.zeros(2)}) is None
    True

    Raises:
      ValueError: leaves lie on several meshes.
    """
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    meshes = {s.mesh for s in shardings if isinstance(s, NamedSharding) and not s.mesh.empty}
    concrete = {mesh for mesh in meshes if isinstance(mesh, Mesh)}
    if len(concrete) > 1:
        raise ValueError(f"the leaves lie on {len(concrete)} meshes, and must lie on one")
    return next(iter(concrete), None)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def place_params(params: PyTree, mesh: Mesh, rules: Rules = DEFAULT) -> PyTree:
    """Parameters on a mesh, by the rules; a leaf that lies on it already stays where it is.

    Args:
      params: arrays, the same in every process.
      mesh: of `make_mesh`.
      rules: see `param_shardings`.
    """

    def place(leaf: Any, sharding: NamedSharding) -> Any:
        return leaf if mesh_of(leaf) == mesh else _put(leaf, sharding)

    return jax.tree.map(place, params, param_shardings(params, mesh, rules))


def place_batch(batch: PyTree, mesh: Mesh, axis: int = 0) -> PyTree:
    """A batch on a mesh, its rows divided over data and fsdp; each process puts its own rows there.

    Args:
      batch: arrays, the same in every process, so that the batch of a step is the same however many
        processes there are.
      mesh: of `make_mesh`.
      axis: of the rows. A leaf without it, or whose rows the devices do not divide, is replicated.
    """

    def place(leaf: Any, sharding: NamedSharding) -> Any:
        return leaf if mesh_of(leaf) == mesh else _put(leaf, sharding)

    return jax.tree.map(place, batch, batch_places(batch, mesh, axis))


def batch_places(batch: PyTree, mesh: Mesh, axis: int = 0) -> PyTree:
    """Where `place_batch` puts the leaves of a batch, which need only have shapes."""
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES[:2]))

    def place(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        divided = len(shape) > axis and shape[axis] % count == 0
        return rows if divided else replicated(mesh)

    return jax.tree.map(place, batch)


def placed_like(value: Any, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """An array of a host where another one lies, in its dtype."""
    return _put(np.asarray(value, like.dtype), like.sharding)


def on_mesh(init: Callable[..., PyTree], mesh: Mesh, *args: Any) -> PyTree:
    """`init(*args)` with every leaf made where it belongs on a mesh; no device holds the whole."""
    places = param_shardings(jax.eval_shape(init, *args), mesh)
    return jax.jit(init, out_shardings=places)(*args)


def abstract(init: Callable[..., PyTree], mesh: Mesh | None, *args: Any) -> PyTree:
    """Shapes, dtypes and shardings of `init(*args)` on a mesh, or (None) on one device."""
    shapes = jax.eval_shape(init, *args)
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        param_shardings(shapes, mesh),
    )


def _put(leaf: Any, sharding: Any) -> jax.Array:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    host = to_host(leaf)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)
