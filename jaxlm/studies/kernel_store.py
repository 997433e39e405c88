"""Kernels of a task: computed once, stored where there is a folder, found there again."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.studies.kernel_task import KernelTask, Split


class Kernels:
    """Kernels at the first parameters of a task's model.

    Attributes:
        task: model and examples.
        folder: where they are stored; None keeps them in memory alone.
    """

    def __init__(self, task: KernelTask, folder: Path | None = None, **options: Any):
        """`options` go to `jaxlm.kernels.ntk`: method, select, block_size, mesh."""
        self.task, self.folder, self.options = task, folder, options
        self._known: dict[tuple[str, ...], np.ndarray] = {}

    def of(self, kind: str, split: Split) -> np.ndarray:
        """Of the examples of a split with the training examples, [M, C, N, C]."""
        return self._remember((kind, split), lambda: self.at(self.task.lm.params, kind, split))

    def flipped(self, kind: str, split: Split) -> np.ndarray:
        """Of the training examples with those of a split, [N, C, M, C]."""
        params = self.task.lm.params
        return self._remember((kind, split, "flipped"), lambda: self._flipped(params, kind, split))

    def f0(self, split: Split) -> np.ndarray:
        """The function of a split, [M, C]."""
        f = jax.jit(self.task.f)
        values = lambda: self.task.values(f, split, self.task.lm.params)  # noqa: E731
        return self._remember(("f0", split), values)

    def at(self, params: Any, kind: str, split: Split) -> np.ndarray:
        """The kernel at other parameters, computed and not kept; as `of`."""
        from jaxlm.kernels import ntk

        train = self.task.whole("train")
        if split == "train":
            other = train if kind == "asymmetric_signgd" else None
            return np.asarray(ntk(self.task.f, params, train, other, kind=kind, **self.options))
        rows = [
            (index, np.asarray(ntk(self.task.f, params, x, train, kind=kind, **self.options)))
            for index, x in self.task.groups(split)
        ]
        return _sorted(rows, 0)

    def _flipped(self, params: Any, kind: str, split: Split) -> np.ndarray:
        from jaxlm.kernels import ntk

        train = self.task.whole("train")
        parts = [
            (index, np.asarray(ntk(self.task.f, params, train, x, kind=kind, **self.options)))
            for index, x in self.task.groups(split)
        ]
        return _sorted(parts, 2)

    def _remember(self, key: tuple[str, ...], compute: Any) -> np.ndarray:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


def _sorted(parts: list[tuple[np.ndarray, np.ndarray]], axis: int) -> np.ndarray:
    index = np.concatenate([each for each, _ in parts])
    joined = np.concatenate([block for _, block in parts], axis=axis)
    return np.take(joined, np.argsort(index), axis=axis)
