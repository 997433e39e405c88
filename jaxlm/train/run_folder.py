"""A run's folder: `config.yaml`, `metrics.jsonl`, `summary.json`, `checkpoints/`, `log.txt`.

A zeroth-order run also has `trajectory.zo`, and every run `data.json`: digests of what it reads.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from jaxlm.artifacts import folder as artifacts
from jaxlm.artifacts.arrays import read_arrays, write_arrays
from jaxlm.artifacts.files import (
    file_path,
    read_json,
    read_text,
    report_write_errors,
    write_json,
    write_shared,
)
from jaxlm.artifacts.folder import check_place, hold, make_folder
from jaxlm.artifacts.processes import barrier, is_main_process
from jaxlm.core.checks import show
from jaxlm.core.errors import UserError
from jaxlm.data import DATA_FORMS
from jaxlm.data.rows import SPLITS, SplitName
from jaxlm.train.logging import Metrics

FREE = ("output", "log_to")
"""Keys that change nothing in the results of a run."""
NAMES = (
    *("model", "tokenizer", "corpus.path", "objective.reference", "forget.retain"),
    *(f"{form}.{split}" for form in DATA_FORMS for split in SPLITS),
)
"""Keys that say where a run finds what it reads. Its digests must stay, so these may change."""


class Digest(NamedTuple):
    """The name of something that a run reads, as it is now, and a SHA-256 of its content."""

    name: str
    sha256: str


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values for YAML and JSON: tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return cast(dict[str, Any], plain(dataclasses.asdict(config)))


def differences(old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, old value, new value) for every key in which configurations differ."""
    pair = (to_dict(each) if dataclasses.is_dataclass(each) else each for each in (old, new))
    return artifacts.differences(*pair)


