"""Every command, with every kind of file broken: a sentence with a fix, and nothing is damaged.

The whole list takes minutes: `pytest -m hostile`. A few rows of every kind of file run each time.
"""

import collections
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.hostile.rows import CELLS, every_row
from tests.hostile.world import COMMANDS, MADE, ROOT, Row, World, contents, run

ROWS = every_row()
# Without the rows that first need a whole run, or a process that imports jaxlm anew.
OFTEN = [row for row in ROWS[6::10] if row.needs in (None, "finetune") and not row.env][::2]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One for all workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return World(shared / "hostile")


def check(world: World, folder: Path, row: Row) -> None:
    world.copy(folder, row)
    if row.breaks is not None:
        row.breaks(folder)
    before = contents(folder)
    done = run(folder, [*COMMANDS[row.command], *row.words], env=row.env or None)
    said = done.stderr.strip()
    assert done.returncode in row.code, said[-3000:]
    assert "Traceback" not in said, said[-3000:]
    assert "Exception ignored" not in said, said[-3000:]
    if done.returncode:
        print(f"{row.id}\n    {said.splitlines()[-1]}")  # the table, with `pytest -n 0 -s`
        check_sentence(said, row)
        if not row.changes:
            assert contents(folder) == before
    assert not (folder / "ran").exists(), "code from a model folder ran"


def check_sentence(said: str, row: Row) -> None:
    """`error: KEY: what is wrong (got VALUE). What to do.`, on one line, the last one."""
    last = said.splitlines()[-1]
    assert len(last) < 1000, last
    form = re.fullmatch(r"error: \S.*?: .+?\. (-*[A-Z`'].*[.?])", last)
    assert form is not None, said[-3000:]
    assert len(form[1].split()) >= 2, f"no fix in: {last}"
    assert not row.named or any(name in last for name in row.named), (row.named, last)


@pytest.mark.parametrize("row", OFTEN, ids=lambda row: row.id)
def test_a_broken_thing_is_named_with_a_fix(row: Row, world: World, tmp_path: Path):
    check(world, tmp_path / "world", row)


@pytest.mark.hostile
@pytest.mark.parametrize("row", [row for row in ROWS if row not in OFTEN], ids=lambda row: row.id)
def test_the_rest_of_the_list(row: Row, world: World, tmp_path: Path):
    check(world, tmp_path / "world", row)


def test_the_list_is_long_and_has_every_command():
    assert len(ROWS) >= 250
    cells = collections.Counter((row.command, row.kind) for row in ROWS)
    assert set(cells) == {(command, kind) for kind in CELLS for command in CELLS[kind]}
    assert max(cells.values()) <= 8, cells.most_common(5)


def test_the_page_on_files_from_others_names_tests_that_exist():
    lines = [x for x in (ROOT / "docs/security.md").read_text().splitlines() if x[:2] == "| "]
    rows = {row.id for row in ROWS}
    assert len(lines) > 15
    for line in lines:
        if line == "| | test |":
            continue
        names = re.findall(r"`([^`]+)`", line.rsplit("|", 2)[1])
        assert names, line
        for name in names:
            file, _, test = name.partition("::")
            there = name in rows or (test and f"def {test}(" in (ROOT / file).read_text())
            assert there, f"docs/security.md: there is no {name}"


def test_no_module_can_unpickle():
    for path in sorted((ROOT / "jaxlm").rglob("*.py")):
        found = re.findall(
            r"\b(?:pickle|marshal|shelve|joblib|allow_pickle=True)\b", path.read_text()
        )
        imports = [name for name in found if f"import {name}" in path.read_text()]
        assert not imports, path
        assert "allow_pickle=True" not in found, path


@pytest.mark.hostile
@pytest.mark.parametrize("words", [["--help"], ["info", "model"]], ids=" ".join)
def test_a_reader_that_stops_early_is_no_error(words, world):
    done = run(world.folder / "inputs", words, pipe_to="head -1")
    assert "BrokenPipe" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 141)


PRINTS = ("evaluate", "generate", "generate file", "convert", "info", "finetune")
"""Commands that end with something on standard output."""


@pytest.mark.hostile
@pytest.mark.parametrize("name", PRINTS)
def test_closed_output_is_no_traceback(name, world, tmp_path):
    folder = world.copy(tmp_path / "world", Row(name, "environment", "closed output"))
    read, write = os.pipe()
    os.close(read)
    done = run(folder, COMMANDS[name], stdout=write)
    os.close(write)
    assert done.returncode in (0, 141), done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.hostile
@pytest.mark.parametrize("name", PRINTS)
def test_full_output_is_a_sentence(name, world, tmp_path):
    row = Row(name, "environment", "full output", named=("output",))
    folder = world.copy(tmp_path / "world", row)
    with open("/dev/full", "w") as full:
        done = run(folder, COMMANDS[name], stdout=full.fileno())
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    check_sentence(done.stderr.strip(), row)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=False
    )
    if mounted.returncode:
        pytest.skip("needs root to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


OUTPUT = {"generate file": "--output={}", "convert": "{}", "convert run": "{}"}
"""Words that say where a command writes; of the others `--output`."""


@pytest.mark.hostile
@pytest.mark.parametrize("name", [*MADE, *OUTPUT])
def test_a_full_disk_is_named(name, world, small_disk, tmp_path):
    row = Row(name, "environment", "full disk", named=(str(small_disk),))
    folder = world.copy(tmp_path / "world", row)
    free = 0 if name in OUTPUT else 8192 if name == "kernel" else 80_000
    (small_disk / "filler").write_bytes(bytes(256 * 1024 - free))
    words = COMMANDS[name][: 2 if "convert" in name else None]
    done = run(folder, [*words, OUTPUT.get(name, "--output={}").format(small_disk / "out")])
    said = done.stderr.strip()
    assert done.returncode == 2, said[-3000:]
    assert "Traceback" not in said, said[-3000:]
    check_sentence(said, row)


@pytest.mark.hostile
@pytest.mark.parametrize("name", list(MADE))
def test_the_second_of_two_commands_is_told_of_the_first(name, world, tmp_path):
    from jaxlm.artifacts.folder import hold

    row = Row(name, "environment", "two processes")
    folder = world.copy(tmp_path / "world", row)
    (folder / str(row.output)).mkdir()
    with hold(folder / str(row.output)):
        before = contents(folder)
        done = run(folder, COMMANDS[name])
        assert done.returncode == 2, done.stderr[-3000:]
        assert f"process {os.getpid()} on " in done.stderr.splitlines()[-1]
        assert contents(folder) == before
