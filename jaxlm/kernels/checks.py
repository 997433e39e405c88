"""Checks of f and its examples, and the search for the example that makes a kernel not finite."""

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
from jaxlm.kernels.jacobian import gradients

BATCH = 8
"""Most examples on which independence is checked."""


def count_outputs(f: Callable[..., Array], params: Any, x: Any, name: str) -> int:
    """Return C, from the shape of f's value at x, which must be floats [N, C]."""
    count = count_examples(x, name)
    out = jax.eval_shape(f, params, x)
    shape = getattr(out, "shape", None)
    if shape is None:
        raise UserError(f"f: must return one array (got {type(out).__name__}). Return [N, C].")
    if len(shape) != 2 or shape[0] != count or not shape[1]:
        cure = "Return f[:, None]." if shape == (count,) else "Return [N, C]."
        raise UserError(
            f"f: must return [{count}, C] at the {count} examples of {name} (got {shape}). {cure}"
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise UserError(f"f: must return floats (got {out.dtype} at {name}). Return the logits.")
    return shape[1]


def check_independence(f: Callable[..., Array], params: Any, x: Any, name: str) -> None:
    """Check on a few examples that each row of f depends on its own example alone.

    f at a batch is compared with f at the batch in reverse order, and with f at the batch with its
    second half replaced by copies of the first example.
    """
    differs = False
    for leaf in map(to_host, jax.tree.leaves(x)):
        flat = leaf.reshape(leaf.shape[0], -1)
        differs = differs | (flat != flat[:1]).any(1)
    order = [0, *np.flatnonzero(differs)[: BATCH - 1].tolist()]
    half = (len(order) + 1) // 2
    if len(order) < 2:
        return
    batches = np.array([order, order[::-1], order[:half] + [0] * (len(order) - half)])
    rows = jax.tree.map(lambda a: to_host(a)[batches], x)

    def values(params, rows):
        # A loop, so that f is compiled once.
        with jax.default_matmul_precision("highest"):
            return jax.lax.map(lambda x: f(params, x), rows)

    # The caller may be within a function that is traced; the values are needed now.
    with jax.ensure_compile_time_eval():
        result = Program(values)(params, rows)
    allowed = float(jnp.finfo(result.dtype).eps) ** 0.5
    plain, turned, partly = to_host(result).astype(np.float64)
    allowed *= np.abs(plain).max(initial=0)
    pairs = ((turned[::-1], plain, "their order"), (partly[:half], plain[:half], "each other"))
    for other, wanted, what in pairs:
        if not (np.isfinite(other).all() and np.isfinite(wanted).all()):
            return  # The kernel will not be finite either, and that check names an example.
        away = np.abs(other - wanted).max(axis=1, initial=0)
        if away.max() > allowed:
            raise UserError(
                f"f: row n must depend on example n alone (got examples "
                f"{', '.join(map(str, order))} of {name}, which depend on {what} by "
                f"{away.max():.2g}). Leave out dropout and batch statistics."
            )


def map_singly(function: Callable[..., Any], params: Any, x: Any) -> Any:
    """Return `function(params, batch)` of every example, in a batch of one."""

    def at(params, x):
        return jax.lax.map(lambda row: function(params, jax.tree.map(lambda a: a[None], row)), x)

    return Program(at)(params, jax.tree.map(jnp.asarray, x))


def check_finite(
    f: Callable[..., Array], params: Any, x: Any, select: paths.Select, name: str
) -> None:
    """Check that f and its gradients are finite; the error names the example and the leaf."""

    def finite(params, batch):
        by_leaf = [jnp.isfinite(g).all() for g in gradients(f, params, batch, select)]
        return jnp.isfinite(f(params, batch)).all(), jnp.stack(by_leaf)

    leaves = paths.flatten(paths.split(params, select)[0])[0]
    values, by_leaf = (to_host(a) for a in map_singly(finite, params, x))
    bad = np.flatnonzero(~(values & by_leaf.all(1)))
    if not bad.size:
        return
    n = int(bad[0])
    cure = "Look at that example and at the parameters."
    if any(leaf.value.dtype == jnp.float16 for leaf in leaves):
        cure = "float16 ends at 65504: give parameters in float32 or bfloat16."
    if not values[n]:
        raise UserError(f"f: not finite (got NaN or inf at example {n} of {name}). {cure}")
    path = leaves[int(by_leaf[n].argmin())].path
    raise UserError(f"f: its gradient is not finite in {path} (got example {n} of {name}). {cure}")
