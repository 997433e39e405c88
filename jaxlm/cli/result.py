"""The result of a run in Python: its summary, its metrics, its model and its curves."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxlm.artifacts.processes import is_main_process
from jaxlm.models import LanguageModel
from jaxlm.studies.figures import learning_curve, save_figure
from jaxlm.train.load import load_model
from jaxlm.train.run import RunConfig
from jaxlm.train.run_folder import RunFolder

CURVE = "learning_curve.png"


@dataclass(frozen=True)
class RunResult:
    """A finished run; its metrics and its model are read from its folder on first use.

    Attributes:
        folder: the run's folder.
        summary: the content of its `summary.json`.
        mesh: the mesh of `model`; None for one device.
    """

    folder: Path
    summary: dict[str, Any]
    mesh: Mesh | None = None

    @cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """The metrics of every step by name; see `jaxlm.train.logging.Metrics.arrays`."""
        return RunFolder(self.folder).metrics.arrays()

    @cached_property
    def model(self) -> LanguageModel:
        """The model with the parameters that were tested, in the dtype of the run."""
        dtype = self.summary["config"].get("param_dtype", "float32")
        return load_model(self.folder, param_dtype=dtype, mesh=self.mesh)

    def plot(self, axes: Any = None) -> Any:
        """Plot the training loss and the validation results; return the matplotlib axes.

        Args:
            axes: where to draw; by default a new figure.

        Raises:
            UserError: matplotlib is not installed.
        """
        return learning_curve(self.metrics, axes=axes)


def finished(config: RunConfig, summary: dict[str, Any], mesh: Mesh | None) -> RunResult:
    """Return the result of a run, and draw its learning curve if matplotlib is installed."""
    folder = RunFolder(config.output)
    result = RunResult(folder.path.absolute(), summary, mesh)
    curve = folder.path / CURVE
    if is_main_process() and not _newer(curve, folder.metrics.path):
        try:
            save_figure(result.plot(), curve)
        except Exception:  # a picture is a courtesy: whatever fails, the run has succeeded
            return result
    return result


def _newer(one: Path, other: Path) -> bool:
    return one.exists() and one.stat().st_mtime >= other.stat().st_mtime
