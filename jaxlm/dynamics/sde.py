r"""Stochastic differential equations whose solutions follow an optimizer.

A minibatch gradient is $\nabla f(\theta) + \sigma z$, where z has mean 0 and covariance
$\Sigma(\theta)$. Each equation here has one step of its optimizer as its time step:
`time_per_step` is η for SGD, with and without momentum, and η² for RMSprop and Adam.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.dynamics.diffusion import NoiseOperator, as_operator
from jaxlm.typing import Params

Grad = Callable[[Any], Any]
"""θ -> the full gradient, a tree like θ."""

SqrtCov = Callable[[Any], Any]
"""θ -> a root of Σ(θ): diagonal like θ, matrix or operator; see `jaxlm.dynamics.as_operator`."""


def _itself(params: Params) -> Params:
    return params


class SDE(NamedTuple):
    r"""$dX = b(t, X)\,dt + s(t, X)\,dW$ in the sense of Itô, X a tree of floats.

    Attributes:
      drift: `(t, x)` -> b, a tree like x.
      diffusion: `(t, x)` -> s: diagonal like x, matrix or operator; see `as_operator`.
      time_per_step: time that one step of the optimizer takes.
      init: parameters -> the state at `t0`.
      t0: where time begins.
    """

    drift: Callable[[Any, Any], Any]
    diffusion: Callable[[Any, Any], Any]
    time_per_step: float
    init: Callable[[Params], Any] = _itself
    t0: float = 0.0


class MomentumState(NamedTuple):
    """θ and the running mean m of gradients."""

    params: Params
    m: Params


def sgd_sde(grad: Grad, sqrt_cov: SqrtCov, eta: float | int) -> SDE:
    r"""SGD, $\theta_{k+1} = \theta_k - \eta g_k$: time $t = k\eta$, noise of the batch as it is.

    $$dX = -\nabla f(X)\,dt + (\eta \Sigma(X))^{1/2}\,dW$$

    Args:
      grad: θ -> gradient.
      sqrt_cov: θ -> $\Sigma^{1/2}$ of one step's gradient: diagonal like θ, matrix or operator.
      eta: η.

    References:
      Li, Tai, E 2017, arXiv:1511.06251; Li, Malladi, Arora 2021, arXiv:2102.12470.

    >>> sde = sgd_sde(lambda x: 2 * x, jnp.ones_like, 0.25)
    >>> float(sde.drift(0.0, jnp.array(3.0)))
    -6.0
    """

    def drift(t, x):
        del t
        return jax.tree.map(jnp.negative, grad(x))

    def diffusion(t, x):
        del t
        noise = as_operator(sqrt_cov(x), x)
        return NoiseOperator(lambda z: scaled(eta**0.5, noise.mv(z)), noise.structure)

    return SDE(drift, diffusion, eta)


def sgdm_sde(grad: Grad, sqrt_cov: SqrtCov, eta: float | int, beta: float | int) -> SDE:
    r"""SGD on a running mean of gradients, $m_{k+1} = \beta m_k + (1 - \beta) g_k$, $t = k\eta$.

    $$d\theta = -m\,dt, \qquad dm = c(\nabla f(\theta) - m)\,dt + c\,(\eta\Sigma)^{1/2}\,dW,
    \qquad c = (1 - \beta)/\eta$$

    The state is a `MomentumState`; it begins with the full gradient as its mean. It follows the
    optimizer where c stays bounded; where β is fixed and η goes to 0, the limit is `sgd_sde`.

    Args:
      grad, sqrt_cov, eta: as in `sgd_sde`.
      beta: β. Momentum in the form m = βm + g has its rate multiplied by 1/(1 - β).

    References:
      Li, Tai, E 2017, arXiv:1511.06251; Wang et al. 2023, arXiv:2307.15196.
    """
    c = (1 - beta) / eta

    def drift(t, state):
        del t
        return MomentumState(scaled(-1.0, state.m), towards(c, state.m, grad(state.params)))

    def diffusion(t, state):
        del t
        noise = as_operator(sqrt_cov(state.params), state.params)

        def mv(z):
            return MomentumState(zeros(state.params), scaled(c * eta**0.5, noise.mv(z)))

        return NoiseOperator(mv, noise.structure)

    return SDE(drift, diffusion, eta, lambda params: MomentumState(params, grad(params)))


def scaled(factor: Any, tree: Any) -> Any:
    """A tree times a number."""
    return jax.tree.map(lambda leaf: factor * leaf, tree)


def towards(rate: Any, tree: Any, target: Any) -> Any:
    """The velocity with which a tree relaxes to another."""
    return jax.tree.map(lambda leaf, goal: rate * (goal - leaf), tree, target)


def zeros(tree: Any) -> Any:
    """A tree of zeros like another."""
    return jax.tree.map(jnp.zeros_like, tree)
