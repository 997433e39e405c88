"""Results of benchmarks: headlines, and tables in Markdown."""

import itertools
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Figure(NamedTuple):
    """A column that sums up the result of a benchmark.

    Attributes:
      says: what its numbers are.
      column: column of the rows: a number, a list (its mean is taken) or a mapping (each value).
      by: columns that tell the rows apart, separated by spaces.
      only: a regular expression that the name of a row must match.
    """

    says: str
    column: str
    by: str
    only: str = ""

    def read(self, rows: Iterable[Row]) -> dict[tuple[str, ...], float]:
        """Return the numbers of all rows that have one, by the parts of the rows' names."""
        found = {}
        for row in rows:
            value, columns = row.get(self.column), self.by.split()
            if value is None or not row.keys() >= set(columns):
                continue
            name = tuple(_part(column, row[column]) for column in columns)
            each = value.items() if isinstance(value, Mapping) else [("", value)]
            for last, number in each:
                whole = (*name, last) if last else name
                if re.search(self.only, ", ".join(whole)):
                    found[whole] = _mean(number)
        return found

    def line(self, rows: Iterable[Row]) -> str:
        """Return all numbers on one line; parts that all names share appear once."""
        found = self.read(rows)
        kept = [len(set(parts)) > 1 for parts in zip(*found, strict=False)]
        if not any(kept):
            kept = [True] * len(kept)
        cells, shared = [], ""
        for name, number in found.items():
            own = ", ".join(part for part, keep in zip(name, kept, strict=False) if keep)
            shared = ", ".join(part for part, keep in zip(name, kept, strict=False) if not keep)
            cells.append(f"{own} **{_short(number)}**")
        return f"{self.says}{f' ({shared})' if shared else ''}: {'; '.join(cells)}"


class Result(NamedTuple):
    """The result of running a benchmark.

    Attributes:
      benchmark: its name.
      question: the first line of its docstring.
      outcome: "passed", "failed", "timed out" or "skipped".
      reason: the last line of its error, or why it was skipped.
      exit_code: exit code of its process; None if it did not run to its end.
      seconds: wall-clock seconds.
      cpu_s: CPU seconds.
      notes: printed lines about missing packages.
      report: its last line: benchmark, device, versions and rows.
    """

    benchmark: str
    question: str
    outcome: str
    reason: str = ""
    exit_code: int | None = None
    seconds: float = 0.0
    cpu_s: float = 0.0
    notes: tuple[str, ...] = ()
    report: Mapping[str, Any] = {}

    @property
    def rows(self) -> Sequence[Row]:
        """Rows of its tables."""
        return self.report.get("rows", ())

    @property
    def went_wrong(self) -> bool:
        """Whether the suite fails because of it."""
        return self.outcome in ("failed", "timed out")

    def as_json(self) -> dict[str, Any]:
        """Return its entry in results.json."""
        own = {name: getattr(self, name) for name in self._fields[1:-1]}
        return {**own, "device": self.report.get("device"), "rows": self.rows}


def device_of(results: Iterable[Result]) -> str:
    """Return the device of most reports."""
    found = [result.report["device"] for result in results if result.report]
    return statistics.mode(found) if found else "no device"


def versions_of(results: Iterable[Result]) -> dict[str, str]:
    """Return the versions in the first report; all share one environment."""
    return next((dict(each.report["versions"]) for each in results if each.report), {})


def headline(rows: Sequence[Row], figures: Iterable[Figure]) -> str:
    """Return all figures in one cell of a table."""
    return _escaped("<br>".join(figure.line(rows) for figure in figures if figure.read(rows)))


def markdown(
    results: Sequence[Result],
    figures: Mapping[str, Iterable[Figure]],
    *,
    command: str,
    beside: Mapping[str, Any] | None = None,
) -> str:
    """Return a page: one table of headlines, and below it all rows of each benchmark.

    Args:
      results: results of this run.
      figures: benchmark to its figures.
      command: the command that made the page.
      beside: results.json of another run, whose headlines get a column of their own.
    """
    versions = ", ".join(f"{name} {number}" for name, number in versions_of(results).items())
    columns = ["benchmark", "what it compares", device_of(results)]
    columns += [] if beside is None else [beside["device"]]
    lines = []
    for each in results:
        cells = [f"[{each.benchmark}](#{each.benchmark})", _escaped(each.question)]
        cells.append(headline(each.rows, figures[each.benchmark]) or _outcome(each))
        if beside is not None:
            other = beside["benchmarks"].get(each.benchmark, {}).get("rows", ())
            cells.append(headline(other, figures[each.benchmark]))
        lines.append([*cells, f"{each.seconds:.0f}"])
    page = [
        "# Benchmarks",
        f"`{command}`: {sum(each.seconds for each in results):.0f} seconds on {versions}.",
        _table([*columns, "seconds"], lines),
        *(_section(each) for each in results),
    ]
    return "\n\n".join(page) + "\n"


def _section(result: Result) -> str:
    """Return the section of one benchmark."""
    parts = [f"## {result.benchmark}", _escaped(result.question)]
    if result.outcome != "passed":
        parts.append(_outcome(result))
    parts += [_escaped(note) for note in result.notes]
    for columns, rows in itertools.groupby(result.rows, tuple):
        parts.append(_table(columns, [[_cell(value) for value in row.values()] for row in rows]))
    return "\n\n".join(parts)


def _outcome(result: Result) -> str:
    """Return why there is no headline."""
    code = "" if not result.exit_code else f" with exit code {result.exit_code}"
    reason = f": {result.reason}" if result.reason else ""
    return _escaped(f"{result.outcome}{code}{reason}")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(map(_escaped, columns)), ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    """Return a value as a cell; of a long list only the first and the last."""
    if isinstance(value, Mapping):
        return _few([f"{name}: {_cell(each)}" for name, each in value.items()])
    if isinstance(value, list):
        return _few([_cell(each) for each in value])
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else _escaped(str(value))


def _few(cells: list[str]) -> str:
    return ", ".join(cells if len(cells) <= 3 else [*cells[:1], "...", *cells[-1:]])


def _part(column: str, value: Any) -> str:
    """Return a part of a row's name; numbers are preceded by their column."""
    return value if isinstance(value, str) else f"{column}={_cell(value)}"


def _mean(value: Any) -> float:
    return statistics.fmean(value) if isinstance(value, list) else float(value)


def _short(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
