r"""Stochastic differential equations that optimizers follow.

A minibatch gradient is $\nabla f(\theta) + \sigma z$, where z has mean 0 and covariance
$\Sigma(\theta)$. Each equation here takes one optimizer step in the time `time_per_step`: η for SGD
with and without momentum, and η² for RMSprop, Adam, and the slow equation of local SGD.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxlm.core.errors import UserError
from jaxlm.typing import Params

__all__ = [
    "SDE",
    "AdamState",
    "AdaptiveConstants",
    "MomentumState",
    "NoiseOperator",
    "RMSpropState",
    "adam_sde",
    "example_noise",
    "local_drift_factor",
    "local_sgd_sde",
    "rmsprop_sde",
    "sgd_sde",
    "sgdm_sde",
]

Grad = Callable[[Any], Any]
"""θ -> the full gradient, a tree like θ."""

SqrtCov = Callable[[Any], Any]
"""θ -> a root of Σ(θ): a diagonal like θ, a matrix, or an operator; see `as_operator`."""


def _identity(params: Params) -> Params:
    return params


class SDE(NamedTuple):
    r"""The equation $dX = b(t, X)\,dt + s(t, X)\,dW$ in the sense of Itô; X is a tree of floats.

    Attributes:
        drift: `(t, x)` -> b, a tree like x.
        diffusion: `(t, x)` -> s: a diagonal like x, a matrix, or a `NoiseOperator`.
        time_per_step: the time that one optimizer step takes.
        init: parameters -> the state at `t0`.
        t0: the start time.
    """

    drift: Callable[[Any, Any], Any]
    diffusion: Callable[[Any, Any], Any]
    time_per_step: float
    init: Callable[[Params], Any] = _identity
    t0: float = 0.0


class NoiseOperator(NamedTuple):
    """A linear map from white noise to noise of the state; its matrix is never formed.

    Attributes:
        mv: maps a tree of `structure` to a tree like the state.
        structure: `jax.ShapeDtypeStruct`s of the white noise.

    >>> rows = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> noise = NoiseOperator(lambda z: rows @ z, jax.ShapeDtypeStruct((2,), jnp.float32))
    >>> noise.mv(jnp.ones(2)).tolist()
    [1.0, 1.0, 2.0]
    """

    mv: Callable[[Any], Any]
    structure: Any

    def in_structure(self) -> Any:
        """Return `structure`, under the name that operators of lineax use."""
        return self.structure


def as_operator(noise: Any, x: Any) -> NoiseOperator:
    """Convert the value of a diffusion at the state x to a `NoiseOperator`.

    The value is a diagonal, as a tree like x whose leaves may be scalars; a matrix [d, r] that maps
    r numbers of white noise to a state x [d]; a `NoiseOperator`; or an operator of lineax.
    """
    if hasattr(noise, "mv") and hasattr(noise, "in_structure"):
        return NoiseOperator(noise.mv, noise.in_structure())
    if _is_diagonal(noise, x):
        return NoiseOperator(lambda z: jax.tree.map(jnp.multiply, noise, z), shapes_of(x))
    if isinstance(x, jax.Array) and x.ndim == 1 and np.shape(noise)[:-1] == x.shape:
        white = jax.ShapeDtypeStruct(np.shape(noise)[1:], x.dtype)
        # Accelerators multiply float32 in fewer bits by default, and the covariance would be off.
        return NoiseOperator(lambda z: jnp.matmul(noise, z, precision="highest"), white)
    shapes, expected = jax.tree.map(np.shape, noise), jax.tree.map(np.shape, x)
    raise UserError(
        f"noise: does not fit the state, of shapes {expected} (got {shapes}). Give a tree like the "
        "state, a matrix [d, r] for a state [d], or a NoiseOperator."
    )


def shapes_of(x: Any) -> Any:
    """Return the shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)


def _is_diagonal(noise: Any, x: Any) -> bool:
    structure: Any = jax.tree.structure(noise)
    if structure != jax.tree.structure(x):
        return False
    pairs = zip(jax.tree.leaves(noise), jax.tree.leaves(x), strict=True)
    return all(np.shape(scale) in ((), np.shape(leaf)) for scale, leaf in pairs)


