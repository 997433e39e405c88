"""Solving a task with a kernel: a grid of fits, of which validation chooses one.

    fit = solve.fit(train, validation, solve.Ridge())
    fit.accuracy(test)

A `Split` has what is known of some examples: their kernel with the training examples, their labels,
and the function at its first parameters.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int

from jaxlm.core.errors import UserError
from jaxlm.kernels import logistic, lssvm, ridge, systems

__all__ = ["SOLVERS", "AsymmetricSvm", "Fit", "Logistic", "Ridge", "Split", "fit", "spectrum"]

RELATIVE = (1e-3, 1e-2, 1e-1, 1.0)


class Split(NamedTuple):
    """Examples as a solver sees them.

    Attributes:
        kernel: of these examples with the training examples, [M, C, N, C], or [M, N] where outputs
            were traced.
        labels: classes, from 0.
        f0: the function at its first parameters; None solves without.
        flipped: of the training examples with these, [N, C, M, C] or [N, M]: what an asymmetric
            kernel may use beside.
    """

    kernel: Any
    labels: Int[Any, " M"]
    f0: Float[Any, "M C"] | None = None
    flipped: Any = None


class Candidate(NamedTuple):
    """One point of a grid.

    Attributes:
        settings: what it is.
        scores: of a split, [M, C].
        leave_one_out: of the training examples, where there is a closed form.
    """

    settings: dict[str, float]
    scores: Callable[[Split], np.ndarray]
    leave_one_out: Float[np.ndarray, "N C"] | None = None


class Solver(Protocol):
    """A grid of fits."""

    def candidates(self, train: Split, num_classes: int) -> Iterator[Candidate]:
        """Every fit that there is; those that have no solution are left out."""

    def loss(self, scores: Float[np.ndarray, "M C"], labels: Int[Any, " M"]) -> float:
        """What decides between candidates of the same accuracy."""


class Fit(NamedTuple):
    """The chosen point of a grid.

    Attributes:
        settings: what it is.
        chosen_by: "validation", or "leave-one-out" on the training examples.
        accuracy_chosen: the accuracy by which it was chosen.
        scores: of a split, [M, C].
        tried: candidates with their accuracy and loss, in the order of the grid.
    """

    settings: dict[str, float]
    chosen_by: str
    accuracy_chosen: float
    scores: Callable[[Split], np.ndarray]
    tried: tuple[tuple[dict[str, float], float, float], ...]

    def accuracy(self, split: Split) -> float:
        """Share of examples of a split whose class is right."""
        return _accuracy(self.scores(split), split.labels)


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """Kernel ridge regression of labels; see `jaxlm.kernels.ridge.ridge_path`.

    Attributes:
        ridges: relative to the largest eigenvalue.
        f0_scales: what f0 is divided by; not used without f0.
    """

    ridges: tuple[float, ...] = ridge.RIDGES
    f0_scales: tuple[float, ...] = ridge.F0_SCALES

    def candidates(self, train: Split, num_classes: int) -> Iterator[Candidate]:
        """See `Solver`; all of them come from one decomposition."""
        outputs = systems.num_outputs(train.kernel, num_classes)
        scales = self.f0_scales if train.f0 is not None else None
        path = ridge.ridge_path(
            train.kernel,
            systems.targets(train.labels, outputs),
            ridges=self.ridges,
            f0=train.f0,
            f0_scales=scales,
        )
        predict = _Last(lambda split: path.predict(split.kernel, split.f0))
        for r, value in enumerate(path.ridges):
            for s, scale in enumerate(path.f0_scales):
                yield Candidate(
                    {"ridge": value, "f0_scale": scale},
                    lambda split, r=r, s=s: predict(split)[r, s],  # type: ignore[misc]
                    path.leave_one_out[r, s],
                )

    def loss(self, scores: Float[np.ndarray, "M C"], labels: Int[Any, " M"]) -> float:
        """Mean squared distance to the targets."""
        return _squares(scores, labels)


@dataclass(frozen=True, kw_only=True)
class Logistic:
    """Kernel logistic or, for several outputs, softmax regression; see `jaxlm.kernels.logistic`.

    Attributes:
        penalties: relative to the largest eigenvalue.
        f0_scales: what f0 is divided by; not used without f0.
    """

    penalties: tuple[float, ...] = RELATIVE
    f0_scales: tuple[float, ...] = (1.0, 10.0, math.inf)

    def candidates(self, train: Split, num_classes: int) -> Iterator[Candidate]:
        """See `Solver`."""
        outputs = systems.num_outputs(train.kernel, num_classes)
        for penalty in self.penalties:
            for scale in self.f0_scales if train.f0 is not None else (math.inf,):
                options = {"penalty": penalty, "f0_scale": scale}
                found = (
                    logistic.kernel_logistic(train.kernel, train.labels, f0=train.f0, **options)
                    if outputs == 1
                    else logistic.kernel_softmax(
                        train.kernel, train.labels, num_classes=outputs, f0=train.f0, **options
                    )
                )
                yield Candidate(
                    options,
                    lambda split, found=found: found.predict(split.kernel, split.f0),  # type: ignore[misc]
                )

    def loss(self, scores: Float[np.ndarray, "M C"], labels: Int[Any, " M"]) -> float:
        """Mean negative log-probability of the labels."""
        logits = (
            np.concatenate([np.zeros_like(scores), scores], 1) if scores.shape[1] == 1 else scores
        )
        shifted = logits - logits.max(axis=1, keepdims=True)
        found = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(logits)), labels]
        return float(found.mean())


@dataclass(frozen=True, kw_only=True)
class AsymmetricSvm:
    r"""The asymmetric least-squares SVM; see `jaxlm.kernels.lssvm`.

    Attributes:
        gammas: γ as it is.
        ridges: λ of further γ, $1/(\lambda \|K\|)$ with the largest singular value, which suit a
            kernel of any size. Below 1 a λ may meet a singular value, and 1 does.
        weights: of the first of the two functions; below 1 splits need `flipped`.
        bias: whether the functions have constants.
        f0_scales: what f0 is divided by; not used without f0.
    """

    gammas: tuple[float, ...] = lssvm.GAMMAS
    ridges: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 2.0)
    weights: tuple[float, ...] = (1.0,)
    bias: bool = False
    f0_scales: tuple[float, ...] = ridge.F0_SCALES

    def candidates(self, train: Split, num_classes: int) -> Iterator[Candidate]:
        """See `Solver`; a γ whose system is singular is left out."""
        outputs = systems.num_outputs(train.kernel, num_classes)
        wanted = systems.targets(train.labels, outputs)
        factored = lssvm.factor(train.kernel)
        top = float(factored.values[0])
        function = lssvm.asymmetric_svm_with_bias if self.bias else lssvm.asymmetric_svm
        for gamma in (*self.gammas, *(1 / (each * top) for each in self.ridges)):
            for scale in self.f0_scales if train.f0 is not None else (math.inf,):
                options = {"gamma": gamma, "f0_scale": scale}
                try:
                    found = function(factored, wanted, f0=train.f0, **options)
                except lssvm.SingularSystem:
                    continue
                for weight in self.weights:
                    yield Candidate(
                        {**options, "weight": weight},
                        lambda split, found=found, weight=weight: found.predict(  # type: ignore[misc]
                            split.kernel, split.flipped, weight=weight, f0=split.f0
                        ),
                    )

    def loss(self, scores: Float[np.ndarray, "M C"], labels: Int[Any, " M"]) -> float:
        """Mean squared distance to the targets."""
        return _squares(scores, labels)


SOLVERS: dict[str, Any] = {"ridge": Ridge, "logistic": Logistic, "asymmetric_svm": AsymmetricSvm}
"""Solvers by name."""


def fit(train: Split, validation: Split | None, solver: Any = None) -> Fit:
    """Fits every point of a solver's grid, and keeps the one that is most accurate on validation.

    Among equals the one with the smaller loss is kept, of the same loss the first.

    Args:
        train: the training examples.
        validation: other examples; None chooses by leaving each training example out in turn, which
            `Ridge` knows in closed form.
        solver: one of `SOLVERS`, an instance; `Ridge()` where not given.

    Raises:
        UserError: no validation for a solver without leave-one-out, a label that is no class, f0 on
            one side alone, no candidate has a solution, or as the solver.

    >>> kernel = np.array([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    >>> train = Split(kernel, np.array([0, 0, 1]))
    >>> fit(train, None).accuracy(train)
    1.0
    """
    chosen = Ridge() if solver is None else solver
    sides = [("training label", train)]
    sides += [] if validation is None else [("validation label", validation)]
    num_classes = _num_classes(sides)
    for what, split in sides:
        systems.checked_labels(split.labels, num_classes, what, len(split.kernel))
        if (split.f0 is None) != (train.f0 is None):
            raise UserError(
                "f0: one of the training and the validation examples has it, the other has not. "
                "Give it for both, or for neither."
            )
    labels = sides[-1][1].labels
    best: tuple[float, float] | None = None
    kept: Candidate | None = None
    tried = []
    for each in chosen.candidates(train, num_classes):
        if validation is None and each.leave_one_out is None:
            name = type(chosen).__name__
            raise UserError(f"{name} needs validation examples to choose by: give them.")
        held_out = each.leave_one_out if validation is None else each.scores(validation)
        scores = np.asarray(held_out)
        accuracy, loss = _accuracy(scores, labels), chosen.loss(scores, labels)
        tried.append((each.settings, accuracy, loss))
        if best is None or (accuracy, -loss) > best:
            best, kept = (accuracy, -loss), each
    if kept is None or best is None:
        raise UserError("no setting of the grid has a solution: give other gammas.")
    by = "leave-one-out" if validation is None else "validation"
    return Fit(kept.settings, by, best[0], kept.scores, tuple(tried))


def _num_classes(sides: list[tuple[str, Split]]) -> int:
    """How many classes there are: validation may have one that no training example has."""
    kernel = np.shape(sides[0][1].kernel)
    if len(kernel) == 4:
        return max(kernel[1], 2)
    labels = np.concatenate([np.ravel(split.labels) for _, split in sides])
    return int(labels.max(initial=1)) + 1 if labels.dtype.kind in "iu" else 2


def spectrum(kernel: Any) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """Rank, number of singular values, and duplicate examples of a kernel of training examples.

    >>> spectrum(np.ones((2, 2)))
    (1, 2, ((0, 1),))
    """
    values = np.linalg.svd(systems.training_matrix(kernel), compute_uv=False)
    rank = int(np.sum(values > ridge.resolution(kernel) * values[0]))
    return rank, len(values), ridge.duplicates(kernel)


class _Last:
    """A function of a split that remembers its last value: all candidates ask for the same."""

    def __init__(self, function: Callable[[Split], Any]):
        self.function = function
        self.split: Split | None = None

    def __call__(self, split: Split) -> Any:
        if self.split is not split:
            self.split, self.value = split, self.function(split)
        return self.value


def _accuracy(scores: Any, labels: Any) -> float:
    return float(np.mean(systems.classes(scores) == np.asarray(labels)))


def _squares(scores: np.ndarray, labels: Any) -> float:
    outputs = scores.shape[1]
    one_hot = np.eye(max(outputs, 2))[np.asarray(labels)]
    wanted = one_hot[:, 1:] * 2 - 1 if outputs == 1 else one_hot
    return float(np.mean(np.sum((scores - wanted) ** 2, axis=1)))
