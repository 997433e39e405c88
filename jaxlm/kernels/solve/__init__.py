"""Solve a task with a kernel: fit every point of a grid, and keep the best on validation.

    fit = solve.fit(train, validation, solve.Ridge())
    fit.accuracy(test)

`Examples` holds the inputs of a solver: the kernel of some examples with the training examples,
their labels, and the function at its first parameters. The solvers behind the grids are in `ridge`,
`logistic` and `lssvm`; `targets` converts labels to numbers, and `classes` scores to labels.
"""

from jaxlm.kernels.solve import logistic, lssvm, ridge
from jaxlm.kernels.solve.linear_systems import classes, targets
from jaxlm.kernels.solve.model_selection import (
    SOLVERS,
    AsymmetricSvm,
    Examples,
    Fit,
    Logistic,
    Ridge,
    fit,
    spectrum,
)

__all__ = [
    "SOLVERS",
    "AsymmetricSvm",
    "Examples",
    "Fit",
    "Logistic",
    "Ridge",
    "classes",
    "fit",
    "logistic",
    "lssvm",
    "ridge",
    "spectrum",
    "targets",
]
