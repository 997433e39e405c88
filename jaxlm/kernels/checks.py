"""What f and its examples must be, and which example is to blame where a kernel is not finite."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.artifacts.processes import to_host
from jaxlm.kernels import gram
from jaxlm.kernels.jacobian import gradients


def concrete(*trees: Any) -> bool:
    """Whether all arrays have values, so that they can be looked at."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def examples(x: Any, name: str) -> int:
    """How many examples a pytree has.

    Raises:
      UserError: if it has none, or its arrays do not agree.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(x)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes:
        raise UserError(
            f"{name} has arrays of shapes {', '.join(map(str, shapes)) or 'none'}; axis 0 of each "
            "must be the examples"
        )
    (count,) = sizes
    if not count:
        raise UserError(f"{name} has no example; give at least one")
    return count


def outputs(f: Callable[..., Array], params: Any, x: Any, name: str) -> int:
    """C, from the shape of f's value at x.

    Raises:
      UserError: if that is not [N, C], or its dtype is not a float.
    """
    count = examples(x, name)
    out = jax.eval_shape(f, params, x)
    shape = getattr(out, "shape", None)
    if shape is None:
        raise UserError(f"f must return one array [N, C], not {type(out).__name__}")
    if len(shape) == 1 and shape[0] == count:
        raise UserError(f"f returns {shape} at {name}, without a class axis; return f[:, None]")
    if len(shape) != 2 or shape[0] != count or not shape[1]:
        raise UserError(f"f returns {shape} at {name}, which has {count} examples; return [N, C]")
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise UserError(f"f returns {out.dtype} at {name}; return floats, whose gradient exists")
    return shape[1]


@functools.partial(jax.jit, static_argnames="f")
def _batches(f, params, x, other):
    """f at a pair of examples, at the pair exchanged, and at the first twice."""

    def at(rows):
        return f(params, jax.tree.map(lambda a: jnp.asarray(a)[rows], x))

    # A loop, so that f is compiled once.
    with jax.default_matmul_precision("highest"):
        pair, exchanged, twice = jax.lax.map(at, jnp.array([[0, other], [other, 0], [0, 0]]))
    return pair, exchanged[::-1], twice


def check_independence(f: Callable[..., Array], params: Any, x: Any, name: str) -> None:
    """Checks on two examples that each output of f depends on its own example alone.

    Raises:
      UserError: if exchanging the two does not exchange f, or one changes f at the other.
    """
    other = _another(x)
    if other is None:
        return
    pair, exchanged, twice = (to_host(a).astype(np.float64) for a in _batches(f, params, x, other))
    narrow = jax.eval_shape(f, params, x).dtype
    allowed = float(jnp.finfo(narrow).eps) ** 0.5 * np.abs(pair).max(initial=0)
    rows = ((exchanged, pair, "their order"), (twice[:1], pair[:1], "each other"))
    for found, wanted, what in rows:
        if not (np.isfinite(found).all() and np.isfinite(wanted).all()):
            return  # the kernel will not be finite either, and that check names an example
        worst = np.abs(found - wanted).max(initial=0)
        if worst > allowed:
            raise UserError(
                f"f at examples 0 and {other} of {name} depends on {what} (by {worst:.2g}); row n "
                "of f must depend on example n alone, without dropout or batch statistics"
            )


def _another(x) -> int | None:
    """The first example that is not the same as example 0."""
    differs = False
    for leaf in map(to_host, jax.tree.leaves(x)):
        flat = leaf.reshape(leaf.shape[0], -1)
        differs = differs | (flat != flat[:1]).any(1)
    found = np.flatnonzero(differs)
    return int(found[0]) if found.size else None


@functools.partial(jax.jit, static_argnames=("f", "select"))
def _finite(f, params, x, select):
    """Whether f is finite at each example, and its gradient in each leaf."""

    def at(row):
        batch = jax.tree.map(lambda a: a[None], row)
        found = [jnp.isfinite(g).all() for g in gradients(f, params, batch, select)]
        return jnp.isfinite(f(params, batch)).all(), jnp.stack(found)

    return jax.lax.map(at, x)


def check_finite(
    f: Callable[..., Array], params: Any, x: Any, select: paths.Select, name: str
) -> None:
    """Checks that f and its gradients are finite.

    Raises:
      UserError: naming the first example for which they are not, and the leaf.
    """
    taken = paths.flatten(paths.split(params, select)[0])[0]
    values, rows = (to_host(a) for a in _finite(f, params, jax.tree.map(jnp.asarray, x), select))
    bad = np.flatnonzero(~(values & rows.all(1)))
    if not bad.size:
        return
    n = int(bad[0])
    half = any(leaf.value.dtype == jnp.float16 for leaf in taken)
    cure = (
        "float16 ends at 65504, give parameters in float32 or bfloat16"
        if half
        else "look at that example and at the parameters"
    )
    if not values[n]:
        raise UserError(f"f at example {n} of {name} is not finite; {cure}")
    path = taken[int(np.flatnonzero(~rows[n])[0])].path
    raise UserError(f"the gradient of f at example {n} of {name} is not finite in {path}; {cure}")


@functools.partial(jax.jit, static_argnames=("f", "threshold", "select"))
def dropped(f, params, x, threshold, select):
    """`gram.dropped` of every example, one at a time."""

    def at(row):
        batch = jax.tree.map(lambda a: a[None], row)
        return gram.dropped(gradients(f, params, batch, select), threshold)[0]

    return jax.lax.map(at, x)
