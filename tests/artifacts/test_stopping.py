"""Signals: a loop that listens stops where it can; everything else ends at once."""

import signal
import subprocess
import sys
import time

import pytest

COMMAND = """
import gc, sys, time
from jaxlm.artifacts.stopping import Stopped, handle_signals, defer_signals, pending_signal

kind = sys.argv[1]
try:
    with handle_signals():
        print("ready", flush=True)
        if kind == "idle":
            time.sleep(60)
        if kind == "collector":  # an exception there is printed and forgotten
            class Slow:
                def __del__(self):
                    time.sleep(60)
            Slow()
        with defer_signals():
            begin = time.monotonic()
            while time.monotonic() < begin + 60:
                time.sleep(0.01)
                if kind == "late" and pending_signal():
                    break
                if kind == "loop" and (number := pending_signal()):
                    raise Stopped("stopped after step 3 of 9", number)
        time.sleep(60)
except Stopped as stopped:
    print(stopped, flush=True)
    sys.exit(stopped.code)
"""


def start(kind: str) -> subprocess.Popen[str]:
    run = subprocess.Popen(
        [sys.executable, "-c", COMMAND, kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    time.sleep(0.3)
    return run


@pytest.mark.parametrize(
    ("kind", "number", "code"), [("idle", signal.SIGTERM, 143), ("collector", signal.SIGINT, 130)]
)
def test_where_no_loop_listens_the_first_signal_ends_the_process(kind, number, code):
    run = start(kind)
    run.send_signal(number)
    out, said = run.communicate(timeout=20)
    assert (run.returncode, out, said) == (code, "", "stopped\n")


def test_a_loop_that_listens_ends_itself():
    run = start("loop")
    run.send_signal(signal.SIGTERM)
    out, said = run.communicate(timeout=20)
    assert (run.returncode, out) == (143, "stopped after step 3 of 9\n")
    assert said == "stopping after the steps under way; once more ends at once\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_warnings_of_a_batch_system_stop_a_loop_however_often_they_come(number):
    run = start("loop")
    run.send_signal(number)
    run.send_signal(number)
    out, said = run.communicate(timeout=20)
    assert (run.returncode, out) == (128 + number, "stopped after step 3 of 9\n")
    assert said == "stopping after the steps under way; once more ends at once\n"
    run = start("deaf")
    for each in (number, number, signal.SIGTERM):
        assert run.poll() is None
        run.send_signal(each)
        time.sleep(0.3)
    run.communicate(timeout=20)
    assert run.returncode == 143


def test_a_second_signal_ends_a_loop_that_does_not_come_to_look():
    run = start("deaf")
    run.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=20)
    assert run.returncode == 130
    assert said.endswith("once more ends at once\nstopped\n")


def test_a_signal_after_the_last_look_ends_the_process():
    run = start("late")
    run.send_signal(signal.SIGTERM)
    out, said = run.communicate(timeout=20)
    assert (run.returncode, out) == (143, "")
    assert said.endswith("stopped\n")


def test_in_a_notebook_the_second_signal_is_an_exception():
    from jaxlm.artifacts.stopping import defer_signals, pending_signal

    before = signal.getsignal(signal.SIGINT)

    def loop():
        with defer_signals():
            signal.raise_signal(signal.SIGINT)
            assert pending_signal() == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            raise KeyboardInterrupt("of the loop")

    with pytest.raises(KeyboardInterrupt, match="of the loop"):
        loop()
    with pytest.raises(KeyboardInterrupt), defer_signals():
        signal.raise_signal(signal.SIGINT)  # after the last look
    assert pending_signal() == 0
    assert signal.getsignal(signal.SIGINT) is before
