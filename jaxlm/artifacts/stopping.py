"""Signals to stop: a loop that defers them stops after its step; anything else stops at once.

Python's own handling, an exception at an arbitrary point, is not reliable enough. An exception that
is raised in a destructor or in a callback of the garbage collector is printed and forgotten, and
one that ends the interpreter while a thread compiles causes a segmentation fault. So a thread waits
for the signals, which it receives even while the main thread compiles. It either records the
signal, for loops to read between steps, or ends the process.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from jaxlm.artifacts.processes import distributed

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a batch system sends, perhaps repeatedly, some time before it ends a process."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, *WARNINGS)


class Stopped(KeyboardInterrupt):
    """A loop has stopped because of a signal; the process ends with `code`, 128 + its number."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.code = 128 + number


class _State:
    """The state of this process: the first signal that loops deferred, their number, the thread."""

    pending = 0
    loops = 0
    watched = False


def _receive(number: int, at_once: str) -> bool:
    """Record a signal and say so; False if it must have its usual effect.

    That is so if no loop defers signals, and for a second signal that is not one of `WARNINGS`.
    """
    if _State.loops and not _State.pending:
        _State.pending = number
        _say(f"stopping after the steps under way; once more {at_once}")
        return True
    return bool(_State.pending) and number in WARNINGS


def _say(line: str) -> None:
    # Not `print`: the main thread may be inside one, which holds the lock of the stream.
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def _ignore(number: int, frame: object) -> None:
    """Do nothing; with a handler set, the system does not end the process by itself."""


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """End the process at once on each of `SIGNALS`, except in loops that defer them.

    This is for the main thread of a command; in another thread it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {number: signal.signal(number, _ignore) for number in SIGNALS}
    former = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch() -> None:
        while number := os.read(read, 1)[0]:
            if number in SIGNALS and not _receive(number, "ends at once"):
                _say("\033[?25hstopped" if os.isatty(2) else "stopped")  # shows the cursor
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
def defer_signals() -> Iterator[None]:
    """Keep the first signal for `pending_signal`; the second one has its usual effect.

    Without `handle_signals`, as in a notebook, the usual effect of SIGINT is an exception. If a
    signal arrives after the loop last called `pending_signal`, it is raised again at the end.
    """
    before = {}
    done, late = False, 0

    def receive(number: int, frame: object) -> None:
        if not _State.watched and not _receive(number, "raises KeyboardInterrupt"):
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        # Set them under `handle_signals` too, since jax.distributed takes SIGTERM for itself.
        numbers = SIGNALS if _State.watched else (signal.SIGINT,)
        before = {number: signal.signal(number, receive) for number in numbers}
    _State.loops += 1
    try:
        yield
        done = True
    finally:
        _State.loops -= 1
        if not _State.loops:
            late, _State.pending = _State.pending, 0
        for number, handler in before.items():
            signal.signal(number, handler)
        if done and late:
            signal.raise_signal(late)


def pending_signal() -> int:
    """Return the signal that a loop must stop for, in this or any other process; 0 for none.

    Every process must call it at the same point.
    """
    if distributed():
        from jax.experimental.multihost_utils import process_allgather

        return int(process_allgather(_State.pending).max())
    return _State.pending
