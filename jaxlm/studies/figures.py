"""Matplotlib figures; matplotlib is imported only when one is drawn."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.artifacts.files import write_atomic
from jaxlm.artifacts.processes import is_main_process
from jaxlm.core.errors import UserError


def new_axes(size: tuple[float, float], columns: int = 1) -> Any:
    """Return the axes of a new figure of `size` inches; an array of them for several columns."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots: need matplotlib. pip install 'jaxlm[plots]'.") from None
    return Figure(figsize=size, layout="constrained").subplots(ncols=columns)


def save_figure(axes: Any, path: Path) -> Path:
    """Save the figure of `axes` from the main process, and return its path."""
    if not is_main_process():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    axes.figure.savefig(image, format=path.suffix[1:], dpi=150, bbox_inches="tight")
    write_atomic(path, image.getvalue())
    return path


def learning_curve(metrics: Mapping[str, np.ndarray], *, axes: Any = None) -> Any:
    """Plot the loss of each step with its running mean, and what was measured on other text.

    `metrics` are those of `jaxlm.train.logging.Metrics.arrays`. Returns the axes of the loss.
    """
    left = new_axes((5.2, 3.4)) if axes is None else axes
    left.set(xlabel="step", ylabel="loss")
    right: Any = None
    lines: list[Any] = []

    def points(name: str) -> tuple[np.ndarray, np.ndarray]:
        known = np.isfinite(metrics[name])
        return metrics["step"][known], metrics[name][known]

    if "loss" in metrics:
        steps, losses = points("loss")
        width = max(1, len(losses) // 20)
        means = np.convolve(losses, np.ones(width) / width, "valid")
        left.plot(steps, losses, color="C0", alpha=0.3)
        label = "loss" if width == 1 else f"loss, mean of {width} steps"
        lines += left.plot(steps[width - 1 :], means, color="C0", label=label)
    others = [name for name in metrics if name.startswith(("validation_", "held_out_"))]
    for i, name in enumerate(others, start=1):
        if not name.endswith("_loss") and right is None:
            right = left.twinx()
        where = left if name.endswith("_loss") else right
        lines += where.plot(*points(name), "o-", color=f"C{i}", label=name.replace("_", " "))
    left.xaxis.get_major_locator().set_params(integer=True)
    # Above the axes, since neither axis knows where the other's lines are.
    left.legend(handles=lines, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    return left
