r"""Kernels of fine-tuning in a subspace: intrinsic dimension, LoRA, biases, prefixes.

Each is the kernel of what is trained. Two of them are random projections of the kernel of all
parameters, and come near it as their dimension grows:

    intrinsic dimension:  θ = θ0 + Πv, Π [P, k] of entries N(0, 1/k):  K = <Π^T ∇f(x), Π^T ∇f(x')>
    LoRA at B = 0:        W + s A B, A [in, r] random:
                          K = s^2 Σ_layers Σ_{t,s} <b_t, b'_s> <A^T x_t, A^T x'_s>

with x_t what enters a kernel at position t and b_t the gradient with respect to what leaves it: the
gradient of A is zero there, and that of B is s Σ_t (A^T x_t) b_t^T. The kernels of biases and of
prefixes approximate nothing.

References: Malladi et al., "A Kernel-Based View of Language Model Fine-Tuning", arXiv:2210.05643;
Aghajanyan et al., "Intrinsic Dimensionality", arXiv:2012.13255; Hu et al., arXiv:2106.09685;
Ben Zaken et al., arXiv:2106.10199; Li and Liang, arXiv:2101.00190.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlm.core import paths, prng, taps
from jaxlm.core.errors import UserError
from jaxlm.core.programs import held
from jaxlm.gradients.per_example import count_examples
from jaxlm.gradients.projection import Family, projector
from jaxlm.kernels import checks, gram
from jaxlm.kernels._ntk import ntk
from jaxlm.kernels._projected import projected
from jaxlm.peft import BITFIT, LORA, PREFIX


def intrinsic_dimension(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    dim: int,
    seed: int = 0,
    family: Family = "gaussian",
    **options: Any,
) -> Array:
    """The kernel of training v in θ0 + Πv at v = 0.

    Args:
      f, params, x1, x2: of `ntk`.
      dim: k, the length of v.
      seed: of Π.
      family: of Π; the others of `jaxlm.gradients.projection.projector` are faster and as good.
      **options: of `projected`.

    Returns:
      As `ntk`.
    """
    drawn = projector(family, dim, seed)
    return projected(f, params, x1, x2, projector=drawn, **options)


def lora(f: Callable[..., Array], params: Any, x1: Any, x2: Any = None, **options: Any) -> Array:
    """The kernel of training low-rank adapters.

    Args:
      f: of `ntk`, of a model that `jaxlm.peft.lora` returned.
      params: that model's parameters.
      x1, x2, **options: of `ntk`.

    Raises:
      UserError: if the parameters have no adapters.
    """
    _need(params, LORA, "LoRA adapters; take the model that jaxlm.peft.lora returns")
    return ntk(f, params, x1, x2, select=LORA, **options)


def bitfit(f: Callable[..., Array], params: Any, x1: Any, x2: Any = None, **options: Any) -> Array:
    """The kernel of training biases alone; arguments of `ntk`.

    Raises:
      UserError: if the parameters have no biases.
    """
    _need(params, BITFIT, "biases; take another kind of fine-tuning")
    return ntk(f, params, x1, x2, select=BITFIT, **options)


def prefix(f: Callable[..., Array], params: Any, x1: Any, x2: Any = None, **options: Any) -> Array:
    """The kernel of training prefixes; arguments of `ntk`, of a model of `jaxlm.peft.prefix`.

    A prefix passes no tap, so the default method is "jacobian".

    Raises:
      UserError: if the parameters have no prefix.
    """
    _need(params, PREFIX, "prefix; take the model that jaxlm.peft.prefix returns")
    return ntk(f, params, x1, x2, select=PREFIX, **{"method": "jacobian", **options})


def _need(params, pattern, what):
    if not any(
        map(paths.path_predicate(pattern), (leaf.path for leaf in paths.flatten(params)[0]))
    ):
        raise UserError(f"the parameters have no {what}")


def draw_adapters(
    params: Any, rank: int, seed: int | Array = 0, targets: paths.Select = r"\.kernel$"
) -> dict[str, Array]:
    """A of `activation_projected`, with entries N(0, 1 / rank), so that E A A^T = I.

    Args:
      params: of a model.
      rank: r.
      seed: of the draw; A is a function of (seed, path, layer, index).
      targets: which kernels.

    Returns:
      Path of a kernel -> A [in, r], [L, in, r] where layers are stacked; float32.

    Raises:
      UserError: if the rank is below 1 or no kernel is taken.
    """
    if rank < 1:
        raise UserError(f"rank is {rank}: give 1 or more")
    takes, key = paths.path_predicate(targets), jax.random.key(seed)
    drawn = {}
    for path, _, stacked, value in paths.flatten(params)[0]:
        if path.endswith(".kernel") and takes(path):
            draw = functools.partial(_normal, key, path + ".lora_a", (value.shape[-2], rank))
            layers = jnp.arange(value.shape[0]) if stacked else None
            drawn[path] = draw(None) if layers is None else jax.vmap(draw)(layers)
    if not drawn:
        raise UserError(f"targets={targets!r} takes no kernel; kernels have paths like a.kernel")
    return drawn


def _normal(key, path, shape, layer):
    return prng.normal(prng.leaf_key(key, path, layer), shape) / math.sqrt(shape[1])


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
    """The kernel of LoRA at B = 0 by its formula, for a model without adapters.

    With Gaussian A its mean is the kernel of the kernels of `adapters`. One forward pass and C
    backward passes for each example; of a kernel's gradient only the part [r, out] is formed. Pure;
    `jax.jit` is the caller's.

    Args:
      f: `f(params, x, *, tap) -> [N, C]`.
      params: of a model whose layers are stacked.
      x1, x2: as of `ntk`.
      adapters: path of a kernel -> A, as of `draw_adapters` or the leaves `lora_a` of a model.
      scale: s, `config.lora_scale` of a model.
      trace_axes, diagonal_axes: of `ntk`.

    Returns:
      [N1, C, N2, C]; traced [N1, N2]; diagonal [N1, N2, C].

    Raises:
      UserError: if f takes no `tap`, or one of the paths passes none.
    """
    if "tap" not in inspect.signature(f).parameters:
        raise UserError("f takes no keyword tap; give f(params, x, *, tap=None)")
    over = gram.axes(trace_axes, diagonal_axes)
    f, params = held(f, params)
    rows = functools.partial(_features, f, params, adapters=adapters, scale=scale)
    left = rows(x1, name="x1")
    right = left if x2 is None else rows(x2, name="x2")
    return gram.contract(left, right, over)


def _features(f, params, x, *, adapters, scale, name):
    """Gradients of B, [N, C, L, r * out] each."""
    count, outputs = count_examples(x, name), checks.outputs(f, params, x, name)
    uses = taps.uses(f, params, x)
    for path in adapters:
        if (path, "dense") not in uses:
            raise UserError(f"adapters has {path}, which passes no tap; take paths of kernels")
    keep = {(path, "dense"): uses[path, "dense"] for path in adapters}
    ones = jnp.eye(outputs, dtype=jax.eval_shape(f, params, x).dtype)
    cotangents = jnp.broadcast_to(ones[:, None], (outputs, count, outputs))
    with jax.default_matmul_precision("highest"):
        found = taps.factors(f, params, x, cotangents=cotangents, keep=keep)
        result = []
        for path, adapter in adapters.items():
            a, b, _ = found[path, "dense"]
            a, b = a.astype(gram.wide(a.dtype)), b.astype(gram.wide(b.dtype))
            if jnp.ndim(adapter) == 2:
                a, b, adapter = a[None], b[:, None], adapter[None]
            a = a.reshape(*a.shape[:2], -1, a.shape[-1])
            b = b.reshape(*b.shape[:3], -1, b.shape[-1])
            low = jnp.einsum("lnti,lir->lntr", a, jnp.asarray(adapter))
            grads = scale * jnp.einsum("lntr,clnto->nclro", low, b)
            result.append(grads.reshape(*grads.shape[:3], -1))
    return result


def relative_error(kernel: Any, full: Any) -> float:
    """`||K - K_full|| / ||K_full||` in the Frobenius norm, in float64.

    >>> relative_error(jnp.array([[3.0, 0.0]]), jnp.array([[3.0, 4.0]]))
    0.8
    """
    kernel, full = (np.asarray(k, np.float64) for k in (kernel, full))
    if kernel.shape != full.shape:
        raise UserError(f"kernels of shapes {kernel.shape} and {full.shape} cannot be compared")
    return float(np.linalg.norm(kernel - full) / np.linalg.norm(full))


def expected_error(full: Any, dim: int) -> float:
    """What `relative_error` of a Gaussian projection to `dim` is, in the root mean square.

    For rows g of Gaussian projections E (K_ij - <g_i, g_j>)^2 = (K_ii K_jj + K_ij^2) / dim, so

        E ||K - K_full||^2 / ||K_full||^2 = (1 + (tr K_full / ||K_full||)^2) / dim.

    Random signs come out at most as large.

    Args:
      full: a kernel with itself, neither traced nor diagonal.
      dim: numbers in a row.
    """
    full = np.asarray(full, np.float64)
    size = math.prod(full.shape[: full.ndim // 2])
    if full.size != size * size:
        raise UserError(f"a kernel of shape {full.shape} is not one of examples with themselves")
    matrix = full.reshape(size, size)
    return math.sqrt((1 + (np.trace(matrix) / np.linalg.norm(matrix)) ** 2) / dim)
