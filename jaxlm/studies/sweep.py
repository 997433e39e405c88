"""A sweep: every method over its grid and every seed, chosen on validation, in one table.

A method has a grid of candidates, and a candidate has one run for each seed. For each seed the
candidate with the best validation result is chosen, and its test result is reported. Every run has
its own folder, so a stopped sweep can be resumed.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from jax.sharding import Mesh

from jaxlm.artifacts.config import build
from jaxlm.core.checks import distinct, one_of, show
from jaxlm.core.errors import UserError
from jaxlm.studies.baselines import icl_run, probe_run
from jaxlm.studies.grid import (
    GridConfig,
    Outcome,
    Result,
    Say,
    folder_name,
    listing,
    no_seed_or_output,
    outcomes,
    per_seed,
    section_of,
    with_keys,
)
from jaxlm.studies.tables import aligned, mean, shown, spread
from jaxlm.train.finetuning import FinetuneConfig, finetune
from jaxlm.train.run_folder import RunFolder

KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "finetune": finetune,
    "probe": probe_run,
    "icl": icl_run,
}
"""The kinds of method: `(config, *, base_dir, mesh) -> summary`; each writes the run's folder."""


Split = Literal["zero_shot", "validation", "test"]


class Unit(NamedTuple):
    """How to show a metric: `scale` times its value, `digits` decimals; `sign` is -1 for a loss."""

    title: str
    scale: int
    digits: int
    sign: int

    def shown(self, spread: Mapping[str, Any] | None) -> str:
        """Return mean and standard deviation as text."""
        return shown(spread, scale=self.scale, digits=self.digits)


UNITS = {
    "accuracy": Unit("Accuracy in per cent", 100, 1, 1),
    "f1": Unit("F1 in per cent", 100, 1, 1),
    "loss": Unit("Loss in nats a token, lower is better", 1, 3, -1),
}


@dataclass(frozen=True, kw_only=True)
class SweepConfig(GridConfig):
    """The configuration of a sweep. It adds to the keys of `GridConfig`.

    Attributes:
        methods: method name to its keys: those that differ from `run`, `grid` and `kind`.
        grid: dotted key to the list of its values; only without `methods`.
    """

    methods: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)

    study: ClassVar[str] = "sweep"

    def __post_init__(self):
        super().__post_init__()
        if self.grid and self.methods:
            raise UserError(
                f"grid: cannot be given together with methods (got {show(list(self.grid))}). Put "
                "it into the methods that it belongs to."
            )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A point of a method's grid.

    Attributes:
        method: name of the method.
        settings: dotted key to value, the coordinates of the point.
        kind: one of `KINDS`.
        runs: one run for each seed, in order; they differ in seed and output.
    """

    method: str
    settings: dict[str, Any]
    kind: str = "finetune"
    runs: tuple[FinetuneConfig, ...]


def setting_title(settings: dict[str, Any]) -> str:
    """Return dotted keys and values on one line.

    >>> setting_title({"optimizer.learning_rate": "1e-6", "peft": {"name": "lora"}})
    'optimizer.learning_rate=1e-6, peft={"name": "lora"}'
    """
    texts = (value if isinstance(value, str) else json.dumps(value) for value in settings.values())
    return ", ".join(f"{key}={text}" for key, text in zip(settings, texts, strict=True))


def plan(config: SweepConfig, where: str) -> list[Candidate]:
    """Return every point of every grid, with a run for each seed; errors name the file `where`."""
    methods = config.methods or {"": {"grid": config.grid}}
    return [
        candidate
        for name, section in methods.items()
        for candidate in _candidates(config, name, section, where)
    ]


def _candidates(config: SweepConfig, name: str, section: Any, where: str) -> Iterator[Candidate]:
    place = f"{where}: method {name}" if name else where
    section = section_of(section, place)
    kind, grid = section.pop("kind", "finetune"), section.pop("grid", {})
    one_of(f"{place}: kind", kind, tuple(KINDS))
    grid = section_of(grid, f"{place}: grid")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(
                f"{place}: grid.{key}: must be a list (got {show(values)}). Write [a, b]."
            )
        distinct(f"{place}: grid.{key}", values)
    no_seed_or_output(section, f"methods.{name}")
    no_seed_or_output(grid, f"methods.{name}.grid" if name else "grid")
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        data = with_keys(config.run, section | settings, place)
        first = build(FinetuneConfig, {**data, "output": config.output}, place)
        method = name or first.optimizer.name
        folder = Path(config.output, folder_name(method, "methods"))
        if settings:
            folder /= folder_name(setting_title(settings), "grid")
        runs = per_seed(first, folder, config.seeds)
        yield Candidate(method=method, settings=settings, kind=kind, runs=runs)


outline = listing(plan)


def run(
    config: SweepConfig, folder: Path, where: str, *, mesh: Mesh | None = None, say: Say = print
) -> Result:
    """Do the sweep of a file; see `jaxlm.studies.study`."""
    found = sweep(plan(config, where), base_dir=Path(where).parent, mesh=mesh, say=say)
    return Result(found, markdown(found))


def sweep(
    candidates: Sequence[Candidate],
    *,
    base_dir: Path | None = None,
    mesh: Mesh | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Do every run that is not finished, and return the table of all runs, see `table`.

    Candidates of one method must be adjacent. Relative paths of the task are looked up in
    `base_dir` first. `say` is called with a line before each run.
    """
    for each in candidates:
        for config in each.runs:
            if config.data.validation is None:
                raise UserError(
                    f"{config.form}.validation: {each.method} has no examples to choose settings "
                    "by (got none). Name a file of them, or hold_out."
                )
            RunFolder(config.output).check(config)

    def work(candidate: Candidate, config: FinetuneConfig) -> dict[str, Any]:
        return KINDS[candidate.kind](config, base_dir=base_dir, mesh=mesh)

    return table(candidates, outcomes(candidates, work, say))


