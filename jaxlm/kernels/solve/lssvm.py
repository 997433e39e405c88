"""Least-squares support vector machines (LS-SVM) whose kernel need not be symmetric."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxlm.core.checks import real
from jaxlm.core.errors import UserError
from jaxlm.kernels.solve import linear_systems as systems

GAMMAS = (0.01, 0.1, 1.0, 10.0)
"""The grid of Malladi et al."""

WORST_CONDITION = 1e12
"""Above this condition number, at most four of the sixteen digits of float64 are left."""


class SingularSystem(UserError):
    """The equations of an asymmetric SVM have no unique solution."""


class AsymmetricFit(NamedTuple):
    """Two functions that an asymmetric kernel fits together.

    Attributes:
      coefficients: β of the training examples as second argument of the kernel.
      flipped_coefficients: α of the training examples as first argument.
      bias: b of the first function; zeros if none was fitted.
      flipped_bias: b' of the second function, likewise.
      f0_scale: the divisor of f0; infinite if f0 was left out.
    """

    coefficients: Float[np.ndarray, "N C"]
    flipped_coefficients: Float[np.ndarray, "N C"]
    bias: Float[np.ndarray, " C"]
    flipped_bias: Float[np.ndarray, " C"]
    f0_scale: float

    def predict(
        self, kernel: Any, flipped: Any = None, *, weight: float = 1.0, f0: Any = None
    ) -> Float[np.ndarray, "M C"]:
        r"""Return $w\,(K(x, X)\,\beta + b) + (1 - w)\,(\alpha^\top K(X, x) + b') + f_0(x)/s$.

        Args:
          kernel: K(x, X), of new examples x with the training examples X: [M, C, N, C] or [M, N].
          flipped: K(X, x), of the training examples with the new ones, [N, C, M, C] or [N, M];
            not needed if `weight` is 1.
          weight: w, the weight of the first function.
          f0: the function at its first parameters, [M, C].

        Raises:
          UserError: if `weight` is below 1 and `flipped` is not given, or f0 is missing.
        """
        real("weight", weight, least=0, most=1)
        values = weight * (systems.evaluate(kernel, self.coefficients) + self.bias[None])
        if weight != 1.0:
            if flipped is None:
                raise UserError(
                    f"flipped: needed for a weight below 1 (got None for {weight:g}). Give K(X, x)."
                )
            turned = np.asarray(flipped)
            turned = turned.T if turned.ndim == 2 else turned.transpose(2, 3, 0, 1)
            second = systems.evaluate(turned, self.flipped_coefficients) + self.flipped_bias[None]
            values = values + (1 - weight) * second
        return values + systems.offset(f0, self.f0_scale, values.shape)


class Factored(NamedTuple):
    r"""A kernel of the training examples, decomposed as $K = P\,\mathrm{diag}(s)\,Q^\top$.

    Attributes:
      left: P.
      values: s, the largest first.
      right: Q^T.
      shape: shape of the kernel.
    """

    left: Float[np.ndarray, "NC NC"]
    values: Float[np.ndarray, " NC"]
    right: Float[np.ndarray, "NC NC"]
    shape: tuple[int, ...]


def factor(kernel: Any) -> Factored:
    """Return the singular value decomposition, from which every γ is solved.

    Args:
      kernel: kernel of the training examples, [N, C, N, C], or [N, N] if traced.

    Raises:
      UserError: if it is not square, not finite, zero, or of one example.
    """
    return Factored(*np.linalg.svd(systems.training_matrix(kernel)), np.shape(kernel))


def asymmetric_svm(
    kernel: Any, targets: Any, *, gamma: float, f0: Any = None, f0_scale: float = 1.0
) -> AsymmetricFit:
    r"""Fit the asymmetric least-squares SVM without bias.

    With $K(u, v) = \langle\phi(u), \psi(v)\rangle$ it is the stationary point of $w^\top v +
    \frac\gamma2 \sum_i (e_i^2 + h_i^2)$ where $e_i = y_i - w^\top\phi(x_i)$ and $h_i = y_i -
    v^\top\psi(x_i)$. That is $w = \sum_i \beta_i \psi(x_i)$, $v = \sum_i \alpha_i \phi(x_i)$ with

    $$\begin{pmatrix} I/\gamma & K \\ K^\top & I/\gamma \end{pmatrix}
    \begin{pmatrix} \alpha \\ \beta \end{pmatrix} = \begin{pmatrix} y \\ y \end{pmatrix}.$$

    For labels of -1 and 1 these are the usual equations, with α and β multiplied by the labels.
    Here targets are any numbers, so that f0 is subtracted as in ridge regression, and several
    outputs are solved together. A symmetric kernel gives $\alpha = \beta = (K + I/\gamma)^{-1} y$.

    Args:
      kernel: K of the training examples, [N, C, N, C] or [N, N] of traced outputs; or its
        `factor`, which decomposes K once if many γ are tried. For the kind
        "asymmetric_signgd" φ is the gradient and ψ its sign: the first function is what signed
        steps on the training examples do to other examples.
      targets: [N, C]; `jaxlm.kernels.solve.targets(labels, C)`, or any numbers.
      gamma: γ, above 0, in the units of 1/K.
      f0: the function at its first parameters, [N, C].
      f0_scale: s, what f0 is divided by; `inf` leaves it out.

    Raises:
      SingularSystem: if 1/γ is a singular value of K.
      UserError: if γ is not positive, or as in `jaxlm.kernels.ridge.ridge_path`.

    References:
      He, He, Shi, Huang, Suykens 2022, arXiv:2202.01397; Malladi et al. 2022, arXiv:2210.05643,
      whose code solves this for C = 1.
    """
    return _fit(kernel, targets, gamma, f0, f0_scale, bias=False)


def asymmetric_svm_with_bias(
    kernel: Any, targets: Any, *, gamma: float, f0: Any = None, f0_scale: float = 1.0
) -> AsymmetricFit:
    r"""Fit `asymmetric_svm` with a constant in each function, for each output.

    The errors are $e_i = y_i - w^\top\phi(x_i) - b$ and $h_i = y_i - v^\top\psi(x_i) - b'$; the
    equations gain b and b', and the conditions that α and β each sum to 0 over the examples.
    Arguments, result, errors and references are those of `asymmetric_svm`.
    """
    return _fit(kernel, targets, gamma, f0, f0_scale, bias=True)


def _fit(
    kernel: Any, targets: Any, gamma: float, f0: Any, f0_scale: float, *, bias: bool
) -> AsymmetricFit:
    """Solve the equations for one γ through the singular vectors of K."""
    real("gamma", gamma, above=0)
    K = kernel if isinstance(kernel, Factored) else factor(kernel)
    targets = systems.check_targets(targets, K.shape)
    count, outputs = targets.shape
    f0_scale = math.inf if f0 is None else f0_scale
    y = systems.columns(targets - systems.offset(f0, f0_scale, targets.shape), K.shape)
    ridge, s = 1 / gamma, K.values[:, None]
    size = np.abs([ridge + s, ridge - s])
    condition = size.max() / size.min() if size.min() else np.inf
    if condition > WORST_CONDITION:
        raise SingularSystem(
            f"gamma: 1/gamma is a singular value of the kernel (got {gamma:g}, condition "
            f"{condition:.1e}). Give another gamma."
        )

    def solve(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return (α, β), one above the other, for right-hand sides like y."""
        u, v = K.left.T @ first, K.right @ second
        product = (ridge - s) * (ridge + s)
        alpha = K.left @ ((ridge * u - s * v) / product)
        beta = K.right.T @ ((ridge * v - s * u) / product)
        return np.concatenate([alpha, beta])

    solution, biases = solve(y, y), np.zeros((2, outputs))
    if bias:
        # A column of ones for each output, or a single one if all outputs share the kernel.
        ones = np.ones((count, 1)) if len(K.shape) == 2 else np.tile(np.eye(outputs), (count, 1))
        nothing = np.zeros_like(ones)
        # Eliminate both constants: solve for their columns once, then for the constants themselves.
        moved = np.concatenate([solve(ones, nothing), solve(nothing, ones)], axis=1)
        both = np.block([[ones, nothing], [nothing, ones]])
        constants = np.linalg.solve(both.T @ moved, both.T @ solution)
        solution, biases = solution - moved @ constants, constants.reshape(2, outputs)
    alpha, beta = (systems.rows(half, outputs) for half in np.split(solution, 2))
    return AsymmetricFit(beta, alpha, biases[0], biases[1], f0_scale)
