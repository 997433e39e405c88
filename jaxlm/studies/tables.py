"""Tables of studies: means over seeds, Markdown aligned for a terminal, files."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.artifacts.files import report_write_errors, write_json, write_shared

TABLES = ("table.json", "table.md")


def write_tables(folder: Path, table: Mapping[str, Any], text: str) -> str:
    """Write a table as JSON and as Markdown, and return the Markdown."""
    write_json(folder / TABLES[0], table)
    with report_write_errors(folder / TABLES[1]):
        write_shared(folder / TABLES[1], text)
    return text


def mean(values: Iterable[float | int | None]) -> float | None:
    """Return the mean of the values that are not None; None if all are.

    >>> mean([0.25, None, 0.75])
    0.5
    """
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Return mean and sample standard deviation of the values that are not None, and all values.

    >>> spread([0.5, None])
    {'mean': 0.5, 'std': None, 'by_seed': [0.5, None]}
    """
    known = [value for value in values if value is not None]
    std = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": mean(known), "std": std, "by_seed": list(values)}


def spreads(values: Sequence[Any]) -> Any:
    """Return `spread` of every number of nested dicts and lists that are alike, in their order.

    >>> spreads([{"b": 0.5, "a": [1.0]}, {"b": 0.5, "a": [1.0]}])["b"]
    {'mean': 0.5, 'std': 0.0, 'by_seed': [0.5, 0.5]}
    """
    first = values[0]
    if isinstance(first, Mapping):
        return {key: spreads([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [spreads(each) for each in zip(*values, strict=True)]
    return spread(values)


def shown(
    spread: Mapping[str, Any] | None, *, scale: float | int = 1, digits: int = 3, missing: str = ""
) -> str:
    """Return mean and standard deviation as text.

    >>> shown({"mean": 0.5, "std": 0.25})
    '0.500 (0.250)'
    """
    if spread is None or spread["mean"] is None:
        return missing
    std = "" if spread["std"] is None else f" ({scale * spread['std']:.{digits}f})"
    return f"{scale * spread['mean']:.{digits}f}{std}"


def percent(spread: Mapping[str, Any] | None) -> str:
    """Return mean and standard deviation in per cent.

    >>> percent({"mean": 0.9, "std": 0.0125})
    '90.0 (1.2)'
    """
    return shown(spread, scale=100, digits=1)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table in columns of equal width.

    >>> print(aligned(("a", "bc"), [("x", "1")]))
    | a | bc |
    |---|----|
    | x | 1  |
    """
    # A bar would end a cell, and a line break its row.
    cells = [[" ".join(t.replace("|", "\\|").splitlines()) for t in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    lines = [
        f"| {' | '.join(text.ljust(width) for text, width in zip(row, widths, strict=True))} |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def size(count: float | int) -> str:
    """Return a number of bytes as text, in powers of 1000.

    >>> size(17_700_000_000)
    '17.7 GB'
    """
    unit = 0
    while count >= 999.5 and unit < 5:
        count, unit = count / 1000, unit + 1
    return f"{count:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[unit]}"
