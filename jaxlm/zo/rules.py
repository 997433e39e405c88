"""Update rules: from slopes along directions to the direction in which parameters move.

An optimizer of `jaxlm.zo.optimizers` moves by

    θ ← θ - η (u + λ θ),

and a rule computes u, one block of parameters at a time. A rule is a pair of pure functions with
its own state: nothing, some scalars, or small matrices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core import paths
from jaxlm.core.checks import integer
from jaxlm.core.dtypes import wide_dtype
from jaxlm.zo.checks import MOST_COPIES, decay_rates, real
from jaxlm.zo.perturbation import Directions, width
from jaxlm.zo.samplers import Sampler
from jaxlm.zo.sites import Site

Block = Callable[[Site], Float[Array, "..."]]
"""`block(site) -> u` at a site, in at least float32."""


class Drawn(NamedTuple):
    """The slopes of a step, as a rule sees them.

    Attributes:
      projected_grad: [n], 0 where a slope is not finite.
      finite: [n], whether a slope is finite.
      step: number of the step, from 0.
      last: number of the last step that moved parameters; -1 before the first.
      directions: `directions(step)`, the directions of this or an earlier step.
    """

    projected_grad: Float[Array, "n"]
    finite: Bool[Array, "n"]
    step: Array
    last: Array
    directions: Callable[[Any], Directions]

    @property
    def now(self) -> Directions:
        """The directions of this step."""
        return self.directions(self.step)


class Setup(NamedTuple):
    """The arguments of a rule's `init`.

    Attributes:
      params: initial parameters.
      select: parameters to train.
      sampler: distribution of the directions.
      num_directions: n.
    """

    params: Any
    select: paths.Select
    sampler: Sampler
    num_directions: int

    @property
    def width(self) -> Any:
        """The dtype of scalars in the state of a rule."""
        return width(self.params, self.select)


class Rule(NamedTuple):
    """A pair of pure functions.

    The result of `update` is discarded in a step without a finite slope: the state is kept and
    nothing moves.

    Attributes:
      name: name and settings of the rule, as a trajectory records them.
      init: `init(setup) -> state`.
      update: `update(drawn, params, state) -> (state, block)`; `block(site)` returns u there.
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
    r"""`u = 1/n Σ_j g_j z_j / std(g)`, std over the n >= 2 slopes of a step: FZOO.

    A slope that is not finite moves nothing and does not enter the standard deviation.

    References: arXiv:2506.09034. The paper writes $(l_j - l_0) / \mathrm{std}(l)$, in which eps
    cancels. The standard deviation has n in the denominator, as in the authors' code.
    """

    def update(drawn, params, state):
        del params
        slopes = drawn.projected_grad
        spread = slopes.std(where=drawn.finite)
        scaled = jnp.where(spread > 0, slopes / jnp.where(spread > 0, spread, 1), 0)
        return state, _along(drawn, scaled)

    return Rule("normalized_by_spread", lambda setup: (), update)


def normalized_by_average(decay_rate: float = 0.99, *, floor: float = 1e-8) -> Rule:
    r"""`u = 1/n Σ_j g_j z_j / (sqrt(v) + floor)`: one scalar in place of Adam's second moment.

    $v_t = \beta v_{t-1} + (1 - \beta) \overline{g_j^2}$ over the finite slopes of a step, divided
    by the sum of its weights, $1 - \beta^t$ after t steps that moved parameters.

    Args:
      decay_rate: β.
      floor: added to the root.

    References: MEAZO, arXiv:2605.03869.
    """
    decay_rates(decay_rate=decay_rate)
    real("floor", floor, least=0.0)

    def update(drawn, params, state):
        del params
        slopes, (square, weight) = drawn.projected_grad, state
        new = jnp.square(slopes).mean(where=drawn.finite)
        square = decay_rate * square + (1 - decay_rate) * new
        # Summed rather than a power of the step number, since steps without a slope do not count.
        weight = decay_rate * weight + (1 - decay_rate)
        return (square, weight), _along(drawn, slopes / (jnp.sqrt(square / weight) + floor))

    def init(setup):
        return (jnp.zeros((), setup.width), jnp.zeros((), setup.width))

    return Rule(f"normalized_by_average(decay={decay_rate}, floor={floor})", init, update)


