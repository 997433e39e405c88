r"""Method "factorized": the kernel from what passes each parameter, for models that take a tap.

At every use of a parameter the backward pass computes that parameter's part of the kernel from its
inputs and cotangents (`jaxlm.kernels.leaf_kernels`): one forward pass of all examples and one
backward pass per output. Gradients exist only in chunks that fit into a cache, one layer at a time,
and no example gets an array of the shape of an embedding table. Memory is that of the activations
of N1 + N2 examples and of C backward passes in one layer. x1 and x2 may differ in length, but then
the factors of all layers are kept.

References: Novak et al., "Fast Finite Width Neural Tangent Kernel", arXiv:2206.08720 (structured
derivatives); Goodfellow, "Efficient Per-Example Gradient Computations", arXiv:1510.01799 (the
factors).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlm.core import paths, taps
from jaxlm.core.errors import UserError
from jaxlm.gradients.per_example import count_examples, takes_tap, untapped
from jaxlm.kernels import cost, leaf_kernels
from jaxlm.kernels.contraction import KernelSpec
from jaxlm.kernels.kinds import Adam, Moments
from jaxlm.kernels.leaf_kernels import LeafKernel, Pairing


def block(f: Callable[..., Array], params: Any, x1: Any, x2: Any, spec: KernelSpec) -> Array:
    """Return the kernel of a block of examples; `x2=None` means `x1`."""
    problem = obstacle(f, params, x1, spec.select)
    if problem is not None:
        raise UserError(problem)
    x1, x2 = jax.tree.map(jnp.asarray, (x1, x2))
    pairing = Pairing(spec.kind, spec.over, None if x2 is None else count_examples(x1, "x1"))
    with jax.default_matmul_precision("highest"):
        return pairing.join(_Backward(f, params, pairing, spec).leaf_kernels(x1, x2))


def obstacle(f: Callable[..., Array], params: Any, x: Any, select: paths.Select) -> str | None:
    """Return why `block` cannot compute the kernel of f, as a message; None if it can."""
    reason = untapped(f, params, x, select)
    if reason is None:
        return None
    cure = ", or leave it out by select" if takes_tap(f) else ""
    return (
        f"f: {reason}, so that there are no factors (got method 'factorized'). Give "
        f"method='jacobian'{cure}."
    )


@dataclasses.dataclass(frozen=True)
class _Backward:
    """The backward passes of f, which compute the kernel of one use after another."""

    f: Callable[..., Array]
    params: Any
    pairing: Pairing
    spec: KernelSpec

    def leaf_kernels(self, x1: Any, x2: Any) -> list[LeafKernel]:
        """Return the contributions of the leaves, summed unless `Pairing.join` needs each."""
        shapes = [[a.shape[1:] for a in jax.tree.leaves(x)] for x in (x1, x2)]
        if x2 is None or shapes[0] == shapes[1]:
            total, by_use, rest = self._together(x1, x2)
        else:
            total, by_use, rest = self._apart(x1, x2)
        if self.pairing.signed:
            layers = [
                jax.tree.map(lambda a, layer=layer: a[layer], part)
                for part in by_use.values()
                for layer in range(part.kernel.shape[0])
            ]
        else:
            layers = [] if total is None else [LeafKernel(total)]
        return layers + self._outside_layers(rest)

    def _together(self, x1, x2):
        """All examples in one batch: only one layer's factors are alive at a time."""
        x = x1 if x2 is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), x1, x2)
        uses = self._uses(x)
        return taps.reduce(
            self.f,
            self.params,
            x,
            lambda key, a, b, layer, extra: self._in_layer(key, a, b, layer, extra, uses[key]),
            cotangents=self._cotangents(x),
            extras=self._moments({key: use.stacked for key, use in uses.items()}),
            keep=uses,
        )

    def _apart(self, x1, x2):
        """Batches of different lengths, which cannot share one call of f.

        The factors of both are kept, padded with zeros, which add nothing, and concatenated.
        """
        uses = [self._uses(x) for x in (x1, x2)]
        factors = [
            taps.factors(self.f, self.params, x, cotangents=self._cotangents(x), keep=keep)
            for x, keep in zip((x1, x2), uses, strict=True)
        ]
        moments = self._moments({key: use.stacked for key, use in uses[0].items()})
        total: Any = None
        by_use, rest = {}, {}
        for key, use in uses[0].items():
            joined = _concatenate(key, use.stacked, *(side[key] for side in factors))
            if not use.stacked:
                rest[key] = joined
                continue
            layers = jnp.arange(use.times, dtype=jnp.int32)
            xs = (joined.a, jnp.moveaxis(joined.b, 1, 0), layers, moments.get(key))

            def in_layer(xs, key=key, use=use):
                a, b, layer, moments = xs
                return self._in_layer(key, a, b, layer, moments, use)

            totals, by_use[key] = lax.map(in_layer, xs)
            total = totals.sum(0) if total is None else total + totals.sum(0)
        return total, by_use, rest

    def _in_layer(self, key, a, b, layer, moments, use):
        """Return what `taps.reduce` sums over layers, and what it keeps of each."""
        part = self._of_use(key, a, b, None, moments, layer == use.times - 1)
        if self.pairing.signed:
            return jnp.zeros((), part.kernel.dtype), part
        return part.kernel, ()

    def _of_use(self, key, a, b, rows, moments, last) -> LeafKernel:
        a, b = _flat(key, a, b)
        if key[1] in ("bias", "scale"):
            return leaf_kernels.summed(self.pairing, key[1], a, b, rows, moments)
        contraction = self._contraction(key[1], a, b, (a.shape[2], b.shape[3]))
        return leaf_kernels.dense(self.pairing, a, b, contraction, moments, last)

    def _contraction(self, op, a, b, shape) -> cost.Contraction:
        outputs = b.shape[0]
        pairs = outputs**2 if self.pairing.inner == "full" else outputs
        first, second = map(len, self.pairing.split(a))
        return cost.choose(op, (first, second), (outputs, pairs), a.shape[1], shape)

    def _outside_layers(self, rest) -> list[LeafKernel]:
        moments = self._moments(dict.fromkeys(rest, False))
        result = []
        tables: dict[str, dict[str, taps.Factors]] = {}
        for key, (a, b, rows) in rest.items():
            if key[1] in ("embed", "head"):
                a, b = _flat(key, a, b)
                tables.setdefault(key[0], {})[key[1]] = taps.Factors(a, b, rows)
            else:
                result.append(self._of_use(key, a, b, rows, moments.get(key), None))
        for path, by_op in tables.items():
            result.append(self._of_table(path, by_op, moments.get((path, next(iter(by_op))))))
        return result

    def _of_table(self, path, by_op, moments) -> LeafKernel:
        leaf = next(leaf for leaf in self.spec.leaves(self.params) if leaf.path == path)
        shape = leaf.value.shape
        rows, head, contraction = [], None, "matches"
        for op, (a, b, ids) in by_op.items():
            if op == "embed":
                # As indexing does: negative ids count from the end, others are clipped.
                a = jnp.clip(jnp.where(a < 0, a + shape[0], a), 0, shape[0] - 1)
                rows.append(leaf_kernels.lookup_rows(a, b))
                contraction = self._contraction(op, a, b, shape)
            elif ids is None:
                head = leaf_kernels.Head(a, b.swapaxes(0, 1))
            else:
                rows.append(leaf_kernels.head_rows(a, b, ids))
        return leaf_kernels.table(self.pairing, shape, rows, head, contraction, moments)

    def _uses(self, x):
        chosen = {leaf.path for leaf in self.spec.leaves(self.params)}
        uses = taps.uses(self.f, self.params, x)
        return {key: use for key, use in uses.items() if key[0] in chosen}

    def _cotangents(self, x):
        """One backward pass per output, for all examples at once: row n depends on n alone."""
        value = jax.eval_shape(self.f, self.params, x)
        eye = jnp.eye(value.shape[1], dtype=value.dtype)
        return jnp.broadcast_to(eye[:, None], (value.shape[1], *value.shape))

    def _moments(self, stacked: Mapping[taps.Key, bool]) -> dict[taps.Key, Moments]:
        """Return Adam's moments for each use, with a leading axis of layers for a stacked use."""
        if not isinstance(self.spec.kind, Adam):
            return {}
        first, second, count = self.spec.kind.state
        rows: dict[str, list[Any]] = {}
        # A model that keeps a list of layers has one leaf per layer: sort them into a stack.
        for leaf, *pair in zip(self.spec.leaves(self.params), first, second, strict=True):
            rows.setdefault(leaf.path, []).append((leaf.layer or 0, pair))
        result = {}
        for key, in_layers in stacked.items():
            ordered = [pair for _, pair in sorted(rows[key[0]], key=lambda row: row[0])]
            first, second = (jnp.concatenate(side) for side in zip(*ordered, strict=True))
            counts = jnp.broadcast_to(count[None], (first.shape[0],))
            whole = Moments(first, second, counts)
            result[key] = whole if in_layers else jax.tree.map(lambda a: a[0], whole)
        return result


def _flat(key, a, b):
    """Return factors with one axis of positions: a [N, T, ...], b [C, N, T, ...]."""
    count = a.shape[0]
    a = a.reshape(count, -1) if key[1] == "embed" else a.reshape(count, -1, a.shape[-1])
    return a, b.reshape(b.shape[0], count, -1, b.shape[-1])


def _concatenate(key, stacked, *sides) -> taps.Factors:
    """Return the factors of all examples, padded with zeros to the same number of positions."""
    flat = lambda a, b: _flat(key, a, b)  # noqa: E731
    flat = jax.vmap(flat, (0, 1), (0, 1)) if stacked else flat
    flattened = [flat(side.a, side.b) for side in sides]
    length = max(b.shape[-2] for _, b in flattened)

    def pad(x, axis):
        return jnp.pad(x, [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])

    lead = int(stacked)
    a = jnp.concatenate([pad(a, lead + 1) for a, _ in flattened], lead)
    b = jnp.concatenate([pad(b, lead + 2) for _, b in flattened], lead + 1)
    return taps.Factors(a, b, sides[0].rows)
