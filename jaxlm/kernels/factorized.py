r"""Kernels from what passes each parameter, for models that take a tap.

One forward pass of all examples and one backward pass for each output; at every use of a parameter
the backward pass stops for its part of the kernel, made from what went in and the cotangent of what
came out (`jaxlm.kernels.rules`, `jaxlm.kernels.tables`). Only pieces of gradients that fit into a
cache ever exist, of one layer at a time.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import partial_eval
from jaxtyping import Array

from jaxlm.core import paths, taps
from jaxlm.core.errors import UserError
from jaxlm.kernels import cost, gram, rules, tables
from jaxlm.kernels.arguments import features_of
from jaxlm.kernels.sides import Sides, Slice

Plan = Mapping[taps.Key, cost.Method]
"""The way to each use of a parameter; see `jaxlm.kernels.cost`."""


def factorized(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    kind: str = "sgd",
    trace_axes: Sequence[int] = (),
    diagonal_axes: Sequence[int] = (),
    select: paths.Select = None,
    sign_threshold: float | int | None = None,
    adam_state: Any = None,
    b1: float | int = 0.9,
    b2: float | int = 0.999,
    eps: float | int = 1e-8,
    plan: Plan | None = None,
) -> Array:
    r"""The kernel from the inputs and the cotangents of each parameter's uses.

    With what went into a matrix at one example, A [T, I], and the cotangents of what came out, B
    [T, O], the gradient is $A^\top B$. So the kernel is a sum over matrices of

        ⟨A_iᵀ B_i, A_jᵀ B_j⟩ = Σ_ts (A_i A_jᵀ)_ts (B_i B_jᵀ)_ts,

    of which the right side is cheaper for short sequences and the left one, column by column, for
    long ones. Rows of embeddings meet where token ids are equal, and no array of the shape of a
    table exists for an example; a table tied to the head has the products of both uses as well. In
    the last layer, where a function of one position has one cotangent that is not zero, T is 1.

    Memory is that of the activations of N1 + N2 examples and of C backward passes in one layer. x1
    and x2 may be of different lengths, but then the factors of all layers are kept. Pure; `jax.jit`
    is the caller's.

    Args:
      f: `f(params, x, *, tap=None) -> [N, C]`, row n depending on example n alone, that hands `tap`
        to every use of a parameter (`jaxlm.core.taps`), as the models of jaxlm do.
      params: a nested dict of arrays.
      x1, x2: pytrees of arrays whose axis 0 is N1 and N2; `x2=None` stands for `x1`.
      kind, trace_axes, diagonal_axes, select, sign_threshold, adam_state, b1, b2, eps: see `ntk`.
      plan: the way to each use; by default `plan` chooses.

    Returns:
      [N1, C, N2, C]; traced [N1, N2]; diagonal [N1, N2, C]. float32, or float64 for gradients of
      that dtype.

    Raises:
      UserError: if a selected parameter passes no tap, or more than one where that is not an
        embedding tied to the head.

    >>> from jaxlm.core import taps
    >>> def f(params, x, *, tap=None):
    ...     return taps.apply(tap, "w", "dense", x, x @ params["w"], None)
    >>> factorized(f, {"w": jnp.ones((2, 1))}, jnp.eye(2), trace_axes=(-1,)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]

    References: Novak et al., "Fast Finite Width Neural Tangent Kernel", arXiv:2206.08720
    (structured derivatives); Goodfellow, "Efficient Per-Example Gradient Computations",
    arXiv:1510.01799 (the factors).
    """
    over = gram.axes(trace_axes, diagonal_axes)
    features = features_of(kind, params, select, sign_threshold, adam_state, b1, b2, eps)
    return block(f, params, x1, x2, features, over, select, plan)


def block(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any,
    features: gram.Features,
    over: gram.Axes,
    select: paths.Select,
    plan: Plan | None = None,
) -> Array:
    """`factorized` of checked arguments."""
    x1, x2 = jax.tree.map(jnp.asarray, (x1, x2))
    chosen = _chosen(params, select)
    problem = obstacle(f, params, x1, select)
    if problem is not None:
        raise UserError(problem)
    found = taps.uses(f, params, x1)
    first = None if x2 is None else _count(x1)
    moments = features.moments
    constants = (0.0, 0.0, 0.0) if moments is None else (moments.b1, moments.b2, moments.eps)
    threshold = features.sign_threshold
    if threshold is None:
        double = any(leaf.value.dtype == jnp.float64 for leaf in chosen.values())
        threshold = 1e-12 if double else 1e-6
    sides = Sides(first, over, features.kind, threshold, constants)
    extras = {} if moments is None else _moments(params, select, moments, found)
    work = _Work(f, params, sides, chosen, found, extras, plan or {})
    with jax.default_matmul_precision("highest"):
        return sides.join(work.slices(x1, x2))


def plan(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    trace_axes: Sequence[int] = (),
    diagonal_axes: Sequence[int] = (),
    select: paths.Select = None,
) -> dict[taps.Key, cost.Method]:
    """The way that `factorized` goes to each use of a matrix or a table, from shapes alone.

    Args:
      f, params, x1, x2, trace_axes, diagonal_axes, select: of `factorized`.

    Returns:
      `{(path, op): "paired" | "chunked" | "matches"}` for the ops dense, embed and head.
    """
    outputs = jax.eval_shape(f, params, x1).shape[1]
    pairs = outputs**2 if gram.axes(trace_axes, diagonal_axes) == "full" else outputs
    counts = (_count(x1), _count(x1 if x2 is None else x2))
    leaves = _chosen(params, select)
    chosen = {}
    for key, use in taps.uses(f, params, x1).items():
        if key[0] in leaves and key[1] in ("dense", "embed", "head"):
            shape = leaves[key[0]].value.shape[-2:]
            chosen[key] = cost.choose(key[1], counts, (outputs, pairs), use, shape)
    return chosen


def takes_tap(f: Callable[..., Array]) -> bool:
    """Whether f has a keyword `tap`."""
    return "tap" in inspect.signature(f).parameters


def obstacle(f: Callable[..., Array], params: Any, x: Any, select: paths.Select) -> str | None:
    """Why `factorized` cannot make the kernel of f, in a sentence; None if it can."""
    if not takes_tap(f):
        return "f has no keyword tap, which method='factorized' needs; give method='jacobian'"
    uses = taps.uses(f, params, x)
    slices: Counter[str] = Counter()
    for leaf in paths.flatten(paths.split(params, select)[0])[0]:
        slices[leaf.path] += leaf.value.shape[0] if leaf.stacked else 1
    missing = slices.keys() - {path for path, _ in uses}
    if missing:
        missing &= _read(f, params, x)
    if missing:
        return (
            f"{min(missing)} passes no tap in f, so its gradient has no factors; give "
            "method='jacobian', or leave it out by select"
        )
    for path, times in slices.items():
        own = {op: use for (at, op), use in uses.items() if at == path}
        tied = set(own) == {"embed", "head"} and not any(use.stacked for use in own.values())
        if any(use.count != times for use in own.values()) or (len(own) > 1 and not tied):
            return (
                f"{path} is used more than once in f, so its gradient is no product of factors; "
                "give method='jacobian', or leave it out by select"
            )
    return None


def _read(f, params, x) -> set[str]:
    """Paths that f's value depends on."""
    traced = jax.make_jaxpr(f)(params, x)
    _, read = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    leaves = paths.flatten(params)[0]
    return {leaf.path for leaf, used in zip(leaves, read, strict=False) if used}


