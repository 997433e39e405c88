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

from jaxlm.artifacts import files
from jaxlm.artifacts.folder import LOCK, LOG
from jaxlm.cli import config as configs
from jaxlm.core.checks import distinct, seeds, show
from jaxlm.core.errors import UserError
from jaxlm.studies.folder import STUDY, TABLES, study_folder, write_tables
from jaxlm.studies.sweep import KINDS, Candidate, setting_title, sweep
from jaxlm.studies.sweep_table import markdown
from jaxlm.train.finetuning import FinetuneConfig


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
        check_runs(self)
        if self.grid and self.methods:
            raise UserError(
                "grid: stands beside methods. Put it into the methods that it belongs to."
            )


def check_runs(config: Any) -> None:
    """Checks what a file of many runs has, and takes `~` in its output for the home folder.

    Raises:
        UserError: a seed is none or stands twice, output is no path, or `run` has one of them.
    """
    seeds(config, "seeds")
    distinct("seeds", config.seeds)
    object.__setattr__(config, "output", str(files.file_path(config.output, "output")))
    no_seed_or_output(config.run, "run")


def no_seed_or_output(run: Mapping[str, Any], place: str) -> None:
    """Refuses the keys of one run where there are many.

    Raises:
        UserError: naming the key.
    """
    for key in ("seed", "output"):
        if key in run:
            plural = "seeds" if key == "seed" else key
            raise UserError(f"{place}.{key}: differs from run to run. Give {plural} beside run.")


def config_class() -> type:
    """What a configuration of this command becomes."""
    return SweepConfig


def run(args: Sequence[str], mesh: Any = None) -> None:
    """The command `jaxlm sweep`."""
    dry = "--dry-run" in args
    path, overrides = configs.parse_args([word for word in args if word != "--dry-run"])
    if path is None:
        raise UserError("config: is missing. Give the file of a sweep: jaxlm sweep sweep.yaml.")
    config = configs.load(SweepConfig, path, overrides)
    candidates = plan(config, path)
    if dry:
        for each in candidates:
            for one in each.runs:
                print(one.output)
        return
    with study_folder("sweep", config):
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
    return write_tables(Path(output), table, markdown(table))


def _candidates(config: SweepConfig, name: str, section: Any, where: str) -> Iterator[Candidate]:
    place = f"{where}: method {name}" if name else where
    if not isinstance(section, Mapping):
        raise UserError(f"{place}: must be a section (got {show(section)}). Give keys with values.")
    section = dict(section)
    kind, grid = section.pop("kind", "finetune"), section.pop("grid", {})
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(
            f"{place}: kind: is not known (got {show(kind)}). Choose one of {', '.join(KINDS)}."
        )
    keys, lists = _lists(grid, place)
    no_seed_or_output(section, f"methods.{name}")
    no_seed_or_output(grid, f"methods.{name}.grid" if name else "grid")
    for values in itertools.product(*lists):
        settings = dict(zip(keys, values, strict=True))
        data = copy.deepcopy(config.run)
        for key, value in (section | settings).items():
            configs.put(data, key, copy.deepcopy(value), place)
        first = configs.build(FinetuneConfig, {**data, "output": config.output}, place)
        method = name or first.optimizer.name
        folder = Path(config.output, folder_name(method, "methods"))
        if settings:
            folder /= folder_name(setting_title(settings), "grid")
        runs = tuple(
            replace(first, seed=seed, output=str(folder / f"seed-{seed}")) for seed in config.seeds
        )
        yield Candidate(method=method, settings=settings, kind=kind, runs=runs)


def _lists(grid: Any, place: str) -> tuple[list[str], list[list[Any]]]:
    if not isinstance(grid, Mapping):
        raise UserError(
            f"{place}: grid: must be a section (got {show(grid)}). Write `key: [value, value]`."
        )
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(
                f"{place}: grid.{key}: must be a list (got {show(values)}). Write [a, b]."
            )
        try:
            distinct(f"grid.{key}", values)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    return list(grid), list(grid.values())


FILES = (STUDY, LOCK, LOG, *TABLES, "curves.png")
"""What a study writes beside the folders of its runs."""


def folder_name(text: str, key: str) -> str:
    """A name for a folder; what cannot stand in one is replaced, and told apart by a hash.

    Args:
        text: the name of a method, a variant or a point of a grid.
        key: where it comes from, for the message.

    Raises:
        UserError: the name is that of a folder above, or of a file of the study.
    """
    if text in FILES:
        raise UserError(f"{key}: is the name of a file of the study (got {text}). Give another.")
    plain = re.sub(r"[^\w.=,+-]+", "_", text.replace(", ", ","))
    if plain != text.replace(", ", ",") or len(plain.encode()) > 100:
        short = plain.encode()[:80].decode(errors="ignore")
        plain = f"{short}-{sha256(text.encode()).hexdigest()[:8]}"
    return files.folder_name(plain, key)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
