"""Matplotlib figures; matplotlib is imported only when one is drawn."""

from pathlib import Path
from typing import Any

from jaxlm.artifacts.processes import is_main_process
from jaxlm.core.errors import UserError


def new_axes(size: tuple[float, float]) -> Any:
    """Return the axes of a new figure of `size` inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots: need matplotlib. pip install 'jaxlm[plots]'.") from None
    return Figure(figsize=size, layout="constrained").subplots()


def save_figure(axes: Any, path: Path) -> Path:
    """Save the figure of `axes` from the main process, and return its path."""
    if not is_main_process():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")
    return path
