r"""The equations of RMSprop and Adam, in the time $t = k\eta^2$.

A minibatch gradient is $\nabla f(\theta) + \sigma z$, where z has mean 0 and covariance
$\Sigma(\theta)$, and noise dominates: squares of $\nabla f$ are left out of the second moment.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core.errors import UserError
from jaxlm.dynamics.diffusion import NoiseOperator, as_operator
from jaxlm.dynamics.sde import SDE, Grad, SqrtCov, scaled, towards, zeros
from jaxlm.typing import Params


class RMSpropState(NamedTuple):
    """θ and u, the running mean of squared gradients over σ²."""

    params: Params
    u: Params


class AdamState(NamedTuple):
    """θ, the running mean m of gradients, and u, that of their squares over σ²."""

    params: Params
    m: Params
    u: Params


class AdaptiveConstants(NamedTuple):
    r"""What stays fixed while η goes to 0, so that RMSprop or Adam has a limit.

    $$\sigma_0 = \sigma\eta, \quad \epsilon_0 = \epsilon\eta, \quad c_i = (1 - \beta_i) / \eta^2$$

    Attributes:
      eta: η.
      sigma0, eps0, c2, c1: as above; c1 is None for RMSprop.

    >>> constants = AdaptiveConstants.of(0.1, sigma=10, b1=0.8, b2=0.98, eps=1)
    >>> round(constants.at(0.05).b1, 6), constants.at(0.05).sigma
    (0.95, 20.0)
    """

    eta: float
    sigma0: float
    eps0: float
    c2: float
    c1: float | None = None

    @classmethod
    def of(
        cls,
        eta: float | int,
        *,
        sigma: float | int,
        b2: float | int,
        eps: float | int,
        b1: float | int | None = None,
    ) -> "AdaptiveConstants":
        """From the optimizer's hyperparameters and the scale σ of the noise."""
        c1 = None if b1 is None else (1 - b1) / eta**2
        return cls(eta, sigma * eta, eps * eta, (1 - b2) / eta**2, c1)

    def at(self, eta: float | int) -> "AdaptiveConstants":
        """The same equation, followed in steps of another η."""
        return self._replace(eta=eta)

    @property
    def sigma(self) -> float:
        """Scale of the gradient noise."""
        return self.sigma0 / self.eta

    @property
    def eps(self) -> float:
        """ε of the optimizer, outside the root."""
        return self.eps0 / self.eta

    @property
    def b1(self) -> float:
        """β1."""
        return self._decay("c1", self.c1)

    @property
    def b2(self) -> float:
        """β2."""
        return self._decay("c2", self.c2)

    def _decay(self, name: str, rate: float | None) -> float:
        if rate is None:
            raise UserError(f"{name} is None: give b1, which Adam needs.")
        if not 0 <= rate * self.eta**2 <= 1:
            raise UserError(
                f"{name} = {rate:g} and eta = {self.eta:g} make a decay of "
                f"{1 - rate * self.eta**2:g}: take an eta of at most {rate**-0.5:g}."
            )
        return 1 - rate * self.eta**2