def _diffusion(sqrt_cov: SqrtCov, embed: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return the diffusion `embed(state, noise of the gradient)`, where `state.params` is θ."""

    def diffusion(t, state):
        noise = as_operator(sqrt_cov(state.params), state.params)
        return NoiseOperator(lambda z: embed(state, noise.mv(z)), noise.structure)

    return diffusion


def example_noise(
    losses: Callable[[Any], Float[Array, " n"]], x: Any, batch_size: float | int
) -> NoiseOperator:
    r"""Return the noise of a minibatch gradient, from the losses of n examples.

    $$z \mapsto \frac{1}{\sqrt{n B}} \sum_i (z_i - \bar z)\, \nabla l_i(x), \qquad
    \mathrm{Cov} = \frac1B \cdot \frac1n \sum_i (g_i - \bar g)(g_i - \bar g)^\top$$

    This is the covariance of the mean of B gradients drawn with replacement. A draw is one backward
    pass of a weighted loss, so that neither a d by d matrix nor n gradients are formed. The full
    gradient plus a draw is a step of noisy gradient descent.

    Args:
        losses: x -> the loss of each example, [n], the shape of the white noise too.
        x: parameters, a tree of floats.
        batch_size: B.

    References:
        Wu et al. 2020, arXiv:1906.07405 (weights in place of a matrix root); Li, Malladi, Arora
        2021, arXiv:2102.12470 (noisy gradient descent).
    """
    # A weighted sum of gradients is the gradient of the weighted sum: one backward pass.
    values, pull = jax.vjp(losses, x)
    (n,) = values.shape
    scale = (n * batch_size) ** -0.5

    def mv(z):
        return pull((z - z.mean()) * scale)[0]

    return NoiseOperator(mv, jax.ShapeDtypeStruct((n,), values.dtype))


def sgd_sde(grad: Grad, sqrt_cov: SqrtCov, eta: float | int) -> SDE:
    r"""Return the equation of SGD, $\theta_{k+1} = \theta_k - \eta g_k$, in the time $t = k\eta$.

    $$dX = -\nabla f(X)\,dt + (\eta \Sigma(X))^{1/2}\,dW$$

    Args:
        grad: θ -> ∇f.
        sqrt_cov: θ -> $\Sigma^{1/2}$: a diagonal like θ, a matrix, or an operator.
        eta: η.

    References:
        Li, Tai, E 2017, arXiv:1511.06251; Li, Malladi, Arora 2021, arXiv:2102.12470.

    >>> sde = sgd_sde(lambda x: 2 * x, jnp.ones_like, 0.25)
    >>> float(sde.drift(0.0, jnp.array(3.0)))
    -6.0
    """

    def diffusion(t, x):
        noise = as_operator(sqrt_cov(x), x)
        return NoiseOperator(lambda z: optax.tree.scale(eta**0.5, noise.mv(z)), noise.structure)

    return SDE(lambda t, x: jax.tree.map(jnp.negative, grad(x)), diffusion, eta)


class MomentumState(NamedTuple):
    """The parameters θ and the running mean m of gradients."""

    params: Params
    m: Params


def sgdm_sde(grad: Grad, sqrt_cov: SqrtCov, eta: float | int, beta: float | int) -> SDE:
    r"""Return the equation of SGD with momentum, in the time $t = k\eta$.

    The optimizer is $m \leftarrow \beta m + (1 - \beta) g$, $\theta \leftarrow \theta - \eta m$:

    $$d\theta = -m\,dt, \qquad dm = c(\nabla f(\theta) - m)\,dt + c\,(\eta\Sigma)^{1/2}\,dW,
    \qquad c = (1 - \beta)/\eta$$

    The state is a `MomentumState`, which starts with the full gradient as m. The equation holds
    where c stays bounded; for fixed β, as η goes to 0, the limit is `sgd_sde`.

    Args:
        grad, sqrt_cov, eta: as in `sgd_sde`.
        beta: β. For the form m = βm + g, divide its learning rate by 1 - β to get η.

    References:
        Li, Tai, E 2017, arXiv:1511.06251; Wang et al. 2023, arXiv:2307.15196.
    """
    c = (1 - beta) / eta

    def drift(t, state):
        velocity = jax.tree.map(jnp.negative, state.m)
        return MomentumState(velocity, _relax(c, state.m, grad(state.params)))

    def embed(state, noise):
        still = optax.tree.zeros_like(state.params)
        return MomentumState(still, optax.tree.scale(c * eta**0.5, noise))

    return SDE(
        drift,
        _diffusion(sqrt_cov, embed),
        eta,
        init=lambda params: MomentumState(params, grad(params)),
    )


class RMSpropState(NamedTuple):
    """The parameters θ, and u, the running mean of squared gradients divided by σ²."""

    params: Params
    u: Params


class AdamState(NamedTuple):
    """The parameters θ, the running mean m of gradients, and u, that of their squares over σ²."""

    params: Params
    m: Params
    u: Params


class AdaptiveConstants(NamedTuple):
    r"""The constants that stay fixed while η goes to 0, so that RMSprop and Adam have a limit.

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
        """Compute the constants from the optimizer's hyperparameters and the noise scale σ."""
        c1 = None if b1 is None else (1 - b1) / eta**2
        return cls(eta, sigma * eta, eps * eta, (1 - b2) / eta**2, c1)

    def at(self, eta: float | int) -> "AdaptiveConstants":
        """Return the constants of the same equation for another learning rate η."""
        return self._replace(eta=eta)

    @property
    def sigma(self) -> float:
        """The scale of the gradient noise."""
        return self.sigma0 / self.eta

    @property
    def eps(self) -> float:
        """ε of the optimizer, outside the root."""
        return self.eps0 / self.eta

    @property
    def b1(self) -> float:
        """β1 of the optimizer."""
        return self._decay("c1", self.c1)

    @property
    def b2(self) -> float:
        """β2 of the optimizer."""
        return self._decay("c2", self.c2)

    def _decay(self, name: str, rate: float | None) -> float:
        if rate is None:
            raise UserError(f"{name}: Adam needs it (got None). Give b1.")
        decay = 1 - rate * self.eta**2
        if not 0 <= decay <= 1:
            raise UserError(
                f"{name}: makes a decay of {decay:g} at eta {self.eta:g} (got {rate:g}). Give a "
                "smaller eta."
            )
        return decay


def rmsprop_sde(grad: Grad, diag_cov: Grad, sqrt_cov: SqrtCov, constants: AdaptiveConstants) -> SDE:
    r"""Return the equation of RMSprop, in the time $t = k\eta^2$.

    The optimizer is $\theta_{k+1} = \theta_k - \eta g_k / (\sqrt{v_k} + \epsilon)$:

    $$d\theta = -P^{-1}(\nabla f\,dt + \sigma_0 \Sigma^{1/2}\,dW), \qquad
    du = c_2(\mathrm{diag}\,\Sigma - u)\,dt, \qquad P = \sigma_0 \sqrt{u} + \epsilon_0$$

    with $u = v/\sigma^2$. It holds where noise dominates, because v leaves out the squares of ∇f.
    Here v is from before the step; most code divides by the v that includes the step's gradient.
    The state is an `RMSpropState`, which starts with u = diag Σ.

    Args:
        grad, sqrt_cov: as in `sgd_sde`; Σ is without σ.
        diag_cov: θ -> diag Σ, like θ.
        constants: `AdaptiveConstants.of(eta, sigma=..., b2=..., eps=...)`.

    References:
        Malladi, Lyu, Panigrahi, Arora 2022, arXiv:2205.10287.
    """
    c = constants

    def rates(u):
        return jax.tree.map(lambda u: 1 / (c.sigma0 * jnp.sqrt(u) + c.eps0), u)

    def drift(t, state):
        velocity = jax.tree.map(lambda r, g: -r * g, rates(state.u), grad(state.params))
        return RMSpropState(velocity, _relax(c.c2, state.u, diag_cov(state.params)))

    def embed(state, noise):
        kick = jax.tree.map(lambda r, s: -c.sigma0 * r * s, rates(state.u), noise)
        return RMSpropState(kick, optax.tree.zeros_like(state.u))

    def init(params):
        return RMSpropState(params, jax.tree.map(jnp.full_like, params, diag_cov(params)))

    return SDE(drift, _diffusion(sqrt_cov, embed), c.eta**2, init)


def adam_sde(grad: Grad, diag_cov: Grad, sqrt_cov: SqrtCov, constants: AdaptiveConstants) -> SDE:
    r"""Return the equation of Adam with bias correction, in the time $t = k\eta^2$.

    $$d\theta = -\frac{\sqrt{\gamma_2}}{\gamma_1} P^{-1} m\,dt, \qquad
    dm = c_1(\nabla f - m)\,dt + \sigma_0 c_1 \Sigma^{1/2}\,dW, \qquad
    du = c_2(\mathrm{diag}\,\Sigma - u)\,dt$$

    with $u = v/\sigma^2$, $\gamma_i(t) = 1 - e^{-c_i t}$ and $P = \sigma_0 \sqrt{u} + \epsilon_0
    \sqrt{\gamma_2}$. It holds where noise dominates, because v leaves out the squares of ∇f. The
    bias corrections are singular at t = 0, so time starts at η², after one step, with $m = \gamma_1
    \nabla f$ and $u = \gamma_2 \mathrm{diag}\,\Sigma$. The state is an `AdamState`.

    Args:
        grad, diag_cov, sqrt_cov: as in `rmsprop_sde`.
        constants: `AdaptiveConstants.of(eta, sigma=..., b1=..., b2=..., eps=...)`.

    References:
        Malladi, Lyu, Panigrahi, Arora 2022, arXiv:2205.10287.
    """
    c, c1 = constants, constants.c1
    if c1 is None:
        raise UserError("c1: Adam needs it (got None). Give b1 to AdaptiveConstants.of.")

    def correction(rate, t):
        # 1 - exp(-x) would lose digits to cancellation in the first steps, where x is small.
        return -jnp.expm1(-rate * t)

    def drift(t, state):
        gamma1, gamma2 = correction(c1, t), correction(c.c2, t)
        root = jnp.sqrt(gamma2)

        def velocity(m, u):
            return -root / gamma1 * m / (c.sigma0 * jnp.sqrt(u) + c.eps0 * root)

        return AdamState(
            jax.tree.map(velocity, state.m, state.u),
            _relax(c1, state.m, grad(state.params)),
            _relax(c.c2, state.u, diag_cov(state.params)),
        )

    def embed(state, noise):
        still = optax.tree.zeros_like(state)
        return still._replace(m=optax.tree.scale(c.sigma0 * c1, noise))

    t0 = c.eta**2

    def init(params):
        u = jax.tree.map(jnp.full_like, params, diag_cov(params))
        m = optax.tree.scale(correction(c1, t0), grad(params))
        return AdamState(params, m, optax.tree.scale(correction(c.c2, t0), u))

    return SDE(drift, _diffusion(sqrt_cov, embed), t0, init, t0)


def local_sgd_sde(
    slow_drift: Callable[[Any], Any], sqrt_cov: SqrtCov, eta: float | int, factor: Any = 1.0
) -> SDE:
    r"""Return the equation of local SGD along a valley of minimisers, in the time $\tau = k\eta^2$.

    $$dX = F\,b(X)\,d\tau + s(X)\,dW$$

    K workers that average after H local steps have the diffusion of SGD on their joint batch, and a
    drift towards flat minima that is F times as strong: F = 1 for H = 1, and F goes to K for $H =
    (\alpha/\eta)^2$ as η goes to 0.

    Args:
        slow_drift: x -> b, the drift of SGD on the joint batch, a tree like x; in general
            $-\frac12 \nabla^3 L[\hat\Sigma]$ projected on the valley. Drift and projection are left
            to the caller.
        sqrt_cov: x -> s along the valley: a diagonal like x, a matrix, or an operator.
        eta: η; `time_per_step` is η².
        factor: F; see `local_drift_factor`.

    References:
        Gu, Lyu, Arora, Zhang, Huang 2023, arXiv:2310.14423; Gu, Lyu, Huang, Arora 2023,
        arXiv:2303.01215.
    """
    return SDE(
        lambda t, x: optax.tree.scale(factor, slow_drift(x)), lambda t, x: sqrt_cov(x), eta**2
    )


def local_drift_factor(workers: int, h: int, eta: float | int, curvature: float | int) -> float:
    r"""Return the drift of local SGD divided by that of SGD on the joint batch.

    The drift is proportional to the variance of one worker across the valley, at the points where
    it takes its gradients. A round starts at the mean of all workers, whose variance is that of the
    joint batch; then the spread of the workers grows as $1 - \rho^j$, where $\rho = (1 -
    \eta\lambda)^2$ for the curvature λ across the valley:

    $$F = 1 + (K - 1)\,\frac1H \sum_{j<H} (1 - \rho^j)$$

    With $H = \beta/\eta$ and small η the mean is $1 - (1 - e^{-x})/x$ at $x = 2\lambda\beta$.

    Args:
        workers: K.
        h: H, the number of local steps in a round.
        eta: η, with 0 < ηλ < 2.
        curvature: λ, of the loss across the valley.

    References:
        Gu, Lyu, Huang, Arora 2023, arXiv:2303.01215, in the limit of small η.

    >>> local_drift_factor(8, 1, 0.02, 4.0)
    1.0
    """
    rho = (1 - eta * curvature) ** 2
    return 1 + (workers - 1) * (1 - (1 - rho**h) / (h * (1 - rho)))


def _relax(rate: Any, tree: Any, target: Any) -> Any:
    """Return the velocity of a tree that relaxes to another."""
    return jax.tree.map(lambda leaf, goal: rate * (goal - leaf), tree, target)
