"""Fine-tune over a grid and several seeds, choose on validation, and write one table.

usage: jaxlm sweep sweep.yaml [--dry-run] [--dotted.path=value ...]

A sweep:

  run:                           # a configuration of `jaxlm finetune` without seed and output
    task: {name: subj}
    steps: 500
  seeds: [0, 1, 2]
  output: runs/sweep-subj        # a folder for each run, table.md and table.json
  methods:
    MeZO:                        # keys that differ from `run`, and the grid
      optimizer: {name: mezo, eps: 1e-3}
      grid: {optimizer.learning_rate: [1e-4, 3e-4, 1e-3]}
    Adam:
      optimizer: {name: adam, schedule: linear}
      steps: 100
      grid: {optimizer.learning_rate: [5e-4], batch_size: [8, 16]}
    probe: {kind: probe}         # logistic regression on what the head reads
    ICL: {kind: icl}             # 32 solved training examples before each test example

With one method, `grid` may stand beside `run`, without `methods`. A key of a method replaces the
whole key of `run`; a dotted key (`optimizer.eps: 1e-1`) changes one value in it. Every combination
of the lists of a grid is run, and for each seed the one with the best validation accuracy is
tested. `--dry-run` lists the runs. The same command resumes a sweep that was stopped. A run that
diverges is a row of the table; to repeat it, remove its folder.
"""

from collections.abc import Sequence
from typing import Any

from jaxlm.cli import study
from jaxlm.cli.config import parse_args
from jaxlm.core.errors import UserError


def config_class() -> type:
    """Return the class of this command's configuration."""
    from jaxlm.studies.sweep import SweepConfig

    return SweepConfig


def run(args: Sequence[str], mesh: Any = None) -> None:
    """Run the command `jaxlm sweep`."""
    path, flags = parse_args([word for word in args if word != study.DRY])
    if path is None:
        raise UserError(
            "config: is missing (got nothing). Give the file of a sweep: jaxlm sweep sweep.yaml."
        )
    study.execute("sweep", path, flags, dry=study.DRY in args, mesh=mesh)
