r"""Momentum in the form whose learning rate is that of SGD, and a comparison of its runs with SGD.

With $m \leftarrow \beta m + (1 - \beta) g$ and $x \leftarrow x - \eta m$, a gradient g moves x by
$\eta g$ over time, as SGD does at once. If noise dominates and η is small, the two stay close in
short and in long runs (Wang et al. 2023, arXiv:2307.15196).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxlm.core.checks import one_of, real
from jaxlm.typing import Params, PRNGKey

__all__ = ["MomentumComparison", "compare_momentum", "effective_lr_schedule", "sgdm"]

Schedule = Callable[[Any], Any]
Oracle = Callable[[PRNGKey, Params], Params]


def sgdm(
    eta: float | int | Schedule, beta: float | int | Schedule, form: str = "ema"
) -> optax.GradientTransformation:
    r"""Return SGD with momentum as an optax optimizer.

    "ema": $m \leftarrow \beta m + (1 - \beta) g$, $x \leftarrow x - \eta m$, from m = 0 and without
    bias correction. "heavy_ball": $m \leftarrow \beta m + g$, which is `optax.sgd(eta, beta)`; its
    η is $1 - \beta$ times that of the other form and of SGD, see `effective_lr_schedule`.

    η and β are numbers or optax schedules; a schedule of β needs `params` in `update`.

    References:
        Wang et al. 2023, arXiv:2307.15196.

    >>> tx = sgdm(0.1, 0.9)
    >>> update, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    >>> update.round(4).tolist()
    [-0.009999999776482582, -0.009999999776482582]
    """
    one_of("form", form, ("ema", "heavy_ball"))
    ema = functools.partial(optax.ema, debias=False)
    average: Any = ema if form == "ema" else optax.trace
    if callable(beta):
        # optax takes schedules for learning rates only.
        average = optax.inject_hyperparams(average)
    else:
        real("beta", beta, least=0, below=1)
    return optax.chain(average(decay=beta), optax.scale_by_learning_rate(eta))


def effective_lr_schedule(
    eta: float | int | Schedule, beta: float | int | Schedule, steps: int
) -> Float[np.ndarray, " steps"]:
    r"""Return the learning rates at which SGD moves as far on each gradient as SGDM does over time.

    $$\bar\eta_k = (1 - \beta_k) \sum_{s \ge k} \eta_s \prod_{\tau = k+1}^s \beta_\tau$$

    for the form "ema" with $\eta_k$, $\beta_k$ in step k. Both schedules stay at their last value
    after the run; constants give η itself. With η = $\gamma / (1 - \beta)$ this also holds for the
    form "heavy_ball" with learning rate γ and constant β.

    The table is in float64; `lambda step: jnp.asarray(table)[step]` is a schedule.

    References:
        Wang et al. 2023, arXiv:2307.15196.

    >>> effective_lr_schedule(0.1, 0.9, 3).round(9).tolist()
    [0.1, 0.1, 0.1]
    """
    rates, betas = _table(eta, steps + 1), _table(beta, steps + 1)
    for extreme in (betas.max(), betas.min()):
        real("beta", float(extreme), least=0, below=1)
    total = rates[-1] / (1 - betas[-1])
    effective = np.empty(steps)
    for k in reversed(range(steps)):
        total = rates[k] + betas[k + 1] * total
        effective[k] = (1 - betas[k]) * total
    return effective


def _table(schedule: Any, length: int) -> np.ndarray:
    value = schedule
    if callable(schedule):
        # Even under a caller's `jit` the table is computed now, as a constant of the program.
        with jax.ensure_compile_time_eval():
            value = jax.vmap(lambda step: jnp.asarray(schedule(step)))(jnp.arange(length))
    return np.broadcast_to(np.asarray(value, np.float64), (length,))


class MomentumComparison(NamedTuple):
    """Values of F functions of the last iterate, for R runs of SGD and SGDM with common noise."""

    sgd: Float[Array, "R F"]
    sgdm: Float[Array, "R F"]

    @property
    def gap(self) -> Float[Array, " F"]:
        """The difference of the means: the weak error that these functions see."""
        return jnp.abs(self.sgdm.mean(0) - self.sgd.mean(0))

    @property
    def standard_error(self) -> Float[Array, " F"]:
        """The standard error of that difference; small, since runs share their noise."""
        return (self.sgdm - self.sgd).std(0, ddof=1) / jnp.sqrt(len(self.sgd))

    @property
    def wasserstein(self) -> Float[Array, " F"]:
        """The distance $W_1$ between the two distributions of each value."""
        return jnp.abs(jnp.sort(self.sgdm, 0) - jnp.sort(self.sgd, 0)).mean(0)


def compare_momentum(
    key: PRNGKey,
    oracle: Oracle,
    x0: Params,
    *,
    eta: float | int | Schedule,
    beta: float | int | Schedule,
    steps: int,
    num_runs: int,
    test_fn: Callable[[Params], Array],
) -> MomentumComparison:
    """Run SGDM, and SGD with the same effective learning rate, many times on a noisy function.

    To tell whether a gap is due to noise or to curvature, amplify the noise as SVAG does: multiply
    σ in the oracle by the root of l, divide η by l, and take l times the steps. The part of the gap
    that is due to curvature vanishes as 1/l.

    Args:
        key: in step k of run r both use the key `fold_in(fold_in(key, r), k)`.
        oracle: `(key, x) -> noisy gradient`.
        x0: the start of each run.
        eta, beta: as in `sgdm`.
        steps: steps of each run.
        num_runs: R.
        test_fn: `x -> [F]`, applied to the last x.

    References:
        Wang et al. 2023, arXiv:2307.15196.

    >>> result = compare_momentum(
    ...     jax.random.key(0), lambda key, x: x + jax.random.normal(key), jnp.float32(1.0),
    ...     eta=0.1, beta=0.9, steps=50, num_runs=4, test_fn=lambda x: jnp.stack([x, x**2]),
    ... )
    >>> result.sgdm.shape
    (4, 2)
    """
    rates = jnp.asarray(effective_lr_schedule(eta, beta, steps), jnp.float32)
    keys = jax.vmap(lambda run: jax.random.fold_in(key, run))(jnp.arange(num_runs))

    def values(tx):
        def run(run_key):
            def step(carry, k):
                x, state = carry
                updates, state = tx.update(oracle(jax.random.fold_in(run_key, k), x), state, x)
                return (optax.apply_updates(x, updates), state), None

            (x, _), _ = jax.lax.scan(step, (x0, tx.init(x0)), jnp.arange(steps))
            return test_fn(x)

        return jax.vmap(run)(keys)

    return MomentumComparison(
        sgd=values(optax.sgd(lambda step: rates[step])), sgdm=values(sgdm(eta, beta))
    )
