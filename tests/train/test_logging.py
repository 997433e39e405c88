"""Files that are whole or absent, and lines of progress where there is no terminal."""

import re
import time

import pytest

from jaxlm.artifacts.files import write_atomic
from jaxlm.train.logging import Progress


def test_a_write_that_fails_leaves_the_former_file(tmp_path):
    path = tmp_path / "summary.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "old"


def test_lines_without_a_terminal_and_in_the_log(tmp_path, capsys):
    log = tmp_path / "log.txt"
    with Progress(10, log=log) as progress:
        progress.say("start")
        progress.update(5, {"loss": 0.25}, 2**20)
        progress.update(6, {"loss": 0.125})
        progress.update(10, {"loss": 0.0625})
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "start"
    assert re.fullmatch(r"step 5/10  loss 0\.25  \S+ steps/s  1 MiB  0:00:\d\d left", shown[1])
    assert re.fullmatch(r"step 10/10  loss 0\.0625  \S+ steps/s", shown[2])
    stamped = [line.split("  ", 1)[1] for line in log.read_text().splitlines()]
    assert stamped == shown


def test_a_quiet_progress_writes_nothing(capsys):
    with Progress(1, quiet=True) as progress:
        progress.update(1, {})
        progress.say("nothing")
    assert capsys.readouterr() == ("", "")


def test_a_run_that_is_slow_still_says_where_it_is(monkeypatch, capsys):
    monkeypatch.setattr("jaxlm.train.logging.SILENCE", 0.05)
    with Progress(10) as progress:
        time.sleep(0.2)
        progress.update(2, {"loss": 0.25})
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    begun = [line for line in lines if "loss" in line]
    assert len(begun) > 1
    assert all(re.fullmatch(r"step 2/10  loss 0\.25  .* left", line) for line in begun)
    assert set(lines) - set(begun) == {"step 0/10"}
    assert len(lines) > len(begun) + 1


def test_the_time_left_is_that_of_the_steps_without_the_first():
    progress = Progress(10, quiet=True)
    progress._begin = (time.perf_counter() - 100, 0)  # 100 seconds, most of them of compiling
    progress.update(2, {})
    progress._begin = (time.perf_counter() - 8, 2)
    progress.update(6, {})
    assert re.fullmatch(r"step 6/10  0\.5 steps/s  0:00:08 left", progress._state())
