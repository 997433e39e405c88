"""Kernel ridge regression: every ridge and every scale of f0 from one eigendecomposition."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxlm.core.checks import real
from jaxlm.core.errors import UserError
from jaxlm.kernels.solve import linear_systems as systems

RIDGES = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
"""The paper's grid, relative to the largest eigenvalue."""

F0_SCALES = (10.0, 100.0, 1000.0, 10000.0, math.inf)
"""The paper's grid of divisors of f0."""


class RidgePath(NamedTuple):
    """Solutions for R ridges and S scales of f0.

    Attributes:
      coefficients: α, one for each training example and output.
      leave_one_out: value of each training example by the fit to all others.
      ridges: the ridges that were used, see `ridge_path`.
      f0_scales: the divisors of f0.
      eigenvalues: eigenvalues of the kernel, the largest first.
      rank: how many of them are larger than the rounding errors of the kernel.
      duplicates: pairs of examples that the kernel does not tell apart.
    """

    coefficients: Float[np.ndarray, "R S N C"]
    leave_one_out: Float[np.ndarray, "R S N C"]
    ridges: tuple[float, ...]
    f0_scales: tuple[float, ...]
    eigenvalues: Float[np.ndarray, " NC"]
    rank: int
    duplicates: tuple[tuple[int, int], ...]

    @property
    def singular(self) -> bool:
        """Whether the kernel has eigenvalues that are zero up to rounding."""
        return self.rank < len(self.eigenvalues)

    def predict(self, kernel: Any, f0: Any = None) -> Float[np.ndarray, "R S M C"]:
        """Return the values of other examples, for every ridge and scale.

        Args:
          kernel: kernel of these examples with the training examples, [M, C, N, C] or [M, N].
          f0: the function at its first parameters, [M, C]; needed if it was given for training.

        Raises:
          UserError: if f0 is missing, or a shape is wrong.
        """
        values = systems.evaluate(kernel, self.coefficients)
        offsets = [systems.offset(f0, scale, values.shape[2:]) for scale in self.f0_scales]
        return values + np.stack(offsets)[None]


def ridge_path(
    kernel: Any,
    targets: Any,
    *,
    ridges: Sequence[float] = RIDGES,
    f0: Any = None,
    f0_scales: Sequence[float] | None = None,
) -> RidgePath:
    r"""Fit $f(x) = f_0(x)/s + K(x, X)\,\alpha$ for every ridge and every scale of f0.

    $$\alpha = (K + \lambda \|K\| I)^{-1} (Y - f_0/s)$$

    With $K = U \Lambda U^\top$ all ridges and scales cost one decomposition. Leaving one example
    out, with its C outputs, moves its value to $y_i - [G_{ii}]^{-1} \alpha_i$, where $G = (K +
    \lambda\|K\|I)^{-1}$ and $G_{ii}$ is the block of the example.

    A kernel is singular, for example, if an example occurs twice. Then smaller ridges are raised to
    the square root of the machine epsilon of the kernel's dtype, where the ridge and the rounding
    of the kernel change values equally. The result is then `singular`, lists `duplicates`, and
    has the ridges that were used in `ridges`.

    Args:
      kernel: kernel of the training examples, symmetric; [N, C, N, C], or [N, N] if outputs were
        traced: then all C outputs share it.
      targets: `jaxlm.kernels.solve.targets(labels, C)`, or any numbers.
      ridges: λ, relative to the largest eigenvalue $\|K\|$.
      f0: the function at its first parameters.
      f0_scales: s; by default `F0_SCALES`. `inf` leaves f0 out; without f0 only `inf` is used.

    Raises:
      UserError: if the kernel is not symmetric, not positive, not finite, or of one example; or the
        targets do not fit it.

    References:
      Malladi et al. 2022, arXiv:2210.05643: grids and f0. Their code solves by least squares for
      one ridge and one scale.

    >>> path = ridge_path(np.eye(3), [[-1.0], [1.0], [1.0]], ridges=[1.0])
    >>> path.coefficients[0, 0, :, 0].tolist()
    [-0.5, 0.5, 0.5]
    """
    K = systems.symmetric_matrix(kernel)
    y = systems.check_targets(targets, np.shape(kernel))
    for ridge in ridges:
        real("ridges", ridge, least=0)
    if not ridges:
        raise UserError("ridges: is empty (got nothing). Give at least one.")
    values, U = np.linalg.eigh(K)
    top, epsilon = values[-1], resolution(kernel)
    if values[0] < -max(epsilon, systems.ASYMMETRY) * abs(top):
        raise UserError(
            f"kernel: has a negative eigenvalue (got {values[0]:.3g}, the largest {top:.3g}). Give "
            "one of kind sgd or signgd, which has none."
        )
    rank = int(np.sum(values > epsilon * top))
    values = np.maximum(values, 0.0)
    least = 0.0 if rank == len(values) else _epsilon(kernel) ** 0.5
    used = tuple(max(float(ridge), least) for ridge in ridges)
    scales = (math.inf,) if f0 is None else tuple(f0_scales or F0_SCALES)
    offsets = np.stack([systems.offset(f0, scale, y.shape) for scale in scales])
    left = np.swapaxes(U, 0, 1) @ systems.columns(y - offsets, np.shape(kernel))  # [S, P, Q]
    block = y.shape[1] if np.ndim(kernel) == 4 else 1
    coefficients, leave_one_out = [], []
    for ridge in used:
        inverse = 1 / (values + ridge * top)
        alpha = systems.rows(U @ (inverse[:, None] * left), y.shape[1])
        coefficients.append(alpha)
        leave_one_out.append(y - _residuals(U, inverse, alpha, block))
    return RidgePath(
        coefficients=np.stack(coefficients),
        leave_one_out=np.stack(leave_one_out),
        ridges=used,
        f0_scales=scales,
        eigenvalues=values[::-1],
        rank=rank,
        duplicates=duplicates(kernel),
    )


def resolution(kernel: Any) -> float:
    """Return the size, relative to the largest eigenvalue, below which one is rounding error."""
    size = np.shape(kernel)
    return size[0] * (size[1] if len(size) == 4 else 1) * _epsilon(kernel)


def duplicates(kernel: Any) -> tuple[tuple[int, int], ...]:
    r"""Return the pairs of examples with distance $K_{ii} + K_{jj} - 2 K_{ij} = 0$ in all outputs.

    >>> duplicates(np.array([[1.0, 0.0, 1.0], [0.0, 2.0, 0.0], [1.0, 0.0, 1.0]]))
    ((0, 2),)
    """
    K = np.asarray(kernel, np.float64)
    traced = K if K.ndim == 2 else np.einsum("icjc->ij", K)
    size = np.diag(traced)
    pairs = size[:, None] + size[None]
    same = np.triu(pairs - traced - traced.T <= resolution(kernel) * pairs, 1)
    return tuple((int(i), int(j)) for i, j in np.argwhere(same))


def _epsilon(kernel: Any) -> float:
    dtype = np.asarray(kernel).dtype
    return float(np.finfo(dtype if dtype == np.float64 else np.float32).eps)


def _residuals(
    U: np.ndarray, inverse: np.ndarray, alpha: np.ndarray, block: int
) -> Float[np.ndarray, "S N C"]:
    """Return the error at each held-out example: the inverse of its block of G times its α."""
    parts = U.reshape(-1, block, U.shape[1])
    G = np.einsum("ncp,ndp->ncd", parts * inverse, parts)
    if block == 1:
        return alpha / G[:, 0]
    return np.linalg.solve(G[None], alpha[..., None])[..., 0]