def _chosen(params, select) -> dict[str, paths.Leaf]:
    """Path -> a leaf of it."""
    return {leaf.path: leaf for leaf in paths.flatten(paths.split(params, select)[0])[0]}


def _count(x) -> int:
    return jax.tree.leaves(x)[0].shape[0]


def _moments(params, select, moments, found) -> dict[taps.Key, Any]:
    """For each use the moments of its leaf: (first, second, count), in layers behind their axis."""
    rows: dict[str, Any] = {}
    leaves = paths.flatten(paths.split(params, select)[0])[0]
    for leaf, *pair in zip(leaves, moments.first, moments.second, strict=True):
        rows.setdefault(leaf.path, []).append((leaf.layer or 0, pair))
    result = {}
    for key, use in found.items():
        if key[0] in rows:
            pairs = [pair for _, pair in sorted(rows[key[0]], key=lambda row: row[0])]
            first, second = (jnp.concatenate(side) for side in zip(*pairs, strict=True))
            count = jnp.broadcast_to(moments.count[None], (first.shape[0],))
            whole = (first, second, count)
            result[key] = whole if use.stacked else jax.tree.map(lambda a: a[0], whole)
    return result


class _Work(NamedTuple):
    """Everything that a rule needs; see `block`."""

    f: Callable[..., Array]
    params: Any
    sides: Sides
    chosen: dict[str, paths.Leaf]
    found: dict[taps.Key, taps.Use]
    extras: dict[taps.Key, Any]
    plan: Plan

    def slices(self, x1, x2) -> list[Slice]:
        """The parts of the kernel of all leaves."""
        shapes = [[a.shape[1:] for a in jax.tree.leaves(x)] for x in (x1, x2)]
        if x2 is None or shapes[0] == shapes[1]:
            total, own, rest = self._together(x1, x2)
        else:
            total, own, rest = self._apart(x1, x2)
        result = [] if total is None or self.sides.signed else [Slice(total)]
        for key, part in own.items():
            if self.sides.signed:
                depth = self.found[key].count
                result += [jax.tree.map(lambda a, i=i: a[i], part) for i in range(depth)]
        return result + self._outside(rest)

    def _rule(self, key, a, b, layer, extra):
        part = self._of_use(key, a, b, None, extra, layer == self.found[key].count - 1)
        return (jnp.zeros(()), part) if self.sides.signed else (part.kernel, ())

    def _cotangents(self, x):
        value = jax.eval_shape(self.f, self.params, x)
        eye = jnp.eye(value.shape[1], dtype=value.dtype)
        return jnp.broadcast_to(eye[:, None], (value.shape[1], *value.shape))

    def _together(self, x1, x2):
        """All examples in one batch."""
        x = x1 if x2 is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), x1, x2)
        return taps.reduce(
            self.f,
            self.params,
            x,
            self._rule,
            cotangents=self._cotangents(x),
            extras=self.extras,
            select=self.chosen.__contains__,
        )

    def _apart(self, x1, x2):
        """Two batches of examples of different lengths: factors first, filled up with zeros."""
        sides = [
            taps.factors(
                self.f,
                self.params,
                x,
                cotangents=self._cotangents(x),
                select=self.chosen.__contains__,
            )
            for x in (x1, x2)
        ]
        joined = {key: self._joined(key, *(side[key] for side in sides)) for key in sides[0]}
        stacked = {key: factors for key, factors in joined.items() if self.found[key].stacked}
        rest = {key: factors for key, factors in joined.items() if key not in stacked}
        total: Any = None
        own = {}
        for key, (a, b, _) in stacked.items():
            extra = self.extras.get(key)
            layers = jnp.arange(a.shape[0], dtype=jnp.int32)

            def layer(xs, key=key):
                a, b, layer, extra = xs
                return self._rule(key, a, b, layer, extra)

            totals, own[key] = lax.map(layer, (a, jnp.moveaxis(b, 1, 0), layers, extra))
            total = totals.sum(0) if total is None else total + totals.sum(0)
        return total, own, rest

    def _joined(self, key, left, right):
        """Factors of all examples, with as many places for each; [L, C, N, T, O] is put as C, L."""
        stacked = self.found[key].stacked
        parts = []
        for a, b, _ in (left, right):
            flat = jax.vmap(lambda a, b: _flat(key, a, b), (0, 1), (0, 1)) if stacked else None
            parts.append(flat(a, b) if flat else _flat(key, a, b))
        length = max(b.shape[-2] for _, b in parts)
        at = 1 if key[1] == "embed" else 2

        def fill(x, axis):
            axis = x.ndim - axis
            return jnp.pad(x, [(0, (length - x.shape[i]) * (i == axis)) for i in range(x.ndim)])

        a = jnp.concatenate([fill(a, at) for a, _ in parts], int(stacked))
        b = jnp.concatenate([fill(b, 2) for _, b in parts], 1 + int(stacked))
        return taps.Factors(a, b, left.rows)

    def _of_use(self, key, a, b, rows, moments, last) -> Slice:
        a, b = _flat(key, a, b)
        if key[1] in ("bias", "scale"):
            return rules.summed(self.sides, key[1], a, b, rows, moments)
        return rules.dense(self.sides, a, b, self._method(key, a, b), moments, last)

    def _method(self, key, a, b):
        if key in self.plan:
            return self.plan[key]
        counts = tuple(part.shape[0] for part in self.sides.each(lambda a: a, a))
        outputs = b.shape[0]
        pairs = outputs**2 if self.sides.inner == "full" else outputs
        use = taps.Use(a, b[0], None, False, 1)
        shape = self.chosen[key[0]].value.shape[-2:]
        return cost.choose(key[1], counts, (outputs, pairs), use, shape)

    def _outside(self, rest) -> list[Slice]:
        """The slices of what is used outside layers."""
        result, by_path = [], {}
        for key, factors in rest.items():
            if key[1] in ("embed", "head"):
                by_path.setdefault(key[0], {})[key[1]] = factors
            else:
                moments = self.extras.get(key)
                result.append(self._of_use(key, *factors, moments, None))
        return result + [self._of_table(path, ops) for path, ops in by_path.items()]

    def _of_table(self, path, ops) -> Slice:
        parts, head, method = [], None, "matches"
        for op, (a, b, rows) in ops.items():
            a, b = _flat((path, op), a, b)
            if op == "embed":
                parts.append(tables.looked_up(a, b))
                method = self._method((path, op), a, b)
            elif rows is None:
                head = tables.Head(a, b.swapaxes(0, 1))
            else:
                parts.append(tables.restricted(a, b, rows))
        moments = self.extras.get((path, next(iter(ops))))
        shape = self.chosen[path].value.shape
        return tables.table(self.sides, shape, tables.both(parts), head, method, moments)


def _flat(key, a, b):
    """Factors with one axis of places: a [N, T, ...], b [C, N, T, ...]."""
    count = a.shape[0]
    a = a.reshape(count, -1) if key[1] == "embed" else a.reshape(count, -1, a.shape[-1])
    return a, b.reshape(b.shape[0], count, -1, b.shape[-1])
