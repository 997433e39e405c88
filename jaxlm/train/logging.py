"""Metrics, log and progress of a run."""

import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from jaxlm.artifacts.files import append_jsonl, read_jsonl, report_write_errors, write_jsonl
from jaxlm.artifacts.processes import is_main_process


def numbers(values: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the numbers among the values."""
    return {name: x for name, x in values.items() if isinstance(x, int | float)}


def shown(values: Mapping[str, Any]) -> str:
    """Return the numbers among the values, as a line of the log has them."""
    return "  ".join(f"{name} {value:.4f}" for name, value in numbers(values).items())


class Metrics:
    """metrics.jsonl: one JSON object a line, each with its `step`.

    Functions in `writers` send a line elsewhere, too; see `jaxlm.train.writers`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.writers: list[Callable[[Mapping[str, Any]], None]] = []

    def append(self, *records: Mapping[str, Any]) -> None:
        """Append lines; they are on disk when this returns."""
        if is_main_process():
            append_jsonl(self.path, records)
            for write in self.writers:
                for record in records:
                    write(record)

    def cut(self, step: int | None) -> None:
        """Keep the lines up to `step`, none if it is None; an incomplete last line is dropped."""
        lines = self.read() if step is not None else []
        write_jsonl(self.path, [line for line in lines if line["step"] <= (step or 0)])

    def read(self) -> list[dict[str, Any]]:
        """Read the complete lines of the file; none if there is no file."""
        try:
            return read_jsonl(self.path, step=int)
        except FileNotFoundError:
            return []

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the metrics by name, each with a row for every measured step.

        `step` is [N]; the others are float64 [N], or [N, K] for K numbers a step, and NaN at the
        steps where they were not measured. Lists of names and numbers are left out.
        """
        rows: dict[int, dict[str, Any]] = {}
        for line in self.read():
            rows.setdefault(line["step"], {}).update(line)
        some = {
            name: value
            for row in rows.values()
            for name, value in row.items()
            if np.ndim(value) < 2 and np.shape(value) != (0,)
        }
        columns = {
            name: [row.get(name, np.full(np.shape(value), np.nan)) for row in rows.values()]
            for name, value in some.items()
        }
        arrays = {name: np.array(column, np.float64) for name, column in columns.items()}
        return {**arrays, "step": np.array(list(rows), np.int64)}

    def first(self) -> dict[str, Any] | None:
        """Return what was measured before the first step; None if there is no such line."""
        rows = self.read()
        return rows[0] if rows and rows[0]["step"] == 0 else None

    def put_first(self, record: Mapping[str, Any]) -> None:
        """Write what was measured before the first step, in front of the other lines."""
        lines = [record, *(line for line in self.read() if "loss" in line or line["step"])]
        write_jsonl(self.path, lines)


SILENCE = 30.0
"""Longest time between two plain lines of a run, in seconds."""


class Progress:
    """Progress of a run: a live line on a terminal, plain lines elsewhere; the log keeps both.

    A plain line gives the step, the loss, the rate and the time left.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        log: Path | None = None,
        quiet: bool = False,
        unit: str = "step",
    ):
        self.total = total
        self.unit = unit
        self.log = log
        self._quiet = quiet
        self._stream: TextIO = sys.stderr
        self._live: Any = None
        self._last = 0.0
        self._begin = self._reached = (time.perf_counter(), start)
        self._rate = 0.0
        self._shown = ""
        self._said = time.perf_counter()
        self._left = threading.Event()

    def __enter__(self) -> "Progress":
        if not self._quiet and is_main_process() and self._stream.isatty():
            from rich import progress as bars
            from rich.console import Console

            columns = (
                bars.TextColumn(self.unit),
                bars.MofNCompleteColumn(),
                bars.BarColumn(bar_width=24),
                bars.TextColumn("{task.fields[line]}", markup=False),
                bars.TimeRemainingColumn(),
            )
            self._live = bars.Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._live.add_task(
                "", total=self.total, completed=self._begin[1], line=""
            )
            self._live.start()
        elif not self._quiet and is_main_process():
            threading.Thread(target=self._speak, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, values: Mapping[str, float], peak_bytes: int = 0) -> None:
        """Show the state of the run after `step` steps; plain lines come every few seconds."""
        begin, first = self._begin
        now = time.perf_counter()
        self._rate = (step - first) / max(now - begin, 1e-9)
        if not self._shown:  # the first steps include compilation
            self._begin = (now, step)
        parts = [f"{name} {value:.4g}" for name, value in values.items()]
        parts.append(f"{self._rate:.3g} {self.unit}s/s")
        if peak_bytes:
            parts.append(f"{peak_bytes / 2**20:.0f} MiB")
        self._reached, self._shown = (now, step), "  ".join(parts)
        if self._live is not None:
            self._live.update(self._task, completed=step, line=self._shown)
        if self._due() or step == self.total:
            self.say(self._state(), screen=self._live is None)

    def _state(self) -> str:
        """Return the last state of the run in words, with the time left from now."""
        then, step = self._reached
        line = f"{self.unit} {step}/{self.total}  {self._shown}".rstrip()
        if step == self.total or not self._rate:
            return line
        left = (self.total - step) / self._rate - (time.perf_counter() - then)
        return f"{line}  {timedelta(seconds=max(0, round(left)))} left"

    def _speak(self) -> None:
        """Write the state after every `SILENCE` seconds without output, until the exit.

        It runs in a thread, because one dispatch or one compilation may take minutes.
        """
        while not self._left.wait(max(0.01, self._said + SILENCE - time.perf_counter())):
            if time.perf_counter() - self._said >= SILENCE:
                self.say(self._state())

    def waiting(self, what: str) -> None:
        """Show what a run does between its steps; plain lines come every few seconds."""
        if self._live is not None:
            self._live.update(self._task, line=what)
        elif self._due():
            self.say(what)

    def _due(self) -> bool:
        now = time.perf_counter()
        due = now - self._last > 5
        if due:
            self._last = now
        return due

    def say(self, line: str, *, screen: bool = True) -> None:
        """Write a line to the log and, if `screen` is True, to the screen."""
        if not is_main_process():
            return
        if self.log is not None:
            with report_write_errors(self.log), self.log.open("a", encoding="utf-8") as file:
                file.write(time.strftime("%Y-%m-%d %H:%M:%S  ") + line + "\n")
        if screen and not self._quiet:
            self._said = time.perf_counter()
            if self._live is not None:
                self._live.console.print(line, highlight=False, markup=False)
            else:
                print(line, file=self._stream, flush=True)
