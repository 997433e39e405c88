"""A kernel in blocks of examples: each pair of blocks once, and its mirror image for nothing.

Blocks are of one size, the last filled up with copies of its last example, so that one compiled
program computes them all.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxlm.core import paths
from jaxlm.core.programs import Program
from jaxlm.kernels import gram, jacobian, vector_products
from jaxlm.kernels.factorized import block as factorized_block
from jaxlm.sharding import batch_sharding, replicated

GRADIENT_BYTES = 2**30
"""What the gradients of a block take at most, by default."""

METHODS: dict[str, Callable[..., Array]] = {
    "jacobian": jacobian.block,
    "factorized": factorized_block,
    "ntk_vector_products": vector_products.block,
}
"""`method(f, params, x1, x2 or None, features, over, select)` of each name."""


@jax.jit
def _signs(gradients, features):
    return features.left(gradients)


@functools.partial(jax.jit, static_argnames="over")
def _against(left, gradients, features, *, over):
    return gram.contract(left, features.right(gradients), over)


@functools.partial(jax.jit, static_argnames=("over", "halves"))
def _alone(left, *, over, halves):
    return gram.contract_self(left, over) if halves else gram.contract(left, left, over)


@dataclasses.dataclass
class Blocks:
    """The blocks of one kernel, each computed when asked for.

    Attributes:
      f, params, features, over, select, method: as of the methods.
      x1, x2: examples; x2 is None where it is x1.
      sizes: examples in a block of x1, and of x2.
      mesh: over whose axes data and fsdp the examples of a block are divided; or None.
    """

    f: Callable[..., Array]
    params: Any
    x1: Any
    x2: Any
    features: gram.Features
    over: gram.Axes
    select: paths.Select
    method: str
    sizes: tuple[int, int]
    mesh: Mesh | None = None
    _row: tuple[int, Any] | None = None

    def __post_init__(self):
        f, over, select, method = self.f, self.over, self.select, METHODS[self.method]
        self._block = Program(
            lambda params, x1, x2, features: method(f, params, x1, x2, features, over, select)
        )
        # The part that takes long to compile, and is the same for all kinds and axes.
        self._gradients = Program(lambda params, x: jacobian.gradients(f, params, x, select))

    @property
    def half(self) -> bool:
        """Whether the lower half of the blocks mirrors the upper."""
        return self.x2 is None and self.features.symmetric

    def count(self, side: int) -> int:
        """Blocks on a side."""
        return -(-self._examples(side) // self.sizes[side])

    def pairs(self) -> list[tuple[int, int]]:
        """Which blocks are to be computed, those of a row one after another."""
        rows, columns = self.count(0), self.count(1)
        return [(i, j) for i in range(rows) for j in range(i if self.half else 0, columns)]

    def compute(self, i: int, j: int) -> Array:
        """One block, without what its examples were filled up with."""
        if self.method == "jacobian":
            found = self._from_gradients(i, j)
        else:
            x2 = None if self.x2 is None and i == j else self._part(1, j)
            found = self._block(self.params, self._part(0, i), x2, self.features)
        rows, columns = (slice(0, self._length(side, at)) for side, at in ((0, i), (1, j)))
        return found[rows, :, columns] if self.over == "full" else found[rows, columns]

    def join(self, blocks: Mapping[tuple[int, int], Any]) -> Array:
        """The kernel from all its blocks."""

        def at(i, j):
            if self.half and j < i:
                return gram.transpose(jnp.asarray(blocks[j, i]), self.over)
            return blocks[i, j]

        where = gram.column_axis(self.over)
        rows = [
            jnp.concatenate([at(i, j) for j in range(self.count(1))], axis=where)
            for i in range(self.count(0))
        ]
        return jnp.concatenate(rows, axis=0)

    def _from_gradients(self, i, j):
        left = self._left(i)
        if self.x2 is None and i == j:
            if self.half:
                return _alone(left, over=self.over, halves=self.mesh is None)
            return _against(left, left, self.features, over=self.over)
        found = self._gradients(self.params, self._part(1, j))
        return _against(left, found, self.features, over=self.over)

    def _left(self, i):
        """φ1 of a block of rows, kept until the next."""
        if self._row is None or self._row[0] != i:
            self._row = None
            found = self._gradients(self.params, self._part(0, i))
            if self.features.kind == "signgd":
                found = _signs(found, self.features)
            self._row = (i, found)
        return self._row[1]

    def _examples(self, side) -> int:
        x = self.x1 if side == 0 or self.x2 is None else self.x2
        return jax.tree.leaves(x)[0].shape[0]

    def _length(self, side, block) -> int:
        return min(self.sizes[side], self._examples(side) - block * self.sizes[side])

    def _part(self, side, block):
        x = self.x1 if side == 0 or self.x2 is None else self.x2
        first, size = block * self.sizes[side], self.sizes[side]
        rows = np.minimum(np.arange(first, first + size), self._examples(side) - 1)
        part = jax.tree.map(lambda a: a[rows], x)
        if self.mesh is None:
            return part
        columns_whole = side == 1 and self.method == "ntk_vector_products"
        return jax.device_put(
            part, replicated(self.mesh) if columns_whole else batch_sharding(self.mesh)
        )


def sizes(
    counts: tuple[int, int], outputs: int, params: Any, select: paths.Select, options: Any
) -> tuple[int, int]:
    """Examples in a block of either side.

    Args:
      counts: examples.
      outputs: C.
      params, select: what is differentiated by.
      options: (block_size or None, method, mesh or None).
    """
    block_size, method, mesh = options
    if block_size is None:
        if method == "jacobian":
            leaves = jax.tree.leaves(paths.split(params, select)[0])
            one = outputs * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
            block_size = max(1, GRADIENT_BYTES // max(one, 1))
        else:
            block_size = max(counts)
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return tuple(_even(count, block_size, shards) for count in counts)  # type: ignore[return-value]


def _even(count: int, most: int, shards: int) -> int:
    """The size of equal blocks of at most `most` examples, a multiple of `shards`."""
    blocks = -(-count // most)
    each = -(-count // blocks)
    return -(-each // shards) * shards
