"""One program from one device to a pod: a mesh, and rules that place parameters by their paths."""

from jaxlm.sharding.mesh import AXES, batch_sharding, make_mesh
from jaxlm.sharding.rules import DEFAULT, Rules, param_shardings

__all__ = ["AXES", "DEFAULT", "Rules", "batch_sharding", "make_mesh", "param_shardings"]
