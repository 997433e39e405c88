"""A folder has one writer at a time."""

import os
import signal
import subprocess
import sys

import pytest

from jaxlm.artifacts.locks import LOCK, hold
from jaxlm.core.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from jaxlm.artifacts.locks import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_writer_is_told_who_the_first_is(tmp_path, holder):
    with pytest.raises(UserError, match=f"^output: .*process {holder.pid} on "), hold(tmp_path):
        pytest.fail("two writers in one folder")


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    with hold(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), hold(tmp_path):
        raise KeyError
    with hold(tmp_path), pytest.raises(UserError), hold(tmp_path):
        pytest.fail("two writers in one folder")
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]  # with the traceback
    (tmp_path / "log.txt").unlink()
    with pytest.raises(UserError), hold(tmp_path):
        raise UserError("foreseen")
    assert not list(tmp_path.iterdir())
