"""Which training data help a target task: LESS and other scores, and training on each choice."""

from collections.abc import Mapping
from pathlib import Path

from jax.sharding import Mesh

from jaxlm.artifacts.config import load
from jaxlm.cost.device import Device
from jaxlm.studies.grid import Result, Say
from jaxlm.studies.selection import SelectionConfig, selection_study
from jaxlm.studies.selection_cost import Plan, Sizes, plan_of, resized
from jaxlm.studies.selection_cost import markdown as cost_markdown
from jaxlm.studies.selection_table import markdown, rows

Config = SelectionConfig
PLAN = ("device", "sizes")
"""Sections of the flags of a dry run."""


def outline(config: SelectionConfig | None, where: str, plan_flags: Mapping[str, str]) -> str:
    """Return the cost of each stage: of the study, or (None) of the one of the paper."""

    def section(name: str) -> dict[str, str]:
        start = f"{name}."
        flags = {key: value for key, value in plan_flags.items() if key.startswith(start)}
        return {key.removeprefix(start): value for key, value in flags.items()}

    device, sizes = load(Device, None, section("device")), load(Sizes, None, section("sizes"))
    plan = Plan() if config is None else plan_of(config, base_dir=Path(where).parent)
    plan = resized(plan, **{key: getattr(sizes, key) for key in section("sizes")})
    return cost_markdown(plan, device)


def run(
    config: SelectionConfig, folder: Path, where: str, *, mesh: Mesh | None = None, say: Say = print
) -> Result:
    """Do every stage; see `jaxlm.studies.study`."""
    del folder
    found = selection_study(config, base_dir=Path(where).parent, mesh=mesh, say=say)
    return Result({**found, "rows": rows(found)}, markdown(found))
