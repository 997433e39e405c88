"""A sweep: every method over its grid and every seed, chosen on validation, in one table.

A method is a list of candidates, the points of its grid; a candidate is one run for each seed. For
each seed the candidate with the best validation accuracy is kept, and its test accuracy counts.
Every run has a folder of its own, so a sweep that was stopped goes on where it was.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jax.sharding import Mesh

from jaxlm.artifacts.files import read_json, write_json
from jaxlm.core.errors import UserError
from jaxlm.studies.baselines import icl_run, probe_run
from jaxlm.train.finetuning import FinetuneConfig, finetune
from jaxlm.train.run_folder import RunFolder

KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "finetune": finetune,
    "probe": probe_run,
    "icl": icl_run,
}
"""What a method may be: `(config, *, base_dir) -> summary`, which writes its folder."""

FAILED = "failed.json"
"""The file in the folder of a run that diverged, with the reason."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A point of a method's grid.

    Attributes:
        method: name of the method.
        settings: dotted key to value, what the point is.
        kind: one of `KINDS`.
        runs: one for each seed, in the order of the seeds; they differ in seed and output.
    """

    method: str
    settings: dict[str, Any]
    kind: str = "finetune"
    runs: tuple[FinetuneConfig, ...]

    @property
    def title(self) -> str:
        """The settings in one line."""
        return setting_title(self.settings)


class Result(NamedTuple):
    """What became of a run: its summary, or the reason why there is none."""

    summary: dict[str, Any] | None
    failed: str | None = None

    @property
    def metric(self) -> str:
        """The name of the value: "accuracy", or "f1" of written answers."""
        return "accuracy" if self.summary is None else self.summary.get("metric", "accuracy")

    def value(self, split: Literal["zero_shot", "validation", "test"]) -> float | None:
        """Accuracy or F1 of a split; None where the run failed or did not measure it."""
        return None if self.summary is None else self.summary[split][self.metric]


def setting_title(settings: dict[str, Any]) -> str:
    """Dotted keys and values in one line.

    >>> setting_title({"optimizer.learning_rate": "1e-6", "peft": {"name": "lora"}})
    'optimizer.learning_rate=1e-6, peft={"name": "lora"}'
    """
    texts = (value if isinstance(value, str) else json.dumps(value) for value in settings.values())
    return ", ".join(f"{key}={text}" for key, text in zip(settings, texts, strict=True))


def sweep(
    candidates: Sequence[Candidate],
    *,
    base_dir: Path | None = None,
    mesh: Mesh | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Makes every run that is not finished, and the table of all.

    Args:
        candidates: see `Candidate`; those of one method follow each other.
        base_dir: where the relative paths of the task start, before the working directory.
        mesh: of all runs; None for one device.
        say: is told of each run before it starts.

    Returns:
        See `table`.

    Raises:
        UserError: a task has no validation data, a folder holds another run, or all runs failed; or
            what a run raises, except that it diverged.
    """
    runs = [(each, config) for each in candidates for config in each.runs]
    for each, config in runs:
        if config.data.validation is None:
            raise UserError(
                f"{config.form}.validation: {each.method} has no examples by which a sweep chooses "
                "(got none). Name a file of them, or hold_out."
            )
        RunFolder(config.output).check(config)
    results: dict[str, Result] = {}
    for number, (each, config) in enumerate(runs, start=1):
        say(f"run {number}/{len(runs)}: {config.output}")
        results[config.output] = run_one(each.kind, config, base_dir=base_dir, mesh=mesh)
    made = [[results[config.output] for config in each.runs] for each in candidates]
    return table(candidates, made)


def run_one(
    kind: str, config: FinetuneConfig, *, base_dir: Path | None = None, mesh: Mesh | None = None
) -> Result:
    """One run, or what is on disk of one that ended; a run that diverges is not tried again.

    Raises:
        UserError: what the run raises, except that it diverged.
    """
    from jaxlm.train.loop import Diverged

    folder = RunFolder(config.output)
    folder.check(config)
    failed = folder.path / FAILED
    if failed.exists():
        return Result(None, read_json(failed, failed=str)["failed"])
    try:
        return Result(KINDS[kind](config, base_dir=base_dir, mesh=mesh))
    except Diverged as error:
        write_json(failed, {"failed": str(error)})
        return Result(None, str(error))


