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
        """Which of two | is it?

        usage: python -m fakes.passes [--quick]
        """
        import json, sys

        rows = [
            {"name": "one", "arguments": sys.argv[1:], "ratio": 0.5, "seconds": 3},
            {"name": "two", "arguments": sys.argv[1:], "ratio": 12345.6, "seconds": 4},
            {"case": "third", "scores": [1.0, 2.0]},
        ]
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
FIGURES = (Figure("time over theirs", "ratio", "name"), Figure("score", "scores", "case"))
FAKES = {
    "passes": Benchmark(FIGURES, full=("--output", "{output}/here")),
    "fails": Benchmark(FIGURES),
    "mute": Benchmark(()),
    "missing": Benchmark((), needs=("json", "no_such_package")),
    "sleeps": Benchmark(()),
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the suite on the files above; its exit code, and the folder of the results."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "fakes"
    folder.mkdir()
    for name, source in SOURCES.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source).strip())

    def call(*arguments, output="out"):
        code = suite.main([*arguments, "--output", output], FAKES, folder)
        return code, tmp_path / output

    return call


def results(output):
    return json.loads((output / "results.json").read_text())


def test_what_fails_or_is_missing_is_a_row_and_the_others_run(run):
    code, output = run("--quick", "--only", "fails,mute,missing,passes")
    assert code == 1
    found = results(output)
    assert (found["device"], found["versions"], found["quick"]) == (
        "abacus x 1",
        {"python": "3"},
        True,
    )
    assert list(found["benchmarks"]) == ["fails", "mute", "missing", "passes"]
    fails, mute, missing, passes = found["benchmarks"].values()
    outcome = lambda row: (row["outcome"], row["exit_code"], row["reason"])  # noqa: E731
    assert outcome(fails) == ("failed", 1, "ValueError: 2 is not 3")
    assert outcome(mute) == ("failed", 0, "its last line is no JSON report")
    reason = "no_such_package is not installed (extra: parity)"
    assert outcome(missing) == ("skipped", None, reason)
    assert outcome(passes) == ("passed", 0, "")
    assert passes["notes"] == ["no row of three, since three is not installed (extra: parity)"]
    assert passes["rows"][0] == {
        "name": "one",
        "arguments": ["--quick"],
        "ratio": 0.5,
        "seconds": 3,
    }
    assert fails["seconds"] > 0 <= fails["cpu_s"]
    assert (output / "logs" / "fails.out").read_text() == "beginning\n"


def test_the_page_has_a_table_of_headlines_and_all_rows(run):
    _, output = run("--quick", "--only", "fails,missing,passes")
    page = (output / "results.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ")[:3] for line in page if line.startswith("| ")]
    assert cells[:5] == [
        ["benchmark", "what it compares", "abacus x 1"],
        ["---", "---", "---"],
        ["[fails](#fails)", "Does it fail?", "failed with exit code 1: ValueError: 2 is not 3"],
        [
            "[missing](#missing)",
            "Is the package there?",
            "skipped: no_such_package is not installed (extra: parity)",
        ],
        [
            "[passes](#passes)",
            "Which of two \\| is it?",
            "time over theirs: one **0.5**; two **12346**<br>score: third **1.5**",
        ],
    ]
    assert "| one | --quick | 0.5 | 3 |" in page
    assert "| two | --quick | 1.235e+04 | 4 |" in page
    assert page[page.index("| case | scores |") + 2] == "| third | 1, 2 |"


def test_what_passes_or_is_skipped_is_no_failure(run):
    code, output = run("--only", "missing,passes")
    assert code == 0
    arguments = results(output)["benchmarks"]["passes"]["rows"][0]["arguments"]
    assert arguments == ["--output", f"{output}/here"]  # a full run has its own


def test_headlines_of_another_device_stand_beside(run, tmp_path):
    _, other = run("--only", "passes", output="other")
    found = results(other)
    found["device"] = "loom x 2"
    found["benchmarks"]["passes"]["rows"][0]["ratio"] = 0.25
    (other / "results.json").write_text(json.dumps(found))
    _, output = run("--only", "passes,missing", "--beside", str(other))
    head, _, passes, missing = (
        line.strip("| ").split(" | ")[2:]
        for line in (output / "results.md").read_text().splitlines()
        if line.startswith(("| bench", "| ---", "| [", "| skip"))
        and "arguments" not in line
        and line.count(" | ") == 4
    )
    assert head == ["abacus x 1", "loom x 2", "seconds"]
    assert "one **0.5**" in passes[0]
    assert "one **0.25**" in passes[1]
    assert missing[1:] == ["", "0"]


def test_what_takes_too_long_is_stopped_with_all_that_it_started(run):
    code, output = run("--only", "sleeps", "--timeout", "2")
    assert code == 1
    row = results(output)["benchmarks"]["sleeps"]
    assert (row["outcome"], row["exit_code"]) == ("timed out", None)
    assert re.fullmatch(r"after \d seconds", row["reason"])
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "passes,other"], "there is no benchmark other; there are passes, fails"),
        (["--beside", "nowhere"], "nowhere has no results.json"),
    ],
)
def test_mistakes_are_told(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_what_all_names_share_stands_once():
    figure = Figure("times", "times", "method T", only="^(?!c)")
    rows = [{"method": name, "T": 16, "times": i} for i, name in enumerate("abc", start=1)]
    assert figure.line(rows) == "times (T=16): a **1**; b **2**"
    assert figure.line(rows[:1]) == "times: a, T=16 **1**"
    gains = Figure("gains", "gains", "task")
    row = {"task": "mr", "gains": {"raw": [1.0, 2.0], "random": [0.0]}}
    assert gains.line([row]) == "gains (mr): raw **1.5**; random **0**"


def test_every_file_with_a_main_is_a_benchmark():
    files = {path.stem: ast.parse(path.read_text()) for path in suite.FOLDER.glob("*.py")}
    runnable = {
        name
        for name, tree in files.items()
        if any(isinstance(each, ast.FunctionDef) and each.name == "main" for each in tree.body)
    }
    assert runnable - {"all"} == set(SUITE)


@pytest.mark.parametrize("name", SUITE)
def test_a_headline_is_of_columns_that_the_benchmark_names(name):
    source = (suite.FOLDER / f"{name}.py").read_text()
    for figure in SUITE[name].figures:
        for column in (figure.column, *figure.by.split()):
            assert re.search(rf"\b{column}\b", source), column
    assert suite.question(suite.FOLDER / f"{name}.py").endswith("?")
