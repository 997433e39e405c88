"""Whether fine-tuning behaves like a kernel: kernels, fine-tuning, linearization, a verdict."""

from collections.abc import Mapping
from pathlib import Path

from jax.sharding import Mesh

from jaxlm.studies.grid import Result, Say
from jaxlm.studies.kernel_study import KernelConfig, cases, kernel_study
from jaxlm.studies.kernel_table import markdown, rows

Config = KernelConfig


def outline(config: KernelConfig, where: str, plan_flags: Mapping[str, str]) -> str:
    """Return the file of every case, a line each."""
    del where, plan_flags
    return "\n".join(str(Path(config.output) / "reports" / case.name) for case in cases(config))


def run(
    config: KernelConfig, folder: Path, where: str, *, mesh: Mesh | None = None, say: Say = print
) -> Result:
    """Make the report of every case; see `jaxlm.studies.study`."""
    records = kernel_study(config, base_dir=Path(where).parent, mesh=mesh, say=say)
    figures: tuple[Path, ...] = ()
    if config.plots:
        from jaxlm.studies.kernel_plots import draw

        figures = tuple(draw(records, folder))
    return Result({"rows": rows(records)}, markdown(records), figures)
