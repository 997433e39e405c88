"""Fine-tune over a grid and several seeds, choose on validation, and write one table.

usage: jaxlm sweep sweep.yaml [--dry-run] [--dotted.path=value ...]

A sweep:

  run:                           # a configuration of `jaxlm finetune` without seed and output
    task: {name: subj}
    steps: 500
  seeds: [0, 1, 2]
  output: runs/sweep-subj        # a folder for each run, table.md and table.json
  methods:
    MeZO:                        # keys of `run` that this method has otherwise, and its grid
      optimizer: {name: mezo, eps: 1e-3}
      grid: {optimizer.learning_rate: [1e-4, 3e-4, 1e-3]}
    Adam:
      optimizer: {name: adam, schedule: linear}
      steps: 100
      grid: {optimizer.learning_rate: [5e-4], batch_size: [8, 16]}
    probe: {kind: probe}         # logistic regression on what the head reads
    ICL: {kind: icl}             # 32 solved training examples before each test example

With one method, `grid` may stand beside `run`, without `methods`. A key of a method takes the place
of the whole key of `run`; a dotted key (`optimizer.eps: 1e-1`) changes one value within. Every
combination of the lists of a grid is run, and for each seed the one with the best validation
accuracy is tested. `--dry-run` lists the runs. The same command goes on with a sweep that was
stopped. A run that diverges is a row of the table; to try it again, remove its folder.
"""

import copy
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from jaxlm.cli import config as configs
from jaxlm.core.errors import UserError
from jaxlm.artifacts.files import write_shared
from jaxlm.studies.sweep import KINDS, Candidate, setting_title, sweep
from jaxlm.studies.sweep_table import markdown
from jaxlm.artifacts.files import write_json
from jaxlm.train.run import FinetuneConfig


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep as its file has it.

    Attributes:
        run: keys of a `FinetuneConfig`.
        methods: name of a method to its keys: those that differ from `run`, `grid` and `kind`.
        grid: dotted key to the list of its values, where there are no methods.
        seeds: of the runs.
        output: folder of the sweep.
    """

    run: dict[str, Any]
    methods: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    output: str

    def __post_init__(self):
        check_runs(self.run, self.seeds, self.output, "sweep")
        if self.grid and self.methods:
            raise UserError("grid stands beside methods: put it into the methods it belongs to.")


def check_runs(
    run: Mapping[str, Any], seeds: Sequence[int], output: str, what: str, place: str = "run"
) -> None:
    """Refuses a file of many runs without seeds or output, or with those of one run.

    Raises:
        UserError: as it says.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError("seeds is empty or has one twice: give each seed once.")
    if not output:
        raise UserError(f"output is empty: give the folder of the {what}.")
    for key in ("seed", "output"):
        if key in run:
            plural = "seeds" if key == "seed" else key
            raise UserError(f"{place}.{key} differs from run to run: give {plural} beside run.")


def run(args: Sequence[str], mesh: Any = None) -> None:
    """The command `jaxlm sweep`."""
    dry = "--dry-run" in args
    path, overrides = configs.parse_args([word for word in args if word != "--dry-run"])
    if path is None:
        raise UserError("jaxlm sweep needs a file: give sweep.yaml.")
    config = configs.load(SweepConfig, path, overrides)
    candidates = plan(config, path)
    if dry:
        for each in candidates:
            for one in each.runs:
                print(one.output)
        return
    table = sweep(candidates, base_dir=Path(path).parent, mesh=mesh, say=_say)
    print(write(table, config.output))


def plan(config: SweepConfig, where: str) -> list[Candidate]:
    """Every point of every grid, with a run for each seed.

    Args:
        config: the sweep.
        where: its file, for messages.

    Raises:
        UserError: a key is unknown, a value does not fit, or a list of a grid is empty.
    """
    methods = config.methods or {"": {"grid": config.grid}}
    return [
        candidate
        for name, section in methods.items()
        for candidate in _candidates(config, name, section or {}, where)
    ]


def write(table: dict[str, Any], output: str) -> str:
    """Writes `table.json` and `table.md`, and returns the latter's text."""
    text = markdown(table)
    write_json(Path(output) / "table.json", table)
    write_shared(Path(output) / "table.md", text)
    return text


def _candidates(config: SweepConfig, name: str, section: Any, where: str) -> Iterator[Candidate]:
    place = f"{where}: method {name}" if name else where
    if not isinstance(section, Mapping):
        raise UserError(f"{place} is {section!r}: give a section of keys.")
    section = dict(section)
    kind, grid = section.pop("kind", "finetune"), section.pop("grid", {})
    if kind not in KINDS:
        raise UserError(f"{place}: kind is '{kind}': choose one of {', '.join(KINDS)}.")
    keys, lists = _lists(grid, place)
    for values in itertools.product(*lists):
        settings = dict(zip(keys, values, strict=True))
        data = copy.deepcopy(config.run)
        for key, value in (section | settings).items():
            configs.put(data, key, copy.deepcopy(value), place)
        first = configs.build(FinetuneConfig, {**data, "output": config.output}, place)
        method = name or first.optimizer.name
        folder = Path(config.output, folder_name(method), folder_name(setting_title(settings)))
        runs = tuple(
            replace(first, seed=seed, output=str(folder / f"seed-{seed}")) for seed in config.seeds
        )
        yield Candidate(method=method, settings=settings, kind=kind, runs=runs)


def _lists(grid: Any, place: str) -> tuple[list[str], list[list[Any]]]:
    if not isinstance(grid, Mapping):
        raise UserError(f"{place}: grid is {grid!r}: give lines `key: [value, value]`.")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{place}: grid.{key} is {values!r}: give a list [a, b].")
        if any(value in values[:i] for i, value in enumerate(values)):
            raise UserError(f"{place}: grid.{key} has a value twice: give each once.")
    return list(grid), list(grid.values())


def folder_name(text: str) -> str:
    """A name for a folder; what cannot stand in one is replaced, and told apart by a hash."""
    plain = re.sub(r"[^\w.=,+-]+", "_", text.replace(", ", ","))
    if plain == text.replace(", ", ",") and len(plain) <= 100:
        return plain
    return f"{plain[:80]}-{sha256(text.encode()).hexdigest()[:8]}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
