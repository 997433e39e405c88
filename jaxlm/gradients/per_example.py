"""Per-example gradients, passed to a rule leaf by leaf.

For a loss with a keyword `tap`, one backward pass over a batch yields the factors of every
example's gradients. The gradients of one layer are formed, passed to a rule and freed before the
next layer is reached. For any other loss, all gradients of a batch exist at once.
"""

import dataclasses
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlm.core import paths, taps
from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError

LOSS_USE = ("", "bias")
"""A tap that belongs to no parameter: it returns the losses from the backward pass."""


class Used(NamedTuple):
    """The factors of one use of a parameter, as in `jaxlm.core.taps`, for one cotangent."""

    op: str
    a: Array
    b: Array
    rows: Array | None = None


@dataclasses.dataclass(frozen=True)
class Gradient:
    """Per-example gradients of a leaf, a stack of layers, or one layer.

    Attributes:
      path: path of the leaf.
      layer: None for a leaf outside layers and for a whole stack.
      shape: shape of one gradient.
      value: the gradients [N, *shape]; None if only their factors are known.
      uses: the factors of the gradients if `value` is None.
    """

    path: str
    layer: Any
    shape: tuple[int, ...]
    value: Array | None = None
    uses: tuple[Used, ...] = ()

    def formed(self) -> Float[Array, "N ..."]:
        """Return the gradients [N, *shape], in at least float32."""
        if self.value is not None:
            return wide(self.value)
        return sum(_form(use, self.shape) for use in self.uses)  # type: ignore[return-value]


def _form(use: Used, shape: tuple[int, ...]) -> Array:
    """Form gradients from factors a [N, T, ...], b [N, T, ...]."""
    op, a, b, rows = use
    if op == "bias":
        g = wide(b).sum(1)
    elif op == "scale":
        g = (wide(a) * wide(b)).sum(1)
    elif op == "dense":
        return _products(a, b)
    elif op == "head":
        g = _products(b, a)
    else:
        rows = None
        # The lookup takes the nearest row for an id out of range, and so must its gradient.
        g = jax.vmap(lambda ids, b: jnp.zeros(shape, b.dtype).at[ids].add(b, mode="clip"))(
            a.astype(jnp.int32), wide(b)
        )
    if rows is None:
        return g.reshape(len(g), *shape)
    return jnp.zeros((len(g), *shape), g.dtype).at[:, rows.astype(jnp.int32)].add(g)


def _products(a: Array, b: Array) -> Array:
    return jnp.einsum("nti,nto->nio", wide(a), wide(b), precision=lax.Precision.HIGHEST)


Rule = Callable[[Gradient, Any, Any], tuple[Any, Any]]


class Reduced(NamedTuple):
    """The result of `reduce`.

    Attributes:
      total: the first value of the rule, summed over all leaves and layers.
      own: the second value of the rule for each selected leaf, [N, ...], or [N, L, ...] for a
        stacked leaf.
      losses: [N].
    """

    total: Any
    own: list[Any]
    losses: Array


