"""Plots of kernels: a heat map ordered by class, the spectrum, accuracy against fine-tuning.

Each function draws on the given matplotlib axes, or on a new figure, and returns the axes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.kernels import load_kernel
from jaxlm.kernels.solve.linear_systems import training_matrix
from jaxlm.studies.figures import new_axes, save_figure
from jaxlm.studies.kernel_table import NAMES, WITHIN, rows
from jaxlm.studies.kernel_task import draw_name


def heat_map(kernel: Any, labels: Any, *, names: Sequence[str] = (), axes: Any = None) -> Any:
    r"""Plot the cosines $K_{ij} / \sqrt{K_{ii} K_{jj}}$ of gradients, ordered by class.

    Args:
        kernel: between the same examples, [N, C, N, C] or [N, N]; outputs are averaged.
        labels: classes, [N].
        names: of the classes.
    """
    found, order = np.asarray(kernel, np.float64), np.argsort(labels, kind="stable")
    traced = found if found.ndim == 2 else np.einsum("icjc->ij", found) / found.shape[1]
    size = np.sqrt(np.abs(np.diag(traced)))
    cosines = traced / np.where(size > 0, size, 1)[:, None] / np.where(size > 0, size, 1)[None]
    limit = float(np.abs(cosines).max())
    axes = axes or new_axes((4.2, 3.6))
    image = axes.imshow(cosines[np.ix_(order, order)], cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.figure.colorbar(image, ax=axes)
    counts = np.bincount(np.asarray(labels))
    edges = np.concatenate([[0], np.cumsum(counts)])
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color="black", linewidth=0.5)
        axes.axvline(edge - 0.5, color="black", linewidth=0.5)
    shown = [names[i] if i < len(names) else str(i) for i in range(len(counts))]
    middles = (edges[:-1] + edges[1:] - 1) / 2
    axes.set_xticks(middles, shown)
    axes.set_yticks(middles, shown, rotation=90, va="center")
    return axes


def spectrum(kernels: Mapping[str, Any], *, axes: Any = None) -> Any:
    """Plot the singular values of kernels, each relative to its largest.

    Args:
        kernels: name to a kernel of training examples, [N, C, N, C] or [N, N].
    """
    axes = axes or new_axes((4.2, 3.2))
    for name, kernel in kernels.items():
        values = np.linalg.svd(training_matrix(kernel), compute_uv=False)
        axes.semilogy(np.arange(1, len(values) + 1), values / values[0], ".-", label=name)
    axes.set(xlabel="singular value", ylabel="relative to the largest")
    axes.legend()
    return axes


def accuracies(records: Sequence[dict[str, Any]], *, axes: Any = None) -> Any:
    """Plot the test accuracy of kernels against that of fine-tuning, a point per row of the table.

    Both are equal on the solid line; a kernel solves the task above the dashed line.

    Args:
        records: as `jaxlm.studies.kernel_behaviour.record` returns them.
    """
    axes = axes or new_axes((4.2, 4.0))
    found = rows(records)
    values: list[float] = []
    for kind in dict.fromkeys(kind for row in found for kind in row["kernels"]):
        taken = [row for row in found if kind in row["kernels"]]
        x = [row["fine_tuned"] for row in taken]
        y = [row["kernels"][kind]["test"] for row in taken]
        axes.errorbar(
            *([100 * each["mean"] for each in side] for side in (x, y)),
            xerr=[100 * (each["std"] or 0.0) for each in x],
            yerr=[100 * (each["std"] or 0.0) for each in y],
            fmt="o",
            label=NAMES.get(kind, kind),
        )
        values += [100 * each["mean"] for each in (*x, *y)]
    low, high = min(values) - 5, max(values) + 5
    axes.plot([low, high], [low, high], color="black", linewidth=0.8)
    axes.plot([low, high], [low - 100 * WITHIN, high - 100 * WITHIN], "k--", linewidth=0.8)
    axes.set(xlabel="fine-tuning", ylabel="kernel", xlim=(low, high), ylim=(low, high))
    axes.legend()
    return axes


def draw(records: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Plot the accuracies of a study, and the stored training kernels of each draw.

    The plots go to the folder `plots` of the study's folder. Returns the files.
    """
    made = [save_figure(accuracies(records), folder / "plots" / "accuracy.png")]
    kinds: dict[str, dict[str, Any]] = {}
    for each in records:
        name = draw_name(each["prompt"], each["k"], each["seed"])
        for kind in (kernel["kind"] for kernel in each["kernels"]):
            kernel = load_kernel(folder / "kernels" / name / f"{kind}-train")
            path = folder / "plots" / f"{name}-{kind}.png"
            made.append(save_figure(heat_map(kernel, each["train_labels"]), path))
            kinds.setdefault(name, {})[NAMES.get(kind, kind)] = kernel
    for name, kernels in kinds.items():
        made.append(save_figure(spectrum(kernels), folder / "plots" / f"{name}-spectrum.png"))
    return made
