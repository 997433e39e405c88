"""Files that are whole or absent, and lines of progress where there is no terminal."""

import re

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
    assert re.fullmatch(r"step 5/10  loss 0\.25  \S+ steps/s  1 MiB", shown[1])
    assert re.fullmatch(r"step 10/10  loss 0\.0625  \S+ steps/s", shown[2])
    stamped = [line.split("  ", 1)[1] for line in log.read_text().splitlines()]
    assert stamped == shown


def test_a_quiet_progress_writes_nothing(capsys):
    with Progress(1, quiet=True) as progress:
        progress.update(1, {})
        progress.say("nothing")
    assert capsys.readouterr() == ("", "")
