r"""The step that Adam would make on a gradient, from the state of a training run.

    m' = b1 m + (1 - b1) g,    v' = b2 v + (1 - b2) g^2
    paper:      (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps),    t = count + 1
    reference:  m' / sqrt(v' + eps)

"paper" is Adam, with the rounding of `optax.scale_by_adam`. "reference" is what the authors' code
of LESS computes: no bias correction, and eps under the root, where it changes the step unless v' is
far above eps.

References: Kingma and Ba, "Adam", arXiv:1412.6980; Xia et al., "LESS", arXiv:2402.04333.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlm.core import paths
from jaxlm.core.checks import number, one_of
from jaxlm.core.dtypes import wide_dtype
from jaxlm.core.errors import UserError

Variant = Literal["paper", "reference"]


class Constants(NamedTuple):
    """The static part of an `Adam`, see there."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    variant: Variant = "paper"


@dataclasses.dataclass(frozen=True, eq=False)
class Adam:
    """Adam in the middle of a training run: its state and its constants.

    Attributes:
      state: state of an optax optimizer with a `ScaleByAdamState`, such as `optax.adam`.
      b1, b2: decay rates of the two moments.
      eps: added to the root ("paper") or under it ("reference").
      variant: "paper", the step that optax makes; or "reference", the step of the authors' code of
        LESS.

    Raises:
      UserError: for constants out of range.
    """

    state: Any
    b1: float | int = 0.9
    b2: float | int = 0.999
    eps: float | int = 1e-8
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        number(self, "b1", "b2", least=0, below=1)
        number(self, "eps", least=0)
        one_of("variant", self.variant, ("paper", "reference"))

    @property
    def constants(self) -> Constants:
        """The constants as floats, which are hashable and so may be static under `jax.jit`."""
        return Constants(float(self.b1), float(self.b2), float(self.eps), self.variant)


def step(
    g: Array, first: Array, second: Array, count: Any, constants: Constants
) -> tuple[Array, Array]:
    """Return Adam's next step on g, without the learning rate and the minus sign.

    The moments broadcast to the shape of g, and have seen `count` steps. The step is in at least
    float32, and 0 where m' is 0. The second result is true where eps is the larger term of the
    denominator.
    """
    b1, b2, eps, variant = constants
    dtype = wide_dtype(g)
    g, first, second = (a.astype(dtype) for a in (g, first, second))
    first = (1 - b1) * g + b1 * first
    second = (1 - b2) * g**2 + b2 * second
    if variant == "reference":
        return _divide(first, jnp.sqrt(second + eps)), second < eps
    # Powers are rounded as optax rounds them. 1 - b2 computed in float32 would be off by 1e-5.
    count = jnp.asarray(count) + 1
    seen1, seen2 = ((1 - decay**count).astype(dtype) for decay in (b1, b2))
    root = jnp.sqrt(second / seen2)
    return _divide(first / seen1, root + eps), root < eps


def _divide(first: Array, denominator: Array) -> Array:
    # With eps = 0, a parameter that never had a gradient would give 0 / 0.
    return jnp.where(first == 0, 0, first / denominator)


def moments(
    state: Any, params: Any, select: paths.Select = None
) -> tuple[list[Array], list[Array], Array]:
    """Return Adam's moments of the selected parameters, wherever they are in an optax state.

    First and second moments have one array per leaf in the order of the tree; the third result is
    the number of steps that they have seen.
    """
    states = _adam_states(state)
    if not states:
        raise UserError(
            "adam_state: has no ScaleByAdamState. Give the state of an optax chain with adam, "
            "adamw or scale_by_adam."
        )
    tables = [
        [{(leaf.path, leaf.layer): leaf.value for leaf in paths.flatten(tree)[0]} for tree in pair]
        for pair in ((each.mu, each.nu) for each in states)
    ]
    first, second, owners = [], [], []
    for leaf in paths.flatten(paths.split(params, select)[0])[0]:
        place = (leaf.path, leaf.layer)
        having = [i for i, (mu, _) in enumerate(tables) if place in mu]
        if len(having) != 1:
            cure = "Give one state." if having else "Leave it out by select."
            raise UserError(
                f"adam_state: has {len(having)} moments of {leaf.path}, not one. {cure}"
            )
        mu, nu = (table[place] for table in tables[having[0]])
        if jnp.shape(mu) != jnp.shape(leaf.value):
            raise UserError(
                f"adam_state: the moments of {leaf.path} must have shape {jnp.shape(leaf.value)} "
                f"(got {jnp.shape(mu)}). Give the state of these parameters."
            )
        first.append(jnp.asarray(mu))
        second.append(jnp.asarray(nu))
        owners.append(having[0])
    if len(set(owners)) > 1:
        raise UserError(
            "adam_state: has several ScaleByAdamStates. Select what one of them trains."
        )
    return first, second, jnp.asarray(states[owners[0]].count)


def _adam_states(state: Any) -> list[Any]:
    from optax import ScaleByAdamState

    def is_adam(node):
        return isinstance(node, ScaleByAdamState)

    return [node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node)]
