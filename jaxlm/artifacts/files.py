"""Files that are whole or absent."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from jaxlm.core.errors import UserError
from jaxlm.artifacts.processes import is_first, meet


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name and renames it, so that it is whole or absent."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says of what cannot be written in it, such as to a full disk, where that is.

    Raises:
      UserError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(
            f"{path}: cannot be written ({reason}): make room there; the same command then goes on "
            "from the last checkpoint."
        ) from error


def write_shared(path: Path, content: str | bytes, *, once: bool = False) -> None:
    """`write_atomic` of a file that all processes of a program have in common, on one file system.

    All of them call it; the first writes, and none returns before the file is there.

    Args:
      path: the file.
      content: of it.
      once: leaves a file that is there.
    """
    if is_first() and not (once and path.exists()):
        write_atomic(path, content)
    meet(str(path))
