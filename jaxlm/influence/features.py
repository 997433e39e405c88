r"""Gradient features: the projected gradient, or Adam's step on it, of every example.

    phi(z) = S g(z)           g(z) = gradient of the loss of z by the selected parameters
    phi(z) = S Gamma(g(z))    Gamma: the step that Adam would make on g(z) from a given state

where S is a random projection that is never stored (`jaxlm.gradients.projection`).

Examples are computed in blocks of one size, which depends on the shapes of one example and of the
parameters alone. So the bits of a row do not depend on the other examples, on their order, or on
the number of devices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core import paths, taps
from jaxlm.core.checks import integer
from jaxlm.core.programs import Program, has_values, held
from jaxlm.gradients import adam, per_example
from jaxlm.gradients.projection import Projector

CPU_BLOCK_BYTES, BLOCK_BYTES = 2**27, 2**31
"""Approximate bytes of the activations of a block, on a CPU and on accelerators."""
HELD_BYTES = 2**28
"""Above this size, gradients of a block are formed layer by layer, not held at once."""
TOGETHER = 64
"""Most examples in a block, and examples that are projected together if gradients are held."""


class FeaturesInfo(NamedTuple):
    """Statistics of the examples and gradients that features were computed from.

    Attributes:
      loss: [N], in the dtype of the loss.
      norm: [N], Euclidean norm of the gradient of the selected parameters.
      skipped: [N], where the loss or its gradient is not finite, or the whole gradient is zero, for
        example if truncation left no token of an answer; such rows of the features are zero.
      zero: [N], where the gradient is zero.
      eps_share: [N], fraction of the numbers of an Adam step for which eps is the larger term of
        the denominator, so that the step scales with the gradient; 0 without Adam.
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
    select: paths.Select = None,
    block_size: int | None = None,
    segments: Int[Array, "rows T"] | np.ndarray | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "N R"]:
    r"""Return the projected gradient, or Adam's step on it, of every example.

        phi(z) = S g(z),    g(z) = gradient of the loss of z by the selected parameters
        phi(z) = S (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps)    with `adam_state`

    where m' and v' are the moments after a step on g(z). LESS takes the cosine of the second, of
    training examples, with the first, of target examples.

    Memory: with a tap, the activations of a block of examples and, if the parameters are too many
    to hold all gradients in 256 MiB, the gradients of one layer; without a tap, all gradients of a
    block. Blocks have a fixed size, so a row does not depend, to the last bit, on the other rows.
    `loss_fn` is traced at every call, so it always sees the current values of what it closes over;
    a call with the same trace as an earlier one reuses its compiled program.

    Args:
      loss_fn: `loss_fn(params, example)`, the loss of one example, a scalar; or a function with a
        keyword `tap`, `loss_fn(params, examples, *, tap=None)`, which is called on a batch, returns
        its losses [N], row n depending on example n alone, and passes `tap` to every use of a
        parameter, as the models of jaxlm do.
      params: any pytree; leaves that are not arrays of floats are held fixed.
      examples: a pytree of arrays whose axis 0 is N.
      projector: S, made by `projector`; None for whole gradients, of small models.
      adam_state: the state of an optax chain with a `ScaleByAdamState`; an `Adam` for constants
        other than the defaults of optax; None for the gradient itself.
      select: restricts the features to some parameters: a regular expression searched in their
        paths or a predicate on them, such as `jaxlm.peft.LORA`.
      block_size: examples in a block; by default a power of 2 that depends on the shapes alone.
      segments: [N, T] for rows that hold several examples: 1 to S at the tokens of each, 0 at
        padding. `loss_fn`, with a tap, then returns losses [N, S], and must keep the examples of a
        row apart.
      mesh: groups of examples are spread over the devices of this process in the mesh, each of
        which holds all parameters; by default the mesh of the projector.

    Returns:
      [N, R], or [N * S, R] with segments; R is the projector's `dim`, or the number of selected
      parameters, in the order of the tree. float32, or float64 for gradients in float64. Skipped
      rows are zero, see `FeaturesInfo`.

    Raises:
      UserError: if constants are out of range, a selected leaf has no Adam moments (the message
        names it), arrays of examples differ in length, or losses have the wrong shape.
      ValueError: if `select` selects nothing.

    >>> loss = lambda params, x: jnp.square(x @ params["w"]).sum()
    >>> gradient_features(loss, {"w": jnp.ones(2)}, jnp.eye(2)).tolist()
    [[2.0, 0.0], [0.0, 2.0]]

    References: Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning",
    arXiv:2402.04333 (the authors' code differs from the paper, see `Adam`); Park et al., "TRAK",
    arXiv:2303.14186.
    """
    return features_with_info(
        loss_fn,
        params,
        examples,
        projector=projector,
        adam_state=adam_state,
        select=select,
        block_size=block_size,
        segments=segments,
        mesh=mesh,
    )[0]


