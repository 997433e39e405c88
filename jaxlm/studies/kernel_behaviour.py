"""Does fine-tuning behave like a kernel method? Fine-tune, solve by kernels, linearize, and judge.

The three criteria of Malladi et al. 2022 (arXiv:2210.05643): the kernel at the pretrained
parameters solves the task about as well as fine-tuning; the function linearized there recovers most
of the improvement by fine-tuning; and the kernel changes little. If fine-tuning gains little, even
an uninformative kernel meets them. Here the gain must also be significant, and each criterion is
compared with a null.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.data import TaskConfig
from jaxlm.evaluation import majority_accuracy
from jaxlm.kernels import solve
from jaxlm.kernels.behaviour import (
    KernelChange,
    gain_p_value,
    kernel_change,
    linearization_score,
    linearize,
    random_move,
    shuffled,
)
from jaxlm.studies.kernel_table import markdown
from jaxlm.studies.kernel_task import Kernels, kernel_task
from jaxlm.studies.kernel_training import KERNELS, Training, Tuned, fine_tune
from jaxlm.train.optimizers import Optimizer
from jaxlm.train.state import Program

NULLS = 5
"""Number of permutations of the labels; the mean over them is the null of a kernel."""


class KernelResult(NamedTuple):
    """A task solved by the kernel at the pretrained parameters.

    Attributes:
        kind: kind of the kernel.
        test: test accuracy.
        validation: validation accuracy, by which the settings were chosen.
        settings: settings of the solver.
        rank: number of eigenvalues, or singular values, above rounding errors.
        size: number of all of them.
        duplicates: pairs of training examples that the kernel does not tell apart.
        change: from the pretrained to the fine-tuned kernel, on the training and validation
            examples with the training examples.
        null: mean test accuracy with permuted training labels, which the solver reaches from f0
            alone.
        control: change from the pretrained kernel to that of random features (parameters shuffled
            within each leaf), at the same Frobenius norm.
        seconds: time to compute the kernel and to solve, without the change.
    """

    kind: str
    test: float
    validation: float
    settings: Mapping[str, float]
    rank: int
    size: int
    duplicates: tuple[tuple[int, int], ...]
    change: KernelChange
    null: float
    control: KernelChange
    seconds: float


class Report(NamedTuple):
    """One model, one few-shot task and one optimizer.

    Attributes:
        task: name of the task.
        prompt: whether the pretrained head answered a prompt.
        seed: of the examples drawn and of training.
        k: training examples per class; None for all.
        train_labels: classes of the training examples.
        optimizer: its name.
        learning_rate: the learning rate that validation chose.
        step: the step after which validation was best.
        majority: test accuracy of the most frequent class of the test set.
        zero_shot: test accuracy before training; without a prompt, that of the fitted linear head.
        fine_tuned: test accuracy of the fine-tuned model.
        linearized: test accuracy of the function linearized at the pretrained parameters.
        recovered: share of the improvement that the linearization recovers.
        gain_p: p-value of the gain over zero-shot.
        null_linearized: test accuracy of the linearized function after a move of the same length in
            random directions.
        kernels: one result per kind.
        seconds: total time.
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
    gain_p: float
    null_linearized: float
    kernels: tuple[KernelResult, ...]
    seconds: float

    def __str__(self) -> str:
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
    """Fine-tune, compute the kernels at the pretrained parameters, solve, and compare.

    Args:
        model: a `LanguageModel`, a folder, a hub id, or None for the shipped model.
        task: the task, with `k` examples per class to train on, and `validation="hold_out"` for as
            many to choose by.
        optimizer: how to fine-tune; a `Training` adds a grid of learning rates.
        seed: of the examples drawn, the order of batches and the optimizer.
        prompt: whether the pretrained head answers the task's prompt; if not, a linear head is
            fitted to the bare text.
        calibrate: see `kernel_task`.
        kinds: of kernels; by default those of the optimizer, see `KERNELS`.
        solvers: kind to a solver of `jaxlm.kernels.solve`; by default ridge for symmetric kinds and
            the asymmetric SVM for "asymmetric_signgd".
        folder: where kernels are stored and found again; None stores none.
        base_dir: folder in which relative paths of the task are looked up first.
        mesh: of `jaxlm.sharding.make_mesh`; by default parameters stay where they are.

    Returns:
        The report; `print(report)` shows it as a table.

    Raises:
        UserError: if no kernel of the optimizer is known, or as `kernel_task`, `fine_tune` and the
            solvers.
    """
    training = optimizer if isinstance(optimizer, Training) else Training(optimizer=optimizer)
    subject = kernel_task(
        model, task, seed=seed, prompt=prompt, calibrate=calibrate, base_dir=base_dir, mesh=mesh
    )
    kernels = Kernels(subject, None if folder is None else Path(folder))
    return measure(kernels, training, seed=seed, kinds=kinds, solvers=solvers)


