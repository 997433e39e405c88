"""Many runs in one folder: their configurations, their folders, and their outcomes."""

import contextlib
import copy
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.artifacts import files
from jaxlm.artifacts.config import put
from jaxlm.artifacts.files import read_json, write_json
from jaxlm.artifacts.folder import LOCK, LOG, claim, failure, mark_failed
from jaxlm.core.checks import distinct, seeds, show
from jaxlm.core.errors import UserError
from jaxlm.studies.tables import TABLES
from jaxlm.train.loop import Diverged
from jaxlm.train.run_folder import RunFolder, to_dict

STUDY = "study.json"
"""File that records which study owns the folder, and its last configuration."""
FILES = (STUDY, LOCK, LOG, *TABLES, "curves.png")
"""Files that a study writes beside the folders of its runs."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """The keys that every configuration of many runs has.

    Attributes:
        run: keys of a run's configuration, without seed and output.
        seeds: one run for each seed.
        output: folder of the study.
    """

    run: dict[str, Any]
    seeds: tuple[int, ...] = (0,)
    output: str

    def __post_init__(self):
        check_seeds_and_output(self)
        no_seed_or_output(self.run, "run")


def check_seeds_and_output(config: Any) -> None:
    """Check these two keys of a study, and write the output's path in full."""
    seeds(config, "seeds")
    distinct("seeds", config.seeds)
    object.__setattr__(config, "output", str(files.file_path(config.output, "output")))


def no_seed_or_output(run: Mapping[str, Any], place: str) -> None:
    """Raise an error if a key is given that differs from run to run."""
    for key in ("seed", "output"):
        if key in run:
            plural = "seeds" if key == "seed" else key
            raise UserError(
                f"{place}.{key}: differs from run to run (got {show(run[key])}). Give {plural} "
                "beside run."
            )


def per_seed(run: Any, folder: Path, seeds: Iterable[int]) -> tuple[Any, ...]:
    """Return a run's configuration for each seed, with a folder for each below `folder`."""
    return tuple(replace(run, seed=seed, output=str(folder / f"seed-{seed}")) for seed in seeds)


def section_of(value: Any, place: str) -> dict[str, Any]:
    """Return the keys of a method or a variant; None and "" (null in YAML) stand for no keys."""
    value = {} if value is None or value == "" else value
    if not isinstance(value, Mapping):
        raise UserError(f"{place}: must be a section (got {show(value)}). Give keys with values.")
    return dict(value)


def with_keys(run: Mapping[str, Any], keys: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return a run's keys with some replaced; a dotted key changes one value within a section."""
    data = copy.deepcopy(dict(run))
    for key, value in keys.items():
        put(data, key, copy.deepcopy(value), place)
    return data


def folder_name(text: str, key: str) -> str:
    """Return a name for a folder, made unique by a hash where characters must be replaced."""
    if text in FILES:
        raise UserError(f"{key}: is the name of a file of the study (got {text}). Choose another.")
    plain = re.sub(r"[^\w.=,+-]+", "_", text.replace(", ", ","))
    if plain != text.replace(", ", ",") or len(plain.encode()) > 100:
        short = plain.encode()[:80].decode(errors="ignore")
        plain = f"{short}-{sha256(text.encode()).hexdigest()[:8]}"
    return files.folder_name(plain, key)


@contextlib.contextmanager
def study_folder(name: str, config: Any) -> Iterator[Path]:
    """Create the folder `config.output` of a study, and lock it against other processes.

    If the study fails before it has written anything, its folder is removed.
    """
    folder = Path(config.output)
    with claim(folder, STUDY, "study"):
        there = read_json(folder / STUDY, study=str)["study"] if (folder / STUDY).exists() else name
        if there != name:
            raise UserError(
                f"output: the folder has the study {there}, not {name} (got {folder}). Choose "
                "another output."
            )
        write_json(folder / STUDY, {"study": name, "config": to_dict(config)})
        yield folder


def listing(plan: Callable[[Any, str], Iterable[Any]]) -> Callable[..., str]:
    """Return the `outline` of a study: the folder of every run of its plan, a line each."""

    def outline(config: Any, where: str, plan_flags: Mapping[str, str]) -> str:
        return "\n".join(run.output for group in plan(config, where) for run in group.runs)

    return outline


class Result(NamedTuple):
    """The output of a study: its table as JSON values and as Markdown, and its figures."""

    table: dict[str, Any]
    text: str
    figures: tuple[Path, ...] = ()


class Outcome(NamedTuple):
    """The summary of a run, or the reason why it failed."""

    summary: dict[str, Any] | None
    failed: str | None = None


def outcome(config: Any, work: Callable[[], dict[str, Any]]) -> Outcome:
    """Do a run, or read the outcome of a finished one; a run that diverged is not repeated.

    `work` starts or resumes the run in `config.output`, and returns its summary.
    """
    folder = RunFolder(config.output)
    folder.check(config)
    if (reason := failure(folder.path)) is not None:
        return Outcome(None, reason)
    try:
        return Outcome(work())
    except Diverged as error:
        mark_failed(folder.path, str(error))
        return Outcome(None, str(error))


def outcomes(
    groups: Sequence[Any], work: Callable[[Any, Any], dict[str, Any]], say: Say
) -> list[list[Outcome]]:
    """Return the outcomes of every run of every group; `work(group, config)` does a run."""
    runs = [(group, config) for group in groups for config in group.runs]
    found = []
    for number, (group, config) in enumerate(runs, start=1):
        say(f"run {number}/{len(runs)}: {config.output}")
        found.append(outcome(config, functools.partial(work, group, config)))
    rest = iter(found)
    return [list(itertools.islice(rest, len(group.runs))) for group in groups]
