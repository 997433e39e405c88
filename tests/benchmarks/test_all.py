"""The suite on small files, whose results are known; and that it has every benchmark."""

import ast
import json
import os
import re
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks import all as suite
from benchmarks.results import Figure
from benchmarks.suite import SUITE, Benchmark

SOURCES = {
    "passes": '''
        """Does it pass?"""
        import json, sys

        rows = [{"name": "one", "arguments": sys.argv[1:], "ratio": 0.5}]
        print("no row of three, since three is not installed (extra: parity)")
        report = {"benchmark": "passes", "device": "abacus x 1", "versions": {"python": "3"}}
        print(json.dumps(report | {"rows": rows}))
    ''',
    "fails": '''
        """Does it fail?"""
        print("beginning")
        raise ValueError("2 is not 3")
    ''',
    "mute": '"""Does it say what it found?"""',
    "missing": '"""Is the package there?"""',
    "sleeps": '''
        """Does it end?"""
        import subprocess, sys, time

        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(child.pid, flush=True)
        time.sleep(60)
    ''',
}
FAKES = {
    "passes": Benchmark((Figure("ratio", "ratio", "name"),)),
    "fails": Benchmark(()),
    "mute": Benchmark(()),
    "missing": Benchmark((), needs=("json", "no_such_package")),
    "sleeps": Benchmark(()),
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the suite on the files above; its exit code, the results, and their folder."""
    monkeypatch.chdir(tmp_path)
    folder, output = tmp_path / "fakes", tmp_path / "out"
    folder.mkdir()
    for name, source in SOURCES.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source).strip())

    def call(*arguments):
        code = suite.main([*arguments, "--output", str(output)], FAKES, folder)
        return code, json.loads((output / "results.json").read_text()), output

    return call


def test_what_fails_or_is_missing_is_a_row_and_the_others_run(run):
    code, found, output = run("--quick", "--only", "fails,mute,missing,passes")
    assert code == 1
    assert (found["device"], found["versions"]) == ("abacus x 1", {"python": "3"})
    assert {name: (row["outcome"], row["reason"]) for name, row in found["benchmarks"].items()} == {
        "fails": ("failed", "ValueError: 2 is not 3"),
        "mute": ("failed", "its last line is no JSON report"),
        "missing": ("skipped", "no_such_package is not installed (extra: parity)"),
        "passes": ("passed", ""),
    }
    passes = found["benchmarks"]["passes"]
    assert passes["notes"] == ["no row of three, since three is not installed (extra: parity)"]
    assert passes["rows"] == [{"name": "one", "arguments": ["--quick"], "ratio": 0.5}]
    assert (output / "logs" / "fails.out").read_text() == "beginning\n"
    assert "ratio: one **0.5**" in (output / "results.md").read_text()
    assert run("--only", "missing,passes")[0] == 0


def test_what_takes_too_long_is_stopped_with_all_that_it_started(run):
    code, found, output = run("--only", "sleeps", "--timeout", "2")
    row = found["benchmarks"]["sleeps"]
    assert (code, row["outcome"], row["exit_code"]) == (1, "timed out", None)
    child = int((output / "logs" / "sleeps.out").read_text())
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def alive(process):
    """Whether a process still runs; one that only waits to be noticed by its parent does not."""
    try:
        os.kill(process, 0)
        stat = Path(f"/proc/{process}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_every_file_with_a_main_is_a_benchmark():
    files = {path.stem: ast.parse(path.read_text()) for path in suite.FOLDER.glob("*.py")}
    runnable = {
        name
        for name, tree in files.items()
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    }
    assert runnable - {"all"} == set(SUITE)


@pytest.mark.parametrize("name", SUITE)
def test_a_headline_is_of_columns_that_the_benchmark_names(name):
    source = (suite.FOLDER / f"{name}.py").read_text()
    for figure in SUITE[name].figures:
        for column in (figure.column, *figure.by.split()):
            assert re.search(rf"\b{column}\b", source), column
    assert suite.question(suite.FOLDER / f"{name}.py").endswith("?")
