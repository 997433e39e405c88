"""What f and its examples must be, and which example is to blame where a kernel is not finite."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlm.artifacts.processes import to_host
from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.core.programs import Program
from jaxlm.gradients.per_example import count_examples
from jaxlm.kernels import gram
from jaxlm.kernels.jacobian import gradients


def outputs(f: Callable[..., Array], params: Any, x: Any, name: str) -> int:
    """C, from the shape of f's value at x.

    Raises:
      UserError: if that is not [N, C], or its dtype is not a float.
    """
    count = count_examples(x, name)
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


BATCH = 8
"""Examples, at most, by which independence is checked."""


def check_independence(f: Callable[..., Array], params: Any, x: Any, name: str) -> None:
    """Checks on some examples that each output of f depends on its own example alone.

    f at a batch of them is compared with f at the same in reverse order, and at a batch whose
    second half is the first example again.

    Raises:
      UserError: if that changes f at an example.
    """
    order = [0, *_others(x)[: BATCH - 1].tolist()]
    half = (len(order) + 1) // 2
    if len(order) < 2:
        return
    batches = np.array([order, order[::-1], order[:half] + [0] * (len(order) - half)])
    rows = jax.tree.map(lambda a: jnp.asarray(a)[batches], x)

    def values(params, rows):
        # A loop, so that f is compiled once.
        with jax.default_matmul_precision("highest"):
            return jax.lax.map(lambda x: f(params, x), rows)

    found = Program(values)(params, rows)
    allowed = float(jnp.finfo(found.dtype).eps) ** 0.5
    plain, turned, partly = to_host(found).astype(np.float64)
    allowed *= np.abs(plain).max(initial=0)
    pairs = ((turned[::-1], plain, "their order"), (partly[:half], plain[:half], "each other"))
    for other, wanted, what in pairs:
        if not (np.isfinite(other).all() and np.isfinite(wanted).all()):
            return  # the kernel will not be finite either, and that check names an example
        away = np.abs(other - wanted).max(axis=1, initial=0)
        if away.max() > allowed:
            raise UserError(
                f"f at examples {', '.join(map(str, order))} of {name} depends on {what} (by "
                f"{away.max():.2g}); row n of f must depend on example n alone, without dropout or "
                "batch statistics"
            )


def _others(x) -> np.ndarray:
    """The examples that are not the same as example 0."""
    differs = False
    for leaf in map(to_host, jax.tree.leaves(x)):
        flat = leaf.reshape(leaf.shape[0], -1)
        differs = differs | (flat != flat[:1]).any(1)
    return np.flatnonzero(differs)


def _at_each(params, x, function):
    """`function(params, batch)` of every example, in a batch of one."""

    def at(params, x):
        return jax.lax.map(lambda row: function(params, jax.tree.map(lambda a: a[None], row)), x)

    return Program(at)(params, jax.tree.map(jnp.asarray, x))


def check_finite(
    f: Callable[..., Array], params: Any, x: Any, select: paths.Select, name: str
) -> None:
    """Checks that f and its gradients are finite.

    Raises:
      UserError: naming the first example for which they are not, and the leaf.
    """

    def finite(params, batch):
        found = [jnp.isfinite(g).all() for g in gradients(f, params, batch, select)]
        return jnp.isfinite(f(params, batch)).all(), jnp.stack(found)

    taken = paths.flatten(paths.split(params, select)[0])[0]
    values, rows = (to_host(a) for a in _at_each(params, x, finite))
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


def dropped(f, params, x, threshold, select):
    """`gram.dropped` of every example, one at a time."""
    return _at_each(
        params,
        x,
        lambda params, batch: gram.dropped(gradients(f, params, batch, select), threshold)[0],
    )
