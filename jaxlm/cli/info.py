"""Print versions, devices and memory, and the names there are; with a model, its parameters.

usage: jaxlm info [MODEL] [--base=FOLDER]

MODEL is a folder, a hub id, or the folder of a run or of a PEFT adapter; `--base` is where the
model is that these began with, if it has moved. Without MODEL, the tasks, model families,
optimizers, objectives and studies are listed, as configurations name them.
"""

import os
import platform
import textwrap
from collections.abc import Sequence
from importlib import metadata

from jaxlm.cli.config import split_args
from jaxlm.cli.screen import show
from jaxlm.core.errors import UserError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "safetensors", "numpy", "transformers")


def run(args: Sequence[str]) -> None:
    """Run the command `jaxlm info`."""
    words, flags = split_args(args)
    base = flags.pop("base", None)
    if len(words) > 1 or flags:
        given = " ".join([*words, *(f"--{name}" for name in flags)])
        raise UserError(
            f"MODEL: info takes it and --base alone (got {given}). See jaxlm info --help."
        )
    import jax

    import jaxlm

    print(f"jaxlm {jaxlm.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("  ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    print(f"{os.cpu_count()} CPU cores, {memory:.1f} GiB memory")
    for device in jax.devices():
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        size = f", {limit / 2**30:.1f} GiB" if limit else ""
        print(f"device {device.id}: {device.platform} {device.device_kind}{size}")
    if words:
        _parameters(words[0], base)
    else:
        for what, names in registries().items():
            print(f"\n{what}")
            print(
                textwrap.fill(
                    ", ".join(names),
                    98,
                    break_on_hyphens=False,
                    initial_indent="  ",
                    subsequent_indent="  ",
                )
            )


def registries() -> dict[str, list[str]]:
    """Return the names that a configuration may give, by kind."""
    from jaxlm.data.tasks import task_names
    from jaxlm.models.families import MODULES
    from jaxlm.studies import STUDIES
    from jaxlm.train.objectives import OBJECTIVES
    from jaxlm.train.optimizers import OPTIMIZERS

    return {
        "tasks": task_names(),
        "model families": list(MODULES),
        "optimizers": list(OPTIMIZERS),
        "objectives": list(OBJECTIVES),
        "studies": list(STUDIES),
    }


def _parameters(name: str, base: str | None) -> None:
    from rich.table import Table

    from jaxlm.core.paths import flatten
    from jaxlm.train.load import load_model
    from jaxlm.train.run_folder import RunFolder

    lm = load_model(name, base=base)
    if (steps := RunFolder(name, "MODEL").tested_step()) is not None:
        print(f"{name}: a run, after step {steps[0]} of {steps[1]}")
    table = Table(title=f"{name}: {lm.config.family} {lm.config.kind}")
    for column in ("path", "shape", "parameters"):
        table.add_column(column, justify="left" if column == "path" else "right")
    total = 0
    for leaf in flatten(lm.params)[0]:
        total += leaf.value.size
        table.add_row(leaf.path, "x".join(map(str, leaf.value.shape)), f"{leaf.value.size:,}")
    table.add_section()
    table.add_row("total", "", f"{total:,}")
    show(table)
