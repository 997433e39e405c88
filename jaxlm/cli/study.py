"""Answer a question that takes many runs by a table and a picture; without a file, list them.

usage: jaxlm study                                     the studies, a line each
       jaxlm study study.yaml [--dry-run] [--dotted.path=value ...]
       jaxlm study NAME [--dry-run] [--dotted.path=value ...]

The key `study` of the file names one of them, and configs/studies/ has a file for each. The output
folder holds a folder for each run or stage, table.md, table.json and figures. `--dry-run` prints
what would be run, or what it costs. The same command resumes a study that was stopped; a run that
diverged is a row of the table, and is repeated once its folder is removed.
"""

import sys
from collections.abc import Sequence
from typing import Any

from jaxlm.artifacts.config import load
from jaxlm.artifacts.yaml import read_yaml
from jaxlm.cli.config import parse_args
from jaxlm.core.checks import one_of
from jaxlm.core.errors import UserError
from jaxlm.studies import STUDIES

DRY = "--dry-run"


def run(args: Sequence[str], mesh: Any = None) -> None:
    """Run the command `jaxlm study`."""
    path, flags = parse_args([word for word in args if word != DRY])
    if path is None and not flags and DRY not in args:
        for name, study in STUDIES.items():
            print(f"{name:<10}{study.question}")
        return
    given, path = (path, None) if path in STUDIES else (None, path)
    if given is None and path is not None:
        given = read_yaml(path).get("study")
    if given is None:
        raise UserError(
            f"study: is missing (got nothing). Name one of {', '.join(STUDIES)} in the file."
        )
    one_of("study", given, tuple(STUDIES))
    execute(given, path, flags, dry=DRY in args, mesh=mesh)


def execute(
    name: str, path: str | None, flags: dict[str, str], *, dry: bool, mesh: Any = None
) -> None:
    """Load the configuration of a study and run it, or print its outline."""
    from jaxlm.studies.study import module_of, study

    module, where = module_of(name), path or "command line"
    keys = None if path is None else [key for key in read_yaml(path) if key != "study"]
    # Flags of a plan, such as --device.memory=80e9, are no keys of the study.
    plan = tuple(f"{section}." for section in getattr(module, "PLAN", ()) if dry)
    extra = {key: flags.pop(key) for key in list(flags) if key.startswith(plan)} if plan else {}
    config = None
    if path is not None or flags or not plan:
        config = load(module.Config, path, flags, only=keys)
    if dry:
        print(module.outline(config, where, extra))
        return
    assert config is not None
    result = study(config, where=where, mesh=mesh, say=lambda line: print(line, file=sys.stderr))
    print(result.text)
    for figure in result.figures:
        print(figure)