def count_examples(x: Any, name: str) -> int:
    """Return how many examples a batch has, from axis 0 of its arrays; `name` is for messages."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(x)]
    sizes = {shape[0] if shape else None for shape in shapes}
    shown = ", ".join(map(str, shapes)) or "no array"
    if len(sizes) != 1 or None in sizes:
        raise UserError(
            f"{name}: axis 0 of every array must be the examples (got {shown}). Give arrays of the "
            "same length."
        )
    (count,) = sizes
    if not count:
        raise UserError(f"{name}: has no examples (got {shown}). Give at least one.")
    return count


def takes_tap(loss_fn: Callable[..., Any]) -> bool:
    """Return whether a function has a keyword `tap`."""
    return "tap" in inspect.signature(loss_fn).parameters


def reduce(
    loss_fn: Callable[..., Array],
    params: Any,
    examples: Any,
    rule: Rule,
    *,
    select: paths.Select = None,
    extras: Sequence[Any] | None = None,
    shared: Any = None,
    segments: Int[Array, "rows T"] | None = None,
) -> Reduced:
    """Call a rule on the per-example gradients of each leaf, or of each layer of a stack.

    Memory: with a tap, the activations of the batch and the gradients of one layer; without a tap,
    the gradients of all selected parameters. If a selected parameter does not pass the tap, or
    passes it twice, the loss is treated as one without a tap (`untapped` returns the reason).

    Args:
      loss_fn: `loss_fn(params, example)`, the loss of one example; or `loss_fn(params, examples, *,
        tap)`, the losses [N] of a batch, which passes `tap` to every use of a parameter.
      params: any pytree.
      examples: a pytree of arrays whose axis 0 is N.
      rule: `rule(gradient, extra, shared) -> (total, own)`, pytrees of arrays; `own` has a leading
        axis N, `total` the same shapes for every leaf.
      select: selects the parameters to differentiate by.
      extras: for each selected leaf, in order, a pytree of arrays with the shape of the leaf; a
        rule for one layer gets the slice of that layer.
      shared: a pytree of small arrays that every call gets.
      segments: for rows that hold several examples: the example of each token, 1 to S, and 0 for
        padding. Losses are then [rows, S], and gradients those of rows * S examples. Needs a tap.
    """
    count = len(jax.tree.leaves(paths.split(params, select)[0]))
    extras = [None] * count if extras is None else list(extras)
    with jax.default_matmul_precision("highest"):
        why = untapped(loss_fn, params, examples, select)
        if why is None:
            return _by_factors(loss_fn, params, examples, rule, select, extras, shared, segments)
        if segments is not None:
            raise UserError(f"segments: need a loss with a tap, but {why}. Give one example a row.")
        return _by_gradients(loss_fn, params, examples, rule, select, extras, shared)


def _by_gradients(loss_fn, params, examples, rule, select, extras, shared) -> Reduced:
    losses, tree = gradients(loss_fn, params, examples, select)
    total, own = None, []
    rows = zip(paths.flatten(tree)[0], extras, strict=True)
    for (path, layer, _, value), extra in rows:
        part, one = rule(Gradient(path, layer, value.shape[1:], value), extra, shared)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
        own.append(one)
    return Reduced(total, own, losses)


def gradients(
    loss_fn: Callable[..., Array], params: Any, examples: Any, select: paths.Select = None
) -> tuple[Float[Array, "N"], Any]:
    """Return the losses [N] and the gradients, each [N, *shape], of all examples; see `reduce`.

    >>> losses, g = gradients(lambda w, x: (w * x) ** 2, jnp.float32(1), jnp.array([1.0, 2.0]))
    >>> losses.tolist(), g.tolist()
    ([1.0, 4.0], [2.0, 8.0])
    """
    taken, rest = paths.split(params, select)
    batched = takes_tap(loss_fn)

    def one(chosen, example):
        merged = paths.merge(chosen, rest)
        if batched:
            return loss_fn(merged, jax.tree.map(lambda a: a[None], example))[0]
        return loss_fn(merged, example)

    return jax.vmap(jax.value_and_grad(one), (None, 0))(taken, examples)


def _by_factors(loss_fn, params, examples, rule, select, extras, shared, segments) -> Reduced:
    leaves = paths.flatten(paths.split(params, select)[0])[0]
    by_path: dict[str, list[int]] = {}
    for i, leaf in enumerate(leaves):
        by_path.setdefault(leaf.path, []).append(i)
    shapes = {leaf.path: leaf.value.shape[leaf.stacked :] for leaf in leaves}

    def with_losses(params, examples, *, tap=None):
        losses = loss_fn(params, examples, tap=tap)
        return taps.apply(tap, *LOSS_USE, losses, losses, None)  # type: ignore[arg-type]

    value = jax.eval_shape(with_losses, params, examples)
    _check_losses(value, examples, segments)
    all_uses = taps.uses(with_losses, params, examples)
    all_uses = {key: use for key, use in all_uses.items() if key[0] in by_path or key == LOSS_USE}

    per_row = None if segments is None else value.shape[1]

    def in_layer(key, a, b, layer, extra):
        extra, shared, segments = extra
        uses = (_used(key[1], a, b[0], None, segments, per_row),)
        return rule(Gradient(key[0], layer, shapes[key[0]], uses=uses), extra, shared)

    # A rule runs inside the backward pass of a `custom_vjp`, which may not close over traced
    # arrays: they are passed as arguments, repeated for each layer.
    by_layer = {
        key: (_by_layer(by_path[key[0]], leaves, extras), *_repeated((shared, segments), use.times))
        for key, use in all_uses.items()
        if use.stacked
    }
    total, stacked, rest = taps.reduce(
        with_losses,
        params,
        examples,
        in_layer,
        cotangents=jnp.ones((1, *value.shape), value.dtype),
        extras=by_layer,
        keep=all_uses,
    )
    own: list[Any] = [None] * len(leaves)
    for (path, _), stacked_own in stacked.items():
        for at, i in enumerate(_in_order(by_path[path], leaves)):
            whole = leaves[i].stacked
            own[i] = jax.tree.map(
                lambda x, whole=whole, at=at: jnp.moveaxis(x, 0, 1) if whole else x[at], stacked_own
            )
    losses = rest.pop(LOSS_USE).a
    layered = {path for path, _ in stacked}
    for path, places in by_path.items():
        if path in layered:
            continue
        uses = tuple(
            _used(op, a, b[0], rows, segments, per_row)
            for (at, op), (a, b, rows) in rest.items()
            if at == path
        )
        for i in places:
            value = None if uses else jnp.zeros((losses.size, *leaves[i].value.shape))
            gradient = Gradient(path, leaves[i].layer, leaves[i].value.shape, value, uses)
            part, own[i] = rule(gradient, extras[i], shared)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
    return Reduced(total, own, losses.reshape(-1))


def _by_layer(places, leaves, extras):
    """The extras of a path, with a leading axis of layers."""
    if leaves[places[0]].stacked:
        return extras[places[0]]
    ordered = [extras[i] for i in _in_order(places, leaves)]
    return jax.tree.map(lambda *x: jnp.stack(x), *ordered)


def _in_order(places, leaves):
    return sorted(places, key=lambda i: leaves[i].layer or 0)


def _repeated(shared, times):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (times, *jnp.shape(x))), shared)


def _used(op, a, b, rows, segments, per_row) -> Used:
    """Return the factors of a use with one axis of positions, one row per example."""
    count = a.shape[0]
    if segments is not None and b.shape[1:-1] != segments.shape[1:]:
        raise UserError(
            f"segments: must have {b.shape[1:-1]} positions a row, as the activations have (got "
            f"{segments.shape[1:]}). Give the segments of the ids that the loss reads."
        )
    a = a.reshape(count, -1) if op == "embed" else a.reshape(count, -1, a.shape[-1])
    b = b.reshape(count, -1, b.shape[-1])
    if segments is None:
        return Used(op, a, b, rows)
    own = segments[:, None] == jnp.arange(1, per_row + 1, dtype=segments.dtype)[None, :, None]
    b = jnp.where(own[..., None], b[:, None], 0)
    return Used(op, jnp.repeat(a, per_row, axis=0), b.reshape(-1, *b.shape[2:]), rows)


def _check_losses(value, examples, segments) -> None:
    count = jax.tree.leaves(examples)[0].shape[0]
    axes = 1 if segments is None else 2
    if getattr(value, "ndim", None) != axes or value.shape[0] != count:
        shape = f"[{count}]" if segments is None else f"[{count}, segments]"
        raise UserError(
            f"loss_fn: with a keyword tap it is called on a batch and must return {shape} (got "
            f"{getattr(value, 'shape', type(value).__name__)}). Return one loss for each example."
        )


def untapped(f: Callable[..., Any], params: Any, x: Any, select: paths.Select = None) -> str | None:
    """Return why the gradients of f are not products of factors, or None if they are."""
    if not takes_tap(f):
        return "it has no keyword tap"
    uses = taps.uses(f, params, x)
    slices: Counter[str] = Counter()
    for leaf in paths.flatten(paths.split(params, select)[0])[0]:
        slices[leaf.path] += leaf.value.shape[0] if leaf.stacked else 1
    missing = slices.keys() - {path for path, _ in uses}
    if missing:
        missing &= taps.read(f, params, x)
    if missing:
        return f"{min(missing)} passes no tap"
    for path, times in slices.items():
        own = {op: use for (at, op), use in uses.items() if at == path}
        tied = set(own) == {"embed", "head"} and not any(use.stacked for use in own.values())
        if any(use.times != times for use in own.values()) or (len(own) > 1 and not tied):
            return f"{path} is used more than once"
    return None


def activation_bytes(uses: Mapping[taps.Key, taps.Use]) -> int:
    """Estimate the bytes that a backward pass keeps: inputs and outputs of all parameter uses."""
    return sum(
        use.times * (math.prod(part.shape) * part.dtype.itemsize)
        for use in uses.values()
        for part in (use.x, use.y)
    )
