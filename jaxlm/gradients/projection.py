r"""Random projections of gradients: $S g$ of `dim` numbers with $E (Sx)^T Sy = x^T y$.

S is never stored. Its part for a leaf is a function of (seed, path, layer, index), so rows that are
computed on different machines, from stacked or unstacked trees, or in batches of any size belong to
the same projection.

References: Achlioptas, "Database-friendly random projections", 2003; Charikar et al., "Finding
frequent items in data streams", 2002; Ailon and Chazelle, "The fast Johnson-Lindenstrauss
transform", 2009; arXiv:2303.14186; arXiv:2402.04333; arXiv:2405.13954.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxlm.core import paths, prng
from jaxlm.core.checks import integer, one_of
from jaxlm.core.dtypes import wide_dtype
from jaxlm.core.errors import UserError
from jaxlm.gradients import sketches

Family = Literal["countsketch", "gaussian", "kronecker", "rademacher", "srht"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projector:
    """A random linear map from gradients to `dim` numbers; see `projector`.

    Attributes:
      family: which map.
      dim: length of a projected row.
      seed: seed of all randomness.
      mesh: devices that share the examples; None if gradients are on one device, or their examples
        are already divided over devices.
    """

    family: str = dataclasses.field(metadata={"static": True})
    dim: int = dataclasses.field(metadata={"static": True})
    seed: Any
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})

    def project(self, gradients: Any) -> Float[Array, "N dim"]:
        """Return S g of whole gradients.

        Leaves are added in the order of their paths, and layers in their order. Under `jit`, only
        blocks of S are alive besides the gradients; outside `jit`, the result is checked.

        Args:
          gradients: a tree like that of the parameters, with a leading axis N of examples on each
            leaf: [N, ...], and [N, L, ...] where layers are stacked. A leaf may be None.

        Returns:
          Rows in float32, or in float64 where gradients are.

        Raises:
          UserError: if there is no leaf, leaves differ in N, a leaf does not hold floats, two paths
            have the same hash, or a gradient is not finite.
        """
        leaves = paths.flatten(gradients)[0]
        _check_leaves(leaves)
        paths.check_unique_hashes(gradients)
        total = None
        for leaf in sorted(leaves, key=_in_order):
            total = self.leaf(leaf.path, leaf.layer, leaf.value, total)
        assert total is not None
        if not isinstance(total, jax.core.Tracer):
            _check_finite(total, leaves)
        return total

    def leaf(
        self, path: str, layer: Any, g: Array, total: Array | None = None
    ) -> Float[Array, "N dim"]:
        """Return what one leaf, or one layer of it, adds to S g, so that layers can be streamed.

        Args:
          path: path of the leaf, without a layer.
          layer: index of the layer, an int or traced; None for a leaf outside `layers` and for a
            stack of layers.
          g: gradients [N, ...]; for a stack [N, L, ...], whose layers are added in order.
          total: array to add to; None for zeros.
        """
        total = jnp.zeros((len(g), self.dim), wide_dtype(g)) if total is None else total
        key = prng.leaf_key(jax.random.key(self.seed), path, layer)
        stacked = layer is None and paths.is_stacked(path, g.ndim - 1)
        add = _add_layers if stacked else _add_leaf
        return _add(add, self.family, self.dim, self.mesh or _mesh_of(g), key, total, g)

    def factors(
        self, path: str, layer: Any, a: Array, b: Array, total: Array | None = None
    ) -> Float[Array, "N dim"]:
        """Return `leaf` of a kernel's gradient sum_t a_t b_t^T, given its factors.

        The family `kronecker` projects the factors and never forms the gradient.

        Args:
          path: path of the leaf.
          layer: index of the layer, or None for a leaf outside `layers`.
          a: inputs of the kernel, [N, T, in] or [N, in], as `jaxlm.core.taps` returns them.
          b: gradients with respect to its outputs, [N, T, out] or [N, out].
          total: array to add to; None for zeros.
        """
        a, b = (x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1]) for x in (a, b))
        dtype = wide_dtype(jnp.result_type(a, b))
        a, b = a.astype(dtype), b.astype(dtype)
        if self.family != "kronecker":
            formed = jnp.einsum("nti,nto->nio", a, b, precision=lax.Precision.HIGHEST)
            return self.leaf(path, layer, formed, total)
        total = jnp.zeros((len(a), self.dim), dtype) if total is None else total
        key = prng.leaf_key(jax.random.key(self.seed), path, layer)
        return _add(_add_factors, self.family, self.dim, self.mesh or _mesh_of(a), key, total, a, b)


def _in_order(leaf: paths.Leaf) -> tuple[str, int]:
    path, layer = paths.identity(leaf.path, leaf.layer)
    return path, layer or 0


def _mesh_of(g: Array) -> Mesh | None:
    """Return the mesh of a concrete array, or None."""
    sharding = None if isinstance(g, jax.core.Tracer) else getattr(g, "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


# Compiled even if the caller is not, so that every caller runs the same loops and rounds alike.
@functools.partial(jax.jit, static_argnames=("add", "family", "dim", "mesh"))
def _add(
    add: Callable[..., Array],
    family: str,
    dim: int,
    mesh: Mesh | None,
    key: Array,
    total: Array,
    *rows: Array,
) -> Array:
    """Return `add(family, dim, key, total, *rows)`, with the examples divided over a mesh."""
    add = functools.partial(add, family, dim)
    if mesh is None or mesh.size == 1:
        return add(key, total, *rows)
    # Each device gets whole gradients of some examples. If gradients stayed divided, every turn of
    # the loop over blocks would have to communicate.
    count, missing = len(total), -len(total) % mesh.size
    arrays = [total, *rows]
    if missing:
        arrays = [jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for x in arrays]
    spec = PartitionSpec(mesh.axis_names)
    specs = (PartitionSpec(), *(spec for _ in arrays))
    divided = jax.shard_map(add, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return divided(key, *arrays)[:count]


def _add_leaf(family: str, dim: int, key: Array, total: Array, g: Array) -> Array:
    return total + sketches.SKETCHES[family](key, dim, g)


def _add_layers(family: str, dim: int, key: Array, total: Array, g: Array) -> Array:
    def layer(i, total):
        one = lax.dynamic_index_in_dim(g, i, axis=1, keepdims=False)
        return _add_leaf(family, dim, jax.random.fold_in(key, i), total, one)

    return lax.fori_loop(0, g.shape[1], layer, total) if g.shape[1] else total


def _add_factors(family: str, dim: int, key: Array, total: Array, a: Array, b: Array) -> Array:
    return total + sketches.kronecker_of_factors(key, dim, a, b)


def projector(family: str, dim: int, seed: int = 0, *, mesh: Mesh | None = None) -> Projector:
    """Return a random projection of gradients to `dim` numbers.

    Inner products are preserved on average. The inner product of unit vectors with cosine c has a
    standard error of about `sqrt((1 + c^2) / dim)`.

    | family      | map                                                                     |
    |-------------|-------------------------------------------------------------------------|
    | countsketch | every number has one bucket and a sign; reads the gradient once         |
    | srht        | countsketch after Hadamard matrices: good where few numbers are large   |
    | rademacher  | dense signs, the projection of LESS and TRAK                            |
    | gaussian    | dense normal numbers, the projection of intrinsic dimension             |
    | kronecker   | P_in^T G P_out, which needs only the factors of a gradient, as in LoGra |

    >>> proj = projector("rademacher", dim=64, seed=0)
    >>> proj.project({"w": jnp.ones((2, 3, 5)), "b": jnp.ones((2, 5))}).shape
    (2, 64)

    Args:
      family: one of the above.
      dim: length of a projected row; for `kronecker`, a product of two numbers of similar size.
      seed: 0 to 2**31 - 1.
      mesh: for gradients that are sharded over several devices, in any way: each device is given
        whole gradients of some examples. Needed under `jit` if parameters, and so their gradients,
        are sharded; outside `jit` the mesh is read from the arrays.

    Returns:
      A frozen dataclass, a pytree whose only leaf is the seed.

    Raises:
      UserError: if the family is unknown, or dim or seed is out of range.
    """
    one_of("family", family, sorted(sketches.SKETCHES))
    integer("dim", dim)
    integer("seed", seed, least=0)
    small, large = sketches.factors_of(dim) if family == "kronecker" else (1, 1)
    if large > 16 * small:
        raise UserError(
            f"dim: must be a product of two similar sizes for kronecker (got {dim}). Give a power "
            "of 2."
        )
    return Projector(family, dim, seed, mesh)


def _check_leaves(leaves: list[paths.Leaf]) -> None:
    if not leaves:
        raise UserError("gradients: the tree is empty. Give at least one leaf.")
    first = leaves[0]
    for path, _, _, value in leaves:
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise UserError(f"gradients: {path} must hold floats (got {value.dtype}). Correct it.")
        if value.ndim == 0:
            raise UserError(f"gradients: {path} has no axis of examples. Give one gradient each.")
        if len(value) != len(first.value):
            raise UserError(
                f"gradients: {path} must have the {len(first.value)} examples of {first.path} (got "
                f"{len(value)}). Give all leaves the same examples."
            )


def _check_finite(rows: Array, leaves: list[paths.Leaf]) -> None:
    bad = ~np.isfinite(np.asarray(rows)).all(axis=1)
    if not bad.any():
        return
    example = int(bad.argmax())
    for leaf in leaves:
        if not np.isfinite(np.asarray(leaf.value[example], np.float64)).all():
            narrow = leaf.value.dtype == jnp.float16
            cure = "Use float32 or bfloat16" if narrow else "Leave the example out"
            raise UserError(
                f"gradients: example {example} is not finite at {leaf.path} (got "
                f"{leaf.value.dtype}). {cure}."
            )
    raise UserError(
        f"gradients: the projection of example {example} overflows (got {rows.dtype}). Scale the "
        "loss down."
    )
