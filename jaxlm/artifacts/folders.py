"""Folders whose files belong together: a model, an adapter."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


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
