"""One writer at a time in a folder."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from jaxlm.artifacts.files import to_json, read_json
from jaxlm.artifacts.processes import is_first
from jaxlm.core.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def hold(folder: Path, key: str = "output") -> Iterator[None]:
    """Keeps other processes from writing into `folder`, which must exist, until the block ends.

    The operating system releases the lock of a process that dies, so none is ever stale. Of a
    program in several processes the first one holds it for all.

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
    finally:
        # Removed while it is still held: `_take` of another process sees that its file is no
        # longer the one at this path, and tries again.
        path.unlink(missing_ok=True)
        os.close(file)


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
