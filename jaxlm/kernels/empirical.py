"""The empirical neural tangent kernel: one function for all kinds and methods."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm.artifacts.processes import to_host
from jaxlm.core import paths, taps
from jaxlm.core.checks import one_of
from jaxlm.core.errors import UserError
from jaxlm.core.programs import has_values, held
from jaxlm.gradients.per_example import count_examples, takes_tap
from jaxlm.gradients.projection import Projector
from jaxlm.kernels import checks, factorized, jacobian, kinds
from jaxlm.kernels.blocks import BLOCK_METHODS, Blocks, KernelOptions, block_sizes
from jaxlm.kernels.contraction import KernelSpec, kernel_spec
from jaxlm.kernels.kinds import Kind
from jaxlm.sharding import WHOLE, mesh_of, place_params

DEFAULT = KernelOptions()


def ntk(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    kind: str | Kind = "sgd",
    method: str = "auto",
    trace_axes: Sequence[int] = (),
    diagonal_axes: Sequence[int] = (),
    select: paths.Select = None,
    projector: Projector | None = None,
    options: KernelOptions = DEFAULT,
) -> Array:
    r"""Return the empirical neural tangent kernel of f at `params`.

        SGD:               K[n, c, m, d] = ⟨∇f_c(x_n), ∇f_d(x'_m)⟩
        SignGD:            K[n, c, m, d] = ⟨sign ∇f_c(x_n), sign ∇f_d(x'_m)⟩
        AsymmetricSignGD:  K[n, c, m, d] = ⟨∇f_c(x_n), sign ∇f_d(x'_m)⟩
        Adam:              K[n, c, m, d] = ⟨∇f_c(x_n), Γ(∇f_d(x'_m))⟩

    To first order, a step of size η of the optimizer on output d of x', with a batch of one, moves
    f_c(x) by ±η K. Γ(g) = m̂ / (√v̂ + ε) is the step that Adam makes on g from its state, with g in
    both moments and bias correction, as `optax.scale_by_adam`.

    f is traced at every call, so it always sees the current values of what it closes over. A call
    with the same trace as an earlier one reuses its compiled program.

    Args:
      f: `f(params, x) -> [N, C]`, where row n depends on example n alone. Method "factorized"
        needs a keyword `tap`.
      params: any pytree. Leaves that are not arrays of floats are held fixed.
      x1: a pytree of arrays whose axis 0 is N1: the examples at which the change of f is measured.
      x2: the same with N2: the examples that the optimizer steps on. None means `x1`; then only
        half of the kernel is computed if the kind is symmetric.
      kind: `SGD()`, `SignGD(threshold)`, `AsymmetricSignGD(threshold)` or `Adam(state, b1, b2,
        eps)`; or "sgd", "signgd" or "asymmetric_signgd".
      method: "jacobian" forms all gradients of a block and contracts them; "ntk_vector_products"
        forms the gradients of one example at a time; "factorized" computes the kernel of each
        parameter from its inputs and cotangents; "projected" contracts random projections, and is
        the only inexact one: for gradients with cosine κ the error of an inner product is about
        √((1 + κ²) / dim) times the product of their norms. "auto" is "factorized" if f has a
        keyword `tap` and every selected parameter passes it, else "jacobian".
      trace_axes: (-1,) for the mean over c = d, `sum_c K[n, c, m, c] / C`.
      diagonal_axes: (-1,) for the entries with c = d only.
      select: restricts the kernel to some parameters: a regular expression searched in their paths,
        or a predicate on them.
      projector: from `jaxlm.gradients.projection.projector`, for method "projected".
      options: blocks, mesh and checks.

    Returns:
      [N1, C, N2, C]; [N1, N2] with `trace_axes`; [N1, N2, C] with `diagonal_axes`. float32, or
      float64 for gradients of that dtype. (neural-tangents returns [N1, N2, C, C].)

    Raises:
      UserError: if an argument is invalid; if f's value is not [N, C], or its C differs between x1
        and x2; if f at one example depends on another; if a gradient is not finite (the message
        names the example).

    >>> f = lambda params, x: jnp.tanh(x @ params["w"])
    >>> ntk(f, {"w": jnp.zeros((2, 3))}, jnp.array([[1.0, 2.0], [0.0, 1.0]])).shape
    (2, 3, 2, 3)

    References: Jacot et al., "Neural Tangent Kernel", arXiv:1806.07572; Malladi et al., "A
    Kernel-Based View of Language Model Fine-Tuning", arXiv:2210.05643 (the kinds; the authors' code
    takes signs without a threshold); Novak et al., arXiv:2206.08720 (methods and axes); Park et
    al., "TRAK", arXiv:2303.14186 (projections).
    """
    f, params = held(f, params)
    spec = kernel_spec(params, kind, trace_axes, diagonal_axes, select)
    return _compute(f, params, x1, x2, spec, method, projector, options)[0]


class NTKInfo(NamedTuple):
    """How a kernel was computed.

    Attributes:
      method: the method that was used.
      dropped1: [N1], the fraction of the nonzero entries of ∇f(x), over all outputs, that the sign
        threshold set to zero; 0 where no sign is taken.
      dropped2: [N2], the same of x'.
    """

    method: str
    dropped1: Float[Array, "N1"]
    dropped2: Float[Array, "N2"]


def ntk_with_info(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    kind: str | Kind = "sgd",
    method: str = "auto",
    trace_axes: Sequence[int] = (),
    diagonal_axes: Sequence[int] = (),
    select: paths.Select = None,
    projector: Projector | None = None,
    options: KernelOptions = DEFAULT,
) -> tuple[Array, NTKInfo]:
    """Return `ntk` with an `NTKInfo`, which costs another backward pass per example.

    >>> f = lambda params, x: x @ params
    >>> K, info = ntk_with_info(f, jnp.ones((2, 1)), jnp.array([[1.0, 1e-9]]), kind="signgd")
    >>> K.tolist(), info.dropped1.tolist()
    ([[[[1.0]]]], [0.5])
    """
    f, params = held(f, params)
    spec = kernel_spec(params, kind, trace_axes, diagonal_axes, select)
    kernel, work = _compute(f, params, x1, x2, spec, method, projector, options)
    left, right = spec.kind.signed

    def dropped(x, signed):
        if not signed:
            return jnp.zeros(count_examples(x, "x"), jnp.float32)

        def one(params, batch):
            gradients = jacobian.gradients(work.f, params, batch, select)
            return kinds.dropped(gradients, spec.kind.threshold)[0]

        return checks.map_singly(one, work.params, x)

    first = dropped(work.x1, left)
    same = work.x2 is None and left == right
    return kernel, NTKInfo(work.method, first, first if same else dropped(work.side(1), right))


def _compute(f, params, x1, x2, spec, method, projector, options) -> tuple[Array, Blocks]:
    if (method == "projected") != (projector is not None):
        raise UserError(
            f"projector: must be given with method 'projected', and only then (got method "
            f"{method!r} and {'no' if projector is None else 'a'} projector). Give both or neither."
        )
    if projector is not None:
        if options.mesh is not None:
            raise UserError(
                "options.mesh: method 'projected' uses the mesh of its projector (got another). "
                "Give the mesh to the projector."
            )
        options = dataclasses.replace(options, mesh=projector.mesh)
    work = prepare(f, params, x1, x2, spec, method, options)
    if projector is not None:
        kernel = work.project(projector)
    else:
        kernel = work.join({pair: work.compute(*pair) for pair in work.pairs()})
    if options.check:
        check_kernel(work, kernel)
    return kernel, work


def prepare(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any,
    spec: KernelSpec,
    method: str,
    options: KernelOptions,
) -> Blocks:
    """Check the arguments, and return the blocks of a kernel, none of them computed yet."""
    x1, x2 = jax.tree.map(jnp.asarray, (x1, x2))
    mesh = mesh_of(params) if options.mesh is None else options.mesh
    if mesh is not None:
        params, x1, x2 = place_params((params, x1, x2), mesh, WHOLE)
    sides = [("x1", x1)] if x2 is None else [("x1", x1), ("x2", x2)]
    outputs = [checks.count_outputs(f, params, x, name) for name, x in sides]
    if len(set(outputs)) > 1:
        raise UserError(
            f"f: must have as many outputs at x1 as at x2 (got {outputs[0]} and {outputs[1]}). "
            "Give both the same classes."
        )
    if method == "auto":
        method = "jacobian" if factorized.obstacle(f, params, x1, spec.select) else "factorized"
    one_of("method", method, ("auto", "jacobian", *BLOCK_METHODS, "projected"))
    if options.check and has_values(params, x1, x2):
        for name, x in sides:
            if takes_tap(f):
                taps.check_ids(f, params, x, name)
            checks.check_independence(f, params, x, name)
    counts = (count_examples(x1, "x1"), count_examples(x1 if x2 is None else x2, "x2"))
    options = dataclasses.replace(options, mesh=mesh)
    sizes = block_sizes(counts, outputs[0], spec.leaves(params), method, options)
    return Blocks(f, params, x1, x2, spec, method, sizes, mesh)


def check_kernel(work: Blocks, kernel: Any) -> None:
    """Check that a kernel, or a block of it, is finite; the error names an example."""
    if not has_values(kernel) or np.isfinite(to_host(kernel)).all():
        return
    for name, x in (("x1", work.x1), ("x2", work.x2)):
        if x is not None:
            checks.check_finite(work.f, work.params, x, work.spec.select, name)
    raise UserError(
        f"f: its kernel overflows {kernel.dtype}, though all gradients are finite (got method "
        f"{work.method!r}). Give parameters of a wider dtype, or scale f down."
    )
