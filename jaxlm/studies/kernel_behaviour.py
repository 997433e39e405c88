"""Does fine-tuning behave like a kernel? Fine-tuned, solved by kernels, linearized, and a verdict.

The three criteria of Malladi et al. 2022 (arXiv:2210.05643): the kernel at the pretrained
parameters solves the task about as well as fine-tuning; the function linearized there recovers most
of what fine-tuning improved; and the kernel moves little.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxlm.data import TaskConfig
from jaxlm.kernels import solve
from jaxlm.kernels.behaviour import KernelChange, kernel_change, linearization_score, linearize
from jaxlm.studies.kernel_store import Kernels
from jaxlm.studies.kernel_task import KernelTask, kernel_task
from jaxlm.studies.kernel_training import KINDS, Training, Tuned, fine_tune
from jaxlm.train.optimizers import Optimizer
from jaxlm.train.state import Program

WITHIN = 0.10
"""A kernel solves a task whose accuracy is at most this far below that of fine-tuning."""

RECOVERED = 0.5
"""Fine-tuning is linear where its linearization recovers more than this share of improvement."""

CHANGE = 2.0
"""Features are fixed where the mean relative change of the kernel is below this."""


class KernelResult(NamedTuple):
    """A task solved by the kernel at the pretrained parameters.

    Attributes:
        kind: of the kernel.
        test: accuracy on the test split.
        validation: accuracy by which the settings were chosen.
        settings: of the solver.
        rank: number of eigenvalues, or singular values, that rounding leaves above zero.
        size: how many there are.
        duplicates: pairs of training examples that the kernel does not tell apart.
        change: from the pretrained to the fine-tuned kernel, on the training and validation
            examples with the training examples.
        seconds: to compute and solve, without the change.
    """

    kind: str
    test: float
    validation: float
    settings: Mapping[str, float]
    rank: int
    size: int
    duplicates: tuple[tuple[int, int], ...]
    change: KernelChange
    seconds: float


class Verdict(NamedTuple):
    """The criteria for one kernel; None where fine-tuning improved nothing on zero-shot.

    Attributes:
        solves: its accuracy is at most `WITHIN` below fine-tuning's.
        linear: the linearization recovers more than `RECOVERED` of the improvement.
        fixed: the kernel's mean relative change is below `CHANGE`.
    """

    solves: bool | None
    linear: bool | None
    fixed: bool

    @property
    def kernel_behaviour(self) -> bool | None:
        """All three; None where there is nothing to judge."""
        if self.solves is None or self.linear is None:
            return None
        return self.solves and self.linear and self.fixed


class Report(NamedTuple):
    """One model, one few-shot task and one optimizer.

    Attributes:
        task: name of the task.
        prompt: whether the pretrained head answered a prompt.
        seed: of the examples drawn and of training.
        k: training examples of a class; None where the task has all.
        train_labels: classes of the training examples.
        optimizer: its name.
        learning_rate: chosen on validation.
        step: at which validation was best.
        majority: test accuracy of the most frequent class of the test set.
        zero_shot: test accuracy of the model as training finds it: without a prompt, with the
            linear head that was fitted.
        fine_tuned: test accuracy of the fine-tuned model.
        linearized: test accuracy of the function that is linearized at the first parameters.
        recovered: share of the improvement that the linearization recovers.
        kernels: one for each kind.
        seconds: of everything.
    """

    task: str
    prompt: bool
    seed: int
    k: int | None
    train_labels: tuple[int, ...]
    optimizer: str
    learning_rate: float
    step: int
    majority: float
    zero_shot: float
    fine_tuned: float
    linearized: float
    recovered: float | None
    kernels: tuple[KernelResult, ...]
    seconds: float

    def verdict(self, kernel: KernelResult) -> Verdict:
        """The criteria for one of the kernels."""
        return verdict(
            self.zero_shot, self.fine_tuned, self.linearized, kernel.test, kernel.change.mean
        )

    def __str__(self) -> str:
        from jaxlm.studies.kernel_table import markdown

        return markdown([record(self)])


def kernel_behaviour_report(
    model: Any,
    task: TaskConfig,
    optimizer: Optimizer | Training,
    *,
    seed: int = 0,
    prompt: bool = True,
    calibrate: bool = False,
    kinds: tuple[str, ...] | None = None,
    solvers: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    base_dir: Path | None = None,
    mesh: Mesh | None = None,
) -> Report:
    """Fine-tunes, computes the kernels at the pretrained parameters, solves, and compares.

    Args:
        model: a `LanguageModel`, a folder, a hub id, or None for the shipped model.
        task: the task, with `k` examples of a class to train on and `validation="hold_out"` for as
            many to choose by.
        optimizer: how to fine-tune; a `Training` has a grid of learning rates.
        seed: of the examples drawn, the order of batches and the optimizer's randomness.
        prompt: whether the pretrained head answers the task's prompt; without, a linear head is
            fitted to the text alone.
        calibrate: see `kernel_task`.
        kinds: kernels; those of the optimizer where not given, see `KINDS`.
        solvers: kind to a solver of `jaxlm.kernels.solve`; ridge for symmetric kinds and the
            asymmetric machine for "asymmetric_signgd" where not given.
        folder: where kernels are stored and found again; None keeps none.
        base_dir: where the relative paths of the task start, before the working directory.
        mesh: of `jaxlm.sharding.make_mesh`; None for where the parameters lie, or one device.

    Returns:
        The report; `print(report)` shows it as a table.

    Raises:
        UserError: no kernel is known of the optimizer, or as `kernel_task`, `fine_tune` and the
            solvers.
    """
    training = optimizer if isinstance(optimizer, Training) else Training(optimizer=optimizer)
    subject = kernel_task(
        model, task, seed=seed, prompt=prompt, calibrate=calibrate, base_dir=base_dir, mesh=mesh
    )
    kernels = Kernels(subject, None if folder is None else Path(folder))
    return measure(subject, training, kernels, task=task, seed=seed, kinds=kinds, solvers=solvers)


def measure(
    subject: KernelTask,
    training: Training,
    kernels: Kernels,
    *,
    task: TaskConfig,
    seed: int,
    kinds: tuple[str, ...] | None = None,
    solvers: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """`kernel_behaviour_report` of a model and a task that are loaded.

    Args:
        subject: model and task.
        training: how to fine-tune.
        kernels: at the pretrained parameters; keeps what it computes for other optimizers.
        task: for its name and k.
        seed: of training.
        kinds, solvers: see `kernel_behaviour_report`.
        say: is told what is done.
    """
    begin = time.perf_counter()
    from jaxlm.evaluation import majority_accuracy

    kinds = KINDS[training.optimizer.name] if kinds is None else kinds
    f = Program(subject.f)
    first = subject.values(f, "test", subject.lm.params)
    say(f"fine-tune with {training.optimizer.name}")
    tuned = fine_tune(subject, training, seed=seed)
    final = subject.values(f, "test", tuned.params)
    f_lin = Program(lambda params, other, x: linearize(subject.f, params)(other, x))
    linear = subject.values(f_lin, "test", subject.lm.params, tuned.params)
    accuracies = [subject.accuracy(scores, "test") for scores in (first, final, linear)]
    results = []
    for kind in kinds:
        say(f"kernel {kind}")
        solver = (solvers or {}).get(kind) or default_solver(kind)
        results.append(solve_with(subject, kernels, kind, solver, tuned))
    labels = (subject.labels("train"), subject.labels("test"))
    return Report(
        task=task.name,
        prompt=subject.prompt,
        seed=seed,
        k=task.k,
        train_labels=tuple(labels[0].tolist()),
        optimizer=training.optimizer.name,
        learning_rate=tuned.learning_rate,
        step=tuned.step,
        majority=majority_accuracy(labels[1]),
        zero_shot=accuracies[0],
        fine_tuned=accuracies[1],
        linearized=accuracies[2],
        recovered=linearization_score(*accuracies),
        kernels=tuple(results),
        seconds=time.perf_counter() - begin,
    )


def default_solver(kind: str) -> Any:
    """Ridge for a symmetric kernel, the asymmetric machine for the other."""
    return solve.AsymmetricSvm() if kind == "asymmetric_signgd" else solve.Ridge()


def solve_with(
    subject: KernelTask, kernels: Kernels, kind: str, solver: Any, tuned: Tuned
) -> KernelResult:
    """Solves the task with one kind of kernel, and measures how far fine-tuning moved it."""
    begin = time.perf_counter()
    train, validation, test = (
        solve.Split(
            kernels.of(kind, split),
            subject.labels(split),
            kernels.f0(split),
            kernels.flipped(kind, split) if _needs_flipped(solver) else None,
        )
        for split in ("train", "validation", "test")
    )
    fit = solve.fit(train, validation, solver)
    seconds = time.perf_counter() - begin
    before = [np.asarray(each.kernel).ravel() for each in (train, validation)]
    after = [kernels.at(tuned.params, kind, split).ravel() for split in ("train", "validation")]
    rank, size, duplicates = solve.spectrum(train.kernel)
    return KernelResult(
        kind=kind,
        test=fit.accuracy(test),
        validation=fit.accuracy_chosen,
        settings=fit.settings,
        rank=rank,
        size=size,
        duplicates=duplicates,
        change=kernel_change(np.concatenate(before), np.concatenate(after)),
        seconds=seconds,
    )


def verdict(
    zero_shot: float, fine_tuned: float, linearized: float, kernel: float, change: float
) -> Verdict:
    """The three criteria from test accuracies and the kernel's mean relative change.

    >>> verdict(0.5, 0.9, 0.75, 0.82, 0.3)
    Verdict(solves=True, linear=True, fixed=True)
    >>> verdict(0.9, 0.9, 0.9, 0.9, 3.0)
    Verdict(solves=None, linear=None, fixed=False)
    """
    recovered = linearization_score(zero_shot, fine_tuned, linearized)
    improved = recovered is not None
    return Verdict(
        solves=fine_tuned - kernel <= WITHIN + 1e-9 if improved else None,
        linear=recovered > RECOVERED if recovered is not None else None,
        fixed=change < CHANGE,
    )


def record(report: Report) -> dict[str, Any]:
    """A report as JSON values."""
    kernels = [
        {
            **each._asdict(),
            "settings": {key: _number(value) for key, value in each.settings.items()},
            "duplicates": [list(pair) for pair in each.duplicates],
            "change": {key: _number(value) for key, value in each.change._asdict().items()},
        }
        for each in report.kernels
    ]
    return {**report._asdict(), "train_labels": list(report.train_labels), "kernels": kernels}


def _number(value: float) -> float | str:
    """JSON has no infinity."""
    return value if np.isfinite(value) else "inf"


def _needs_flipped(solver: Any) -> bool:
    return isinstance(solver, solve.AsymmetricSvm) and any(w != 1.0 for w in solver.weights)
