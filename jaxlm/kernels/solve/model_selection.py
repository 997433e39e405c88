"""A grid of fits, and the choice of one by validation."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxlm.core.errors import UserError
from jaxlm.kernels.solve import linear_systems as systems
from jaxlm.kernels.solve import logistic, lssvm, ridge


class Examples(NamedTuple):
    """Examples as a solver sees them.

    Attributes:
      kernel: kernel of these examples with the training examples, [M, C, N, C], or [M, N] if
        outputs were traced.
      labels: classes, from 0.
      f0: the function at its first parameters; None fits without it.
      flipped: kernel of the training examples with these, [N, C, M, C] or [N, M]; needed by
        `AsymmetricSvm` with a weight below 1.
    """

    kernel: Any
    labels: Int[Any, " M"]
    f0: Float[Any, "M C"] | None = None
    flipped: Any = None


class GridPoint(NamedTuple):
    """One fit of a grid.

    `leave_one_out` has the scores of each training example by the fit to the others; None if the
    solver has no closed form for them.
    """

    settings: dict[str, float]
    scores: Callable[[Examples], np.ndarray]
    leave_one_out: Float[np.ndarray, "N C"] | None = None


class Fit(NamedTuple):
    """The chosen fit of a grid.

    Attributes:
      settings: settings of the solver.
      chosen_by: "validation", or "leave-one-out" on the training examples.
      accuracy_chosen: the accuracy by which it was chosen.
      scores: returns the scores [M, C] of examples.
      tried: settings, accuracy and loss of every fit, in the order of the grid.
    """

    settings: dict[str, float]
    chosen_by: str
    accuracy_chosen: float
    scores: Callable[[Examples], np.ndarray]
    tried: tuple[tuple[dict[str, float], float, float], ...]

    def accuracy(self, examples: Examples) -> float:
        """Return the share of examples whose class is right."""
        return _accuracy(self.scores(examples), examples.labels)


class _Regression:
    """A solver of regression targets."""

    def loss(self, scores: Float[np.ndarray, "M C"], labels: Int[Any, " M"]) -> float:
        """Return the mean squared distance to the targets."""
        wanted = systems.regression_targets(np.asarray(labels), scores.shape[1])
        return float(np.mean(np.sum((scores - wanted) ** 2, axis=1)))


@dataclass(frozen=True, kw_only=True)
class Ridge(_Regression):
    """Kernel ridge regression of labels; see `jaxlm.kernels.ridge.ridge_path`.

    Attributes:
      ridges: relative to the largest eigenvalue.
      f0_scales: what f0 is divided by; not used without f0.
    """

    ridges: tuple[float, ...] = ridge.RIDGES
    f0_scales: tuple[float, ...] = ridge.F0_SCALES

    def grid(self, train: Examples, num_classes: int) -> Iterator[GridPoint]:
        """Yield every fit, all from one decomposition."""
        path = ridge.ridge_path(
            train.kernel,
            systems.targets(train.labels, systems.num_outputs(train.kernel, num_classes)),
            ridges=self.ridges,
            f0=train.f0,
            f0_scales=self.f0_scales,
        )
        for r, value in enumerate(path.ridges):
            for s, scale in enumerate(path.f0_scales):
                one = path._replace(
                    coefficients=path.coefficients[r : r + 1, s : s + 1], f0_scales=(scale,)
                )
                yield GridPoint(
                    {"ridge": value, "f0_scale": scale},
                    lambda examples, one=one: one.predict(examples.kernel, examples.f0)[0, 0],  # type: ignore[misc]
                    path.leave_one_out[r, s],
                )


@dataclass(frozen=True, kw_only=True)
class Logistic:
    """Kernel logistic or, for several outputs, softmax regression; see `jaxlm.kernels.logistic`.

    Attributes:
      penalties: relative to the largest eigenvalue.
      f0_scales: what f0 is divided by; not used without f0.
    """

    penalties: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    f0_scales: tuple[float, ...] = (1.0, 10.0, math.inf)

    def grid(self, train: Examples, num_classes: int) -> Iterator[GridPoint]:
        """Yield every fit."""
        outputs = systems.num_outputs(train.kernel, num_classes)
        solve: Callable[..., logistic.LogisticFit] = logistic.kernel_logistic
        if outputs > 1:
            solve = functools.partial(logistic.kernel_softmax, num_classes=outputs)
        for penalty in self.penalties:
            for scale in self.f0_scales if train.f0 is not None else (math.inf,):
                options = {"penalty": penalty, "f0_scale": scale}
                fitted = solve(train.kernel, train.labels, f0=train.f0, **options)
                yield GridPoint(
                    options,
                    lambda examples, fitted=fitted: fitted.predict(examples.kernel, examples.f0),  # type: ignore[misc]
                )

    def loss(self, scores: Float[np.ndarray, "M C"], labels: Int[Any, " M"]) -> float:
        """Return the mean negative log-probability of the labels."""
        log_probs = systems.log_probs(scores)
        return -float(log_probs[np.arange(len(scores)), labels].mean())


@dataclass(frozen=True, kw_only=True)
class AsymmetricSvm(_Regression):
    r"""The asymmetric least-squares SVM; see `jaxlm.kernels.lssvm`.

    Attributes:
      gammas: values of γ.
      ridges: λ of further values of γ, $1/(\lambda \|K\|)$ with the largest singular value
        $\|K\|$, which suit a kernel of any scale. λ = 1 is always singular, and λ < 1 may be.
      weights: weights of the first function; below 1, examples need `flipped`.
      bias: whether to fit a constant for each function.
      f0_scales: what f0 is divided by; not used without f0.
    """

    gammas: tuple[float, ...] = lssvm.GAMMAS
    ridges: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 2.0)
    weights: tuple[float, ...] = (1.0,)
    bias: bool = False
    f0_scales: tuple[float, ...] = ridge.F0_SCALES

    def grid(self, train: Examples, num_classes: int) -> Iterator[GridPoint]:
        """Yield every fit, except for γ whose system is singular."""
        targets = systems.targets(train.labels, systems.num_outputs(train.kernel, num_classes))
        factored = lssvm.factor(train.kernel)
        top = float(factored.values[0])
        solve = lssvm.asymmetric_svm_with_bias if self.bias else lssvm.asymmetric_svm
        for gamma in (*self.gammas, *(1 / (value * top) for value in self.ridges)):
            for scale in self.f0_scales if train.f0 is not None else (math.inf,):
                options = {"gamma": gamma, "f0_scale": scale}
                try:
                    fitted = solve(factored, targets, f0=train.f0, **options)
                except lssvm.SingularSystem:
                    continue
                for weight in self.weights:
                    yield GridPoint(
                        {**options, "weight": weight},
                        lambda examples, fitted=fitted, weight=weight: fitted.predict(  # type: ignore[misc]
                            examples.kernel, examples.flipped, weight=weight, f0=examples.f0
                        ),
                    )


SOLVERS: dict[str, Any] = {"ridge": Ridge, "logistic": Logistic, "asymmetric_svm": AsymmetricSvm}
"""Solvers by name."""


def fit(train: Examples, validation: Examples | None, solver: Any = None) -> Fit:
    """Fit every point of a solver's grid, and keep the most accurate one on validation.

    Among fits of the same accuracy the one with the smaller loss is kept, then the first.

    Args:
      train: the training examples.
      validation: other examples; None chooses by leaving each training example out in turn, which
        `Ridge` has in closed form.
      solver: an instance of one of `SOLVERS`; by default `Ridge()`.

    Raises:
      UserError: if a solver without leave-one-out gets no validation examples, a label is not a
        class, only one side has f0, no fit has a solution, or as the solver.

    >>> kernel = np.array([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    >>> train = Examples(kernel, np.array([0, 0, 1]))
    >>> fit(train, None).accuracy(train)
    1.0
    """
    solver = Ridge() if solver is None else solver
    sides = {"train": train} | ({} if validation is None else {"validation": validation})
    num_classes = _num_classes(train.kernel, [examples.labels for examples in sides.values()])
    for name, examples in sides.items():
        systems.check_labels(examples.labels, num_classes, f"{name}.labels", len(examples.kernel))
        if (examples.f0 is None) != (train.f0 is None):
            raise UserError(
                "f0: needed for both the training and the validation examples (got one of them). "
                "Give it for both, or for neither."
            )
    held_out = train if validation is None else validation
    best: tuple[float, float] | None = None
    kept: GridPoint | None = None
    tried = []
    for point in solver.grid(train, num_classes):
        if validation is None and point.leave_one_out is None:
            raise UserError(
                f"validation: {type(solver).__name__} needs it (got None). Give validation "
                "examples, or use Ridge."
            )
        scores = np.asarray(point.leave_one_out if validation is None else point.scores(validation))
        accuracy, loss = _accuracy(scores, held_out.labels), solver.loss(scores, held_out.labels)
        tried.append((point.settings, accuracy, loss))
        if best is None or (accuracy, -loss) > best:
            best, kept = (accuracy, -loss), point
    if kept is None or best is None:
        raise UserError("solver: no setting has a solution (got singular systems). Give others.")
    by = "leave-one-out" if validation is None else "validation"
    return Fit(kept.settings, by, best[0], kept.scores, tuple(tried))


def _num_classes(kernel: Any, labels: list[Any]) -> int:
    """Return the number of classes; validation may have a class that training does not have."""
    if np.ndim(kernel) == 4:
        return max(np.shape(kernel)[1], 2)
    every = np.concatenate([np.ravel(each) for each in labels])
    return int(every.max(initial=1)) + 1 if every.dtype.kind in "iu" else 2


def spectrum(kernel: Any) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """Return rank, number of singular values, and duplicate examples of a training kernel.

    >>> spectrum(np.ones((2, 2)))
    (1, 2, ((0, 1),))
    """
    values = np.linalg.svd(systems.training_matrix(kernel), compute_uv=False)
    rank = int(np.sum(values > ridge.resolution(kernel) * values[0]))
    return rank, len(values), ridge.duplicates(kernel)


def _accuracy(scores: Any, labels: Any) -> float:
    return float(np.mean(systems.classes(scores) == np.asarray(labels)))
