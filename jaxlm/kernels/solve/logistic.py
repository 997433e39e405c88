"""Kernel logistic and softmax regression by Newton's method."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxlm.core.checks import real
from jaxlm.core.errors import UserError
from jaxlm.kernels.solve import linear_systems as systems

TOLERANCE = 1e-10
ITERATIONS = 100
HALVINGS = 40


class LogisticFit(NamedTuple):
    """A fit of kernel logistic or softmax regression.

    Attributes:
      coefficients: α, one for each training example and output.
      f0_scale: the divisor of f0; infinite if f0 was left out.
      loss: the minimised sum, penalty included.
      residual: largest absolute residual of the equation that the solution satisfies.
      iterations: Newton steps.
    """

    coefficients: Float[np.ndarray, "N C"]
    f0_scale: float
    loss: float
    residual: float
    iterations: int

    def predict(self, kernel: Any, f0: Any = None) -> Float[np.ndarray, "M C"]:
        """Return logits of other examples; see `jaxlm.kernels.ridge.RidgePath.predict`."""
        values = systems.evaluate(kernel, self.coefficients)
        return values + systems.offset(f0, self.f0_scale, values.shape)


def kernel_logistic(
    kernel: Any,
    labels: Any,
    *,
    penalty: float,
    f0: Any = None,
    f0_scale: float = 1.0,
) -> LogisticFit:
    r"""Minimise $\sum_i \log(1 + e^{-y_i F_i}) + \frac{\lambda \|K\|}{2} \alpha^\top K \alpha$.

    $F = f_0/s + K \alpha$, and $y_i$ is -1 or 1. At the solution $\lambda \|K\| \alpha_i = [y_i =
    1] - \sigma(F_i)$. This equation for α has a unique solution even if the kernel is singular.

    Args:
      kernel: kernel of the training examples, symmetric: [N, 1, N, 1], or [N, N] if traced.
      labels: 0 or 1.
      penalty: λ, above 0, relative to the largest eigenvalue $\|K\|$.
      f0: the function at its first parameters, for example a difference of two logits.
      f0_scale: s; `inf` leaves f0 out.

    Raises:
      UserError: if the penalty is not positive, the kernel has several outputs, or as in
        `jaxlm.kernels.ridge.ridge_path`.

    >>> fit = kernel_logistic(np.eye(4), [0, 0, 1, 1], penalty=0.1)
    >>> fit.coefficients[:, 0].round(3).tolist()
    [-1.634, -1.634, 1.634, 1.634]
    """
    if np.ndim(kernel) == 4 and np.shape(kernel)[1] != 1:
        raise UserError(
            f"kernel: must have one output (got {np.shape(kernel)[1]}). Call kernel_softmax."
        )
    return _newton(kernel, labels, 1, penalty, f0, f0_scale)


def kernel_softmax(
    kernel: Any,
    labels: Any,
    *,
    penalty: float,
    num_classes: int | None = None,
    f0: Any = None,
    f0_scale: float = 1.0,
) -> LogisticFit:
    r"""Minimise the cross-entropy of the labels with a penalty.

    $$\sum_i -\log \mathrm{softmax}(F_i)_{y_i} + \frac{\lambda\|K\|}{2} \alpha^\top K \alpha$$

    $F = f_0/s + K \alpha$ with C values per example. At the solution $\lambda \|K\| \alpha = Y -
    \mathrm{softmax}(F)$, Y one-hot; Newton's method solves systems of N times C rows.

    Args:
      kernel: kernel of the training examples, symmetric; [N, C, N, C], or [N, N] if traced, which
        all classes share.
      labels: classes from 0.
      penalty: λ, above 0, relative to the largest eigenvalue $\|K\|$.
      num_classes: C if outputs were traced; by default one more than the largest label.
      f0: the function at its first parameters, the logits.
      f0_scale: s; `inf` leaves f0 out.

    Raises:
      UserError: see `kernel_logistic`.
    """
    if np.ndim(kernel) == 4:
        num_classes = int(np.shape(kernel)[1])
        if num_classes == 1:
            raise UserError("kernel: must have several outputs (got 1). Call kernel_logistic.")
    elif num_classes is None:
        num_classes = int(systems.check_labels(labels, 2**31).max(initial=1)) + 1
    return _newton(kernel, labels, num_classes, penalty, f0, f0_scale)


def _newton(
    kernel: Any, labels: Any, outputs: int, penalty: float, f0: Any, f0_scale: float
) -> LogisticFit:
    real("penalty", penalty, above=0)  # At 0 the logits of separable data are unbounded.
    K = systems.symmetric_matrix(kernel)
    count = len(np.asarray(kernel))
    if np.ndim(kernel) == 2:
        K = np.kron(K, np.eye(outputs))
    shape = (count, outputs)
    array = systems.check_labels(labels, max(outputs, 2), count=count)
    systems.targets(array, outputs)  # Checks that there are two classes.
    one_hot = np.eye(max(outputs, 2))[array]
    f0_scale = math.inf if f0 is None else f0_scale
    first = systems.offset(f0, f0_scale, shape)
    strength = penalty * float(np.linalg.eigvalsh(K)[-1])

    def objective(alpha: np.ndarray) -> tuple[float, np.ndarray]:
        moved = K @ alpha
        log_probs = systems.log_probs(first + moved.reshape(shape))
        loss = -float((one_hot * log_probs).sum()) + strength / 2 * float(alpha @ moved)
        return loss, log_probs

    def curvature(probs: np.ndarray) -> np.ndarray:
        """Return the second derivative diag(p) - p pᵀ of each example's loss, times K."""
        blocks = K.reshape(*shape, -1)
        mean = np.einsum("nc,ncp->np", probs, blocks)
        return (probs[..., None] * (blocks - mean[:, None])).reshape(K.shape)

    alpha = np.zeros(count * outputs)
    loss, log_probs = objective(alpha)
    for iteration in range(ITERATIONS + 1):
        probs = np.exp(log_probs)[:, -outputs:]  # With one output, the probability of class 1.
        equation = strength * alpha - (one_hot[:, -outputs:] - probs).ravel()
        size = float(np.abs(equation).max())
        if size <= TOLERANCE:
            return LogisticFit(alpha.reshape(shape), f0_scale, loss, size, iteration)
        step = np.linalg.solve(curvature(probs) + strength * np.eye(len(K)), -equation)
        slope = float(equation @ (K @ step))
        for halving in range(HALVINGS):
            scale = 0.5**halving
            trial = objective(alpha + scale * step)
            # The last term: the last steps change the loss by less than its rounding error.
            if trial[0] <= loss + 1e-4 * scale * slope + 1e-13 * abs(loss):
                break
        alpha, (loss, log_probs) = alpha + scale * step, trial
    raise UserError(
        f"penalty: Newton's method does not converge in {ITERATIONS} steps (got a residual of "
        f"{size:.3g} with {penalty:g}). Raise it."
    )
