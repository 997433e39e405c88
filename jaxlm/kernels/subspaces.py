r"""Kernels of training in a subspace, and the error of a random projection.

The kernel of a method of fine-tuning is that of the parameters that it trains. For most methods it
is `ntk` with another `select` (`docs/kernels.md` has the table). Two of them are random projections
of the kernel of all parameters, and approach it as their dimension grows:

    intrinsic dimension:  θ = θ0 + Πv, Π [P, k] of entries N(0, 1/k):  K = <Π^T ∇f(x), Π^T ∇f(x')>
    LoRA at B = 0:        W + s A B, A [in, r] random:
                          K = s^2 Σ_layers Σ_{t,s} <b_t, b'_s> <A^T x_t, A^T x'_s>

where x_t is the input of a matrix at position t and b_t the gradient with respect to its output. At
B = 0 the gradient of A is zero, and that of B is s Σ_t (A^T x_t) b_t^T. The first kernel is `ntk`
with a Gaussian projector, the second is `activation_projected`.

References: Malladi et al., "A Kernel-Based View of Language Model Fine-Tuning", arXiv:2210.05643;
Aghajanyan et al., "Intrinsic Dimensionality", arXiv:2012.13255; Hu et al., arXiv:2106.09685.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlm.core import paths, prng, taps
from jaxlm.core.checks import integer
from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError
from jaxlm.core.programs import held
from jaxlm.gradients.per_example import takes_tap
from jaxlm.kernels.checks import count_outputs
from jaxlm.kernels.contraction import class_axis, contract


def draw_adapters(
    params: Any, rank: int, seed: int | Array = 0, targets: paths.Select = r"\.kernel$"
) -> dict[str, Array]:
    """Return A of `activation_projected`, with entries N(0, 1 / rank), so that E A A^T = I.

    Args:
      params: the parameters of a model.
      rank: r.
      seed: seed of the draw; A is a function of (seed, path, layer, index).
      targets: selects kernels by their paths.

    Returns:
      Path of a kernel -> A [in, r], [L, in, r] where layers are stacked; float32.

    Raises:
      UserError: if the rank is below 1 or no kernel is selected.
    """
    integer("rank", rank)
    takes, key = paths.path_predicate(targets), jax.random.key(seed)
    drawn = {}
    for path, _, stacked, value in paths.flatten(params)[0]:
        if path.endswith(".kernel") and takes(path):
            leaf_key = functools.partial(prng.leaf_key, key, f"{path}.lora_a")
            draw = functools.partial(prng.normal, shape=(value.shape[-2], rank))
            keys = jax.vmap(leaf_key)(jnp.arange(value.shape[0])) if stacked else leaf_key(None)
            drawn[path] = (jax.vmap(draw) if stacked else draw)(keys) / math.sqrt(rank)
    if not drawn:
        raise UserError(
            f"targets: selects no kernel (got {targets!r}). Kernels have paths like a.kernel."
        )
    return drawn


def activation_projected(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    adapters: Mapping[str, Any],
    scale: float | int = 1.0,
    trace_axes: Sequence[int] = (),
    diagonal_axes: Sequence[int] = (),
) -> Array:
    """Return the kernel of LoRA at B = 0 by its formula, for a model without adapters.

    With Gaussian A its mean is s² times the NTK of the matrices that `adapters` names. It costs one
    forward pass and C backward passes per example, and of a matrix's gradient only the projection
    [r, out] is formed. The function is pure: apply `jax.jit` to it.

    Args:
      f: `f(params, x, *, tap) -> [N, C]`.
      params: parameters of a model whose layers are stacked.
      x1, x2: see `ntk`.
      adapters: path of a kernel -> A, from `draw_adapters` or the leaves `lora_a` of a model.
      scale: s, `config.lora_scale` of a model.
      trace_axes, diagonal_axes: see `ntk`.

    Returns:
      [N1, C, N2, C]; [N1, N2] with `trace_axes`; [N1, N2, C] with `diagonal_axes`.

    Raises:
      UserError: if f has no keyword `tap`, or a kernel named in `adapters` passes no tap.
    """
    if not takes_tap(f):
        raise UserError("f: has no keyword tap (got none). Give f(params, x, *, tap=None).")
    over = class_axis(trace_axes, diagonal_axes)
    f, params = held(f, params)
    rows = functools.partial(_features, f, params, adapters=adapters, scale=scale)
    left = rows(x1, name="x1")
    right = left if x2 is None else rows(x2, name="x2")
    return contract(left, right, over)


def _features(f, params, x, *, adapters, scale, name):
    """Return the gradients of B, [N, C, L, r * out] per adapter."""
    outputs = count_outputs(f, params, x, name)
    uses = taps.uses(f, params, x)
    for path in adapters:
        if (path, "dense") not in uses:
            raise UserError(
                f"adapters: must name kernels that pass a tap (got {path}). Correct it."
            )
    keep = {(path, "dense"): uses[path, "dense"] for path in adapters}
    value = jax.eval_shape(f, params, x)
    ones = jnp.eye(outputs, dtype=value.dtype)
    cotangents = jnp.broadcast_to(ones[:, None], (outputs, *value.shape))
    with jax.default_matmul_precision("highest"):
        factors = taps.factors(f, params, x, cotangents=cotangents, keep=keep)
        result = []
        for path, adapter in adapters.items():
            a, b, _ = factors[path, "dense"]
            a, b = wide(a), wide(b)
            if jnp.ndim(adapter) == 2:
                a, b, adapter = a[None], b[:, None], adapter[None]
            a = a.reshape(*a.shape[:2], -1, a.shape[-1])
            b = b.reshape(*b.shape[:3], -1, b.shape[-1])
            low = jnp.einsum("lnti,lir->lntr", a, jnp.asarray(adapter))
            grads = scale * jnp.einsum("lntr,clnto->nclro", low, b)
            result.append(grads.reshape(*grads.shape[:3], -1))
    return result


def relative_error(kernel: Any, full: Any) -> float:
    """Return `||K - K_full|| / ||K_full||` in the Frobenius norm, in float64.

    >>> relative_error(jnp.array([[3.0, 0.0]]), jnp.array([[3.0, 4.0]]))
    0.8
    """
    kernel, full = (np.asarray(k, np.float64) for k in (kernel, full))
    if kernel.shape != full.shape:
        raise UserError(
            f"kernel: must have the shape of full, {full.shape} (got {kernel.shape}). Compute both "
            "of the same examples."
        )
    return float(np.linalg.norm(kernel - full) / np.linalg.norm(full))


def expected_error(full: Any, dim: int) -> float:
    """Return the root mean square of `relative_error` for a Gaussian projection to `dim`.

    For rows g of Gaussian projections E (K_ij - <g_i, g_j>)^2 = (K_ii K_jj + K_ij^2) / dim, so

        E ||K - K_full||^2 / ||K_full||^2 = (1 + (tr K_full / ||K_full||)^2) / dim.

    For random signs this is an upper bound.

    Args:
      full: a kernel of examples with themselves, neither traced nor diagonal.
      dim: dimension of the projection.
    """
    full = np.asarray(full, np.float64)
    size = math.prod(full.shape[: full.ndim // 2])
    if full.size != size * size:
        raise UserError(
            f"full: must be a kernel of examples with themselves (got {full.shape}). Give "
            "[N, C, N, C]."
        )
    matrix = full.reshape(size, size)
    return math.sqrt((1 + (np.trace(matrix) / np.linalg.norm(matrix)) ** 2) / dim)
