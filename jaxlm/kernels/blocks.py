"""A kernel computed in blocks of examples; a symmetric kernel needs only the upper half of them.

All blocks have the same size: the last one is padded with copies of its last example, so that one
compiled program computes them all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxlm.core import paths
from jaxlm.core.checks import whole
from jaxlm.core.programs import Program
from jaxlm.gradients.projection import Projector
from jaxlm.kernels import factorized, jacobian, vector_products
from jaxlm.kernels.contraction import KernelSpec, column_axis, contract, contract_self, transpose
from jaxlm.sharding import batch_sharding, replicated

GRADIENT_BYTES = 2**30
"""Most bytes of the gradients of a block, by default."""

BLOCK_METHODS: dict[str, Callable[..., Array]] = {
    "factorized": factorized.block,
    "ntk_vector_products": vector_products.block,
}
"""`block(f, params, x1, x2 or None, spec)` of the methods that form no gradients."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """How a kernel is computed; the result depends on these options only by rounding.

    Attributes:
      block_size: examples on each side of a block. By default, as many as keep the gradients within
        1 GiB for methods "jacobian" and "projected", and all of them for the others.
      mesh: the examples of a block are divided over its axes data and fsdp. Parameters that are on
        it stay there, others are copied to each device. By default the mesh of the parameters.
      check: whether to check that no example changes f at another, and that the kernel is finite.
        Under `jax.jit` there are no values to check.
    """

    block_size: int | None = None
    mesh: Mesh | None = None
    check: bool = True

    def __post_init__(self):
        whole(self, "block_size")


@jax.jit
def _left(gradients, kind):
    return kind.left(gradients)


@functools.partial(jax.jit, static_argnames="over")
def _against(left, gradients, kind, *, over):
    return contract(left, kind.right(gradients), over)


@functools.partial(jax.jit, static_argnames=("over", "halves"))
def _alone(left, *, over, halves):
    return contract_self(left, over) if halves else contract(left, left, over)


@dataclasses.dataclass
class Blocks:
    """The blocks of one kernel of checked arguments, each computed when asked for.

    `sizes` are the examples per block of x1, and of x2; x2 is None if it is x1.
    """

    f: Callable[..., Array]
    params: Any
    x1: Any
    x2: Any
    spec: KernelSpec
    method: str
    sizes: tuple[int, int]
    mesh: Mesh | None = None
    _row: tuple[int, Any] | None = None

    def __post_init__(self):
        f, select = self.f, self.spec.select
        if self.method in BLOCK_METHODS:
            self._block = Program(functools.partial(BLOCK_METHODS[self.method], f))
        # Compiled apart from the contraction, because it takes long to compile and is the same for
        # all kinds and axes.
        self._gradients = Program(lambda params, x: jacobian.gradients(f, params, x, select))

    @property
    def half(self) -> bool:
        """Whether the lower half of the blocks mirrors the upper."""
        return self.x2 is None and self.spec.kind.symmetric

    def count(self, side: int) -> int:
        """Return the number of blocks on a side."""
        return -(-self._examples(side) // self.sizes[side])

    def pairs(self) -> list[tuple[int, int]]:
        """Return which blocks are to be computed, row by row."""
        rows, columns = self.count(0), self.count(1)
        return [(i, j) for i in range(rows) for j in range(i if self.half else 0, columns)]

    def compute(self, i: int, j: int) -> Array:
        """Return one block, without the examples that pad it."""
        if self.method == "jacobian":
            block = self._from_gradients(i, j)
        else:
            x2 = None if self.x2 is None and i == j else self._part(1, j)
            block = self._block(self.params, self._part(0, i), x2, self.spec)
        rows, columns = (slice(0, self._length(side, at)) for side, at in ((0, i), (1, j)))
        return block[rows, :, columns] if self.spec.over == "full" else block[rows, columns]

    def join(self, blocks: Mapping[tuple[int, int], Any]) -> Array:
        """Return the kernel from all its blocks."""

        def at(i, j):
            if self.half and j < i:
                return transpose(jnp.asarray(blocks[j, i]), self.spec.over)
            return blocks[i, j]

        where = column_axis(self.spec.over)
        rows = [
            jnp.concatenate([at(i, j) for j in range(self.count(1))], axis=where)
            for i in range(self.count(0))
        ]
        return jnp.concatenate(rows, axis=0)

    def project(self, projector: Projector) -> Array:
        """Return the kernel of projected features, which are small enough to be kept at once."""
        left = self.projected_features(0, projector)
        right = left if self.half else self.projected_features(1, projector)
        return contract([left[:, :, None]], [right[:, :, None]], self.spec.over)

    def projected_features(self, side: int, projector: Projector) -> Float[Array, "N C dim"]:
        """Return S φ1 of x1, or S φ2 of x2, for the random map S of a projector."""

        def project(params, x, kind, projector):
            gradients = jacobian.gradients(self.f, params, x, self.spec.select)
            features = kind.right(gradients) if side else kind.left(gradients)
            leaves, structure = jax.tree.flatten(paths.split(params, self.spec.select)[0])
            lead = features[0].shape[:2]
            rows = [
                g.reshape(math.prod(lead), *leaf.shape)
                for g, leaf in zip(features, leaves, strict=True)
            ]
            projected = projector.project(jax.tree.unflatten(structure, rows))
            return projected.reshape(*lead, projector.dim)

        program, kind = Program(project), self.spec.kind
        blocks = [
            program(self.params, self._part(side, i), kind, projector)[: self._length(side, i)]
            for i in range(self.count(side))
        ]
        return jnp.concatenate(blocks)

    def _from_gradients(self, i, j):
        left, over = self._left(i), self.spec.over
        same = self.x2 is None and i == j
        if same and self.half:
            # On a mesh the tiles of `contract_self` would cut across devices.
            return _alone(left, over=over, halves=self.mesh is None)
        gradients = left if same else self._gradients(self.params, self._part(1, j))
        return _against(left, gradients, self.spec.kind, over=over)

    def _left(self, i):
        """Return φ1 of a block of rows, kept until the next row: `pairs` goes row by row."""
        if self._row is None or self._row[0] != i:
            self._row = None  # Freed before the next is computed.
            gradients = self._gradients(self.params, self._part(0, i))
            if self.spec.kind.signed[0]:
                gradients = _left(gradients, self.spec.kind)
            self._row = (i, gradients)
        return self._row[1]

    def side(self, side: int) -> Any:
        """Return the examples of a side, 0 or 1."""
        return self.x1 if side == 0 or self.x2 is None else self.x2

    def _examples(self, side) -> int:
        return jax.tree.leaves(self.side(side))[0].shape[0]

    def _length(self, side, block) -> int:
        return min(self.sizes[side], self._examples(side) - block * self.sizes[side])

    def _part(self, side, block):
        first, size = block * self.sizes[side], self.sizes[side]
        rows = np.minimum(np.arange(first, first + size), self._examples(side) - 1)
        part = jax.tree.map(lambda a: a[rows], self.side(side))
        if self.mesh is None:
            return part
        # Vector products take one example of x' at a time, which all devices need.
        everywhere = side == 1 and self.method == "ntk_vector_products"
        return jax.device_put(
            part, replicated(self.mesh) if everywhere else batch_sharding(self.mesh)
        )


def block_sizes(
    counts: tuple[int, int],
    outputs: int,
    leaves: list[Any],
    method: str,
    options: KernelOptions,
) -> tuple[int, int]:
    """Return the examples per block of each side, for C `outputs` and the selected `leaves`."""
    most = options.block_size
    if most is None and method in ("jacobian", "projected"):
        one = outputs * sum(leaf.value.size * leaf.value.dtype.itemsize for leaf in leaves)
        most = max(1, GRADIENT_BYTES // max(one, 1))
    mesh = options.mesh
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]

    def size(count):
        blocks = -(-count // (most or max(counts)))
        even = -(-count // blocks)  # Equal blocks: fewer copies of the last example.
        return -(-even // shards) * shards

    return size(counts[0]), size(counts[1])
