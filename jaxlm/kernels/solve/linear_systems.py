"""What the solvers share: kernels as matrices, labels as targets, and checks of both.

Systems are solved by NumPy in float64 on the host: they have one row per example and output, and
kernels of language models have condition numbers too large for float32.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.special import log_softmax

from jaxlm.core.errors import UserError

ASYMMETRY = 1e-3
"""Largest |K - K^T|, relative to the largest entry, that counts as rounding."""


def matrix(kernel: Any, name: str = "kernel") -> Float[np.ndarray, "MC NC"]:
    """Return a kernel [M, C, N, C], or [M, N] of traced outputs, as a matrix in float64."""
    kernel = np.asarray(kernel)
    full = kernel.ndim == 4 and kernel.shape[1] == kernel.shape[3]
    if not (full or kernel.ndim == 2):
        raise UserError(
            f"{name}: must be [M, C, N, C], or [M, N] of traced outputs (got "
            f"{list(kernel.shape)}). Give what ntk returns."
        )
    wide = kernel.astype(np.float64)
    wrong = np.argwhere(~np.isfinite(wide))
    if len(wrong):
        at = wrong[0]
        raise UserError(
            f"{name}: not finite (got {wide[tuple(at)]} at examples {at[0]} and "
            f"{at[kernel.ndim // 2]}). Look at their gradients, or compute it in float32."
        )
    return wide.reshape(kernel.shape[0] * (kernel.shape[1] if full else 1), -1)


def training_matrix(kernel: Any) -> Float[np.ndarray, "NC NC"]:
    """Return `matrix` of a kernel between the training examples."""
    result = matrix(kernel)
    count, other = len(kernel), np.shape(kernel)[np.ndim(kernel) // 2]
    if count != other:
        raise UserError(
            f"kernel: must be of the training examples with themselves (got {count} and {other} "
            "examples). Give that one."
        )
    if count < 2:
        raise UserError("kernel: has too few training examples (got 1). Give at least two.")
    if not result.any():
        raise UserError(
            "kernel: no selected parameter moves the function (got zeros). Select others."
        )
    return result


def symmetric_matrix(kernel: Any) -> Float[np.ndarray, "NC NC"]:
    """Return `training_matrix` of a symmetric kernel, with rounding errors averaged."""
    result = training_matrix(kernel)
    gap = np.abs(result - result.T).max()
    if gap > ASYMMETRY * np.abs(result).max():
        raise UserError(
            f"kernel: must be symmetric (got entries that differ by {gap:.3g}). Solve it by "
            "asymmetric_svm."
        )
    return (result + result.T) / 2


def columns(values: Any, shape: tuple[int, ...]) -> Float[np.ndarray, "... NC Q"]:
    """Return values [..., N, C] at the training examples as right-hand sides for `matrix`.

    [..., N * C, 1]; for a kernel [N, N], [..., N, C], with one column per output.
    """
    values = np.asarray(values, np.float64)
    return values if len(shape) == 2 else values.reshape(*values.shape[:-2], -1, 1)


def rows(solution: Float[np.ndarray, "... NC Q"], num_outputs: int) -> Float[np.ndarray, "... N C"]:
    """Invert `columns`."""
    return solution.reshape(*solution.shape[:-2], -1, num_outputs)


def evaluate(
    kernel: Any, coefficients: Float[np.ndarray, "... N C"]
) -> Float[np.ndarray, "... M C"]:
    r"""Return $\sum_{nd} K_{mc,nd}\, \alpha_{nd}$ of the coefficients of the training examples."""
    left, right = matrix(kernel), columns(coefficients, np.shape(kernel))
    if left.shape[1] != right.shape[-2]:
        raise UserError(
            f"kernel: must be of all examples with the {coefficients.shape[-2]} training examples "
            f"(got {list(np.shape(kernel))}). Give that one."
        )
    return rows(left @ right, coefficients.shape[-1])


def num_outputs(kernel: Any, num_classes: int) -> int:
    """Return C; with traced outputs, 1 for two classes and else the number of classes."""
    if np.ndim(kernel) == 4:
        return int(np.shape(kernel)[1])
    return 1 if num_classes == 2 else num_classes


def targets(labels: Any, outputs: int) -> Float[np.ndarray, "N C"]:
    """Return labels as regression targets: -1 and 1 for one output, else one-hot.

    Args:
      labels: classes, from 0.
      outputs: C. A single output is for two classes, and is high for class 1.

    Raises:
      UserError: if a label is not a class, or all labels are the same.

    >>> targets([0, 1], 1).tolist(), targets([0, 2], 3).tolist()
    ([[-1.0], [1.0]], [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    """
    array = check_labels(labels, max(outputs, 2))
    if len(np.unique(array)) < 2:
        raise UserError(
            f"labels: must have two classes (got {array[0]} alone). Give examples of another."
        )
    return regression_targets(array, outputs)


def regression_targets(labels: np.ndarray, outputs: int) -> Float[np.ndarray, "N C"]:
    """Return `targets` of checked labels, which may all be of one class."""
    one_hot = np.eye(max(outputs, 2))[labels]
    return one_hot[:, 1:] * 2 - 1 if outputs == 1 else one_hot


def check_labels(
    labels: Any, num_classes: int, name: str = "labels", count: int | None = None
) -> Int[np.ndarray, " N"]:
    """Return labels, classes from 0, as an array; `count=None` accepts any number of them."""
    array = np.asarray(labels)
    if not np.issubdtype(array.dtype, np.integer) or array.ndim != 1:
        raise UserError(
            f"{name}: must be whole numbers [N] (got {array.dtype} {list(array.shape)}). Give the "
            "class of each example."
        )
    wrong = np.flatnonzero((array < 0) | (array >= num_classes))
    if len(wrong):
        raise UserError(
            f"{name}: must be classes from 0 to {num_classes - 1} (got {array[wrong[0]]} for "
            f"example {wrong[0]}). Correct it."
        )
    if count is not None and len(array) != count:
        raise UserError(
            f"{name}: must be one for each of {count} examples (got {len(array)}). Correct them."
        )
    return array


def check_targets(values: Any, kernel_shape: tuple[int, ...]) -> Float[np.ndarray, "N C"]:
    """Return targets in float64, if their shape fits the kernel."""
    array = np.asarray(values, np.float64)
    outputs = kernel_shape[1] if len(kernel_shape) == 4 else array.shape[-1]
    return _check_values(array, (kernel_shape[0], outputs), "targets")


def _check_values(array, shape, name):
    if array.shape != shape:
        raise UserError(
            f"{name}: must be {list(shape)} (got {list(array.shape)}). Give [N, C] of these "
            "examples."
        )
    wrong = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(wrong):
        raise UserError(
            f"{name}: not finite (got {array[wrong[0]].tolist()} for example {wrong[0]}). Correct "
            "it, or compute it in float32."
        )
    return array


def classes(scores: Any) -> Int[np.ndarray, "... N"]:
    """Return the class of the highest score; for one output, 1 where it is positive.

    >>> classes([[-0.3], [2.0]]).tolist(), classes([[0.1, 0.7, 0.2]]).tolist()
    ([0, 1], [1])
    """
    scores = np.asarray(scores)
    if scores.shape[-1] == 1:
        return (scores[..., 0] > 0).astype(int)
    return scores.argmax(axis=-1)


def log_probs(scores: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N K"]:
    """Return the log-softmax; a single output is the logit of class 1, and class 0 has logit 0."""
    if scores.shape[1] == 1:
        scores = np.concatenate([np.zeros_like(scores), scores], axis=1)
    return log_softmax(scores, axis=1)


def offset(f0: Any, scale: float, shape: tuple[int, ...]) -> Float[np.ndarray, "N C"]:
    """Return `f0 / scale`, zeros where the scale is infinite."""
    if not scale > 0:
        raise UserError(f"f0_scale: must be positive or inf (got {scale:g}). Correct it.")
    if f0 is None:
        if scale < np.inf:
            raise UserError(
                f"f0: missing, though the fit used it divided by {scale:g} (got None). Give the "
                "function at its first parameters, at these examples."
            )
        return np.zeros(shape)
    return _check_values(np.asarray(f0, np.float64), shape, "f0") / scale
