"""SIGINT and SIGTERM: a loop that listens stops after the steps under way; anything else at once.

An exception in the middle of whatever Python does is not good enough. One that is raised in a
destructor or a callback of the garbage collector is printed and forgotten, and one that ends the
interpreter while a thread compiles ends it with a segmentation fault. So a thread waits for the
signals, which the system hands it even while the main thread compiles, and either takes a note of
the signal, which loops read between steps, or ends the process.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from jaxlm.artifacts.processes import distributed

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A loop was told to stop, and did.

    Attributes:
      code: exit code of the process: 130 after SIGINT, 143 after SIGTERM.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.code = 128 + number


class _State:
    """What this process was told.

    Attributes:
      told: the first signal that came while a loop listened.
      listeners: loops that listen.
      watched: whether a thread waits for signals.
    """

    told = 0
    listeners = 0
    watched = False


def _receive(number: int, at_once: str) -> bool:
    """Takes a note of a signal and says so; False if nobody listens or one was there before."""
    if _State.listeners and not _State.told:
        _State.told = number
        _say(f"stopping after the steps under way; once more {at_once}")
        return True
    return False


def _say(line: str) -> None:
    # Not `print`: the thread may come in the middle of one, which holds the lock of the stream.
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def _ignore(number: int, frame: object) -> None:
    """With a handler of Python's the system does not end the process by itself."""


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Lets SIGINT and SIGTERM end the process at once, or stop a loop that listens.

    For the main thread of a command; a process that only passes signals on does without.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {number: signal.signal(number, _ignore) for number in _SIGNALS}
    former = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch() -> None:
        while number := os.read(read, 1)[0]:
            if number in _SIGNALS and not _receive(number, "ends at once"):
                _say("\033[?25hstopped" if os.isatty(2) else "stopped")  # and shows the cursor
                os._exit(128 + number)

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    _State.watched = True
    try:
        yield
    finally:
        _State.watched = False
        signal.set_wakeup_fd(former)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(write, b"\0")
        thread.join()
        os.close(read)
        os.close(write)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within, the first signal is for `told` to read; the second one does what it always does.

    Without `handled`, as in a notebook, that is an exception for SIGINT. A signal that came after
    the last look of a loop that is done is sent once more.
    """
    before = {}
    done, late = False, 0

    def receive(number: int, frame: object) -> None:
        if not _State.watched and not _receive(number, "raises KeyboardInterrupt"):
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        # Under `handled` too: jax.distributed takes SIGTERM for itself.
        numbers = _SIGNALS if _State.watched else (signal.SIGINT,)
        before = {number: signal.signal(number, receive) for number in numbers}
    _State.listeners += 1
    try:
        yield
        done = True
    finally:
        _State.listeners -= 1
        if not _State.listeners:
            late, _State.told = _State.told, 0
        for number, handler in before.items():
            signal.signal(number, handler)
        if done and late:
            signal.raise_signal(late)


def told() -> int:
    """The signal that a loop is to stop for, 0 for none; of several processes that of any.

    Every process calls it at the same place.
    """
    if distributed():
        from jax.experimental.multihost_utils import process_allgather

        return int(process_allgather(_State.told).max())
    return _State.told
