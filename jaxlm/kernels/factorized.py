r"""Kernels from what passes each parameter, for models that take a tap.

One forward pass of all examples and one backward pass for each output; at every use of a parameter
the backward pass stops for its part of the kernel, made from what went in and the cotangent of what
came out (`jaxlm.kernels.rules`, `jaxlm.kernels.tables`). Only pieces of gradients that fit into a
cache ever exist, of one layer at a time.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlm.core import paths, taps
from jaxlm.core.errors import UserError
from jaxlm.core.programs import held
from jaxlm.gradients import per_example
from jaxlm.gradients.per_example import takes_tap
from jaxlm.kernels import cost, gram
from jaxlm.kernels.arguments import features_of
from jaxlm.kernels.backward import Backward, Plan
from jaxlm.kernels.sides import Sides


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
    f, params = held(f, params)
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
    problem = obstacle(f, params, x1, select)
    if problem is not None:
        raise UserError(problem)
    x1, x2 = jax.tree.map(jnp.asarray, (x1, x2))
    moments = features.moments
    constants = (0.0, 0.0, 0.0) if moments is None else (moments.b1, moments.b2, moments.eps)
    threshold = features.sign_threshold
    if threshold is None:
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(paths.split(params, select)[0])]
        threshold = 1e-12 if jnp.float64 in dtypes else 1e-6
    first = None if x2 is None else _count(x1)
    sides = Sides(first, over, features.kind, threshold, constants)
    with jax.default_matmul_precision("highest"):
        work = Backward(f, params, sides, select, moments, plan or {})
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
    f, params = held(f, params)
    outputs = jax.eval_shape(f, params, x1).shape[1]
    pairs = outputs**2 if gram.axes(trace_axes, diagonal_axes) == "full" else outputs
    counts = (_count(x1), _count(x1 if x2 is None else x2))
    taken = paths.flatten(paths.split(params, select)[0])[0]
    shapes = {leaf.path: leaf.value.shape[-2:] for leaf in taken}
    return {
        key: cost.choose(key[1], counts, (outputs, pairs), _places(key, use), shapes[key[0]])
        for key, use in taps.uses(f, params, x1).items()
        if key[0] in shapes and key[1] in ("dense", "embed", "head")
    }


def obstacle(f: Callable[..., Array], params: Any, x: Any, select: paths.Select) -> str | None:
    """Why `factorized` cannot make the kernel of f, in a sentence; None if it can."""
    found = per_example.untapped(f, params, x, select)
    if found is None:
        return None
    if not takes_tap(f):
        return "f has no keyword tap, which method='factorized' needs; give method='jacobian'"
    return (
        f"{found} in f, so its gradient has no factors; give method='jacobian', or leave "
        "it out by select"
    )


def _places(key, use) -> int:
    """How many places of an example a use has."""
    return math.prod(use.x.shape[1:] if key[1] == "embed" else use.x.shape[1:-1])


def _count(x) -> int:
    return jax.tree.leaves(x)[0].shape[0]