class RunFolder:
    """A run on disk. Nothing is written before `held`.

    Attributes:
        path: the folder; `key` names the option that gave it, for messages.
        metrics: its `metrics.jsonl`.
        log: path of its `log.txt`.
        checkpoints: path of its checkpoints.
        trajectory: path of its `trajectory.zo`.
    """

    def __init__(self, path: str | Path, key: str = "output"):
        self.path = file_path(path, key)
        self.metrics = Metrics(self.path / "metrics.jsonl")
        self.log = self.path / "log.txt"
        self.checkpoints = self.path / "checkpoints"
        self.trajectory = self.path / "trajectory.zo"
        self._data = self.path / "data.json"
        self._summary = self.path / "summary.json"
        self._columns = self.path / "columns.safetensors"

    def check(self, config: Any) -> None:
        """Refuse a folder that cannot hold this run, without writing to it.

        It may hold a run that has begun with the same configuration: only `output` and `log_to` may
        differ; `NAMES`, whose digests `held` compares; and `steps` if the steps already done stay
        the same.
        """
        check_place(self.path, "config.yaml", "run")
        stored = self.config()
        if stored is None:
            check_place(self.path, None, "run")  # a model folder may have a config.yaml, too
            return
        if not self._begun():
            return
        # Epochs are compared as the steps that they are, once the data are read.
        counted = () if getattr(config, "epochs", None) is None else ("epochs", "steps")
        for key, old, new in differences(stored, to_dict(config)):
            if key in FREE or key in NAMES or key in counted:
                continue
            why = self._why_fixed(stored, config) if key == "steps" else None
            if key != "steps" or why is not None:
                reason = f", since {why}" if why else ""
                todo = "Choose another output or remove the folder."
                if why and new > old:
                    todo = f"Go on from its result with --model={self.path} in another output."
                raise UserError(
                    f"output: the run in {self.path} has {key} = {show(old)} (got {show(new)}), "
                    f"which cannot change{reason}. {todo}"
                )

    def has_other_names(self, config: Any) -> bool:
        """Return whether a configuration finds what the run read in other places."""
        found = differences(self.config() or {}, to_dict(config))
        # A name that is not found is as it was typed: what it named may be gone.
        return bool(self.digests()) and any(
            key in NAMES and not str(old).endswith(f"/{new}") for key, old, new in found
        )

    def digests(self) -> dict[str, str]:
        """Return the digests of what the run reads, by key; empty before it began."""
        return read_json(self._data) if self._data.exists() else {}

    def _begun(self) -> bool:
        """Return whether the run has done a step or is finished."""
        return self._summary.exists() or bool(self.latest_step())

    def _stored(self) -> Any:
        from jaxlm.train.checkpoint import Checkpoints

        return Checkpoints(self.checkpoints, read_only=True)

    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint, or None."""
        return self._stored().latest_step

    def best_params(self) -> Any | None:
        """Return the parameters that are tested; None if there is no checkpoint."""
        return self._stored().best_params()

    def resume(self) -> int | None:
        """Cut the metrics back to the newest checkpoint and return its step, or None."""
        step = self.latest_step()
        self.metrics.cut(step)
        return step

    def tested_step(self) -> tuple[int, int] | None:
        """Return the step whose parameters are the result, and the number of steps of the run.

        It is None if there is no run, or nothing of it but its configuration.
        """
        if (stored := self.config()) is None:
            return None
        if not isinstance(steps := stored.get("steps"), int):
            raise self.foreign()
        step = self._stored().best_step()
        if step is None:
            return (steps, steps) if self.trajectory.exists() else None
        return step, steps

    def _why_fixed(self, stored: Mapping[str, Any], config: Any) -> str | None:
        """Return why the number of steps of a run cannot change; None if it can."""
        steps, optimizer = stored.get("steps"), stored.get("optimizer")
        if not isinstance(steps, int) or not isinstance(optimizer, dict):
            raise self.foreign()
        done = self.latest_step() or (steps if self._summary.exists() else 0)
        if config.steps < done:
            return f"{done} are done"
        if config.optimizer.needs_steps:
            return "the schedule of its learning rate depends on them"
        if stored.get("dynamics") or "corpus" in stored:
            return "its data or its dynamics depend on them"
        return None

    @contextlib.contextmanager
    def held(self, config: Any, digests: Mapping[str, Digest] | None = None) -> Iterator[None]:
        """Create the folder, lock it against other processes, and write `config.yaml`.

        A new folder is removed again if the start fails before there is any work in it. The files
        of a run that has done no step are removed if its configuration or `digests`, of all that
        it reads, were other ones; a run that has done a step refuses other digests.
        """
        import yaml

        with make_folder(self.path, "config.yaml", "data.json", "tokens"), hold(self.path):
            self.check(config)
            stored, begun, known = self.config(), self._begun(), self.digests()
            digests = digests or {}
            if begun and digests:
                gone = dict.fromkeys(known.keys() - digests.keys(), Digest("nothing", ""))
                self.check_unchanged(gone | dict(digests))
            new = {key: digest.sha256 for key, digest in digests.items()}
            found = [] if stored is None else differences(stored, to_dict(config))
            changed = {key for key, _, _ in found} - {*FREE}
            anew = not begun and (bool(changed) or known not in ({}, new))
            barrier(f"{self.path} is read")  # by every process, before the first one writes
            with report_write_errors(self.path):
                if is_main_process() and (anew or changed - {*NAMES}):
                    self._clear(whole=not begun)
                if stored is None or changed:
                    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
                    write_shared(self.path / "config.yaml", text)
            if digests and (anew or not known):
                write_json(self._data, new)
            yield

    def columns(
        self, make: Callable[[], dict[SplitName, dict[str, np.ndarray]]]
    ) -> dict[SplitName, dict[str, np.ndarray]]:
        """Return what an objective computes of each example before the first step, once.

        It is kept in `columns.safetensors`: the model has changed when the run resumes.
        """
        if not self._columns.exists():
            columns = make()
            flat = {f"{split}.{k}": x for split, rows in columns.items() for k, x in rows.items()}
            if flat:
                write_arrays(self._columns, flat)
            return columns
        flat = read_arrays(self._columns)
        columns = {split: {} for split in SPLITS}
        for name, values in flat.items():
            split, _, key = name.partition(".")
            columns[cast(SplitName, split)][key] = values
        return columns

    def _clear(self, *, whole: bool) -> None:
        """Remove the summary, or with `whole` all results of the run."""
        self._summary.unlink(missing_ok=True)
        if whole:
            for name in ("checkpoints", "model", "tensorboard", "wandb"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for file in (self.metrics.path, self.trajectory, self._data, self._columns):
                file.unlink(missing_ok=True)

    def check_unchanged(self, digests: Mapping[str, Digest]) -> None:
        """Raise UserError if one of these digests is not the one that the run began with."""
        known = self.digests()
        for key, (name, sha256) in digests.items():
            if known and known.get(key) != sha256:
                raise UserError(
                    f"{key}: has changed since the run in {self.path} began (got {name}). Put back "
                    "what was there, say where it is, or choose another output to start anew."
                )

    def config(self) -> dict[str, Any] | None:
        """Return the stored configuration, or None if there is none.

        A `config.yaml` beside a `config.json` belongs to a model and not to a run.
        """
        import yaml

        file = self.path / "config.yaml"
        if not file.exists() or (self.path / "config.json").exists():
            return None
        try:
            stored = yaml.safe_load(read_text(file))
        except UserError:
            raise
        except (yaml.YAMLError, RecursionError, ValueError):
            stored = None
        if not isinstance(stored, dict) or not isinstance(stored.get("output"), str):
            raise self.foreign()
        return stored

    def foreign(self) -> UserError:
        """Return the error for a `config.yaml` that is not that of a run."""
        return UserError(
            f"{self.path / 'config.yaml'}: is damaged, or not that of a run of jaxlm. Put back "
            "what was there, or choose another folder."
        )

    def option_offsets(self) -> np.ndarray | None:
        """Return the offsets that the run subtracts from option scores, [C], or None."""
        if (offsets := (self.metrics.first() or {}).get("option_offsets")) is None:
            return None
        try:
            found = np.asarray(offsets, np.float32)
            shape = (len((self.config() or {})["task"]["labels"]),)
            if found.shape == shape and np.isfinite(found).all():
                return found
        except (KeyError, TypeError, ValueError, OverflowError):
            pass
        raise UserError(
            f"{self.metrics.path}: option_offsets must be a number for each of the task's labels "
            f"(got {show(offsets)}). Put back what was there."
        )

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`; the run is then finished."""
        write_json(self._summary, summary)

    def summary(self, **fields: Any) -> dict[str, Any] | None:
        """Return the summary of a finished run, or None; for `fields` see `read_json`."""
        try:
            return read_json(self._summary, **fields)
        except FileNotFoundError:
            return None
        except UserError as error:
            reason = str(error).removeprefix(f"{self._summary}: ").partition(".")[0]
            raise UserError(
                f"{self._summary}: is damaged ({reason}). Remove it: the same command then writes "
                "it again from the last checkpoint."
            ) from None