class History(NamedTuple):
    """Slopes of the last h steps that moved parameters, newest first.

    Attributes:
      slopes: [h, n].
      steps: [h], the numbers of the steps; -1 where there is none yet.
    """

    slopes: Float[Array, "h n"]
    steps: Int[Array, "h"]


def _replayed(
    name: str, horizon: int, decays: tuple[float, ...], direction: Callable[..., Array]
) -> Rule:
    """Return the rule `u = direction(m_1, m_2, ...)`, `m_p = Σ_s β_p^s G_s^p / Σ_s β_p^s`."""
    integer("horizon", horizon, most=MOST_COPIES)

    def init(setup):
        slopes = jnp.zeros((horizon, setup.num_directions), setup.width)
        return History(slopes, jnp.full(horizon, -1, jnp.int32))

    def update(drawn, params, state):
        del params

        def first(new, old):
            return jnp.concatenate([new[None].astype(old.dtype), old[:-1]])

        history = History(*map(first, (drawn.projected_grad, drawn.step), state))
        drawn_again = lax.map(drawn.directions, jnp.maximum(history.steps, 0))
        n = history.slopes.shape[1]

        def block(site):
            zero = jnp.zeros(jnp.shape(site.value), wide_dtype(site.value))

            def add(age, carry):
                totals, weights = carry
                directions = jax.tree.map(lambda x: x[age], drawn_again)
                estimate = directions.combine(history.slopes[age] / n, site).astype(zero.dtype)
                known = history.steps[age] >= 0
                factors = [known * decay ** age.astype(zero.dtype) for decay in decays]
                totals = [
                    total + jnp.where(known, factor * estimate**power, 0)
                    for power, (total, factor) in enumerate(zip(totals, factors, strict=True), 1)
                ]
                return totals, [w + factor for w, factor in zip(weights, factors, strict=True)]

            start = ([zero for _ in decays], [jnp.zeros((), zero.dtype) for _ in decays])
            totals, weights = lax.fori_loop(0, horizon, add, start)
            return direction(*(x / weight for x, weight in zip(totals, weights, strict=True)))

        return history, block

    return Rule(name, init, update)


def replayed_momentum(momentum: float = 0.9, *, horizon: int = 20) -> Rule:
    r"""$u = \sum_s \beta^s G_{t-s} / \sum_s \beta^s$, $G = 1/n \sum_j g_j z_j$, without a buffer.

    The last estimates are drawn again from their keys and slopes: the state is `horizon` n scalars,
    and each step draws `horizon` n directions. Older estimates are left out.

    Args:
      momentum: β.
      horizon: number of estimates in the mean.

    References: arXiv:2305.17333, appendix B.
    """
    decay_rates(momentum=momentum)
    name = f"replayed_momentum(decay={momentum}, horizon={horizon})"
    return _replayed(name, horizon, (momentum,), lambda mean: mean)


def replayed_adam(
    b1: float = 0.9, b2: float = 0.999, *, floor: float = 1e-8, horizon: int = 20
) -> Rule:
    r"""Adam on the estimates G, without storing its moments.

    $u = \hat m / (\sqrt{\hat v} + \epsilon)$ with weighted means over the last `horizon` steps in
    place of running ones: $\hat m = \sum_s \beta_1^s G_{t-s} / \sum_s \beta_1^s$, and $\hat v$
    likewise of $G^2$. The first `horizon` steps equal Adam with bias correction.

    Args:
      b1: β1, decay rate of the first moment.
      b2: β2, decay rate of the second moment.
      floor: Adam's ε, added to the root.
      horizon: number of estimates in the means.

    References: arXiv:2305.17333, appendix B; AdaMeZO, arXiv:2605.00650 (the horizon).
    """
    decay_rates(b1=b1, b2=b2)
    real("floor", floor, least=0.0)

    def direction(mean, square):
        return mean / (jnp.sqrt(square) + floor)

    name = f"replayed_adam(b1={b1}, b2={b2}, eps={floor}, horizon={horizon})"
    return _replayed(name, horizon, (b1, b2), direction)
