r"""Gradient features: the projected gradient, or Adam's step on it, of every example.

    phi(z) = S g(z)           g(z) = gradient of the loss of z by the selected parameters
    phi(z) = S Gamma(g(z))    Gamma: the step that Adam would make on g(z) from a given state

with S a random projection that is never stored (`jaxlm.core.projection`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core import adam, paths, per_example, tapped
from jaxlm.core.errors import UserError
from jaxlm.core.projection import Projector

BLOCK_BYTES = 2**30
"""What the activations or the gradients of a block take at most, about, by default."""
BLOCK = 64
"""Examples in a block at most, by default."""


class FeaturesInfo(NamedTuple):
    """What features were made of.

    Attributes:
      loss: [N], in the dtype of the loss.
      norm: [N], Euclidean length of the gradient of the selected parameters.
      skipped: [N], where the loss or its gradient is not finite, or all of the gradient is zero, as
        it is where no token of an answer is left after truncation; such rows of the features are
        zero.
      zero: [N], where the gradient is zero.
      eps_share: [N], of the numbers of an Adam step the fraction where eps is the larger term of
        the denominator, so that the step follows the size of the gradient; 0 without Adam.
    """

    loss: Float[Array, "N"]
    norm: Float[Array, "N"]
    skipped: Bool[Array, "N"]
    zero: Bool[Array, "N"]
    eps_share: Float[Array, "N"]


def gradient_features(
    loss_fn: Callable[..., Array],
    params: Any,
    examples: Any,
    *,
    projector: Projector | None = None,
    adam_state: Any = None,
    b1: float | int = 0.9,
    b2: float | int = 0.999,
    eps: float | int = 1e-8,
    variant: adam.Variant = "paper",
    select: paths.Select = None,
    block_size: int | None = None,
    mesh: Mesh | None = None,
    segments: Int[Array, "rows T"] | None = None,
) -> Float[Array, "N R"]:
    """Features [N, R]; see `features_with_info`, which returns more."""
    return features_with_info(
        loss_fn,
        params,
        examples,
        projector=projector,
        adam_state=adam_state,
        b1=b1,
        b2=b2,
        eps=eps,
        variant=variant,
        select=select,
        block_size=block_size,
        mesh=mesh,
        segments=segments,
    )[0]


def features_info(
    loss_fn: Callable[..., Array], params: Any, examples: Any, **options: Any
) -> FeaturesInfo:
    """What `features_with_info` returns beside the features."""
    return features_with_info(loss_fn, params, examples, **options)[1]


def features_with_info(
    loss_fn: Callable[..., Array],
    params: Any,
    examples: Any,
    *,
    projector: Projector | None = None,
    adam_state: Any = None,
    b1: float | int = 0.9,
    b2: float | int = 0.999,
    eps: float | int = 1e-8,
    variant: adam.Variant = "paper",
    select: paths.Select = None,
    block_size: int | None = None,
    mesh: Mesh | None = None,
    segments: Int[Array, "rows T"] | None = None,
) -> tuple[Float[Array, "N R"], FeaturesInfo]:
    """Features and info."""
    options = {"b1": b1, "b2": b2, "eps": eps}
    constants = None
    params = jax.tree.map(jnp.asarray, params)
    moments: Any = ()
    if adam_state is not None:
        constants = adam.Constants(**{k: float(v) for k, v in options.items()}, variant=variant)
        adam.check(constants)
        moments = adam.moments(adam_state, params, select)
    count = _count(examples)
    mesh = projector.mesh if mesh is None and projector is not None else mesh
    projector = None if projector is None else dataclasses.replace(projector, mesh=None)
    batch = (examples, segments)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), examples)
    size = _block_size(loss_fn, params, one, select) if block_size is None else block_size
    if size < 1:
        raise UserError(f"block_size={size} is no number of examples; give 1 or more")
    run = functools.partial(_block, loss_fn=_hashable(loss_fn), constants=constants, select=select)
    if mesh is not None:
        whole = NamedSharding(mesh, PartitionSpec())
        params, projector, moments = jax.device_put((params, projector, moments), whole)
        run = functools.partial(_on_mesh, **run.keywords, mesh=mesh)
    step = size * (1 if mesh is None else mesh.size)
    found = []
    for start in range(0, count, step):
        rows = np.minimum(np.arange(start, start + step), count - 1)
        part = jax.tree.map(lambda a, rows=rows: a[rows], batch)
        if mesh is not None:
            part = jax.device_put(part, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
        block = run(params, part, projector, moments)
        found.append(jax.tree.map(lambda a, n=min(step, count - start): a[:n], block))
    rows, info = jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)
    return rows, info


def _count(examples) -> int:
    """N.

    Raises:
      UserError: if there is none, or the arrays do not agree.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(examples)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes:
        raise UserError(
            f"examples have arrays of shapes {', '.join(map(str, shapes)) or 'none'}; axis 0 of "
            "each must be the examples"
        )
    (count,) = sizes
    if not count:
        raise UserError("there is no example; give at least one")
    return count


