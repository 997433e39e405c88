"""Answer a question that takes many runs, with a table and a picture; or list the studies.

usage: jaxlm study                                     the studies, a line each
       jaxlm study study.yaml [--dry-run] [--dotted.path=value ...]
       jaxlm study NAME [--dry-run] [--dotted.path=value ...]

The key `study` of the file names a study; configs/studies/ has a file for each. The output
folder holds a folder for each run or stage, table.md, table.json and figures. `--dry-run` prints
what would be run, or what it costs. The same command resumes a study that was stopped. A run that
diverged is a row of the table, and is repeated after you remove its folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxlm.artifacts.yaml import read_yaml
from jaxlm.cli import config as configs
from jaxlm.core.checks import one_of
from jaxlm.core.errors import UserError
from jaxlm.studies import STUDIES
from jaxlm.studies.grid import Result
from jaxlm.studies.study import module_of
from jaxlm.studies.study import study as run_study

DRY = "--dry-run"


def described(args: Sequence[str]) -> str:
    """Return the keys of a study, or the list of all studies."""
    from jaxlm.artifacts.keys import listing

    name, _, _ = _named(args)
    return _list() if name is None else listing(module_of(name).Config)


def read_config(args: Sequence[str]) -> Any:
    """Return the configuration that the command would run."""
    name, path, flags = _named(args)
    return _load(_known(name), path, flags)


def run(args: Sequence[str], mesh: Any = None) -> None:
    """Run the command `jaxlm study`."""
    if not args:
        print(_list())
        return
    name, path, flags = _named([word for word in args if word != DRY])
    execute(_known(name), path, flags, dry=DRY in args, mesh=mesh)


def study(config: Any, *, mesh: Mesh | None = None, **overrides: Any) -> Result:
    """Run a study in its folder, or resume it, as the command `jaxlm study` does.

    Args:
        config: a study's name, its YAML file, or its configuration.
        mesh: see `jaxlm.sharding.make_mesh`; None for one device.
        **overrides: keys of the study; see `jaxlm.finetune`, also for the default of `output`.

    Returns:
        The table as JSON values, the text, and the figures that were written.

    Raises:
        UserError: see `jaxlm.studies.study.study`; or a key is unknown, or a value does not fit.
    """
    name, file = getattr(config, "study", config), None
    if configs.is_file(config):
        file = config
        name = _known(read_yaml(file).get("study"))
    elif isinstance(config, str):
        config = None
        _known(name)
    cls = module_of(name).Config
    built, _ = configs.from_call(cls, config, overrides, name, only=_keys(file))
    return _run(built, str(file or configs.ARGUMENTS), mesh)


def _list() -> str:
    return "\n".join(f"{name:<14}{study.question}" for name, study in STUDIES.items())


def _named(args: Sequence[str]) -> tuple[str | None, str | None, dict[str, str]]:
    """Return the name of a study (None: not given), its file, and the other flags."""
    path, flags = configs.parse_args(args)
    if path is not None and not configs.is_file(path):
        return _known(path), None, flags
    return (None if path is None else read_yaml(path).get("study")), path, flags


def _known(name: Any) -> str:
    if name is None:
        raise UserError(
            f"study: is missing (got nothing). Name one of {', '.join(STUDIES)} in the file."
        )
    one_of("study", name, tuple(STUDIES))
    return str(name)


def _load(name: str, path: str | None, flags: dict[str, str]) -> Any:
    return configs.load(module_of(name).Config, path, flags, only=_keys(path))


def _keys(path: str | Path | None) -> list[str] | None:
    """Return the keys of a study's file that are those of its configuration."""
    return None if path is None else [key for key in read_yaml(path) if key != "study"]


def _run(config: Any, where: str, mesh: Mesh | None) -> Result:
    return run_study(config, where=where, mesh=mesh, say=lambda line: print(line, file=sys.stderr))


def execute(
    name: str, path: str | None, flags: dict[str, str], *, dry: bool, mesh: Any = None
) -> None:
    """Load the configuration of a study and run it, or print its outline."""
    module, where = module_of(name), path or "command line"
    # Flags of a plan, such as --device.memory=80e9, are not keys of the study.
    plan = tuple(f"{section}." for section in getattr(module, "PLAN", ()) if dry)
    extra = {key: flags.pop(key) for key in list(flags) if plan and key.startswith(plan)}
    config = _load(name, path, flags) if path is not None or flags or not plan else None
    if dry:
        print(module.outline(config, where, extra))
        return
    assert config is not None
    result = _run(config, where, mesh)
    print(result.text)
    for figure in result.figures:
        print(figure)
