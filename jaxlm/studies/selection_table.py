"""The table of a study of selections: what each method chose, and what that did for the target."""

import statistics
from typing import Any

from jaxlm.studies.tables import aligned, percent, shown, spread


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each method, means over the seeds.

    Args:
        found: as `jaxlm.studies.selection.selection_study` returns it.

    Returns:
        `{"method", "rows", "sources", "noise", "mean", "std", "by_seed"}`: how many rows are
        chosen, the share of each source and of noise among them, and the target's metric. The first
        row is of all rows without training.
    """
    pool = found["pool"]
    table = [
        {
            "method": "no training",
            "rows": pool["rows"],
            "sources": {name: n / pool["rows"] for name, n in pool["sources"].items()},
            "noise": pool["noise"] / pool["rows"],
            **spread([pool["before"]]),
        }
    ]
    for method in dict.fromkeys(run["method"] for run in found["runs"]):
        runs = [run for run in found["runs"] if run["method"] == method]
        values = [run["value"] for run in runs]
        table.append(
            {
                "method": method,
                "rows": runs[0]["rows"],
                "sources": {
                    name: statistics.fmean(run["sources"][name] / run["rows"] for run in runs)
                    for name in pool["sources"]
                },
                "noise": statistics.fmean(run["noise"] / run["rows"] for run in runs),
                **spread(values),
            }
        )
    return table


def markdown(found: dict[str, Any]) -> str:
    """The table as Markdown that is also aligned for a terminal."""
    pool, table = found["pool"], rows(found)
    accuracy = pool["metric"] == "accuracy"
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(run["seed"] for run in found["runs"]))
    what = "accuracy in per cent" if accuracy else "loss in nats a token, lower is better"
    said = (
        f"Rows chosen of {pool['rows']} with {pool['target']} target examples; shares of the "
        f"sources and of rows with another label than their own in per cent; {what}, "
        f"mean (standard deviation) over the seeds {seeds}."
    )
    header = ("method", "rows", *pool["sources"], "wrong label", pool["metric"])
    cells = [
        (
            each["method"],
            str(each["rows"]),
            *(f"{100 * share:.1f}" for share in each["sources"].values()),
            f"{100 * each['noise']:.1f}",
            percent(each) if accuracy else shown(each),
        )
        for each in table
    ]
    return f"{said}\n\n{aligned(header, cells)}\n"