def table(candidates: Sequence[Candidate], results: Sequence[Sequence[Result]]) -> dict[str, Any]:
    """Chooses on validation, and gathers the numbers.

    Args:
        candidates: see `sweep`.
        results: of each candidate, one for each seed.

    Returns:
        `{"metric", "seeds", "methods", "points"}`. A method has its test accuracy, or F1, with the
        setting chosen for each seed (`test`) and with the one of the best mean validation
        (`one_setting`), each {mean, std, by_seed}; std is that of a sample, None for one seed.
        Passes and seconds are means over the chosen runs, memory is the largest. A point has what
        its runs were and why they failed.

    Raises:
        UserError: every run failed.
    """
    ended = [result for each in results for result in each if result.summary]
    if not ended:
        reason = results[0][0].failed
        raise UserError(
            f"runs: all of them failed (got, from the first: {reason}). Correct that one."
        )
    pairs = list(zip(candidates, results, strict=True))
    names = dict.fromkeys(each.method for each in candidates)
    return {
        "metric": ended[0].metric,
        "seeds": [config.seed for config in candidates[0].runs],
        "methods": [_method(name, [p for p in pairs if p[0].method == name]) for name in names],
        "points": [_point(*pair) for pair in pairs],
    }


def _method(name: str, pairs: list[tuple[Candidate, Sequence[Result]]]) -> dict[str, Any]:
    chosen = [_best(pairs, seed) for seed in range(len(pairs[0][1]))]
    found = [pairs[place][1][seed] for seed, place in enumerate(chosen) if place is not None]
    summaries = [result.summary for result in found if result.summary is not None]
    whole = [pair for pair in pairs if all(result.summary for result in pair[1])]
    one = max(whole, key=lambda pair: _mean(_values(pair[1], "validation")) or 0.0, default=None)
    runs = [
        None if place is None else pairs[place][0].runs[seed].output
        for seed, place in enumerate(chosen)
    ]
    return {
        "method": name,
        "settings": [None if place is None else pairs[place][0].settings for place in chosen],
        "runs": runs,
        "zero_shot": _spread(_values(found, "zero_shot")),
        "validation": _spread(_values(found, "validation")),
        "test": _spread(_values(found, "test")),
        "one_setting": one
        and {
            "settings": one[0].settings,
            "validation": _spread(_values(one[1], "validation")),
            "test": _spread(_values(one[1], "test")),
        },
        "failed": sum(result.failed is not None for _, made in pairs for result in made),
        "forwards": _mean([each["forwards"] for each in summaries]),
        "backwards": _mean([each["backwards"] for each in summaries]),
        "seconds": _mean([each["seconds"] for each in summaries]),
        "peak_memory_bytes": max((each["peak_memory_bytes"] for each in summaries), default=None),
    }


def _best(pairs: list[tuple[Candidate, Sequence[Result]]], seed: int) -> int | None:
    """The place of the candidate that is best on validation, the first of equals.

    Without any validation accuracy (baselines that choose nothing) it is the first that has ended.
    """
    ended = [place for place, (_, made) in enumerate(pairs) if made[seed].summary is not None]
    return max(ended, key=lambda i: pairs[i][1][seed].value("validation") or 0.0, default=None)


def _point(candidate: Candidate, results: Sequence[Result]) -> dict[str, Any]:
    return {
        "method": candidate.method,
        "settings": candidate.settings,
        "runs": [config.output for config in candidate.runs],
        "validation": _spread(_values(results, "validation")),
        "test": _spread(_values(results, "test")),
        "failed": [result.failed for result in results],
    }


def _values(results: Iterable[Result], split: Any) -> list[float | None]:
    return [result.value(split) for result in results]


def _mean(values: Iterable[float | int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _spread(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    std = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": _mean(values), "std": std, "by_seed": values}