def rmsprop_sde(grad: Grad, diag_cov: Grad, sqrt_cov: SqrtCov, constants: AdaptiveConstants) -> SDE:
    r"""RMSprop, $\theta_{k+1} = \theta_k - \eta g_k / (\sqrt{v_k} + \epsilon)$: time $t = k\eta^2$.

    $$d\theta = -P^{-1}(\nabla f\,dt + \sigma_0 \Sigma^{1/2}\,dW), \qquad
    du = c_2(\mathrm{diag}\,\Sigma - u)\,dt, \qquad P = \sigma_0 \sqrt{u} + \epsilon_0$$

    with $u = v/\sigma^2$. It holds where noise dominates: squares of ∇f are left out of v. v is
    that before the step; common codes divide by the v that has seen the step's own gradient.
    The state is an `RMSpropState`, which begins with u = diag Σ.

    Args:
      grad: θ -> ∇f.
      diag_cov: θ -> diag Σ, like θ.
      sqrt_cov: θ -> $\Sigma^{1/2}$, without σ: diagonal like θ, matrix or operator.
      constants: `AdaptiveConstants.of(eta, sigma=..., b2=..., eps=...)`.

    References:
      Malladi, Lyu, Panigrahi, Arora 2022, arXiv:2205.10287.
    """
    c = constants

    def rates(u):
        return jax.tree.map(lambda u: 1 / (c.sigma0 * jnp.sqrt(u) + c.eps0), u)

    def drift(t, state):
        del t
        moved = jax.tree.map(lambda r, g: -r * g, rates(state.u), grad(state.params))
        return RMSpropState(moved, towards(c.c2, state.u, diag_cov(state.params)))

    def diffusion(t, state):
        del t
        noise, rate = as_operator(sqrt_cov(state.params), state.params), rates(state.u)

        def mv(z):
            moved = jax.tree.map(lambda r, s: -c.sigma0 * r * s, rate, noise.mv(z))
            return RMSpropState(moved, zeros(state.u))

        return NoiseOperator(mv, noise.structure)

    def init(params):
        return RMSpropState(params, _like(params, diag_cov(params)))

    return SDE(drift, diffusion, c.eta**2, init)


def adam_sde(grad: Grad, diag_cov: Grad, sqrt_cov: SqrtCov, constants: AdaptiveConstants) -> SDE:
    r"""Adam with bias correction: time $t = k\eta^2$.

    $$d\theta = -\frac{\sqrt{\gamma_2}}{\gamma_1} P^{-1} m\,dt, \qquad
    dm = c_1(\nabla f - m)\,dt + \sigma_0 c_1 \Sigma^{1/2}\,dW, \qquad
    du = c_2(\mathrm{diag}\,\Sigma - u)\,dt$$

    with $u = v/\sigma^2$, $\gamma_i(t) = 1 - e^{-c_i t}$ and $P = \sigma_0 \sqrt{u} + \epsilon_0
    \sqrt{\gamma_2}$. It holds where noise dominates. The bias corrections are singular at t = 0, so
    that time begins at η², after one step, with $m = \gamma_1 \nabla f$ and $u = \gamma_2
    \mathrm{diag}\,\Sigma$. The state is an `AdamState`.

    Args:
      grad, diag_cov, sqrt_cov: as in `rmsprop_sde`.
      constants: `AdaptiveConstants.of(eta, sigma=..., b1=..., b2=..., eps=...)`.

    Raises:
      UserError: the constants have no c1.

    References:
      Malladi, Lyu, Panigrahi, Arora 2022, arXiv:2205.10287.
    """
    c, c1 = constants, constants.c1
    if c1 is None:
        raise UserError("the constants have no c1: give b1 to AdaptiveConstants.of.")

    def correction(rate, t):
        return -jnp.expm1(-rate * t)

    def drift(t, state):
        gamma1, gamma2 = correction(c1, t), correction(c.c2, t)
        root = jnp.sqrt(gamma2)

        def moved(m, u):
            return -root / gamma1 * m / (c.sigma0 * jnp.sqrt(u) + c.eps0 * root)

        return AdamState(
            jax.tree.map(moved, state.m, state.u),
            towards(c1, state.m, grad(state.params)),
            towards(c.c2, state.u, diag_cov(state.params)),
        )

    def diffusion(t, state):
        del t
        noise = as_operator(sqrt_cov(state.params), state.params)

        def mv(z):
            moved = scaled(c.sigma0 * c1, noise.mv(z))
            return AdamState(zeros(state.params), moved, zeros(state.u))

        return NoiseOperator(mv, noise.structure)

    t0 = c.eta**2

    def init(params):
        u = scaled(correction(c.c2, t0), _like(params, diag_cov(params)))
        return AdamState(params, scaled(correction(c1, t0), grad(params)), u)

    return SDE(drift, diffusion, t0, init, t0)


def _like(tree: Any, values: Any) -> Any:
    """Values that may be scalars, in the shapes of the tree."""
    return jax.tree.map(lambda leaf, value: jnp.full_like(leaf, value), tree, values)
