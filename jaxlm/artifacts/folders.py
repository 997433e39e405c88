"""Folders whose files belong together: a model, an adapter."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlm.artifacts.processes import is_first, meet
from jaxlm.core.errors import UserError


@contextlib.contextmanager
def make(folder: Path, *names: str) -> Iterator[None]:
    """Makes a folder, and takes it back where an error comes before there is work in it.

    Args:
      folder: it may exist; then it stays.
      names: of what is no work yet: files, and folders as long as they are empty.

    Raises:
      UserError: the folder cannot be made.
    """
    new = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    meet(f"{folder} is known")  # by every process, before the first one makes it
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output: cannot be written ({error.strerror or error}; got {folder}). Choose another "
            "output."
        ) from error
    try:
        yield
    except BaseException:
        if new and is_first():
            found = [path for path in folder.rglob("*") if path.is_file() or path.parent == folder]
            if all(path.name in names and path.parent == folder for path in found):
                with contextlib.suppress(OSError):  # another process may have written beside them
                    for path in found:
                        path.rmdir() if path.is_dir() else path.unlink()
                    for place in new:
                        place.rmdir()
        raise


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(source: Path, target: Path, *, last: str, stale: Callable[[Path], bool]) -> None:
    """Moves the files of one folder into another, in place of those of an earlier save.

    A stop at any moment leaves the files before, those after, or a folder without `last`, which no
    reader takes for a whole one; never a mixture.

    Args:
      source: folder on the same file system.
      target: where they go.
      last: the file without which the others are nothing.
      stale: says what in `target` belongs to an earlier save, and is removed.
    """
    for path in source.rglob("*"):
        sync(path)
    (target / last).unlink(missing_ok=True)
    sync(target)
    for path in [path for path in target.iterdir() if stale(path)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in source.iterdir():
        if path.name != last:
            path.replace(target / path.name)
    sync(target)
    (source / last).replace(target / last)
    sync(target)
