r"""The step that Adam would make on a gradient, from the state of a training run.

    m' = b1 m + (1 - b1) g,    v' = b2 v + (1 - b2) g^2
    paper:      (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps),    t = count + 1
    reference:  m' / sqrt(v' + eps)

"paper" is Adam, and `optax.scale_by_adam` to the last digits. "reference" is what the authors' code
of LESS computes: no bias correction, and eps under the root, where it is felt by every v' that is
not far above it.

References: Kingma and Ba, "Adam", arXiv:1412.6980; Xia et al., "LESS", arXiv:2402.04333.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlm.core import paths
from jaxlm.core.errors import UserError

Variant = Literal["paper", "reference"]


class Constants(NamedTuple):
    """What an Adam is made with.

    Attributes:
      b1, b2: decay of the two moments.
      eps: added to the root, or under it.
      variant: "paper" or "reference".
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    variant: Variant = "paper"


def step(
    g: Array, first: Array, second: Array, count: Any, constants: Constants
) -> tuple[Array, Array]:
    """Adam's next step on g, without learning rate and sign.

    Args:
      g: gradient.
      first, second: moments, of a shape that g's broadcasts with.
      count: steps that the moments have seen.
      constants: of the optimizer.

    Returns:
      The step, in at least float32 and 0 where m' is; and where eps is the larger term below.
    """
    b1, b2, eps, variant = constants
    dtype = jnp.promote_types(g.dtype, jnp.float32)
    g, first, second = (a.astype(dtype) for a in (g, first, second))
    first = (1 - b1) * g + b1 * first
    second = (1 - b2) * g**2 + b2 * second
    if variant == "reference":
        return _divide(first, jnp.sqrt(second + eps)), second < eps
    # Rounded as optax does: 1 - b2 in float32 is off by 1e-5 of itself.
    count = jnp.asarray(count) + 1
    seen1, seen2 = ((1 - decay**count).astype(dtype) for decay in (b1, b2))
    root = jnp.sqrt(second / seen2)
    return _divide(first / seen1, root + eps), root < eps


def _divide(first: Array, below: Array) -> Array:
    return jnp.where(first == 0, 0, first / below)


def check(constants: Constants) -> None:
    """Raises UserError for constants that no Adam has."""
    for name in ("b1", "b2"):
        value = getattr(constants, name)
        if not 0 <= value < 1:
            raise UserError(f"{name}={value} is impossible; give 0 <= {name} < 1")
    if constants.eps < 0:
        raise UserError(f"eps={constants.eps} is impossible; give 0 or more")
    if constants.variant not in ("paper", "reference"):
        raise UserError(f"variant={constants.variant!r} is not known; give 'paper' or 'reference'")


def moments(
    state: Any, params: Any, select: paths.Select = None
) -> tuple[list[Array], list[Array], Array]:
    """Adam's moments of the selected parameters, wherever they are in an optax state.

    Args:
      state: of `optax.scale_by_adam`, or of any chain that has one.
      params: what was trained.
      select: which of it.

    Returns:
      First and second moments, one array a leaf in the order of the tree; and the steps they have
      seen.

    Raises:
      UserError: if there are no moments of a selected leaf, several, or of another shape; the
        message names the leaf.
    """
    found = _adam_states(state)
    if not found:
        raise UserError(
            "adam_state has no ScaleByAdamState; give the state of an optax chain with adam, adamw "
            "or scale_by_adam"
        )
    tables = [
        [{(leaf.path, leaf.layer): leaf.value for leaf in paths.flatten(tree)[0]} for tree in pair]
        for pair in ((each.mu, each.nu) for each in found)
    ]
    first, second, states = [], [], []
    for leaf in paths.flatten(paths.split(params, select)[0])[0]:
        place = (leaf.path, leaf.layer)
        having = [i for i, (mu, _) in enumerate(tables) if place in mu]
        if len(having) != 1:
            raise UserError(
                f"adam_state has {len(having)} moments of {leaf.path}; "
                + ("give one state" if having else "leave it out by select")
            )
        pair = [table[place] for table in tables[having[0]]]
        if jnp.shape(pair[0]) != jnp.shape(leaf.value):
            raise UserError(
                f"adam_state has moments of shape {jnp.shape(pair[0])} for {leaf.path}, which is "
                f"{jnp.shape(leaf.value)}; give the state of these parameters"
            )
        first.append(jnp.asarray(pair[0]))
        second.append(jnp.asarray(pair[1]))
        states.append(having[0])
    if len(set(states)) > 1:
        raise UserError("adam_state has several ScaleByAdamStates; select what one of them trains")
    return first, second, jnp.asarray(found[states[0]].count)


def _adam_states(state) -> list[Any]:
    from optax import ScaleByAdamState

    def is_adam(node):
        return isinstance(node, ScaleByAdamState)

    return [node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node)]
