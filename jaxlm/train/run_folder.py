"""A run's folder: `config.yaml`, `metrics.jsonl`, `summary.json`, `checkpoints/`, `log.txt`.

A zeroth-order run has a `trajectory.zo` too.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.artifacts.files import write_shared
from jaxlm.artifacts.files import write_json
from jaxlm.train.logging import Metrics


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values for YAML and JSON: tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return cast(dict[str, Any], plain(dataclasses.asdict(config)))


def differences(old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every key in which two configurations differ."""
    olds, news = (
        dict(_dotted(to_dict(config) if dataclasses.is_dataclass(config) else config))
        for config in (old, new)
    )
    for key in sorted(olds.keys() | news.keys()):
        if olds.get(key) != news.get(key):
            yield key, olds.get(key), news.get(key)


class RunFolder:
    """A run on disk. Nothing is written before `create`.

    Attributes:
        path: the folder.
        metrics: its `metrics.jsonl`.
        log: path of its `log.txt`.
        checkpoints: path of its checkpoints.
        trajectory: path of its `trajectory.zo`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metrics = Metrics(self.path / "metrics.jsonl")
        self.log = self.path / "log.txt"
        self.checkpoints = self.path / "checkpoints"
        self.trajectory = self.path / "trajectory.zo"

    def check(self, config: Any) -> None:
        """Refuses a place that cannot hold this run, without touching it.

        Raises:
            UserError: the folder cannot be written, holds other things, or a run of another
                configuration; that one is refused by the first key that differs. `output` may
                differ.
        """
        there = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            what = "a folder that cannot be written" if there.is_dir() else "no folder"
            raise UserError(f"output {self.path}: {there} is {what}: choose another output.")
        stored = self.config()
        if stored is None:
            if there == self.path and any(p.suffix != ".tmp" for p in self.path.iterdir()):
                raise UserError(
                    f"output {self.path}: the folder has files but no run: choose another output."
                )
            return
        for key, old, new in differences(stored, to_dict(config)):
            if key != "output":
                raise UserError(
                    f"output {self.path}: the run there has {key} = {json.dumps(old)}, not "
                    f"{json.dumps(new)}: choose another output or remove the folder."
                )

    def create(self, config: Any) -> None:
        """Makes the folder with its `config.yaml`, where it is not there yet."""
        import yaml

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
            write_shared(self.path / "config.yaml", text, once=True)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"output {self.path}: cannot be written ({reason}): choose another output."
            ) from error

    def config(self) -> dict[str, Any] | None:
        """The stored configuration, or None."""
        import yaml

        file = self.path / "config.yaml"
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None

    def option_offsets(self) -> np.ndarray | None:
        """What the run takes from the score of each option, [C]; None where it takes nothing."""
        rows = self.metrics.read() if self.metrics.path.exists() else []
        offsets = rows[0].get("option_offsets") if rows else None
        return None if offsets is None else np.asarray(offsets, np.float32)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`; the run is then finished."""
        write_json(self.path / "summary.json", summary)

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None."""
        file = self.path / "summary.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