def _hashable(f: Callable[..., Any]) -> Callable[..., Any]:
    """A function that can be hashed, of the same value and signature."""
    try:
        hash(f)
    except TypeError:  # a callable object that holds arrays
        return functools.wraps(f, updated=())(lambda *args, **options: f(*args, **options))
    return f


def _block_size(loss_fn, params, one, select) -> int:
    """Examples in a block: a power of 2, from the shapes of one example alone."""
    taken = paths.flatten(paths.split(params, select)[0])[0]
    lean = per_example.untapped(loss_fn, params, one, select) is None
    if lean:
        bytes_of_one = per_example.activation_bytes(tapped.uses(loss_fn, params, one))
        sizes = [leaf.value[0].size if leaf.stacked else leaf.value.size for leaf in taken]
        bytes_of_one += 4 * max(sizes)
    else:
        bytes_of_one = 4 * sum(leaf.value.size for leaf in taken)
    most = min(BLOCK, max(1, BLOCK_BYTES // max(bytes_of_one, 1)))
    return 1 << (most.bit_length() - 1)


STATIC = ("loss_fn", "constants", "select")


@functools.partial(jax.jit, static_argnames=STATIC)
def _block(params, batch, projector, moments, *, loss_fn, constants, select):
    return _features(params, batch, projector, moments, loss_fn, constants, select)


@functools.partial(jax.jit, static_argnames=(*STATIC, "mesh"))
def _on_mesh(params, batch, projector, moments, *, loss_fn, constants, select, mesh):
    """One block on each device."""

    def here(params, batch, projector, moments):
        return _features(params, batch, projector, moments, loss_fn, constants, select)

    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    divided = jax.shard_map(
        here, mesh=mesh, in_specs=(whole, rows, whole, whole), out_specs=rows, check_vma=False
    )
    return divided(params, batch, projector, moments)


def _features(params, batch, projector, moments, loss_fn, constants, select):
    examples, segments = batch
    extras, steps = None, None
    if constants is not None:
        first, second, steps = moments
        extras = list(zip(first, second, strict=True))
    seed = None if projector is None else projector.seed

    def rule(gradient, extra, shared):
        seed, steps = shared
        g = gradient.formed()
        over = tuple(range(1, g.ndim))
        wide = jnp.float32
        total = {
            "bad": (~jnp.isfinite(g)).sum(over, dtype=wide),
            "nonzero": (g != 0).sum(over, dtype=wide),
            "square": jnp.square(g).sum(over),
            "eps": jnp.zeros(len(g), wide),
        }
        if constants is not None:
            g, small = adam.step(g, extra[0][None], extra[1][None], steps, constants)
            total["eps"] = small.sum(over, dtype=wide)
        if projector is None:
            return total, g
        here = dataclasses.replace(projector, seed=seed)
        total["rows"] = here.leaf(gradient.path, gradient.layer, g)
        return total, ()

    found = per_example.reduce(
        loss_fn,
        params,
        examples,
        rule,
        select=select,
        extras=extras,
        shared=(seed, steps),
        segments=segments,
    )
    total = found.total
    if projector is None:
        rows = jnp.concatenate([g.reshape(len(g), -1) for g in found.own], axis=1)
    else:
        rows = total["rows"]
    skipped = (total["bad"] > 0) | (total["nonzero"] == 0) | ~jnp.isfinite(found.losses)
    size = sum(leaf.size for leaf in jax.tree.leaves(paths.split(params, select)[0]))
    info = FeaturesInfo(
        loss=found.losses,
        norm=jnp.sqrt(total["square"]),
        skipped=skipped,
        zero=(total["nonzero"] == 0) & (total["bad"] == 0),
        eps_share=total["eps"] / size,
    )
    return jnp.where(skipped[:, None], 0, rows), info