def measure(
    kernels: Kernels,
    training: Training,
    *,
    seed: int,
    kinds: tuple[str, ...] | None = None,
    solvers: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Return the report of a loaded task, whose kernels several optimizers may share."""
    begin, subject = time.perf_counter(), kernels.task
    kinds = KERNELS[training.optimizer.name] if kinds is None else kinds
    f = Program(subject.f)
    first = subject.values(f, "test", subject.lm.params)
    say(f"fine-tune with {training.optimizer.name}")
    tuned = fine_tune(subject, training, seed=seed)
    final = subject.values(f, "test", tuned.params)
    f_lin = Program(lambda params, other, x: linearize(subject.f, params)(other, x))
    key = jax.random.key(seed)
    moved = random_move(subject.lm.params, tuned.params, key)
    linear, null = (
        subject.values(f_lin, "test", subject.lm.params, params) for params in (tuned.params, moved)
    )
    accuracies = [subject.accuracy(scores, "test") for scores in (first, final, linear)]
    right = [solve.classes(scores) == subject.labels("test") for scores in (first, final)]
    results = []
    for kind in kinds:
        say(f"kernel {kind}")
        default = solve.AsymmetricSvm() if kind == "asymmetric_signgd" else solve.Ridge()
        solver = (solvers or {}).get(kind, default)
        results.append(_solve(kernels, kind, solver, tuned, seed))
    labels = (subject.labels("train"), subject.labels("test"))
    return Report(
        task=subject.config.name,
        prompt=subject.prompt,
        seed=seed,
        k=subject.config.k,
        train_labels=tuple(labels[0].tolist()),
        optimizer=training.optimizer.name,
        learning_rate=tuned.learning_rate,
        step=tuned.step,
        majority=majority_accuracy(labels[1]),
        zero_shot=accuracies[0],
        fine_tuned=accuracies[1],
        linearized=accuracies[2],
        recovered=linearization_score(*accuracies),
        gain_p=gain_p_value(*right),
        null_linearized=subject.accuracy(null, "test"),
        kernels=tuple(results),
        seconds=time.perf_counter() - begin,
    )


def _solve(kernels: Kernels, kind: str, solver: Any, tuned: Tuned, seed: int) -> KernelResult:
    """Solve the task with one kind of kernel, and measure how far fine-tuning moved it.

    `seed` is that of the nulls.
    """
    begin, subject = time.perf_counter(), kernels.task
    both_ways = isinstance(solver, solve.AsymmetricSvm) and any(w != 1.0 for w in solver.weights)
    train, validation, test = (
        solve.Examples(
            kernels.of(kind, split),
            subject.labels(split),
            kernels.f0(split),
            kernels.flipped(kind, split) if both_ways else None,
        )
        for split in ("train", "validation", "test")
    )
    fit = solve.fit(train, validation, solver)
    seconds = time.perf_counter() - begin
    before = np.concatenate([np.asarray(each.kernel).ravel() for each in (train, validation)])
    after, random = (
        np.concatenate(
            [kernels.at(params, kind, split).ravel() for split in ("train", "validation")]
        )
        for params in (tuned.params, shuffled(subject.lm.params, jax.random.key(seed)))
    )
    size = float(np.linalg.norm(random))
    numbers = np.random.default_rng(seed)
    nulls = [train._replace(labels=numbers.permutation(train.labels)) for _ in range(NULLS)]
    rank, count, duplicates = solve.spectrum(train.kernel)
    return KernelResult(
        kind=kind,
        test=fit.accuracy(test),
        validation=fit.accuracy_chosen,
        settings=fit.settings,
        rank=rank,
        size=count,
        duplicates=duplicates,
        change=kernel_change(before, after),
        null=float(np.mean([solve.fit(each, validation, solver).accuracy(test) for each in nulls])),
        # Random features have an arbitrary scale.
        control=kernel_change(before, random * (np.linalg.norm(before) / size if size else 1)),
        seconds=seconds,
    )


def record(report: Report) -> dict[str, Any]:
    """Return a report as JSON values."""
    kernels = [
        {
            **each._asdict(),
            "settings": {key: _number(value) for key, value in each.settings.items()},
            "duplicates": [list(pair) for pair in each.duplicates],
            **{
                name: {key: _number(value) for key, value in changed._asdict().items()}
                for name, changed in (("change", each.change), ("control", each.control))
            },
        }
        for each in report.kernels
    ]
    return {**report._asdict(), "train_labels": list(report.train_labels), "kernels": kernels}


def _number(value: float) -> float | str:
    """Return a value for JSON, which has no infinity."""
    return value if np.isfinite(value) else "inf"
