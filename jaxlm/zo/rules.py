"""Update rules: from slopes along directions to the direction in which parameters move.

An optimizer of `jaxlm.zo.optimizers` moves by

    θ ← θ - η (u + λ θ),

and a rule says what u is, for one block of parameters at a time. A rule is a pair of pure
functions, and what it remembers is its own: nothing, some scalars, or small matrices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxlm.core import paths
from jaxlm.zo.perturbation import Directions
from jaxlm.zo.samplers import Sampler
from jaxlm.zo.sites import Site

Block = Callable[[Site], Float[Array, "..."]]
"""u at a site, at least in float32."""


class Drawn(NamedTuple):
    """What a rule learns of a step.

    Attributes:
      projected_grad: [n], 0 in place of what is not finite.
      finite: [n], where it is.
      step: number of the step, from 0.
      directions: `directions(step)`, those of this or of an earlier step.
    """

    projected_grad: Float[Array, "n"]
    finite: Bool[Array, "n"]
    step: Array
    directions: Callable[[Any], Directions]

    @property
    def now(self) -> Directions:
        return self.directions(self.step)


class Setup(NamedTuple):
    """What a rule is initialised with.

    Attributes:
      params: where training starts.
      select: parameters that move.
      sampler: of the directions.
      num_directions: n.
    """

    params: Any
    select: paths.Select
    sampler: Sampler
    num_directions: int


class Rule(NamedTuple):
    """A pair of pure functions.

    Attributes:
      name: with the rule's settings.
      init: `init(setup) -> state`.
      update: `update(drawn, params, state) -> (state, block)`, with `block(site)` the u of a site.
    """

    name: str
    init: Callable[[Setup], Any]
    update: Callable[[Drawn, Any, Any], tuple[Any, Block]]


def _along(drawn: Drawn, coefficients: Array) -> Block:
    directions = drawn.now
    return lambda site: directions.combine(coefficients / directions.count, site)


def sgd() -> Rule:
    """`u = 1/n Σ_j g_j z_j`, the gradient estimate: MeZO."""

    def update(drawn, params, state):
        del params
        return state, _along(drawn, drawn.projected_grad)

    return Rule("sgd", lambda setup: (), update)


def normalized_by_spread() -> Rule:
    r"""`u = 1/n Σ_j g_j z_j / std(g)`, std over the n slopes of a step, which are 2 or more: FZOO.

    A slope that is not finite moves nothing and is left out of the standard deviation.

    References: arXiv:2506.09034. There $(l_j - l_0) / \mathrm{std}(l)$, in which eps cancels: the
    same. The standard deviation is that of a population, as in the authors' code.
    """

    def update(drawn, params, state):
        del params
        slopes = drawn.projected_grad
        spread = slopes.std(where=drawn.finite)
        scaled = jnp.where(spread > 0, slopes / jnp.where(spread > 0, spread, 1), 0)
        return state, _along(drawn, scaled)

    return Rule("normalized_by_spread", lambda setup: (), update)


def normalized_by_average(decay: float = 0.99, *, floor: float = 1e-8) -> Rule:
    r"""`u = 1/n Σ_j g_j z_j / (sqrt(v) + floor)`: one scalar in place of Adam's second moment.

    $v_t = \beta v_{t-1} + (1 - \beta) \overline{g_j^2}$, divided by $1 - \beta^t$.

    Args:
      decay: β.
      floor: added to the root.

    References: MEAZO, arXiv:2605.03869.
    """

    def update(drawn, params, state):
        del params
        slopes = drawn.projected_grad
        state = decay * state + (1 - decay) * jnp.square(slopes).mean()
        size = jnp.sqrt(state / (1 - decay ** (drawn.step + 1.0)))
        return state, _along(drawn, slopes / (size + floor))

    name = f"normalized_by_average(decay={decay}, floor={floor})"
    return Rule(name, lambda setup: jnp.zeros((), jnp.result_type(float)), update)


class _History(NamedTuple):
    """Slopes of the last steps, as rules that replay them see them.

    Attributes:
      slopes: [h, n], newest first, NaN before the run.
      directions: those of each, stacked.
    """

    slopes: Float[Array, "h n"]
    directions: Directions

    def averages(self, site: Site, decays: tuple[float, ...], powers: tuple[int, ...]) -> list:
        """`Σ_s β^s G_s^p / Σ_s β^s` over the steps, for each decay β and power p."""
        count, n = self.slopes.shape
        zero = jnp.zeros(jnp.shape(site.value), jnp.promote_types(site.value.dtype, jnp.float32))

        def add(age, carry):
            totals, weights = carry
            directions = jax.tree.map(lambda x: x[age], self.directions)
            estimate = directions.combine(self.slopes[age] / n, site)
            known = ~jnp.isnan(self.slopes[age, 0])
            factors = [known * decay ** age.astype(zero.dtype) for decay in decays]
            totals = [
                total + jnp.where(known, factor * estimate**power, 0)
                for total, factor, power in zip(totals, factors, powers, strict=True)
            ]
            return totals, [w + factor for w, factor in zip(weights, factors, strict=True)]

        start = ([zero for _ in decays], [jnp.zeros((), zero.dtype) for _ in decays])
        totals, weights = lax.fori_loop(0, count, add, start)
        return [total / weight for total, weight in zip(totals, weights, strict=True)]


def _replayed(name: str, horizon: int, block: Callable[[_History, Site], Array]) -> Rule:
    if horizon < 1:
        raise ValueError(f"horizon is {horizon}: give at least 1")

    def init(setup):
        return jnp.full((horizon, setup.num_directions), jnp.nan, jnp.result_type(float))

    def update(drawn, params, state):
        del params
        state = jnp.concatenate([drawn.projected_grad[None].astype(state.dtype), state[:-1]])
        steps = drawn.step - jnp.arange(horizon)
        history = _History(state, lax.map(drawn.directions, jnp.maximum(steps, 0)))
        return state, lambda site: block(history, site)

    return Rule(name, init, update)


def replayed_momentum(decay: float = 0.9, *, horizon: int = 20) -> Rule:
    r"""$u = \sum_s \beta^s G_{t-s} / \sum_s \beta^s$, $G = 1/n \sum_j g_j z_j$, without its memory.

    The last estimates are drawn again from their keys and slopes: a state of `horizon` n scalars,
    and as many draws of noise a step. What lies further back is left out.

    References: arXiv:2305.17333, appendix B.
    """

    def block(history, site):
        return history.averages(site, (decay,), (1,))[0]

    return _replayed(f"replayed_momentum(decay={decay}, horizon={horizon})", horizon, block)


def replayed_adam(
    b1: float = 0.9, b2: float = 0.999, *, eps: float = 1e-8, horizon: int = 20
) -> Rule:
    r"""Adam on the estimates G, without the memory of its moments.

    $u = \hat m / (\sqrt{\hat v} + \epsilon)$ with weighted means over the last `horizon` steps in
    place of running ones: $\hat m = \sum_s \beta_1^s G_{t-s} / \sum_s \beta_1^s$, $\hat v$ likewise
    of $G^2$. Adam itself, bias correction included, for as many steps as the horizon is long.

    References: arXiv:2305.17333, appendix B; AdaMeZO, arXiv:2605.00650 (the horizon).
    """

    def block(history, site):
        mean, square = history.averages(site, (b1, b2), (1, 2))
        return mean / (jnp.sqrt(square) + eps)

    name = f"replayed_adam(b1={b1}, b2={b2}, eps={eps}, horizon={horizon})"
    return _replayed(name, horizon, block)
