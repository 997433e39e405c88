"""How accurate does each method get with forward passes alone, and do the curves flatten?

usage: python -m benchmarks.mezo_accuracy [--output FOLDER] [--tasks mr,subj] [--methods mezo,lozo]
           [--seeds 3] [--forwards 2000] [--looks 16] [--model FOLDER] [--data FOLDER]
           [--configs FOLDER] [--quick]

Every file of `--configs` is a method, and every file of its folder `tasks` a task: configs/accuracy
is for the shipped model, configs/smollm2 for a real one (scripts/get_smollm2.py). A method without
`steps` takes as many as `--forwards` forward passes allow, so that zeroth-order methods are
compared at equal numbers of forward passes; a task may multiply their learning rates by
`zeroth_order_scale`. `--data` is the folder of the files of rte (train.jsonl and validation.jsonl
with premise, hypothesis, label), or of reviews (scripts/prepare_reviews.py).

Each (task, method, seed) is a run with its own folder; with the same --output the benchmark
resumes. Without --output the folders are deleted at the end. --quick runs one seed with 40 forward
passes and 100 examples of each split, by default for some methods on subj. The parameters that are
best on validation are tested. The table has accuracy, passes, seconds, memory, and the gain of
validation accuracy in the last quarter of the run: about 0 if the curve has flattened. The last
line is one JSON object, with the curves.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import print_report, print_table
from jaxlm.artifacts.yaml import read_yaml
from jaxlm.studies.sweep import Candidate, SweepConfig, markdown, plan, sweep
from jaxlm.studies.tables import write_tables
from jaxlm.train.run_folder import RunFolder

FOLDER = Path(__file__).parent.parent / "configs" / "accuracy"
QUICK = "zero_shot,calibrated,probe,mezo,lozo,adam"


def methods(folder: Path = FOLDER) -> list[str]:
    """Return the names of all methods."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def candidates(
    task: str,
    names: Sequence[str],
    *,
    seeds: Sequence[int],
    forwards: int,
    looks: int,
    output: str,
    changes: dict[str, Any],
    folder: Path = FOLDER,
) -> list[Candidate]:
    """Return the runs of a task: each named method at `forwards` forward passes."""
    run = read_yaml(folder / "tasks" / f"{task}.yaml") | changes
    scale = float(run.pop("zeroth_order_scale", 1))
    sections = {name: read_yaml(folder / f"{name}.yaml") for name in names}
    for section in sections.values():
        if "optimizer" in section and "steps" not in section:
            rate = float(section["optimizer"]["learning_rate"])
            section["optimizer"]["learning_rate"] = str(scale * rate)
    config = SweepConfig(
        run=run,
        methods=sections,
        seeds=tuple(seeds),
        output=str(Path(output, task)),
    )
    return [
        each
        if "steps" in sections[each.method] or each.kind != "finetune"
        else cut(each, forwards, looks)
        for each in plan(config, str(folder))
    ]


def cut(candidate: Candidate, forwards: int, looks: int) -> Candidate:
    """Return runs of that many forward passes, with that many validations."""
    steps = max(1, forwards // passes(candidate.runs[0].optimizer))
    every = max(1, steps // looks)
    runs = (
        dataclasses.replace(run, steps=steps, eval_every=every, checkpoint_every=every)
        for run in candidate.runs
    )
    return dataclasses.replace(candidate, runs=tuple(runs))


def small(candidate: Candidate) -> Candidate:
    """Return runs of at most 20 steps, with 100 examples of each split."""
    runs = (
        dataclasses.replace(
            run,
            steps=min(20, run.steps),
            eval_every=10,
            checkpoint_every=10,
            task=dataclasses.replace(
                run.task, validation="hold_out", num_train=100, num_validation=100, num_test=100
            ),
        )
        for run in candidate.runs
    )
    return dataclasses.replace(candidate, runs=tuple(runs))


def passes(optimizer: Any) -> int:
    """Return the number of forward passes in a step."""
    from jaxlm.train.state import method

    return method(optimizer, lambda params, batch: params, 1).forwards


def rows(task: str, table: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each method, in per cent, seconds and 1e6 bytes."""
    return [
        {
            "task": task,
            "method": each["method"],
            "accuracy": _percent(each["test"]["mean"]),
            "std": _percent(each["test"]["std"]),
            "validation": _percent(each["validation"]["mean"]),
            "last_quarter": last_quarter(curve(each["runs"])),
            "forwards": each["forwards"],
            "backwards": each["backwards"],
            "seconds": each["seconds"],
            "peak_MB": each["peak_memory_bytes"] and each["peak_memory_bytes"] / 1e6,
            "failed": each["failed"],
        }
        for each in table["methods"]
    ]


def curve(runs: Sequence[str | None]) -> list[tuple[int, float]]:
    """Return (step, validation accuracy in per cent, mean over seeds) at each validation."""
    looks: dict[int, list[float]] = {}
    for run in filter(None, runs):
        metrics = RunFolder(run).metrics
        for record in metrics.read() if metrics.path.exists() else []:
            if "validation_accuracy" in record:
                looks.setdefault(record["step"], []).append(100 * record["validation_accuracy"])
    return [(step, statistics.fmean(values)) for step, values in sorted(looks.items())]


def last_quarter(looks: Sequence[tuple[int, float]]) -> float | None:
    """Return the mean over the last quarter of a curve minus the mean over the quarter before it.

    A curve with fewer than eight points has quarters too short for a mean; it gives None.
    """
    if len(looks) < 8:
        return None
    quarter = len(looks) // 4
    values = [value for _, value in looks]
    return statistics.fmean(values[-quarter:]) - statistics.fmean(values[-2 * quarter : -quarter])


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def main() -> None:
    """Run the benchmark, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output")
    parser.add_argument("--tasks")
    parser.add_argument("--methods")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--forwards", type=int, default=2000)
    parser.add_argument("--looks", type=int, default=16, help="validations in a run")
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path, help="folder of the files of rte, or of reviews")
    parser.add_argument("--configs", type=Path, default=FOLDER, help="methods and tasks")
    parser.add_argument("--quick", action="store_true", help="one seed, 40 forwards, few examples")
    options = parser.parse_args()
    options.tasks = options.tasks or ("subj" if options.quick else "mr,subj")
    options.methods = options.methods or (
        QUICK if options.quick else ",".join(methods(options.configs))
    )
    with tempfile.TemporaryDirectory() as folder:
        print_tables(options, options.output or folder)


def print_tables(options: argparse.Namespace, output: str) -> None:
    """Do the runs in a folder, and print the table and the report."""
    seeds, forwards = (1, 40) if options.quick else (options.seeds, options.forwards)
    changes = {} if options.model is None else {"model": options.model}
    found, curves = [], []
    for task in options.tasks.split(","):
        runs = candidates(
            task,
            options.methods.split(","),
            seeds=range(seeds),
            forwards=forwards,
            looks=options.looks,
            output=output,
            changes=changes,
            folder=options.configs,
        )
        runs = [small(each) for each in runs] if options.quick else runs
        table = sweep(runs, base_dir=options.data, say=lambda line: print(line, file=sys.stderr))
        write_tables(Path(output, task), table, markdown(table))
        found += rows(task, table)
        curves += [curve(each["runs"]) for each in table["methods"]]
    print_table(found)
    report = [{**row, "curve": looks} for row, looks in zip(found, curves, strict=True)]
    print_report("mezo_accuracy", report)


if __name__ == "__main__":
    main()
