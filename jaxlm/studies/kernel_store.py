"""Kernels of a task, computed once and stored in a folder if one is given."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.artifacts.files import report_write_errors
from jaxlm.artifacts.processes import to_host
from jaxlm.core import paths
from jaxlm.kernels import KernelOptions, ntk, saved_ntk
from jaxlm.kernels.empirical import DEFAULT
from jaxlm.kernels.kinds import Kind
from jaxlm.studies.kernel_task import KernelTask, Split, joined
from jaxlm.train.state import Program


def draw_name(prompt: bool, k: int | None, seed: int) -> str:
    """Return the name of a prompt and of the examples that a seed draws.

    >>> draw_name(True, 16, 0)
    'prompt-k16-seed0'
    """
    return f"{'prompt' if prompt else 'no-prompt'}-k{k}-seed{seed}"


class Kernels:
    """Kernels at the pretrained parameters of a task's model.

    Attributes:
        task: model and examples.
        folder: where they are stored, each with a manifest; None keeps them in memory.
        kinds: name to a `kind` of `jaxlm.kernels.ntk`, for kinds with settings of their own.
        select, options: of `jaxlm.kernels.ntk`.
    """

    def __init__(
        self,
        task: KernelTask,
        folder: Path | None = None,
        *,
        kinds: Mapping[str, Kind] | None = None,
        select: paths.Select = None,
        options: KernelOptions = DEFAULT,
    ):
        self.task, self.folder, self.kinds = task, folder, kinds or {}
        self.settings: dict[str, Any] = {"select": select, "options": options}
        self._known: dict[tuple[str, ...], np.ndarray] = {}

    def of(self, kind: str, split: Split) -> np.ndarray:
        """Return the kernel of a split with the training examples, [M, C, N, C]."""
        params = self.task.lm.params
        return self._once((kind, split), lambda: self._compute(params, kind, split, self.folder))

    def flipped(self, kind: str, split: Split) -> np.ndarray:
        """Return the kernel of the training examples with a split, [N, C, M, C]."""

        def compute() -> np.ndarray:
            train, params = self.task.whole("train"), self.task.lm.params
            parts = []
            for i, (places, x) in enumerate(self.task.groups(split)):
                place = self.folder and self.folder / f"{kind}-{split}-{i}-flipped"
                parts.append((places, self._ntk(params, kind, train, x, place)))
            return joined(parts, 2)

        return self._once((kind, split, "flipped"), compute)

    def f0(self, split: Split) -> np.ndarray:
        """Return the function at a split, [M, C]."""
        task = self.task
        return self._once(
            ("f0", split), lambda: task.values(Program(task.f), split, task.lm.params)
        )

    def at(self, params: Any, kind: str, split: Split) -> np.ndarray:
        """Return the kernel at other parameters, as `of`, without keeping it."""
        return self._compute(params, kind, split, None)

    def _compute(self, params: Any, kind: str, split: Split, folder: Path | None) -> np.ndarray:
        train = self.task.whole("train")
        if split == "train":
            return self._ntk(params, kind, train, None, folder and folder / f"{kind}-{split}")
        parts = []
        for i, (places, x) in enumerate(self.task.groups(split)):
            place = folder and folder / f"{kind}-{split}-{i}"
            parts.append((places, self._ntk(params, kind, x, train, place)))
        return joined(parts, 0)

    def _ntk(self, params: Any, kind: str, x1: Any, x2: Any, place: Path | None) -> np.ndarray:
        settings = {"kind": self.kinds.get(kind, kind), **self.settings}
        if place is None:
            return to_host(ntk(self.task.f, params, x1, x2, **settings))
        settings["template"] = self.task.description
        with report_write_errors(place):
            return to_host(saved_ntk(place, self.task.f, params, x1, x2, **settings))

    def _once(self, key: tuple[str, ...], compute: Callable[[], np.ndarray]) -> np.ndarray:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]
