"""Pages of the documentation as blocks and commands, and a check of every kind of them."""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import yaml

from jaxlm.cli import launch
from jaxlm.cli.main import ALONE, COMMANDS, main
from jaxlm.core.errors import UserError
from jaxlm.peft import TUNINGS
from jaxlm.sharding import AXES
from jaxlm.sharding.multihost import group_from_text
from jaxlm.train.dynamics import DYNAMICS
from jaxlm.train.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
SHORT = ("--steps=2", "--task.num_test=4", "--eval_batch_size=16")
"""What makes a run of a page's own file short; it still trains on as many rows as printed."""
FEW = ("--task.validation=hold_out", "--task.k=4")
"""And, where a page names a shipped task, few of these."""
AWAY = re.compile(r"(^|=)(facebook/|opt/|roberta|FOLDER)")
"""What a command is given that is not on this machine."""


@dataclasses.dataclass(frozen=True)
class Block:
    """What stands between two fences; `title` is the file that it is."""

    language: str
    title: str
    text: str
    where: str


def pages() -> list[Path]:
    """Everything with text of its own on the site, and the README."""
    found = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return sorted(path for path in found if path.parent.name != "api")


FENCE = re.compile(r"^( *)(`{3,}|~{3,})([^\n]*)\n(.*?)^\1\2", re.M | re.S)


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a page in order."""
    text = path.read_text()
    for match in FENCE.finditer(text):
        language, _, options = match[3].strip().partition(" ")
        title = re.search(r'title="([^"]*)"', options)
        body = match[4]
        comment = re.match(r"# (\S+\.ya?ml)\n", body)
        name = title[1] if title else comment[1] if comment else ""
        line = text.count("\n", 0, match.start()) + 1
        yield Block(language, name, body, f"{path.name}:{line}")


def spans(path: Path) -> list[str]:
    """The inline code of a page, each on one line."""
    text = FENCE.sub("", path.read_text())
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


class Stopped(Exception):
    """A command came as far as to its work."""


def stop(*args: Any, **kwargs: Any) -> None:
    raise Stopped


def stop_with_folder(config: Any, **kwargs: Any) -> None:
    """In place of a run: its folder, for the commands that follow."""
    with RunFolder(config.output).held(config):
        pass
    raise Stopped


Until = Literal["work", "training", "end"]
"""How far a command goes: to where its work begins, to the first step, or to its end."""
DRY = ("sweep", "study")
WORK: dict[str, list[tuple[str, Callable]]] = {
    "finetune": [
        ("jaxlm.train.finetuning.finetune", stop_with_folder),
        ("jaxlm.cost.plan.dry_run", stop),
        ("jaxlm.studies.quickstart.run", stop),
    ],
    "pretrain": [("jaxlm.cli.pretrain.pretrain", stop)],
    "evaluate": [("jaxlm.cli.evaluate._evaluate", stop)],
    "study": [("jaxlm.studies.less_cost.plan_of", stop)],
    **{
        name: [("jaxlm.train.load.load_model", stop)]
        for name in ("generate", "predict", "convert", "info")
    },
}
"""Where the work of a command begins, and what is done in its place."""
TRAINING = {**WORK, "finetune": [("jaxlm.train.finetuning._run", stop)]}
"""The same where the data and the model of a run are read."""


def run_jaxlm(args: list[str], until: Until) -> None:
    """Runs a command of jaxlm, or as a dry run."""
    assert args, "jaxlm without a command"
    name = args[0]
    assert name in COMMANDS or name == "help" or name.startswith("--"), f"no command {name}"
    args = [name, *on_one_device(name, args[1:])]
    if name in DRY and len(args) > 1 and not {"--help", "--dry-run"} & set(args):
        args = [*args, "--dry-run"]
    if len(args) == 1 or any(map(AWAY.search, args)):
        until = "work"
    if until != "work" and name == "finetune":
        named = any(word.startswith("--task.name=") for word in args)
        short = (*SHORT, *(FEW if named else ()))
        files = [Path(word).read_text() for word in args if word.endswith(".yaml")]
        if any(re.search("(messages|tokens):", text) for text in files):
            short = tuple(flag for flag in short if not flag.startswith("--task."))
        if any("epochs:" in text for text in files):
            short = (*short, "--epochs=null")
        flags = {flag.partition("=")[0] for flag in short}
        args = [*(word for word in args if word.partition("=")[0] not in flags), *short]
    with contextlib.ExitStack() as patches:
        # A dry run compiles its programs, but does not look for the largest batch.
        patches.enter_context(mock.patch("jaxlm.cost.plan._largest_batch", return_value=None))
        stand_ins = {"work": WORK, "training": TRAINING, "end": {}}[until]
        for place, stand_in in stand_ins.get(name, []):
            patches.enter_context(mock.patch(place, stand_in))
        with contextlib.suppress(Stopped):
            succeeds(args)


def on_one_device(name: str, args: list[str]) -> list[str]:
    """The arguments without those that say where a command runs, which are checked."""
    flags, rest = launch.parse(args)
    assert flags == launch.Launch() or name not in ALONE, f"{name} runs on one device"
    for axis in (flags.mesh or "").split(",") if flags.mesh else ():
        assert re.fullmatch(rf"({'|'.join(AXES)})=(-1|[1-9]\d*)", axis), flags.mesh
    if flags.distributed is not None:
        group_from_text(flags.distributed)
    return rest


def succeeds(args: list[str]) -> None:
    try:
        assert main([*args, "--debug"]) == 0
    except UserError as error:
        raise AssertionError(f"jaxlm {shlex.join(args)}: {error}") from None


def parse_python(args: list[str], until: Until) -> None:
    """Checks that `python -m module` or `python file.py` takes the arguments that follow."""
    del until
    if args[0] == "-m":
        name, rest = args[1], args[2:]
    else:
        assert (ROOT / args[0]).exists(), f"there is no {args[0]}"
        name, rest = args[0].removesuffix(".py").replace("/", "."), args[1:]
    if name == "jaxlm":
        return run_jaxlm(rest, "work")
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, given: Any = None, space: Any = None):
        parse(parser, rest, space)
        raise Stopped

    module = importlib.import_module(name)
    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop):
        try:
            module.main()
        except Stopped:
            return
    raise AssertionError(f"{name} reads no arguments")


def check_files(args: list[str], until: Until) -> None:
    """Checks that the files that a command is given are in the repository."""
    del until
    for word in args:
        assert "/" not in word or word.startswith("-") or (ROOT / word).exists(), word


def check_start(args: list[str], until: Until) -> None:
    """Checks the command of jaxlm that another one starts in every process."""
    del until
    run_jaxlm(args[args.index("jaxlm") + 1 :], "work")


def check_tool(args: list[str], until: Until) -> None:
    """A tool of the lint, notebooks or docs extra."""
    del args, until


def move(args: list[str], until: Until) -> None:
    """Moves what the commands before have made."""
    source, target = map(Path, args)
    source.rename(target)


def make_folder(args: list[str], until: Until) -> None:
    """Makes a folder, with `-p` alone."""
    assert args[0] == "-p"
    Path(args[1]).mkdir(parents=True, exist_ok=True)


CHECKS: dict[str, Callable[[list[str], Until], None]] = {
    "mkdir": make_folder,
    "mv": move,
    "jaxlm": run_jaxlm,
    "python": parse_python,
    **dict.fromkeys(("mpirun", "srun"), check_start),
    **dict.fromkeys(("kubectl", "sbatch"), check_files),
    **dict.fromkeys(
        ("cd", "git", "mkdocs", "mypy", "pip", "pre-commit", "pytest", "ruff"), check_tool
    ),
}


def command(line: str, until: Until = "work") -> None:
    """Checks one shell command, or runs it; of a kind that is not known it fails."""
    for part in re.split(r" && ", line):
        words = shlex.split(part, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            assert words[0] in CHECKS, f"nothing checks the command {words[0]}"
            CHECKS[words[0]](words[1:], until)


def commands(text: str) -> list[str]:
    """The commands of a shell block, each on one line."""
    return text.replace("\\\n", " ").splitlines()


def is_command(span: str) -> bool:
    """Whether inline code is a command with arguments that can be checked.

    One that names a file that is not there (`jaxlm sweep sweep.yaml`) stands for any such file; its
    command is known by its first two words.
    """
    words = span.split()
    if words[0] not in ("jaxlm", "pip", "pytest", "python") or len(words) < 2:
        return False
    if words[0] == "jaxlm":
        assert words[1] in (*COMMANDS, "help") or words[1].startswith("--"), span
        files = [word for word in words[2:] if word.endswith((".yaml", ".yml"))]
        return len(words) > 2 and all(Path(file).exists() for file in files)
    return True


def write(block: Block) -> None:
    """Writes a block that is a file into the working directory, as it is printed."""
    path = Path(block.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text)


def add_family(block: Block, monkeypatch: Any) -> None:
    """Makes a page's file of a model family one of the package."""
    from jaxlm.models import families

    write(block)
    path = Path(block.title)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(path.parent.resolve())])
    monkeypatch.setattr(families, "MODULES", (*families.MODULES, path.stem))
    monkeypatch.delitem(sys.modules, f"{families.__name__}.{path.stem}", raising=False)


