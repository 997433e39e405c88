"""What the solvers share: kernels as matrices, labels as targets, and checks of both.

Systems are solved by NumPy in float64 on the host: they have as many rows as there are examples
times outputs, and kernels of language models have condition numbers that float32 cannot hold.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxlm.core.errors import UserError

ASYMMETRY = 1e-3
"""Largest |K - K^T| relative to the largest entry that counts as rounding."""


def matrix(kernel: Any, what: str = "the kernel") -> Float[np.ndarray, "MC NC"]:
    """A kernel as a matrix of examples times outputs, in float64.

    Args:
        kernel: [M, C, N, C], or [M, N] where outputs were traced.
        what: name of the kernel, for messages.

    Returns:
        [M * C, N * C], or [M, N].

    Raises:
        UserError: another shape, or an entry that is not finite.
    """
    kernel = np.asarray(kernel)
    full = kernel.ndim == 4 and kernel.shape[1] == kernel.shape[3]
    if not (full or kernel.ndim == 2):
        shape = list(kernel.shape)
        raise UserError(
            f"{what} has shape {shape}: give [M, C, N, C], or [M, N] of traced outputs."
        )
    wrong = np.argwhere(~np.isfinite(kernel.astype(np.float64)))
    if len(wrong):
        first, second = wrong[0][0], wrong[0][kernel.ndim // 2]
        raise UserError(
            f"{what} is not finite at examples {first} and {second}: look at their gradients, or "
            "compute it in float32."
        )
    rows = kernel.shape[0] * (kernel.shape[1] if full else 1)
    return kernel.astype(np.float64).reshape(rows, -1)


def training_matrix(kernel: Any) -> Float[np.ndarray, "NC NC"]:
    """`matrix` of a kernel between the training examples.

    Raises:
        UserError: see `matrix`; or it is not square, has one example, or is zero.
    """
    found = matrix(kernel, "the training kernel")
    count = len(kernel)
    if found.shape[0] != found.shape[1]:
        other = np.shape(kernel)[np.ndim(kernel) // 2]
        raise UserError(
            f"the training kernel is between {count} and {other} examples: give that of the "
            "training examples with themselves."
        )
    if count < 2:
        raise UserError("the training kernel has one example: give at least two.")
    if not found.any():
        raise UserError("the training kernel is zero: no selected parameter moves the function.")
    return found


def symmetric_matrix(kernel: Any) -> Float[np.ndarray, "NC NC"]:
    """`training_matrix` of a symmetric kernel, without what rounding left of asymmetry.

    Raises:
        UserError: see `training_matrix`; or it is not symmetric.
    """
    found = training_matrix(kernel)
    gap = np.abs(found - found.T).max()
    if gap > ASYMMETRY * np.abs(found).max():
        raise UserError(
            f"the training kernel is not symmetric (entries differ by {gap:.3g}): solve it by "
            "asymmetric_svm."
        )
    return (found + found.T) / 2


def columns(values: Any, shape: tuple[int, ...]) -> Float[np.ndarray, "... NC Q"]:
    """Values [..., N, C] as right-hand sides beside `matrix` of a kernel.

    Args:
        values: of the training examples.
        shape: of the kernel.

    Returns:
        [..., N * C, 1]; or [..., N, C] beside [N, N], a column for each output.
    """
    values = np.asarray(values, np.float64)
    return values if len(shape) == 2 else values.reshape(*values.shape[:-2], -1, 1)


def rows(solution: Float[np.ndarray, "... NC Q"], num_outputs: int) -> Float[np.ndarray, "... N C"]:
    """Inverse of `columns`."""
    return solution.reshape(*solution.shape[:-2], -1, num_outputs)


def evaluate(
    kernel: Any, coefficients: Float[np.ndarray, "... N C"]
) -> Float[np.ndarray, "... M C"]:
    r"""Values $\sum_{nd} K_{mc,nd}\, \alpha_{nd}$.

    Args:
        kernel: [M, C, N, C], or [M, N] where outputs were traced.
        coefficients: of the training examples.

    Raises:
        UserError: see `matrix`; or the kernel has other training examples or outputs.
    """
    found, right = matrix(kernel), columns(coefficients, np.shape(kernel))
    if found.shape[1] != right.shape[-2]:
        raise UserError(
            f"the kernel has shape {list(np.shape(kernel))}, the coefficients "
            f"{list(coefficients.shape[-2:])}: give that of all examples with the training "
            "examples."
        )
    return rows(found @ right, coefficients.shape[-1])


def num_outputs(kernel: Any, num_classes: int) -> int:
    """C of a kernel; where outputs were traced, 1 for two classes and otherwise their number."""
    if np.ndim(kernel) == 4:
        return int(np.shape(kernel)[1])
    return 1 if num_classes == 2 else num_classes


def targets(labels: Any, outputs: int) -> Float[np.ndarray, "N C"]:
    """Labels as what regression fits: -1 and 1 for one output, else one of C is 1.

    Args:
        labels: classes, from 0.
        outputs: C. One output is for two classes and grows with the second.

    Raises:
        UserError: a label that is no class, or labels of one class alone.

    >>> targets([0, 1], 1).tolist(), targets([0, 2], 3).tolist()
    ([[-1.0], [1.0]], [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    """
    classes = max(outputs, 2)
    found = checked_labels(labels, classes)
    if len(np.unique(found)) < 2:
        raise UserError(f"every label is {found[0]}: give examples of at least two classes.")
    one_hot = np.eye(classes)[found]
    return one_hot[:, 1:] * 2 - 1 if outputs == 1 else one_hot


def checked_labels(
    labels: Any, num_classes: int, what: str = "label", count: int | None = None
) -> Int[np.ndarray, " N"]:
    """Labels as an array.

    Args:
        labels: classes, from 0.
        num_classes: how many there are.
        what: name of a label, for messages.
        count: examples; None for any number.

    Raises:
        UserError: a label that is no class, or another number of labels.
    """
    found = np.asarray(labels)
    if not np.issubdtype(found.dtype, np.integer) or found.ndim != 1:
        raise UserError(f"{what}s are no list of whole numbers: give the class of each example.")
    wrong = np.flatnonzero((found < 0) | (found >= num_classes))
    if len(wrong):
        raise UserError(
            f"the {what} of example {wrong[0]} is {found[wrong[0]]}: give a class from 0 to "
            f"{num_classes - 1}."
        )
    if count is not None and len(found) != count:
        raise UserError(f"there are {len(found)} {what}s for {count} examples: give as many.")
    return found


def checked_targets(values: Any, kernel_shape: tuple[int, ...]) -> Float[np.ndarray, "N C"]:
    """Targets in float64.

    Raises:
        UserError: their shape does not fit the kernel, or one is not finite.
    """
    found, shape = np.asarray(values, np.float64), list(kernel_shape)
    outputs = shape[1] if len(shape) == 4 else found.shape[-1]
    if found.shape != (shape[0], outputs):
        raise UserError(
            f"targets have shape {list(found.shape)} beside a kernel of shape {shape}: give [N, C]."
        )
    wrong = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if len(wrong):
        raise UserError(f"the target of example {wrong[0]} is not finite: correct it.")
    return found


def classes(scores: Any) -> Int[np.ndarray, "... N"]:
    """The class of the highest score; of one output, 1 where it is positive.

    >>> classes([[-0.3], [2.0]]).tolist(), classes([[0.1, 0.7, 0.2]]).tolist()
    ([0, 1], [1])
    """
    scores = np.asarray(scores)
    if scores.shape[-1] == 1:
        return (scores[..., 0] > 0).astype(int)
    return scores.argmax(axis=-1)


def offset(f0: Any, scale: float, shape: tuple[int, ...]) -> Float[np.ndarray, "N C"]:
    """`f0 / scale`, zeros where the scale is infinite.

    Raises:
        UserError: f0 is missing, has another shape or is not finite, or the scale is not positive.
    """
    if not scale > 0:
        raise UserError(f"the scale of f0 is {scale:g}: give a positive number, or inf.")
    if f0 is None:
        if scale < np.inf:
            raise UserError(
                f"f0: missing, though the fit has it over {scale:g} (got None). Give the function "
                "at its first parameters, of these examples."
            )
        return np.zeros(shape)
    found = np.asarray(f0, np.float64)
    if found.shape != shape:
        raise UserError(f"f0 has shape {list(found.shape)}, not {list(shape)}: give f of each row.")
    wrong = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if len(wrong):
        raise UserError(f"f0 of example {wrong[0]} is not finite: compute it in float32.")
    return found / scale
