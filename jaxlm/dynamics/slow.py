r"""Local SGD along a valley of minimisers, in the slow time $\tau = k\eta^2$."""

from collections.abc import Callable
from typing import Any

import jax

from jaxlm.dynamics.sde import SDE


def local_sgd_sde(
    slow_drift: Callable[[Any], Any],
    sqrt_cov: Callable[[Any], Any],
    eta: float | int,
    factor: Any = 1.0,
) -> SDE:
    r"""The slow equation of SGD, its drift multiplied: $dX = F\,b(X)\,d\tau + s(X)\,dW$.

    Along the minimisers, K workers that average after H local steps have the diffusion of SGD on
    their joint batch, and a drift towards flat minima that is F times as strong: F = 1 for H = 1,
    and F goes to K for $H = (\alpha/\eta)^2$ as η goes to 0.

    Args:
      slow_drift: x -> b, that of SGD on the batch of all workers, a tree like x; in general
        $-\frac12 \nabla^3 L[\hat\Sigma]$ projected on the valley.
      sqrt_cov: x -> s, along the valley: diagonal like x, matrix or operator.
      eta: η; `time_per_step` is η².
      factor: F; see `local_drift_factor`.

    References:
      Gu, Lyu, Arora, Zhang, Huang 2023, arXiv:2310.14423; Gu, Lyu, Huang, Arora 2023,
      arXiv:2303.01215. The drift and the projection are left to the caller.
    """

    def drift(t, x):
        del t
        return jax.tree.map(lambda b: factor * b, slow_drift(x))

    def diffusion(t, x):
        del t
        return sqrt_cov(x)

    return SDE(drift, diffusion, eta**2)


def local_drift_factor(workers: int, h: int, eta: float | int, curvature: float | int) -> float:
    r"""How much stronger the drift of local SGD is than that of SGD on the joint batch.

    The drift is proportional to the variance of one worker across the valley, at the points where
    it takes its gradients. Across, with curvature λ, a round begins at the mean of all workers,
    whose variance is that of the joint batch, and their spread grows as $1 - \rho^j$, where $\rho =
    (1 - \eta\lambda)^2$:

    $$F = 1 + (K - 1)\,\frac1H \sum_{j<H} (1 - \rho^j)$$

    With $H = \beta/\eta$ and small η the mean is $1 - (1 - e^{-x})/x$ at $x = 2\lambda\beta$.

    Args:
      workers: K.
      h: H, local steps in a round.
      eta: η, with 0 < ηλ < 2.
      curvature: λ, of the loss across the valley.

    References:
      Gu, Lyu, Huang, Arora 2023, arXiv:2303.01215, in the limit of small η.

    >>> local_drift_factor(8, 1, 0.02, 4.0)
    1.0
    """
    rho = (1 - eta * curvature) ** 2
    return 1 + (workers - 1) * (1 - (1 - rho**h) / (h * (1 - rho)))
