"""What a command writes to its streams, and what becomes of it where they take no more."""

import codecs
import contextlib
import os
import sys
from typing import Any


def prepare() -> None:
    """Lets every text be written: no stream is missing, and none stops at a character."""
    with contextlib.suppress(OSError):
        # Or the next file to be opened would become standard output, and take what is printed.
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
    codecs.register_error("jaxlm", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="jaxlm")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    r"""Writes `\u00e9` for what an encoding lacks, which within JSON is the same text."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    pairs = (units[i : i + 2].hex() for i in range(0, len(units), 2))
    return "".join(f"\\u{pair}" for pair in pairs), error.end


def flush() -> None:
    """Writes what is still held, so that a full disk is noticed here and not at the exit."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def give_up() -> None:
    """Sends what standard output and error could not take nowhere; the exit would try again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def show(table: Any) -> None:
    """Prints a table of rich, whose texts are names and no markup."""
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # which `main` ends on, and not an exit from within

    Screen(markup=False, emoji=False, highlight=False).print(table)
