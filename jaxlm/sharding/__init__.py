"""Run the same program on one device or a pod: meshes, and shardings by the paths of parameters."""

from jaxlm.sharding.mesh import AXES, batch_sharding, make_mesh, mesh_from_text
from jaxlm.sharding.multihost import initialize
from jaxlm.sharding.placement import (
    abstract,
    mesh_of,
    on_mesh,
    place_batch,
    place_params,
    placed_like,
    replicated,
)
from jaxlm.sharding.rules import DEFAULT, WHOLE, Rules, param_shardings

__all__ = [
    "AXES",
    "DEFAULT",
    "WHOLE",
    "Rules",
    "abstract",
    "batch_sharding",
    "initialize",
    "make_mesh",
    "mesh_from_text",
    "mesh_of",
    "on_mesh",
    "param_shardings",
    "place_batch",
    "place_params",
    "placed_like",
    "replicated",
]
