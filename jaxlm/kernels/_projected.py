r"""Kernels of randomly projected gradients, for more examples than gradients can be held of.

    K[n, c, m, d] ~ <S φ1(∇f_c(x_n)), S φ2(∇f_d(x'_m))>,    S [dim, P] random and never stored

The inner product of two gradients at an angle with cosine κ is off by about
`sqrt((1 + κ^2) / dim)` of the product of their lengths, whatever P is.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.core.programs import Program, has_values, held
from jaxlm.gradients.per_example import count_examples
from jaxlm.gradients.projection import Projector
from jaxlm.kernels import blocks, checks, gram, jacobian
from jaxlm.kernels.arguments import features_of
from jaxlm.sharding import WHOLE, batch_sharding, place_params

Side = Literal["left", "right"]


def projected(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    projector: Projector,
    kind: str = "sgd",
    trace_axes: Sequence[int] = (),
    diagonal_axes: Sequence[int] = (),
    select: paths.Select = None,
    block_size: int | None = None,
    sign_threshold: float | int | None = None,
    adam_state: Any = None,
    b1: float | int = 0.9,
    b2: float | int = 0.999,
    eps: float | int = 1e-8,
    check: bool = True,
) -> Array:
    """The kernel from projected gradients, one block of which is alive at a time.

    Time is that of (N1 + N2) C backward passes and projections, and of products of [N1 C, dim] with
    [dim, N2 C]. Of kinds "sgd" and "signgd" the result is positive semidefinite; of all kinds its
    mean over seeds is the kernel. f is traced at every call.

    Args:
      f, params, x1, x2, kind, trace_axes, diagonal_axes, select, sign_threshold, adam_state, b1,
        b2, eps, check: of `ntk`.
      projector: of `jaxlm.gradients.projection.projector`; with a mesh, the examples of a block are
        divided over its axes data and fsdp.
      block_size: examples in a block; by default as many as have gradients of at most 1 GiB.

    Returns:
      [N1, C, N2, C]; traced [N1, N2]; diagonal [N1, N2, C]. float32, or float64 for gradients of
      that dtype.

    Raises:
      UserError: as `ntk`.
      ValueError: if `select` takes nothing.

    >>> from jaxlm.gradients.projection import projector
    >>> f = lambda params, x: jnp.tanh(x @ params["w"])
    >>> x = jnp.array([[1.0, 2.0], [0.0, 1.0]])
    >>> projected(f, {"w": jnp.zeros((2, 3))}, x, projector=projector("rademacher", 64)).shape
    (2, 3, 2, 3)

    References: Park et al., "TRAK: Attributing Model Behavior at Scale", arXiv:2303.14186; Malladi
    et al., "A Kernel-Based View of Language Model Fine-Tuning", arXiv:2210.05643.
    """
    over = gram.axes(trace_axes, diagonal_axes)
    f, params = held(f, params)
    features = features_of(kind, params, select, sign_threshold, adam_state, b1, b2, eps)
    rows = functools.partial(
        _rows,
        f,
        params,
        features=features,
        projector=projector,
        select=select,
        block_size=block_size,
        check=check,
    )
    left = rows(x1, side="left", name="x1")
    if x2 is None and features.symmetric:
        right = left
    else:
        right = rows(x1 if x2 is None else x2, side="right", name="x1" if x2 is None else "x2")
    if left.shape[1] != right.shape[1]:
        raise UserError(
            f"f has {left.shape[1]} outputs at x1 and {right.shape[1]} at x2; give both the same "
            "classes"
        )
    return gram.contract([left[:, :, None]], [right[:, :, None]], over)


def projected_features(
    f: Callable[..., Array],
    params: Any,
    x: Any,
    *,
    projector: Projector,
    kind: str = "sgd",
    side: Side = "left",
    select: paths.Select = None,
    block_size: int | None = None,
    sign_threshold: float | int | None = None,
    adam_state: Any = None,
    b1: float | int = 0.9,
    b2: float | int = 0.999,
    eps: float | int = 1e-8,
    check: bool = True,
) -> Float[Array, "N C dim"]:
    """The rows whose inner products `projected` takes, for those who keep them.

    Args:
      f, params, kind, select, sign_threshold, adam_state, b1, b2, eps, check: of `ntk`.
      x: a pytree of arrays whose axis 0 is N.
      projector, block_size: of `projected`.
      side: "left" for S φ1(∇f), "right" for S φ2(∇f).
    """
    f, params = held(f, params)
    features = features_of(kind, params, select, sign_threshold, adam_state, b1, b2, eps)
    return _rows(
        f,
        params,
        x,
        features=features,
        projector=projector,
        select=select,
        block_size=block_size,
        check=check,
        side=side,
        name="x",
    )


def _rows(f, params, x, *, features, projector, select, block_size, check, side, name):
    if block_size is not None and block_size < 1:
        raise UserError(f"block_size={block_size} is no number of examples; give 1 or more")
    x = jax.tree.map(jnp.asarray, x)
    outputs = checks.outputs(f, params, x, name)
    look = check and has_values(params, x)
    if look:
        checks.check_independence(f, params, x, name)
    count, mesh = count_examples(x, name), projector.mesh
    options = (block_size, "jacobian", mesh)
    size = blocks.sizes((count, count), outputs, params, select, options)[0]
    placed = params if mesh is None else place_params(params, mesh, WHOLE)
    program = Program(functools.partial(_block, f, select, side))
    found = []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        part = jax.tree.map(lambda a, rows=rows: a[rows], x)
        part = part if mesh is None else jax.device_put(part, batch_sharding(mesh))
        block = program(placed, part, features, projector)
        found.append(block[: min(size, count - start)])
    result = jnp.concatenate(found)
    if look and not np.isfinite(np.asarray(result)).all():
        checks.check_finite(f, params, x, select, name)
        raise UserError(
            f"a projection of the gradients at {name} overflows {result.dtype}; scale f down"
        )
    return result


def _block(f, select, side, params, x, features, projector):
    found = getattr(features, side)(jacobian.gradients(f, params, x, select))
    taken, structure = jax.tree.flatten(paths.split(params, select)[0])
    count, outputs = found[0].shape[:2]
    rows = [g.reshape(count * outputs, *leaf.shape) for g, leaf in zip(found, taken, strict=True)]
    tree = jax.tree.unflatten(structure, rows)
    return projector.project(tree).reshape(count, outputs, projector.dim)
