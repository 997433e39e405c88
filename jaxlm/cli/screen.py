"""Standard output and error: any character, a closed pipe, a full disk, tables."""

import codecs
import contextlib
import os
import sys
from typing import Any


def prepare() -> None:
    """Open streams that are missing, and make every character writable."""
    with contextlib.suppress(OSError):
        # Otherwise the next file opened would become standard output, and take what is printed.
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
    codecs.register_error("jaxlm", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="jaxlm")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    r"""Return `\u00e9` for a character that an encoding lacks, which is the same text in JSON."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    pairs = (units[i : i + 2].hex() for i in range(0, len(units), 2))
    return "".join(f"\\u{pair}" for pair in pairs), error.end


def flush() -> None:
    """Flush the streams, so that a full disk is noticed before the exit."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def give_up() -> None:
    """Discard what a stream could not write, since Python would try again at the exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def show(table: Any) -> None:
    """Print a rich table; its texts are not read as markup."""
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # for `main`; rich would exit here

    Screen(markup=False, emoji=False, highlight=False).print(table)
