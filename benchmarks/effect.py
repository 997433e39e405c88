"""What does MeZO add to a pretrained model, and how much of it depends on pretraining?

usage: python -m benchmarks.effect [--seeds 3] [--quick] [--model FOLDER] [--set KEY=VALUE]
                                   [TASK.yaml ...]

Runs every row of the quickstart's table on mr and subj for several seeds (under an hour on 2 cores)
and prints means, standard deviations, and the gains of MeZO over its baselines. --quick runs one
seed of the first task with few steps and texts. --set changes a key of every file, such as
`--set calibrate=false` or `--set random_init.optimizer.learning_rate=1e-3`. Files have the form of
the quickstart's, jaxlm/assets/quickstart.yaml. The last line is one JSON object.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import print_report
from jaxlm.cli import config as configs
from jaxlm.studies import quickstart

FOLDER = Path(__file__).parent.parent / "configs" / "effect"
BASELINES = {
    "random init": "MeZO, random init",
    "raw": "zero-shot",
    "calibrated": "zero-shot, calibrated",
}
TARGETS = {("subj", "random init"): 15, ("mr", "random init"): 5, "raw": 10, "calibrated": 2}


def measure(config: quickstart.QuickstartConfig, seeds: int) -> list[dict[str, Any]]:
    """Return a row for each method: accuracies by seed, in per cent, and costs."""
    rows: dict[str, dict[str, Any]] = {}
    for seed in range(seeds):
        for row in quickstart.run(dataclasses.replace(config, seed=seed), quiet=True):
            first = {**row._asdict(), "task": config.task.name, "accuracy": []}
            rows.setdefault(row.method, first)["accuracy"].append(100 * row.accuracy)
            result = f"{row.method} {100 * row.accuracy:.1f} %"
            print(f"{config.task.name} seed {seed}: {result}", flush=True)
    return list(rows.values())


def report(task: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Print the table of a task, and return the gains of MeZO over the baselines, by seed."""
    print(f"\n{task:<35} accuracy (sd)  forwards  backwards     MiB  seconds")
    for row in rows:
        mean, sd = statistics.mean(row["accuracy"]), statistics.pstdev(row["accuracy"])
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        cells = f"{row['forwards']:>9} {row['backwards']:>10} {memory:>7} {row['seconds']:>8.1f}"
        print(f"{row['method']:<35} {mean:7.1f} ({sd:.1f}) {cells}")
    by_method = {row["method"]: row["accuracy"] for row in rows}
    gains = {}
    for name, method in BASELINES.items():
        gain = [a - b for a, b in zip(by_method["MeZO"], by_method[method], strict=True)]
        target = TARGETS.get((task, name), TARGETS.get(name))
        mean = statistics.mean(gain)
        reached = mean >= target and (name != "calibrated" or min(gain) >= 0)
        verdict = f"aim {target}: {'reached' if reached else 'missed'}"
        print(f"MeZO over {name}: {mean:+.1f} points, least {min(gain):+.1f}; {verdict}")
        gains[name] = gain
    return {"task": task, "gains": gains}


def main() -> None:
    """Run the tasks, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", default=sorted(map(str, FOLDER.glob("*.yaml"))))
    parser.add_argument("--model")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one task and seed, few steps")
    options = parser.parse_args()
    overrides = dict(each.split("=", 1) for each in options.set)
    overrides |= {} if options.model is None else {"model": options.model}
    if options.quick:
        overrides |= {f"{row}.steps": "20" for row in ("mezo", "random_init", "adam")}
        overrides |= {"task.num_test": "200", "unlabelled": "200"}
        options.configs = options.configs[:1]
    results = []
    for path in options.configs:
        config = configs.load(quickstart.QuickstartConfig, path, overrides)
        rows = measure(config, 1 if options.quick else options.seeds)
        results += [*rows, report(config.task.name, rows)]
    print_report("effect", results)


if __name__ == "__main__":
    main()
