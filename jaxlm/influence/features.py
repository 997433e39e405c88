r"""Gradient features: the projected gradient, or Adam's step on it, of every example.

    phi(z) = S g(z)           g(z) = gradient of the loss of z by the selected parameters
    phi(z) = S Gamma(g(z))    Gamma: the step that Adam would make on g(z) from a given state

with S a random projection that is never stored (`jaxlm.gradients.projection`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core import paths, taps
from jaxlm.core.errors import UserError
from jaxlm.core.programs import has_values, held
from jaxlm.gradients import adam, per_example
from jaxlm.gradients.projection import Projector
from jaxlm.influence.rows import Work, groups, size_of_block


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
    segments: Int[Array, "rows T"] | np.ndarray | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "N R"]:
    r"""The projected gradient, or Adam's step on it, of every example.

        phi(z) = S g(z),    g(z) = gradient of the loss of z by the selected parameters
        phi(z) = S (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps)    with `adam_state`

    with m' and v' the moments after a step on g(z). LESS compares the second of training examples
    with the first of target examples by their cosine.

    Memory: with a tap, activations of a block of examples and, of more parameters than 256 MiB have
    room for, the gradients of one layer; without, all gradients of a block. Blocks have a fixed
    size, so a row does not depend, to the last bit, on what is given with it. `loss_fn` is traced
    at every call, so the rows are of what it closes over now; what is compiled is kept for the next
    call with the same trace.

    Args:
      loss_fn: `loss_fn(params, example)`, the loss of one example, a scalar; or one with a keyword
        `tap`, `loss_fn(params, examples, *, tap=None)`, which is called on a batch, gives its
        losses [N], row n depending on example n alone, and hands `tap` to every use of a parameter,
        as the models of jaxlm do.
      params: any pytree; what is no array of floats is held fixed.
      examples: a pytree of arrays whose axis 0 is N.
      projector: S, of `projector`; None for whole gradients, of small models.
      adam_state: a state of `optax.adam` and the like, or of a chain that has one; None for the
        gradient itself.
      b1, b2, eps: of that Adam.
      variant: "paper", the step that optax makes; or "reference", that of the authors' code of
        LESS, m' / sqrt(v' + eps).
      select: restricts the features to some parameters: a regular expression searched in their
        paths or a predicate on them, such as `jaxlm.peft.LORA`.
      block_size: examples in a block; by default a power of 2 that the shapes alone decide.
      segments: [N, T] for rows that have several examples one after another: 1 to S at the tokens
        of each, 0 at padding. `loss_fn`, with a tap, then gives losses [N, S], and must keep the
        examples of a row apart.
      mesh: groups of examples go round its devices, those of this process, each of which gets all
        parameters; by default that of the projector.

    Returns:
      [N, R], R the projector's `dim` or the number of selected parameters in the order of the tree;
      of rows with segments [N * S, R]. float32, or float64 for gradients of that dtype. Rows that
      are skipped are zero, see `FeaturesInfo`.

    Raises:
      UserError: for impossible constants, a state without Adam's moments of a selected leaf (which
        it names), examples that do not agree, or losses of another shape.
      ValueError: if `select` takes nothing.

    >>> loss = lambda params, x: jnp.square(x @ params["w"]).sum()
    >>> gradient_features(loss, {"w": jnp.ones(2)}, jnp.eye(2)).tolist()
    [[2.0, 0.0], [0.0, 2.0]]

    References: Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning",
    arXiv:2402.04333 (their code differs from the paper, see `variant`); Park et al., "TRAK",
    arXiv:2303.14186.
    """
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
        segments=segments,
        mesh=mesh,
    )[0]


def features_info(
    loss_fn: Callable[..., Array], params: Any, examples: Any, **options: Any
) -> FeaturesInfo:
    """The second of what `features_with_info` returns.

    >>> loss = lambda params, x: jnp.square(x @ params["w"]).sum()
    >>> features_info(loss, {"w": jnp.ones(2)}, jnp.array([[3.0, 4.0], [0.0, 0.0]])).norm.tolist()
    [70.0, 0.0]

    Args:
      loss_fn, params, examples, **options: of `gradient_features`.
    """
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
    segments: Int[Array, "rows T"] | np.ndarray | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "N R"], FeaturesInfo]:
    """`gradient_features`, and what they were made of.

    Args:
      loss_fn, params, examples, projector, adam_state, b1, b2, eps, variant, select, block_size,
        segments, mesh: of `gradient_features`.

    Returns:
      The features, and a `FeaturesInfo` of as many rows.
    """
    constants, moments = None, ()
    loss_fn, params = held(loss_fn, params)
    if adam_state is not None:
        constants = adam.Constants(float(b1), float(b2), float(eps), variant)
        adam.check(constants)
        moments = adam.moments(adam_state, params, select)  # type: ignore[assignment]
    per_example.count_examples(examples, "examples")
    if per_example.takes_tap(loss_fn) and has_values(params, examples):
        taps.check_ids(loss_fn, params, examples, "examples")
    size, whole = size_of_block(loss_fn, params, examples, select)
    size = size if block_size is None else block_size
    if size < 1:
        raise UserError(f"block_size={size} is no number of examples; give 1 or more")
    if mesh is None and projector is not None:
        mesh = projector.mesh
    if projector is not None:
        projector = dataclasses.replace(projector, mesh=None)
    work = Work(loss_fn, select, constants, projector is not None and not whole)
    batch = (examples, segments)
    found = list(groups(work, params, batch, projector, moments, size, mesh))
    rows, sums = jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)
    return rows, _info(sums, params, select)


def _info(total, params, select) -> FeaturesInfo:
    count = sum(leaf.size for leaf in jax.tree.leaves(paths.split(params, select)[0]))
    return FeaturesInfo(
        loss=total["loss"],
        norm=jnp.sqrt(total["square"]),
        skipped=total["skipped"],
        zero=(total["nonzero"] == 0) & (total["bad"] == 0),
        eps_share=total["eps"] / count,
    )
