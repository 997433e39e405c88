"""The slices of a kernel, from the backward passes of a function that takes a tap."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlm.core import paths, taps
from jaxlm.kernels import cost, gram, rules, tables
from jaxlm.kernels.sides import Sides, Slice

Plan = Mapping[taps.Key, cost.Method]
"""The way to each use of a parameter; see `jaxlm.kernels.cost`."""


@dataclasses.dataclass(frozen=True)
class Backward:
    """What the backward passes need.

    Attributes:
      f: `f(params, x, *, tap) -> [N, C]`.
      params: its parameters.
      sides: what kind of kernel is made.
      select: parameters to differentiate by.
      moments: of Adam, or None.
      plan: ways that are not to be chosen by cost.
    """

    f: Callable[..., Array]
    params: Any
    sides: Sides
    select: paths.Select
    moments: gram.Moments | None
    plan: Plan

    def slices(self, x1: Any, x2: Any) -> list[Slice]:
        """The parts of the kernel that the leaves have, summed where that is all they are for."""
        shapes = [[a.shape[1:] for a in jax.tree.leaves(x)] for x in (x1, x2)]
        if x2 is None or shapes[0] == shapes[1]:
            total, own, rest = self._together(x1, x2)
        else:
            total, own, rest = self._apart(x1, x2)
        if not self.sides.signed:
            own, result = {}, [] if total is None else [Slice(total)]
        else:
            result = []
        for part in own.values():
            for layer in range(part.kernel.shape[0]):
                result.append(jax.tree.map(lambda a, layer=layer: a[layer], part))
        return result + self._outside(rest)

    def _together(self, x1, x2):
        """All examples in one batch, the kernel made layer by layer."""
        x = x1 if x2 is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), x1, x2)
        found = self._uses(x)
        return taps.reduce(
            self.f,
            self.params,
            x,
            lambda key, a, b, layer, extra: self._rule(key, a, b, layer, extra, found[key].times),
            cotangents=self._cotangents(x),
            extras=self._extras({key: use.stacked for key, use in found.items()}),
            keep=found,
        )

    def _apart(self, x1, x2):
        """Batches of different shapes: the factors of each, filled up with zeros and joined."""
        uses = [self._uses(x) for x in (x1, x2)]
        sides = [
            taps.factors(self.f, self.params, x, cotangents=self._cotangents(x), keep=found)
            for x, found in zip((x1, x2), uses, strict=True)
        ]
        extras = self._extras({key: use.stacked for key, use in uses[0].items()})
        total: Any = None
        own, rest = {}, {}
        for key, use in uses[0].items():
            factors = _joined(key, use.stacked, *(side[key] for side in sides))
            if not use.stacked:
                rest[key] = factors
                continue

            def layer(xs, key=key, times=use.times):
                a, b, layer, extra = xs
                return self._rule(key, a, b, layer, extra, times)

            layers = jnp.arange(use.times, dtype=jnp.int32)
            b = jnp.moveaxis(factors.b, 1, 0)
            totals, own[key] = lax.map(layer, (factors.a, b, layers, extras.get(key)))
            total = totals.sum(0) if total is None else total + totals.sum(0)
        return total, own, rest

    def _rule(self, key, a, b, layer, extra, times):
        """What `taps.reduce` asks of a use in a layer."""
        part = self._of_use(key, a, b, None, extra, layer == times - 1)
        return (jnp.zeros((), part.kernel.dtype), part) if self.sides.signed else (part.kernel, ())

    def _of_use(self, key, a, b, rows, moments, last) -> Slice:
        a, b = _flat(key, a, b)
        if key[1] in ("bias", "scale"):
            return rules.summed(self.sides, key[1], a, b, rows, moments)
        shape = (a.shape[2], b.shape[3])
        return rules.dense(self.sides, a, b, self._method(key, a, b, shape), moments, last)

    def _method(self, key, a, b, shape):
        if key in self.plan:
            return self.plan[key]
        outputs = b.shape[0]
        pairs = outputs**2 if self.sides.inner == "full" else outputs
        counts = self.sides.counts(a)
        return cost.choose(key[1], counts, (outputs, pairs), a.shape[1], shape)

    def _outside(self, rest) -> list[Slice]:
        """The slices of what is used outside layers."""
        extras = self._extras(dict.fromkeys(rest, False))
        result = []
        by_path: dict[str, dict[str, taps.Factors]] = {}
        for key, (a, b, rows) in rest.items():
            if key[1] in ("embed", "head"):
                a, b = _flat(key, a, b)
                by_path.setdefault(key[0], {})[key[1]] = taps.Factors(a, b, rows)
            else:
                result.append(self._of_use(key, a, b, rows, extras.get(key), None))
        for path, ops in by_path.items():
            result.append(self._of_table(path, ops, extras.get((path, next(iter(ops))))))
        return result

    def _of_table(self, path, ops, moments) -> Slice:
        leaf = next(leaf for leaf in self._leaves() if leaf.path == path)
        rows, head, method = [], None, "matches"
        for op, (a, b, ids) in ops.items():
            if op == "embed":
                # Indexing counts from the end, and takes the nearest row for an id that is none.
                size = leaf.value.shape[0]
                a = jnp.clip(jnp.where(a < 0, a + size, a), 0, size - 1)
                rows.append(tables.looked_up(a, b))
                method = self._method((path, op), a, b, leaf.value.shape)
            elif ids is None:
                head = tables.Head(a, b.swapaxes(0, 1))
            else:
                rows.append(tables.restricted(a, b, ids))
        joined = tables.joined(rows)
        return tables.table(self.sides, leaf.value.shape, joined, head, method, moments)

    def _leaves(self) -> list[paths.Leaf]:
        return paths.flatten(paths.split(self.params, self.select)[0])[0]

    def _uses(self, x):
        chosen = {leaf.path for leaf in self._leaves()}
        found = taps.uses(self.f, self.params, x)
        return {key: use for key, use in found.items() if key[0] in chosen}

    def _cotangents(self, x):
        value = jax.eval_shape(self.f, self.params, x)
        eye = jnp.eye(value.shape[1], dtype=value.dtype)
        return jnp.broadcast_to(eye[:, None], (value.shape[1], *value.shape))

    def _extras(self, stacked: Mapping[taps.Key, bool]) -> dict[taps.Key, Any]:
        """For each use the moments of its leaf (first, second, count), in layers behind an axis."""
        if self.moments is None:
            return {}
        rows: dict[str, list[Any]] = {}
        pairs = zip(self._leaves(), self.moments.first, self.moments.second, strict=True)
        for leaf, *pair in pairs:
            rows.setdefault(leaf.path, []).append((leaf.layer or 0, pair))
        result = {}
        for key, in_layers in stacked.items():
            ordered = [pair for _, pair in sorted(rows[key[0]], key=lambda row: row[0])]
            first, second = (jnp.concatenate(side) for side in zip(*ordered, strict=True))
            count = jnp.broadcast_to(self.moments.count[None], (first.shape[0],))
            whole = (first, second, count)
            result[key] = whole if in_layers else jax.tree.map(lambda a: a[0], whole)
        return result


def _flat(key, a, b):
    """Factors with one axis of places: a [N, T, ...], b [C, N, T, ...]."""
    count = a.shape[0]
    a = a.reshape(count, -1) if key[1] == "embed" else a.reshape(count, -1, a.shape[-1])
    return a, b.reshape(b.shape[0], count, -1, b.shape[-1])


def _joined(key, stacked, *sides) -> taps.Factors:
    """Factors of all examples, with as many places for each."""

    def flat(a, b, rows):
        put = jax.vmap(lambda a, b: _flat(key, a, b), (0, 1), (0, 1)) if stacked else None
        return _flat(key, a, b) if put is None else put(a, b)

    flattened = [flat(*side) for side in sides]
    length = max(b.shape[-2] for _, b in flattened)

    def fill(x, axis):
        return jnp.pad(x, [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])

    lead = int(stacked)
    a = jnp.concatenate([fill(a, lead + 1) for a, _ in flattened], lead)
    b = jnp.concatenate([fill(b, lead + 2) for _, b in flattened], lead + 1)
    return taps.Factors(a, b, sides[0].rows)
