"""Pretrain under several settings and seeds, and compare the curves of the loss.

usage: jaxlm compare study.yaml [--dry-run] [--dotted.path=value ...]

A study:

  run:                           # a configuration of `jaxlm pretrain` without seed and output
    model: {hidden_size: 64, num_layers: 2, num_heads: 2, intermediate_size: 128}
    ...
  variants:                      # name to the keys of `run` that it has otherwise
    l = 1: {}
    l = 4: {dynamics: {name: svag, l: 4}}
    batch x 4: {scale: {rule: sqrt, k: 4}}   # batch, steps and optimizer under a scaling rule
  seeds: [0, 1, 2]
  output: runs/svag              # a folder for each run, table.md, table.json and curves.png
  y: held_out_loss               # or loss, of training
  start: 0.1                     # part of the run from which on curves are compared

A key of a variant takes the place of the whole key of `run`; a dotted key (`optimizer.b1: 0.5`)
changes one value within. `scale` comes after them. `--dry-run` lists the runs. The same command
goes on with a study that was stopped; a run that diverged is not tried again until its folder is
removed. The figure needs matplotlib; `figure: false` goes without.
"""

import copy
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.cli import config as configs
from jaxlm.cli.sweep import check_runs, folder_name, no_seed_or_output
from jaxlm.core.checks import distinct, number, show
from jaxlm.core.errors import UserError
from jaxlm.studies import curves
from jaxlm.studies.folder import study_folder, write_tables
from jaxlm.train.pretraining import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A study as its file has it.

    Attributes:
        run: keys of a `PretrainConfig`.
        variants: name to the keys that differ from `run`, and `scale`.
        seeds: of the runs.
        output: folder of the study.
        y: what is compared.
        start: part of the run from which on curves are compared, from 0 to below 1.
        figure: whether to draw the curves.
    """

    run: dict[str, Any]
    variants: dict[str, Any]
    seeds: tuple[int, ...] = (0,)
    output: str
    y: curves.Y = "held_out_loss"
    start: float = 0.0
    figure: bool = True

    def __post_init__(self):
        check_runs(self)
        distinct("variants", self.variants)
        number(self, "start", least=0, below=1)
        corpus = self.run.get("corpus")
        if self.y == "held_out_loss" and not (isinstance(corpus, dict) and corpus.get("held_out")):
            raise UserError(
                "y: there is no held-out text (got held_out_loss). Give run.corpus.held_out, or "
                "y: loss."
            )


def config_class() -> type:
    """What a configuration of this command becomes."""
    return CompareConfig


def run(args: Sequence[str], mesh: Any = None) -> None:
    """The command `jaxlm compare`."""
    dry = "--dry-run" in args
    path, overrides = configs.parse_args([word for word in args if word != "--dry-run"])
    if path is None:
        raise UserError("config: is missing. Give the file of a study: jaxlm compare study.yaml.")
    config = configs.load(CompareConfig, path, overrides)
    variants = plan(config, path)
    if dry:
        for each in variants:
            for one in each.runs:
                print(one.output)
        return
    with study_folder("compare", config) as folder:
        found = curves.compare(variants, y=config.y, mesh=mesh, say=_say)
        print(write(found, config))
        if config.figure:
            print(curves.draw(found, folder / "curves.png", y=config.y, start=config.start))


def plan(config: CompareConfig, where: str) -> list[curves.Variant]:
    """Every variant, with a run for each seed.

    Args:
        config: the study.
        where: its file, for messages.

    Raises:
        UserError: a key is unknown or a value does not fit.
    """
    return [_variant(config, name, section, where) for name, section in config.variants.items()]


def write(found: Sequence[curves.Curve], config: CompareConfig) -> str:
    """Writes `table.json` and `table.md`, and returns the latter's text."""
    text = curves.markdown(found, y=config.y, start=config.start)
    rows = curves.rows(found, start=config.start)
    return write_tables(Path(config.output), {"y": config.y, "rows": rows}, text)


def _variant(config: CompareConfig, name: str, section: Any, where: str) -> curves.Variant:
    place = f"{where}: variant {name}"
    if not isinstance(section or {}, Mapping):
        raise UserError(f"{place}: must be a section (got {show(section)}). Give keys with values.")
    section = dict(section or {})
    no_seed_or_output(section, f"variants.{name}")
    scale = section.pop("scale", None)
    data = copy.deepcopy(config.run)
    for key, value in section.items():
        configs.put(data, key, copy.deepcopy(value), place)
    data["output"] = config.output
    first = _scaled(data, scale, place) if scale else configs.build(PretrainConfig, data, place)
    folder = Path(config.output, folder_name(name, "variants"))
    runs = tuple(
        dataclasses.replace(first, seed=seed, output=str(folder / f"seed-{seed}"))
        for seed in config.seeds
    )
    return curves.Variant(name=name, runs=runs)


def _scaled(data: dict[str, Any], scale: Any, place: str) -> PretrainConfig:
    """The run under a scaling rule; its `dynamics` are those of the new batch."""
    plain = configs.build(PretrainConfig, {**data, "dynamics": "null"}, place)
    rule = configs.build(curves.Scale, scale, place, "scale")
    try:
        changed = rule(plain)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    data = {**data, "batch_size": str(changed["batch_size"])}
    dynamics = configs.build(PretrainConfig, data, place).dynamics
    return dataclasses.replace(plain, **changed, dynamics=dynamics)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