def features_with_info(
    loss_fn: Callable[..., Array],
    params: Any,
    examples: Any,
    *,
    projector: Projector | None = None,
    adam_state: Any = None,
    select: paths.Select = None,
    block_size: int | None = None,
    segments: Int[Array, "rows T"] | np.ndarray | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "N R"], FeaturesInfo]:
    """Return `gradient_features` with a `FeaturesInfo`: losses, norms, skipped rows.

    >>> loss = lambda params, x: jnp.square(x @ params["w"]).sum()
    >>> x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    >>> features_with_info(loss, {"w": jnp.ones(2)}, x)[1].norm.tolist()
    [70.0, 0.0]

    Args:
      loss_fn, params, examples, projector, adam_state, select, block_size, segments, mesh: see
        `gradient_features`.

    Returns:
      The features, and a `FeaturesInfo` with as many rows.
    """
    loss_fn, params = held(loss_fn, params)
    constants, moments = None, ()
    if adam_state is not None:
        given = adam_state if isinstance(adam_state, adam.Adam) else adam.Adam(adam_state)
        constants = given.constants
        moments = adam.moments(given.state, params, select)  # type: ignore[assignment]
    per_example.count_examples(examples, "examples")
    integer("block_size", block_size)
    if per_example.takes_tap(loss_fn) and has_values(params, examples):
        taps.check_ids(loss_fn, params, examples, "examples")
    default, whole = _block_size(loss_fn, params, examples, select)
    if mesh is None and projector is not None:
        mesh = projector.mesh
    if projector is not None:
        # Each device projects its own groups of examples, so the projection sees one device.
        projector = dataclasses.replace(projector, mesh=None)
    task = _Task(loss_fn, select, constants, projector is not None and not whole)
    arguments = (params, projector, moments)
    parts = _groups(task, arguments, (examples, segments), block_size or default, mesh)
    rows, sums = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    count = sum(leaf.size for leaf in jax.tree.leaves(paths.split(params, select)[0]))
    return rows, FeaturesInfo(
        loss=sums["loss"],
        norm=jnp.sqrt(sums["square"]),
        skipped=sums["skipped"],
        zero=(sums["nonzero"] == 0) & (sums["bad"] == 0),
        eps_share=sums["eps"] / count,
    )


@dataclasses.dataclass(frozen=True)
class _Task:
    """What is computed for each example; with `project`, inside the backward pass, leaf by leaf."""

    loss_fn: Callable[..., Array]
    select: paths.Select
    constants: adam.Constants | None
    project: bool