def table(candidates: Sequence[Candidate], results: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    """Choose settings on validation, and collect the results of each candidate, one for each seed.

    A method has its test result with the setting chosen for each seed (`test`) and with the setting
    of the best mean validation result (`one_setting`). Passes and seconds are means over the chosen
    runs, memory is their maximum. A point has the results of its runs, and why runs failed.
    """
    ended = [result for each in results for result in each if result.summary]
    if not ended:
        reason = results[0][0].failed
        raise UserError(
            f"runs: all of them failed (got, from the first: {reason}). Correct that one."
        )
    metric = str((ended[0].summary or {})["metric"])
    pairs = list(zip(candidates, results, strict=True))
    names = dict.fromkeys(each.method for each in candidates)
    return {
        "metric": metric,
        "seeds": [config.seed for config in candidates[0].runs],
        "methods": [
            _method(name, [p for p in pairs if p[0].method == name], metric) for name in names
        ],
        "points": [_point(*pair) for pair in pairs],
    }


def _method(
    name: str, pairs: list[tuple[Candidate, Sequence[Outcome]]], metric: str
) -> dict[str, Any]:
    def rank(value: float | None) -> float:
        """Higher is better; a missing result ranks last."""
        return float("-inf") if value is None else UNITS[metric].sign * value

    # Ties go to the first candidate, and so does a baseline without a validation result.
    chosen = []
    for seed in range(len(pairs[0][1])):
        ended = [(each, found[seed]) for each, found in pairs if found[seed].summary]
        best = max(ended, key=lambda pair: rank(_value(pair[1], "validation")), default=None)
        chosen.append(best and (best[0].settings, best[0].runs[seed].output, best[1]))
    found = [each[2] for each in chosen if each]
    summaries = [result.summary for result in found if result.summary]
    one = max(
        (pair for pair in pairs if all(result.summary for result in pair[1])),
        key=lambda pair: rank(_over_seeds(pair[1], "validation")["mean"]),
        default=None,
    )
    return {
        "method": name,
        "settings": [each and each[0] for each in chosen],
        "runs": [each and each[1] for each in chosen],
        "zero_shot": _over_seeds(found, "zero_shot"),
        "validation": _over_seeds(found, "validation"),
        "test": _over_seeds(found, "test"),
        "one_setting": one
        and {
            "settings": one[0].settings,
            "validation": _over_seeds(one[1], "validation"),
            "test": _over_seeds(one[1], "test"),
        },
        "failed": sum(result.failed is not None for _, made in pairs for result in made),
        "forwards": mean([each["forwards"] for each in summaries]),
        "backwards": mean([each["backwards"] for each in summaries]),
        "seconds": mean([each["seconds"] for each in summaries]),
        "peak_memory_bytes": max((each["peak_memory_bytes"] for each in summaries), default=None),
    }


def _point(candidate: Candidate, results: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "method": candidate.method,
        "settings": candidate.settings,
        "runs": [config.output for config in candidate.runs],
        "validation": _over_seeds(results, "validation"),
        "test": _over_seeds(results, "test"),
        "failed": [result.failed for result in results],
    }


def _value(outcome: Outcome, split: Split) -> float | None:
    """Return the result of a split; None if the run failed or did not measure it."""
    summary = outcome.summary
    return None if summary is None else summary[split].get(summary["metric"])


def _over_seeds(results: Iterable[Outcome], split: Split) -> dict[str, Any]:
    return spread([_value(result, split) for result in results])


METHODS = (
    "method", "setting", "validation", "test", "test, one setting", "zero-shot", "forwards",
    "backwards", "seconds", "MiB",
)  # fmt: skip
POINTS = ("method", "setting", "validation", "failed")


def markdown(table: dict[str, Any]) -> str:
    """Return two tables: a row for each method, and a row for each point of the grids."""
    unit, seeds = UNITS[table["metric"]], ", ".join(map(str, table["seeds"]))
    reasons = {
        reason: None
        for point in table["points"]
        for reason in point["failed"]
        if reason is not None
    }
    parts = [
        f"{unit.title}, mean (standard deviation) over the seeds {seeds}. The setting is chosen on "
        "validation for each seed; brackets count its seeds. `test, one setting` uses the setting "
        "with the best mean validation result for all seeds.",
        aligned(METHODS, [_method_row(each, unit) for each in table["methods"]]),
        "Every point of the grids:",
        aligned(POINTS, [_point_row(each, unit) for each in table["points"]]),
    ]
    if reasons:
        parts.append("Failed:\n\n" + "\n".join(f"- {reason}" for reason in reasons))
    return "\n\n".join(parts) + "\n"


def _method_row(method: dict[str, Any], unit: Unit) -> list[str]:
    one, memory = method["one_setting"], method["peak_memory_bytes"]
    results = method["validation"], method["test"], one and one["test"], method["zero_shot"]
    cells = [method["method"], _chosen(method["settings"]), *map(unit.shown, results)]
    for name, form in (("forwards", ".0f"), ("backwards", ".0f"), ("seconds", ".1f")):
        cells.append("" if method[name] is None else format(method[name], form))
    return [*cells, "" if memory is None else f"{memory / 2**20:.0f}"]


def _chosen(settings: list[dict[str, Any] | None]) -> str:
    titles = ["failed" if each is None else setting_title(each) for each in settings]
    counts = {title: titles.count(title) for title in titles if title}
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{title} ({count})" for title, count in counts.items())


def _point_row(point: dict[str, Any], unit: Unit) -> list[str]:
    failed = sum(reason is not None for reason in point["failed"])
    of = f"{failed} of {len(point['failed'])}" if failed else ""
    return [point["method"], setting_title(point["settings"]), unit.shown(point["validation"]), of]


Config = SweepConfig