def execute(block: Block, names: dict[str, Any], monkeypatch: Any, until: Until = "work") -> None:
    """Runs a block, or checks it; one of a kind that is not known fails."""
    if block.language == "python":
        if block.title and not (ROOT / block.title).exists():
            add_family(block, monkeypatch)
        else:
            exec(compile(block.text, block.where, "exec"), names)
    elif block.language == "bash":
        for line in commands(block.text):
            command(line, until)
    elif block.language == "yaml":
        assert isinstance(yaml.safe_load(block.text), dict)
        assert block.title, f"{block.where}: nothing reads this; give it the title of its file"
        write(block)
    elif block.language == "csv":
        write(block)
    elif block.language == "json":
        for line in block.text.splitlines():
            json.loads(line)
        if block.title:
            write(block)
    else:
        raise AssertionError(f"{block.where}: nothing runs a block of {block.language!r}")


def known(name: str) -> bool:
    """Whether a dotted name is a module or what one has."""
    found, *rest = name.split(".")
    value = importlib.import_module(found)
    for part in rest:
        if not hasattr(value, part):
            try:
                importlib.import_module(f"{value.__name__}.{part}")
            except (ImportError, AttributeError):
                return False
        value = getattr(value, part)
    return True


def is_key(name: str) -> bool:
    """Whether a dotted name is a key of a section of a configuration, such as `peft.targets`."""
    section, _, key = name.partition(".")
    kinds = {"dynamics": DYNAMICS, "peft": TUNINGS}.get(section, {})
    return any(key in (field.name for field in dataclasses.fields(kind)) for kind in kinds.values())


def link_into(folder: Path) -> None:
    """What a command finds in the root of a clone."""
    os.symlink(ROOT / "configs", folder / "configs")