def _block_size(
    loss_fn: Callable[..., Array], params: Any, examples: Any, select: paths.Select
) -> tuple[int, bool]:
    """Return the examples in a block, and whether the gradients of a block are held at once."""
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), examples)
    leaves = paths.flatten(paths.split(params, select)[0])[0]
    whole = 4 * sum(leaf.value.size for leaf in leaves)
    lean = per_example.untapped(loss_fn, params, one, select) is None
    bytes_each = whole
    if lean:
        bytes_each = per_example.activation_bytes(taps.uses(loss_fn, params, one))
        bytes_each += 4 * max(math.prod(leaf.value.shape[leaf.stacked :]) for leaf in leaves)
    room = CPU_BLOCK_BYTES if jax.default_backend() == "cpu" else BLOCK_BYTES
    most = min(TOGETHER, max(1, room // max(bytes_each, 1)))
    size = 1 << (most.bit_length() - 1)
    return size, not lean or size * whole <= HELD_BYTES


def _groups(
    task: _Task, arguments: tuple[Any, Any, Any], batch: Any, size: int, mesh: Mesh | None
) -> Iterator[tuple[Any, dict[str, Array]]]:
    """Yield the features and sums of `_rows` of one group of examples after another.

    A group is projected at once, and consists of blocks of `size` examples. On a mesh, groups are
    given to its devices in turn; each runs the program that a single device would run.
    """
    count = len(jax.tree.leaves(batch)[0])
    at_once = size * max(1, TOGETHER // size)
    devices = [None] if mesh is None else list(mesh.local_devices)
    program = Program(functools.partial(_rows, task))
    placed = [arguments if d is None else jax.device_put(arguments, d) for d in devices]
    for number, first in enumerate(range(0, count, at_once)):
        at = number % len(devices)
        params, projector, moments = placed[at]
        blocks = []
        for start in range(first, min(first + at_once, count), size):
            # Copies of the last example pad the last block, so that all blocks run one program.
            places = np.minimum(np.arange(start, start + size), count - 1)
            part = jax.tree.map(lambda a, places=places: a[places], batch)
            part = part if devices[at] is None else jax.device_put(part, devices[at])
            blocks.append(program(params, part, projector, moments))
        features, sums = jax.tree.map(lambda *parts: jnp.concatenate(parts), *blocks)
        if not task.project and projector is None:
            features = jnp.concatenate([g.reshape(len(g), -1) for g in features], axis=1)
        elif not task.project:
            structure = jax.tree.structure(paths.split(params, task.select)[0])
            features = projector.project(jax.tree.unflatten(structure, features))
        per_row = len(sums["loss"]) // (size * len(blocks))
        real = per_row * min(at_once, count - first)
        result = jax.tree.map(lambda a, real=real: a[:real], (features, sums))
        yield result if len(devices) == 1 else jax.device_put(result, devices[0])


def _rows(task: _Task, params: Any, batch: Any, projector: Projector | None, moments: Any) -> Any:
    """Return projected rows, or the gradients of each leaf; and sums over leaves, with losses."""
    examples, segments = batch
    extras = steps = None
    if task.constants is not None:
        first, second, steps = moments
        extras = list(zip(first, second, strict=True))

    def rule(gradient, extra, shared):
        seed, steps = shared
        sums, g = _transform(gradient.formed(), extra, steps, task.constants)
        if not task.project:
            return sums, g
        assert projector is not None
        here = dataclasses.replace(projector, seed=seed)
        return {**sums, "rows": here.leaf(gradient.path, gradient.layer, g)}, ()

    seed = projector.seed if projector is not None and task.project else None
    reduced = per_example.reduce(
        task.loss_fn,
        params,
        examples,
        rule,
        select=task.select,
        extras=extras,
        shared=(seed, steps),
        segments=segments,
    )
    sums = dict(reduced.total)
    skipped = (sums["bad"] > 0) | (sums["nonzero"] == 0) | ~jnp.isfinite(reduced.losses)

    def without_skipped(g):
        return jnp.where(skipped.reshape(-1, *[1] * (g.ndim - 1)), 0, g)

    rows = sums.pop("rows") if task.project else reduced.own
    return jax.tree.map(without_skipped, rows), {**sums, "skipped": skipped, "loss": reduced.losses}


def _transform(g: Array, extra: Any, steps: Any, constants: adam.Constants | None) -> Any:
    """Return sums over one leaf for each example, and Adam's step on g, or g itself."""
    over = tuple(range(1, g.ndim))
    count = functools.partial(jnp.sum, axis=over, dtype=jnp.float32)
    sums = {
        "bad": count(~jnp.isfinite(g)),
        "nonzero": count(g != 0),
        "square": jnp.square(g).sum(over),
        "eps": jnp.zeros(len(g), jnp.float32),
    }
    if constants is not None:
        g, small = adam.step(g, extra[0][None], extra[1][None], steps, constants)
        sums["eps"] = count(small)
    return sums, g
