"""Say whether fine-tuning behaves like a kernel: kernels, fine-tuning, linearization, a verdict.

usage: jaxlm kernel study.yaml [--dry-run] [--dotted.path=value ...]
       jaxlm kernel --task.name=subj --output=runs/kernel-subj [--dotted.path=value ...]

A study:

  model: path-or-hub-id          # left out: the model that comes with jaxlm
  task: {name: mr}               # as for `jaxlm finetune`
  ks: [16, 64]                   # examples of a class; as many more choose learning rate and ridge
  prompts: [true, false]         # with the task's prompt; without: a linear head on the bare text
  calibrate: true                # start from calibrated scores, where a prompt is answered
  seeds: [0, 1, 2]
  training:
    - optimizer: {name: sgd, schedule: linear}
      learning_rates: [1e-3, 1e-2]
      steps: 200
      batch_size: 8
      eval_every: 50
    - {optimizer: {name: adam}, learning_rates: [1e-4, 1e-3]}
  output: runs/kernel-mr         # reports, kernels, table.md and table.json

The kernel of SGD is that of the gradients, of Adam that of their signs. More keys: solver (ridge or
logistic), plots (true draws kernels, spectra and accuracies with matplotlib). `--dry-run` lists the
cases. The same command goes on with a study that was stopped, and takes the kernels that it stored.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.cli import config as configs


def config_class() -> type:
    """What a configuration of this command becomes."""
    from jaxlm.studies.kernel_study import KernelConfig

    return KernelConfig


def run(args: Sequence[str], mesh: Any = None) -> None:
    """The command `jaxlm kernel`."""
    from jaxlm.studies.folder import study_folder
    from jaxlm.studies.kernel_study import KernelConfig, cases, kernel_study

    dry = "--dry-run" in args
    path, overrides = configs.parse_args([word for word in args if word != "--dry-run"])
    config = configs.load(KernelConfig, path, overrides)
    if dry:
        for case in cases(config):
            print(Path(config.output) / "reports" / case.name)
        return
    base_dir = Path(path).parent if path else None
    with study_folder("kernel", config) as folder:
        records = kernel_study(config, base_dir=base_dir, mesh=mesh, say=_say)
        print(write(records, config.output))
        if config.plots:
            from jaxlm.studies.kernel_plots import draw

            for made in draw(records, folder):
                print(made)


def write(records: list[dict[str, Any]], output: str) -> str:
    """Writes `table.json` and `table.md`, and returns the latter's text."""
    from jaxlm.studies.folder import write_tables
    from jaxlm.studies.kernel_table import markdown, rows

    return write_tables(Path(output), {"rows": rows(records)}, markdown(records))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
