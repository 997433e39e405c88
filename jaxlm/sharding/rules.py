"""The sharding of each parameter, by its path.

There are two tables: one maps a path to logical axes, the other maps a logical axis to mesh axes.
They depend on names only, so they hold for every tree whose paths end alike: parameters, stacked
over layers or not, and the moments of an optimizer.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxlm.core.paths import map_with_path

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which axes of a parameter are sharded over which axes of the mesh.

    Attributes:
      paths: pairs of a regular expression and the logical names of the last axes of a leaf. The
        first expression that is found in a path counts; a path that none matches is replicated.
        Leading axes without a name, such as that of stacked layers, are not sharded.
      axes: pairs of a logical name and one or several axes of the mesh. Other names are not
        sharded.
    """

    paths: tuple[tuple[str, tuple[str | None, ...]], ...]
    axes: tuple[tuple[str, MeshAxes], ...]

    def sharding(self, path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
        """Return the sharding of a leaf; an axis not divisible by its devices is not sharded."""
        matches = (logical for pattern, logical in self.paths if re.search(pattern, path))
        logical = next(matches, ())
        if len(logical) > len(shape):
            return NamedSharding(mesh, PartitionSpec())
        names = (None,) * (len(shape) - len(logical)) + logical
        rows = zip(names, shape, strict=True)
        return NamedSharding(mesh, PartitionSpec(*(self._axis(*row, mesh) for row in rows)))

    def _axis(self, name: str | None, size: int, mesh: Mesh) -> MeshAxes:
        given = dict(self.axes).get(name) if name is not None else None
        axes = (given,) if isinstance(given, str) else given or ()
        count = math.prod(mesh.shape.get(axis, 1) for axis in axes)
        if count == 1 or size % count:
            return None
        axes = tuple(axis for axis in axes if axis in mesh.shape)
        return axes if len(axes) > 1 else axes[0]


DEFAULT = Rules(
    paths=(
        (r"(tokens|lm_head)\.embedding\b", ("vocab", "embed")),
        (r"\.embedding\b", (None, "embed")),
        (r"[qkv]_proj\.kernel\b", ("embed", "heads")),
        (r"[qkv]_proj\.bias$", ("heads",)),
        (r"o_proj\.kernel\b", ("heads", "embed")),
        (r"(gate|up)_proj\.kernel\b", ("embed", "mlp")),
        (r"(gate|up)_proj\.bias$", ("mlp",)),
        (r"down_proj\.kernel\b", ("mlp", "embed")),
        (r"lm_head\.bias$", ("vocab",)),
        (r"\.kernel\b", ("embed", None)),
    ),
    axes=(("vocab", "model"), ("heads", "model"), ("mlp", "model"), ("embed", "fsdp")),
)

WHOLE = Rules(paths=(), axes=())
"""Rules that replicate every leaf."""


def param_shardings(params: PyTree, mesh: Mesh, rules: Rules = DEFAULT) -> PyTree:
    """Return the sharding of every leaf of a tree.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s, or the shapes of
        `jaxlm.models.param_shapes(config)`.
      mesh: a mesh of `make_mesh`, or one that lacks some of its axes.
      rules: the two tables.

    Returns:
      A tree of `NamedSharding`s like `params`, for `jax.device_put`, `in_shardings` and
      `out_shardings`.
    """
    shaped = jax.tree.map(_shaped, params, is_leaf=_is_shape)
    return map_with_path(
        lambda leaf: rules.sharding(leaf.path, getattr(leaf.value, "shape", ()), mesh), shaped
    )


def _is_shape(node) -> bool:
    return type(node) is tuple and bool(node) and all(isinstance(size, int) for size in node)


def _shaped(node):
    return jax.ShapeDtypeStruct(node, jnp.float32) if _is_shape(node) else node
