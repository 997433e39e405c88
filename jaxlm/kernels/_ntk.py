"""The empirical neural tangent kernel: one function for all kinds and methods."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxlm.artifacts.processes import to_host
from jaxlm.core import paths, taps
from jaxlm.core.errors import UserError
from jaxlm.core.programs import has_values, held
from jaxlm.gradients.per_example import count_examples, takes_tap
from jaxlm.gradients.projection import Projector
from jaxlm.kernels import blocks, checks, gram
from jaxlm.kernels._projected import projected
from jaxlm.kernels.arguments import features_of
from jaxlm.kernels.factorized import obstacle
from jaxlm.sharding import WHOLE, mesh_of, place_params


class NTKInfo(NamedTuple):
    """What a kernel was made of.

    Attributes:
      method: that computed it.
      dropped1: [N1], the part of the entries of ∇f(x), of all outputs together, that were not zero
        and were taken for zero by the sign threshold; 0 where no sign was taken.
      dropped2: [N2], the same of x'.
    """

    method: str
    dropped1: Float[Array, "N1"]
    dropped2: Float[Array, "N2"]


def ntk(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    kind: str = "sgd",
    method: str = "auto",
    trace_axes: Sequence[int] = (),
    diagonal_axes: Sequence[int] = (),
    select: paths.Select = None,
    block_size: int | None = None,
    sign_threshold: float | int | None = None,
    adam_state: Any = None,
    b1: float | int = 0.9,
    b2: float | int = 0.999,
    eps: float | int = 1e-8,
    projector: Projector | None = None,
    mesh: Mesh | None = None,
    check: bool = True,
) -> Array:
    r"""The empirical neural tangent kernel of f at `params`.

        sgd:                K[n, c, m, d] = ⟨∇f_c(x_n), ∇f_d(x'_m)⟩
        signgd:             K[n, c, m, d] = ⟨sign ∇f_c(x_n), sign ∇f_d(x'_m)⟩
        asymmetric_signgd:  K[n, c, m, d] = ⟨∇f_c(x_n), sign ∇f_d(x'_m)⟩
        adam:               K[n, c, m, d] = ⟨∇f_c(x_n), Γ(∇f_d(x'_m))⟩

    One step of size η of the optimizer on output d of x', with a batch of one, moves f_c(x) by
    ±η K, to first order. Γ(g) = m̂ / (√v̂ + ε) is the step that Adam makes on g from its state, with
    g in both moments and bias correction, as `optax.scale_by_adam`. From a fresh state and with
    ε → 0 it is sign(g): early Adam is SignGD, for which the paper has the sign kernels. From a
    trained state Γ is no longer odd, and has the part of the momentum that all examples share.

    f is traced at every call, so the kernel is that of what f closes over now; what is compiled is
    kept for the next call with the same trace.

    Args:
      f: `f(params, x) -> [N, C]`, row n depending on example n alone. With a keyword `tap` the
        factorized method can use it.
      params: any pytree; what is no array of floats, such as the activation functions of a module
        of Equinox, is held fixed.
      x1: a pytree of arrays whose axis 0 is N1: the examples whose f moves.
      x2: the same with N2: the examples that move it. None stands for `x1`; of a symmetric kind
        only half of the kernel is then computed.
      kind: one of the four.
      method: "jacobian" forms all gradients and contracts them; "ntk_vector_products" forms one at
        a time; "factorized" makes the kernel of each parameter from its inputs and cotangents;
        "projected" contracts random projections, and is the one that is not exact. "auto" is
        "factorized" for an f with a keyword `tap`, which chooses a way for each matrix, unless a
        parameter is used where no tap sees it; and else "jacobian".
      trace_axes: (-1,) for the mean over c = d, `sum_c K[n, c, m, c] / C`.
      diagonal_axes: (-1,) for c = d alone.
      select: restricts the kernel to some parameters: a regular expression searched in their paths
        or a predicate on them.
      block_size: examples on either side of a block; by default as many as have gradients of at
        most 1 GiB, for methods that form them.
      sign_threshold: τ: a sign counts where |g| > τ max|g| of its leaf, one layer of a stack being
        a leaf, and where that leaf is not all below τ max|g| of the whole gradient. By default
        1e-6, and 1e-12 in float64; 0 is the paper's code.
      adam_state: for "adam", the state of an optax chain that holds a `ScaleByAdamState`.
      b1, b2, eps: of that Adam.
      projector: of `jaxlm.gradients.projection.projector`, for "projected".
      mesh: divides the examples of a block over its axes data and fsdp; the parameters stay where
        they are on it, or are copied to each device. By default the mesh that they lie on.
      check: whether to look at values: that exchanging two examples exchanges f, and that the
        kernel is finite. Under `jax.jit` there are none to look at.

    Returns:
      [N1, C, N2, C]; traced [N1, N2]; diagonal [N1, N2, C]. float32, or float64 for gradients of
      that dtype. (neural-tangents: [N1, N2, C, C].)

    Raises:
      UserError: for an unknown kind, method or axis; if f's value is not [N, C], or its C is not
        the same at x1 and x2; if an example changes f at another; if a gradient is not finite (the
        message names the example).
      ValueError: if `select` takes nothing.

    >>> f = lambda params, x: jnp.tanh(x @ params["w"])
    >>> ntk(f, {"w": jnp.zeros((2, 3))}, jnp.array([[1.0, 2.0], [0.0, 1.0]])).shape
    (2, 3, 2, 3)

    References: Jacot et al., "Neural Tangent Kernel", arXiv:1806.07572; Malladi et al., "A
    Kernel-Based View of Language Model Fine-Tuning", arXiv:2210.05643 (the kinds; the authors' code
    takes signs without a threshold); Novak et al., arXiv:2206.08720 (the methods and axes).
    """
    options: dict[str, Any] = {
        "kind": kind,
        "trace_axes": trace_axes,
        "diagonal_axes": diagonal_axes,
        "select": select,
        "block_size": block_size,
        "sign_threshold": sign_threshold,
        "adam_state": adam_state,
        "b1": b1,
        "b2": b2,
        "eps": eps,
        "check": check,
    }
    if (method == "projected") != (projector is not None):
        raise UserError("method='projected' and a projector go together; give both or neither")
    if projector is not None:
        if mesh is not None:
            raise UserError(
                "the mesh of method='projected' is that of its projector; give it there"
            )
        return projected(f, params, x1, x2, projector=projector, **options)
    work = prepare(f, params, x1, x2, method=method, mesh=mesh, **options)
    kernel = work.join({pair: work.compute(*pair) for pair in work.pairs()})
    if check:
        check_kernel(work, kernel)
    return kernel


def ntk_with_info(
    f: Callable[..., Array], params: Any, x1: Any, x2: Any = None, **options: Any
) -> tuple[Array, NTKInfo]:
    """`ntk`, and what its sign threshold dropped, for another backward pass of each example.

    Args:
      f, params, x1, x2, **options: of `ntk`.

    >>> f = lambda params, x: x @ params
    >>> K, info = ntk_with_info(f, jnp.ones((2, 1)), jnp.array([[1.0, 1e-9]]), kind="signgd")
    >>> K.tolist(), info.dropped1.tolist()
    ([[[[1.0]]]], [0.5])
    """
    kernel = ntk(f, params, x1, x2, **options)
    kind, select = options.get("kind", "sgd"), options.get("select")

    def lost(x, signed):
        if not signed:
            return jnp.zeros(count_examples(x, "x"), jnp.float32)
        return dropped_fraction(f, params, x, options.get("sign_threshold"), select)

    first = lost(x1, kind == "signgd")
    if x2 is None and kind == "signgd":
        second = first
    else:
        second = lost(x1 if x2 is None else x2, kind in ("signgd", "asymmetric_signgd"))
    method = options.get("method", "auto")
    if method == "auto":
        method = resolve(method, *held(f, params), x1, select)
    return kernel, NTKInfo(method, first, second)


def dropped_fraction(
    f: Callable[..., Array],
    params: Any,
    x: Any,
    sign_threshold: float | int | None = None,
    select: paths.Select = None,
) -> Float[Array, "N"]:
    """The part of the non-zero entries of each example's gradients that has no sign.

    Args:
      f, params, x, sign_threshold, select: of `ntk`.
    """
    threshold = None if sign_threshold is None else float(sign_threshold)
    f, params = held(f, params)
    return checks.dropped(f, params, jax.tree.map(jnp.asarray, x), threshold, select)


def resolve(method: str, f: Callable[..., Array], params: Any, x: Any, select: paths.Select) -> str:
    """The name of a method; "auto" is factorized where f and its parameters allow it."""
    if method == "auto":
        fits = takes_tap(f) and obstacle(f, params, x, select) is None
        return "factorized" if fits else "jacobian"
    if method not in blocks.METHODS:
        known = ", ".join(("auto", *blocks.METHODS))
        raise UserError(f"method={method!r} is not known; give one of {known}, projected")
    return method


def prepare(
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any,
    *,
    kind: str = "sgd",
    method: str = "auto",
    trace_axes: Sequence[int] = (),
    diagonal_axes: Sequence[int] = (),
    select: paths.Select = None,
    block_size: int | None = None,
    sign_threshold: float | int | None = None,
    adam_state: Any = None,
    b1: float | int = 0.9,
    b2: float | int = 0.999,
    eps: float | int = 1e-8,
    mesh: Mesh | None = None,
    check: bool = True,
) -> blocks.Blocks:
    """The blocks of `ntk`, after all that can be checked before them."""
    over = gram.axes(trace_axes, diagonal_axes)
    f, params = held(f, params)
    features = features_of(kind, params, select, sign_threshold, adam_state, b1, b2, eps)
    if block_size is not None and block_size < 1:
        raise UserError(f"block_size={block_size} is no number of examples; give 1 or more")
    x1, x2 = jax.tree.map(jnp.asarray, (x1, x2))
    mesh = mesh_of(params) if mesh is None else mesh
    if mesh is not None:
        params, x1, x2 = place_params((params, x1, x2), mesh, WHOLE)
    count = checks.outputs(f, params, x1, "x1")
    if x2 is not None and checks.outputs(f, params, x2, "x2") != count:
        other = checks.outputs(f, params, x2, "x2")
        raise UserError(
            f"f has {count} outputs at x1 and {other} at x2; give both the same classes"
        )
    method = resolve(method, f, params, x1, select)
    if check and has_values(params, x1, x2):
        for name, x in (("x1", x1), ("x2", x2)):
            if x is not None:
                if takes_tap(f):
                    taps.check_ids(f, params, x, name)
                checks.check_independence(f, params, x, name)
    counts = (count_examples(x1, "x1"), count_examples(x1 if x2 is None else x2, "x2"))
    size = blocks.sizes(counts, count, params, select, (block_size, method, mesh))
    return blocks.Blocks(f, params, x1, x2, features, over, select, method, size, mesh)


def check_kernel(work: blocks.Blocks, kernel: Any) -> None:
    """Raises UserError if a kernel, or a block of it, is not finite, naming an example."""
    if not has_values(kernel) or np.isfinite(to_host(kernel)).all():
        return
    for name, x in (("x1", work.x1), ("x2", work.x2)):
        if x is not None:
            checks.check_finite(work.f, work.params, x, work.select, name)
    raise UserError(
        "the kernel is not finite though all gradients are; give parameters of a wider dtype"
    )
