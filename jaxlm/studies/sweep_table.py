"""A sweep's table as Markdown that is also aligned for a terminal."""

from collections.abc import Sequence
from typing import Any

from jaxlm.studies.sweep import setting_title

METHODS = (
    "method", "setting", "validation", "test", "test, one setting", "zero-shot", "forwards",
    "backwards", "seconds", "MiB",
)  # fmt: skip
TITLES = {"accuracy": "Accuracy", "f1": "F1"}
POINTS = ("method", "setting", "validation", "failed")


def markdown(table: dict[str, Any]) -> str:
    """Two tables: one row for each method, and one for each point of its grid.

    Args:
        table: as `jaxlm.studies.sweep.table` returns it.
    """
    seeds = ", ".join(map(str, table["seeds"]))
    reasons = {
        reason: None
        for point in table["points"]
        for reason in point["failed"]
        if reason is not None
    }
    parts = [
        f"{TITLES[table['metric']]} in per cent, mean (standard deviation) over the seeds {seeds}. "
        "The setting is chosen on validation for each seed, in brackets for how many of them; "
        "beside it, the one setting that is best on validation in the mean.",
        aligned(METHODS, [_method_row(each) for each in table["methods"]]),
        "Every point of the grids:",
        aligned(POINTS, [_point_row(each) for each in table["points"]]),
    ]
    if reasons:
        parts.append("Failed:\n\n" + "\n".join(f"- {reason}" for reason in reasons))
    return "\n\n".join(parts) + "\n"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table in columns of equal width.

    >>> print(aligned(("a", "bc"), [("x", "1")]))
    | a | bc |
    |---|----|
    | x | 1  |
    """
    rows = [[cell(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (text.ljust(width) for text, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def cell(text: str) -> str:
    r"""A text that ends neither the cell nor the row that it stands in.

    >>> cell("a|b")
    'a\\|b'
    """
    return " ".join(text.replace("|", "\\|").splitlines())


def percent(spread: dict[str, Any] | None) -> str:
    """Mean and standard deviation.

    >>> percent({"mean": 0.9, "std": 0.0125})
    '90.0 (1.2)'
    """
    if spread is None or spread["mean"] is None:
        return ""
    std = "" if spread["std"] is None else f" ({100 * spread['std']:.1f})"
    return f"{100 * spread['mean']:.1f}{std}"


def _method_row(method: dict[str, Any]) -> list[str]:
    one, memory = method["one_setting"], method["peak_memory_bytes"]
    cells = [method["method"], _chosen(method["settings"])]
    cells += [percent(method["validation"]), percent(method["test"])]
    cells += [percent(one and one["test"]), percent(method["zero_shot"])]
    for name, form in (("forwards", ".0f"), ("backwards", ".0f"), ("seconds", ".1f")):
        cells.append("" if method[name] is None else format(method[name], form))
    return [*cells, "" if memory is None else f"{memory / 2**20:.0f}"]


def _chosen(settings: list[dict[str, Any] | None]) -> str:
    titles = ["failed" if each is None else setting_title(each) for each in settings]
    counts = {title: titles.count(title) for title in titles if title}
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{title} ({count})" for title, count in counts.items())


def _point_row(point: dict[str, Any]) -> list[str]:
    failed = sum(reason is not None for reason in point["failed"])
    of = f"{failed} of {len(point['failed'])}" if failed else ""
    return [point["method"], setting_title(point["settings"]), percent(point["validation"]), of]
