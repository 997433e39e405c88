"""One writer at a time in a folder, of one kind of files."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from jaxlm.artifacts.files import read_json, to_json
from jaxlm.artifacts.processes import is_first
from jaxlm.core.errors import UserError

LOCK = ".lock"
LOG = "log.txt"
_LOGGED = "The traceback is in "


def check_place(folder: Path, marker: str, what: str, key: str = "output") -> None:
    """Refuses a folder that cannot be written or that holds other things, without touching it.

    Args:
      folder: to be written; it need not exist.
      marker: the file that says that the folder is what it should be.
      what: it should be, for the message.
      key: name of the option that gave it, for messages.

    Raises:
      UserError: saying which of the two it is.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if _exists(p))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "is a folder that cannot be written" if there.is_dir() else "is not a folder"
        raise UserError(f"{key}: {there} {reason} (got {folder}). Choose another {key}.")
    if there != folder or (folder / marker).exists():
        return
    if any(p.suffix != ".tmp" and p.name != LOCK for p in folder.iterdir()):
        raise UserError(
            f"{key}: the folder has files but no {what} (got {folder}). Choose another {key}."
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


@contextlib.contextmanager
def hold(folder: Path, key: str = "output") -> Iterator[None]:
    """Keeps other processes from writing into `folder`, which must exist, until the block ends.

    The operating system releases the lock of a process that dies, so none is ever stale. Of a
    program in several processes the first one holds it for all. The traceback of an error that
    nobody foresaw goes into the folder's `log.txt`, and a note at the error says so.

    Args:
      folder: to be written.
      key: name of the option that gave it, for the message.

    Raises:
      UserError: another process holds it; the message says which.
    """
    if not is_first():
        yield
        return
    path = folder / LOCK
    file = _take(path, folder, key)
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError | OSError) and where_logged(error) is None:
            with contextlib.suppress(OSError), (folder / LOG).open("a", encoding="utf-8") as log:
                traceback.print_exception(error, file=log)
                error.add_note(f"{_LOGGED}{folder / LOG}.")
        raise
    finally:
        # Removed while it is still held: `_take` of another process sees that its file is no
        # longer the one at this path, and tries again.
        path.unlink(missing_ok=True)
        os.close(file)


def where_logged(error: Exception) -> str | None:
    """The sentence that says where `hold` wrote the traceback; JAX adds notes of its own."""
    notes = getattr(error, "__notes__", ())
    return next((note for note in notes if note.startswith(_LOGGED)), None)


def _take(path: Path, folder: Path, key: str) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return file  # a file system without locks: there is nothing to hold
            os.close(file)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise UserError(
                f"{key}: another process writes into {folder} ({_holder(path)}). Wait until it is "
                "done, stop it, or choose another folder."
            ) from None
        try:
            if os.path.samestat(os.fstat(file), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        os.close(file)
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
    }
    os.truncate(file, 0)
    os.write(file, to_json(owner).encode())
    return file


def _holder(path: Path) -> str:
    try:
        owner = read_json(path, pid=int, host=str, since=str, command=str)
    except (OSError, UserError):  # it has not written its name yet
        return "which has just started"
    return "process {pid} on {host} since {since}: {command}".format(**owner)
