"""Choose the training data that helps a target task by gradients (LESS), and train on the choice.

usage: jaxlm select study.yaml [--dotted.path=value ...]
       jaxlm select [study.yaml] --dry-run [--dotted.path=value ...]

A study:

  model: path-or-hub-id            # left out: the model that comes with jaxlm
  sources:                         # what is chosen from
    reviews: {task: {name: mr}, rows: 2000}
    noise: {task: {name: mr}, rows: 2000, skip: 2000, labels: shuffled}
    dolly: {messages: dolly.jsonl} # rows {"messages": [{"role", "content"}, ...], "id"}
  target: {task: {name: mr}, rows: 100}  # its validation examples; its test examples measure
  template: tulu                   # of messages, or chat: the tokenizer's own
  recipe:                          # of the warm-up and of training on what is chosen
    peft: {rank: 8}
    optimizer: {learning_rate: 1e-3, schedule: linear}
    epochs: 4
    batch_size: 16
  warmup_fraction: 0.05            # part of the rows for the warm-up
  features: {family: countsketch, dim: 8192, dtype: float16}
  fraction: 0.05                   # part of the rows that is chosen
  methods: [less, random, full]    # also matched, bm25, representation
  seeds: [0, 1, 2]
  output: runs/select-mr           # a folder for each seed and stage, table.md and table.json

The same command goes on with a study that was stopped: stages whose inputs have not changed are
not done again. seed-N/select-M/selected.jsonl has what a method chose.

`--dry-run` does nothing, and writes the FLOPs, bytes and hours of each stage: of the study, or,
without a file, of LESS on 270,679 examples with a 7B Llama and LoRA of rank 128. State the device
by --device.peak_flops=312e12 --device.utilisation=0.4, and other data by --sizes.examples=1000000
--sizes.tokens=300.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.cli import config as configs


def config_class() -> type:
    """What a configuration of this command becomes."""
    from jaxlm.studies.selection import SelectionConfig

    return SelectionConfig


def run(args: Sequence[str], mesh: Any = None) -> None:
    """The command `jaxlm select`."""
    from jaxlm.studies.folder import study_folder, write_tables
    from jaxlm.studies.selection import SelectionConfig, selection_study
    from jaxlm.studies.selection_table import markdown, rows

    path, overrides = configs.parse_args([word for word in args if word != "--dry-run"])
    if "--dry-run" in args:
        return _dry_run(path, overrides)
    config = configs.load(SelectionConfig, path, overrides)
    base_dir = Path(path).parent if path else None
    with study_folder("select", config) as folder:
        found = selection_study(config, base_dir=base_dir, mesh=mesh, say=_say)
        print(write_tables(folder, {**found, "rows": rows(found)}, markdown(found)))


def _dry_run(path: str | None, overrides: dict[str, str]) -> None:
    from jaxlm.cost.device import Device
    from jaxlm.studies.selection import SelectionConfig
    from jaxlm.studies.selection_cost import Plan, Sizes, markdown, plan_of, resized

    def section(name: str) -> dict[str, str]:
        start = f"{name}."
        return {
            key.removeprefix(start): value
            for key, value in overrides.items()
            if key.startswith(start)
        }

    device = configs.load(Device, None, section("device"))
    sizes = configs.load(Sizes, None, section("sizes"))
    rest = {
        key: value for key, value in overrides.items() if not key.startswith(("device.", "sizes."))
    }
    plan = Plan()
    if path is not None or rest:
        config = configs.load(SelectionConfig, path, rest)
        plan = plan_of(config, base_dir=Path(path).parent if path else None)
    plan = resized(plan, **{key: getattr(sizes, key) for key in section("sizes")})
    print(markdown(plan, device))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
