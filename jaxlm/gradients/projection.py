r"""Random projections of gradients: $S g$ of `dim` numbers with $E (Sx)^T Sy = x^T y$.

S is never stored: what it does to a leaf is a function of (seed, path, layer, index). So rows that
were made on different machines, from trees that are stacked or not, in batches of any size, are
rows of one projection.

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
from jaxlm.core.errors import UserError
from jaxlm.gradients import sketches

Family = Literal["countsketch", "gaussian", "kronecker", "rademacher", "srht"]
Form = Literal["leaf", "stack", "factors"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projector:
    """A random linear map from gradients to `dim` numbers; see `projector`.

    Attributes:
      family: which map.
      dim: numbers in a row of the result.
      seed: all randomness comes from it.
      mesh: devices that share the examples; None where gradients lie on one device or their
        examples are divided already.
    """

    family: str = dataclasses.field(metadata={"static": True})
    dim: int = dataclasses.field(metadata={"static": True})
    seed: Any
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})

    def project(self, gradients: Any) -> Float[Array, "N dim"]:
        """S g of whole gradients.

        The leaves are added in the order of their paths, layers in their order. Under `jit` beside
        the gradients only blocks are alive; where it is not traced, the result is checked.

        Args:
          gradients: a tree like that of the parameters, with a leading axis N of examples on each
            leaf: [N, ...], and [N, L, ...] where layers are stacked. A leaf may be None.

        Returns:
          float32, or float64 where gradients are.

        Raises:
          UserError: if there is no leaf, leaves differ in N, a leaf holds no floats, two paths
            share a hash, or a gradient is not finite.
        """
        leaves = paths.flatten(gradients)[0]
        _check_leaves(leaves)
        _check_hashes(gradients)
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
        """What one leaf, or one layer of it, contributes to S g: a caller may stream layers.

        Args:
          path: of the leaf, without a layer.
          layer: index of the layer, an int or traced; None for a leaf outside `layers`, and for a
            stack of layers.
          g: gradients [N, ...]; [N, L, ...] of a stack, whose layers are added in their order.
          total: a result to which this is added; zeros if None.
        """
        total = self._zeros(len(g), g.dtype) if total is None else total
        key = prng.leaf_key(jax.random.key(self.seed), path, layer)
        stacked = layer is None and paths.is_stacked(path, g.ndim - 1)
        form: Form = "stack" if stacked else "leaf"
        return _add(self.family, self.dim, form, self.mesh or _mesh_of(g), key, g, total)

    def factors(
        self, path: str, layer: Any, a: Array, b: Array, total: Array | None = None
    ) -> Float[Array, "N dim"]:
        """`leaf` of a kernel's gradient sum_t a_t b_t^T, from the factors of `jaxlm.core.taps`.

        The family `kronecker` projects the factors and forms no gradient.

        Args:
          path: of the leaf.
          layer: index of the layer, or None for a leaf outside `layers`.
          a: what entered, [N, T, in] or [N, in].
          b: gradient with respect to what left, [N, T, out] or [N, out].
          total: as of `leaf`.
        """
        a, b = (x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1]) for x in (a, b))
        dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
        a, b = a.astype(dtype), b.astype(dtype)
        if self.family != "kronecker":
            formed = jnp.einsum("nti,nto->nio", a, b, precision=lax.Precision.HIGHEST)
            return self.leaf(path, layer, formed, total)
        total = self._zeros(len(a), dtype) if total is None else total
        key = prng.leaf_key(jax.random.key(self.seed), path, layer)
        return _add(self.family, self.dim, "factors", self.mesh or _mesh_of(a), key, a, b, total)

    def _zeros(self, count: int, dtype) -> Array:
        return jnp.zeros((count, self.dim), jnp.promote_types(dtype, jnp.float32))


def _in_order(leaf: paths.Leaf) -> tuple[str, int]:
    path, layer = paths.identity(leaf.path, leaf.layer)
    return path, layer or 0


def _mesh_of(g: Array) -> Mesh | None:
    """The mesh that an array with values lies on."""
    sharding = None if isinstance(g, jax.core.Tracer) else getattr(g, "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


@functools.partial(jax.jit, static_argnames=("family", "dim", "form", "mesh"))
def _add(family: str, dim: int, form: Form, mesh: Mesh | None, key: Array, *rows: Array) -> Array:
    """The last of `rows` and what the others contribute.

    Compiled by itself where nothing else is, so that every caller has the same loops. On a mesh the
    examples are divided over all devices, and each has whole gradients of its own: then a loop over
    blocks has nothing to exchange.
    """
    add = functools.partial(_FORMS[form], family, dim)
    if mesh is None or mesh.size == 1:
        return add(key, *rows)
    count = len(rows[0])
    more = -count % mesh.size
    padded = [jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)) for x in rows] if more else rows
    spec = PartitionSpec(mesh.axis_names)
    specs = (PartitionSpec(), *(spec for _ in rows))
    divided = jax.shard_map(add, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return divided(key, *padded)[:count]


def _add_leaf(family: str, dim: int, key: Array, g: Array, total: Array) -> Array:
    return total + sketches.SKETCHES[family](key, dim, g)


def _add_stack(family: str, dim: int, key: Array, g: Array, total: Array) -> Array:
    def layer(i, total):
        one = lax.dynamic_index_in_dim(g, i, axis=1, keepdims=False)
        return _add_leaf(family, dim, jax.random.fold_in(key, i), one, total)

    return lax.fori_loop(0, g.shape[1], layer, total) if g.shape[1] else total


def _add_factors(family: str, dim: int, key: Array, a: Array, b: Array, total: Array) -> Array:
    del family
    return total + sketches.kronecker_factors(key, dim, a, b)


_FORMS: dict[Form, Callable[..., Array]] = {
    "leaf": _add_leaf,
    "stack": _add_stack,
    "factors": _add_factors,
}


def projector(family: str, dim: int, seed: int = 0, *, mesh: Mesh | None = None) -> Projector:
    """A random projection of gradients to `dim` numbers.

    Inner products are kept on average: with c the cosine, that of unit vectors is off by about
    `sqrt((1 + c^2) / dim)`.

    | family      | map                                                                     |
    |-------------|-------------------------------------------------------------------------|
    | countsketch | every number has one bucket and a sign; reads the gradient once         |
    | srht        | that after Hadamard matrices: good where few numbers are large          |
    | rademacher  | dense signs, the projection of LESS and TRAK                            |
    | gaussian    | dense normal numbers, the projection of intrinsic dimension             |
    | kronecker   | P_in^T G P_out, which needs only the factors of a gradient, as in LoGra |

    >>> proj = projector("rademacher", dim=64, seed=0)
    >>> proj.project({"w": jnp.ones((2, 3, 5)), "b": jnp.ones((2, 5))}).shape
    (2, 64)

    Args:
      family: one of the above.
      dim: numbers in a row; of `kronecker`, a product of two that are not too different.
      seed: 0 to 2**31 - 1.
      mesh: for gradients that are divided in any way over several devices: each device is given
        whole gradients of a part of the examples. Needed under `jit` where parameters, and so
        their gradients, are divided; else an array's own mesh is found.

    Returns:
      A frozen dataclass, a pytree whose only leaf is the seed.

    Raises:
      UserError: for another family, dim or seed.
    """
    if family not in sketches.SKETCHES:
        known = ", ".join(sorted(sketches.SKETCHES))
        raise UserError(f"family={family!r} is no projection; choose one of {known}")
    if not isinstance(dim, int | np.integer) or dim < 1:
        raise UserError(f"dim is {dim}: give the numbers of a row, 1 or more")
    if dim >= 2**31:
        raise UserError(f"dim is {dim}: too many numbers for a row; give fewer than 2^31")
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**31:
        raise UserError(f"seed is {seed}: give 0 to {2**31 - 1}")
    if family == "kronecker":
        small, large = sketches.factors_of(dim)
        if large > 16 * small:
            raise UserError(
                f"dim={dim} is no product of two near sizes, as kronecker needs; give a power of 2"
            )
    return Projector(family, dim, seed, mesh)


def _check_leaves(leaves: list[paths.Leaf]) -> None:
    if not leaves:
        raise UserError("there are no gradients to project: the tree is empty")
    for leaf in leaves:
        if not jnp.issubdtype(leaf.value.dtype, jnp.floating):
            raise UserError(f"{leaf.path} holds {leaf.value.dtype}; project gradients, of floats")
        if leaf.value.ndim == 0:
            raise UserError(f"{leaf.path} has no axis of examples; give one gradient for each")
    first = leaves[0]
    for leaf in leaves:
        if len(leaf.value) != len(first.value):
            raise UserError(
                f"{first.path} has gradients of {len(first.value)} examples and {leaf.path} of "
                f"{len(leaf.value)}; give all leaves the same examples"
            )


def _check_hashes(tree: Any) -> None:
    try:
        paths.check_unique_hashes(tree)
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_finite(rows: Array, leaves: list[paths.Leaf]) -> None:
    bad = ~np.isfinite(np.asarray(rows)).all(axis=1)
    if not bad.any():
        return
    example = int(bad.argmax())
    for leaf in leaves:
        if not np.isfinite(np.asarray(leaf.value[example], np.float64)).all():
            narrow = leaf.value.dtype == jnp.float16
            why = ", whose largest number is 65504; take float32 or bfloat16" if narrow else ""
            raise UserError(
                f"the gradient of example {example} is not finite at {leaf.path}, in "
                f"{leaf.value.dtype}{why or '; leave the example out or look for its cause'}"
            )
    raise UserError(f"the projection of example {example} overflows {rows.dtype}; scale the loss")
