"""Place parameters and batches on a mesh.

A program does not ask how many devices there are. It receives parameters, reads their mesh, and
places its batches there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxlm.artifacts.processes import to_host
from jaxlm.core.errors import UserError
from jaxlm.sharding.mesh import AXES
from jaxlm.sharding.rules import DEFAULT, Rules, param_shardings


def mesh_of(tree: PyTree) -> Mesh | None:
    """Return the mesh of a tree, or None if it is on one device without a mesh.

    >>> mesh_of({"w": jax.numpy.zeros(2)}) is None
    True

    Raises:
      UserError: the leaves are on several meshes.
    """
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    meshes = {s.mesh for s in shardings if isinstance(s, NamedSharding) and not s.mesh.empty}
    concrete = {mesh for mesh in meshes if isinstance(mesh, Mesh)}
    if len(concrete) > 1:
        raise UserError(f"mesh: all leaves must be on one (got {len(concrete)}). Move them.")
    return next(iter(concrete), None)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array of which every device has a full copy."""
    return NamedSharding(mesh, PartitionSpec())


def place_params(params: PyTree, mesh: Mesh, rules: Rules = DEFAULT) -> PyTree:
    """Place parameters on a mesh by the rules; leaves that are already on it stay.

    Args:
      params: arrays, the same in every process.
      mesh: a mesh of `make_mesh`.
      rules: see `param_shardings`.
    """
    return _place(params, mesh, param_shardings(params, mesh, rules))


def place_batch(batch: PyTree, mesh: Mesh, axis: int = 0) -> PyTree:
    """Place a batch on a mesh, its rows sharded over data and fsdp.

    Args:
      batch: arrays, the same in every process, so that a step has the same batch with any number of
        processes. Each process places its own rows.
      mesh: a mesh of `make_mesh`.
      axis: axis of the rows. A leaf without this axis, or whose number of rows the devices do not
        divide, is replicated.
    """
    return _place(batch, mesh, batch_places(batch, mesh, axis))


def batch_places(batch: PyTree, mesh: Mesh, axis: int = 0) -> PyTree:
    """Return the shardings that `place_batch` gives to arrays of these shapes."""
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES[:2]))

    def place(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        divided = len(shape) > axis and shape[axis] % count == 0
        return rows if divided else replicated(mesh)

    return jax.tree.map(place, batch)


def placed_like(value: Any, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Place a host array with the dtype and sharding of another array."""
    return _put(np.asarray(value, like.dtype), like.sharding)


def on_mesh(init: Callable[..., PyTree], mesh: Mesh, *args: Any) -> PyTree:
    """Return `init(*args)`, computed with its shardings, so that no device holds all of it."""
    places = param_shardings(jax.eval_shape(init, *args), mesh)
    return jax.jit(init, out_shardings=places)(*args)


def abstract(init: Callable[..., PyTree], mesh: Mesh | None, *args: Any) -> PyTree:
    """Return shapes, dtypes and shardings of `init(*args)` on a mesh, or on one device (None)."""
    shapes = jax.eval_shape(init, *args)
    return shapes if mesh is None else with_places(shapes, param_shardings(shapes, mesh))


def with_places(tree: PyTree, places: PyTree) -> PyTree:
    """Return shapes and dtypes of a tree with these shardings, leaf by leaf."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        places,
    )


def _place(tree: PyTree, mesh: Mesh, places: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, place: leaf if mesh_of(leaf) == mesh else _put(leaf, place), tree, places
    )


def _put(leaf: Any, sharding: Any) -> jax.Array:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    host = to_host(leaf)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)
