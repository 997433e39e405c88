"""Update rules: from slopes along directions to the direction in which parameters move.

An optimizer of `jaxlm.zo.optimizers` moves by

    θ ← θ - η (u + λ θ),

and a rule says what u is, for one block of parameters at a time. A rule is a pair of pure
functions, and what it remembers is its own: nothing, some scalars, or small matrices.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core import checks, paths
from jaxlm.zo.perturbation import Directions, is_traced, width
from jaxlm.zo.samplers import Sampler
from jaxlm.zo.sites import Site


def below_one(**values: Any) -> None:
    """Raises UserError for a decay that is not from 0 to below 1; traced ones pass."""
    _numbers(values, least=0.0, below=1.0)


def at_least_zero(**values: Any) -> None:
    """Raises UserError for a negative number or one that is not finite; traced ones pass."""
    _numbers(values, least=0.0)


def _numbers(values, **bounds):
    given = {name: float(x) for name, x in values.items() if not is_traced(x)}
    checks.number(types.SimpleNamespace(**given), *given, **bounds)


Block = Callable[[Site], Float[Array, "..."]]
"""u at a site, at least in float32."""


class Drawn(NamedTuple):
    """What a rule learns of a step.

    Attributes:
      projected_grad: [n], 0 in place of what is not finite.
      finite: [n], where it is.
      step: number of the step, from 0.
      last: number of the last step that moved something; -1 before there is one.
      directions: `directions(step)`, those of this or of an earlier step.
    """

    projected_grad: Float[Array, "n"]
    finite: Bool[Array, "n"]
    step: Array
    last: Array
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

    @property
    def width(self) -> Any:
        """The dtype of scalars that a rule remembers."""
        return width(self.params, self.select)


class Rule(NamedTuple):
    """A pair of pure functions.

    `update` is only of consequence in a step with a finite slope: in another one the state stays as
    it was and nothing moves, whatever the rule returns.

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

    $v_t = \beta v_{t-1} + (1 - \beta) \overline{g_j^2}$ over the finite slopes of a step, divided
    by the sum of its weights, $1 - \beta^t$ after t steps that moved.

    Args:
      decay: β.
      floor: added to the root.

    References: MEAZO, arXiv:2605.03869.
    """
    below_one(decay=decay)
    at_least_zero(floor=floor)

    def update(drawn, params, state):
        del params
        slopes, (square, weight) = drawn.projected_grad, state
        square = decay * square + (1 - decay) * jnp.square(slopes).mean(where=drawn.finite)
        weight = decay * weight + (1 - decay)
        return (square, weight), _along(drawn, slopes / (jnp.sqrt(square / weight) + floor))

    def init(setup):
        return (jnp.zeros((), setup.width), jnp.zeros((), setup.width))

    return Rule(f"normalized_by_average(decay={decay}, floor={floor})", init, update)


class History(NamedTuple):
    """Slopes of the last steps that moved something, newest first.

    Attributes:
      slopes: [h, n].
      steps: [h], their numbers; -1 where there was none yet.
    """

    slopes: Float[Array, "h n"]
    steps: Int[Array, "h"]

    def averages(
        self, drawn: Directions, site: Site, decays: tuple[float, ...], powers: tuple[int, ...]
    ) -> list:
        """`Σ_s β^s G_s^p / Σ_s β^s` over the steps, for each decay β and power p.

        Args:
          drawn: the directions of each step, stacked.
          site: where.
          decays: the β.
          powers: the p.
        """
        count, n = self.slopes.shape
        zero = jnp.zeros(jnp.shape(site.value), jnp.promote_types(site.value.dtype, jnp.float32))

        def add(age, carry):
            totals, weights = carry
            directions = jax.tree.map(lambda x: x[age], drawn)
            estimate = directions.combine(self.slopes[age] / n, site).astype(zero.dtype)
            known = self.steps[age] >= 0
            factors = [known * decay ** age.astype(zero.dtype) for decay in decays]
            totals = [
                total + jnp.where(known, factor * estimate**power, 0)
                for total, factor, power in zip(totals, factors, powers, strict=True)
            ]
            return totals, [w + factor for w, factor in zip(weights, factors, strict=True)]

        start = ([zero for _ in decays], [jnp.zeros((), zero.dtype) for _ in decays])
        totals, weights = lax.fori_loop(0, count, add, start)
        return [total / weight for total, weight in zip(totals, weights, strict=True)]


def _replayed(name: str, horizon: int, block: Callable[[Callable[..., list], Site], Array]) -> Rule:
    if horizon < 1:
        raise ValueError(f"horizon is {horizon}: give at least 1")

    def init(setup):
        slopes = jnp.zeros((horizon, setup.num_directions), setup.width)
        return History(slopes, jnp.full(horizon, -1, jnp.int32))

    def update(drawn, params, state):
        del params

        def first(new, old):
            return jnp.concatenate([new[None].astype(old.dtype), old[:-1]])

        history = History(*map(first, (drawn.projected_grad, drawn.step), state))
        directions = lax.map(drawn.directions, jnp.maximum(history.steps, 0))
        averages = functools.partial(history.averages, directions)
        return history, lambda site: block(averages, site)

    return Rule(name, init, update)


def replayed_momentum(decay: float = 0.9, *, horizon: int = 20) -> Rule:
    r"""$u = \sum_s \beta^s G_{t-s} / \sum_s \beta^s$, $G = 1/n \sum_j g_j z_j$, without its memory.

    The last estimates are drawn again from their keys and slopes: a state of `horizon` n scalars,
    and as many draws of noise a step. What lies further back is left out.

    References: arXiv:2305.17333, appendix B.
    """
    below_one(decay=decay)

    def block(averages, site):
        return averages(site, (decay,), (1,))[0]

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
    below_one(b1=b1, b2=b2)
    at_least_zero(eps=eps)

    def block(averages, site):
        mean, square = averages(site, (b1, b2), (1, 2))
        return mean / (jnp.sqrt(square) + eps)

    name = f"replayed_adam(b1={b1}, b2={b2}, eps={eps}, horizon={horizon})"
    return _replayed(name, horizon, block)
