"""One folder: which process writes it, what it was made from, whether it is whole.

Run folders, stage folders, kernel stores, token caches and sweeps are all made of these parts.
Checksums find damage, not malice: whoever can change a file can change its checksum.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxlm.artifacts.files import read_json, report_write_errors, to_json, write_atomic, write_json
from jaxlm.artifacts.processes import barrier, is_main_process
from jaxlm.core.checks import show
from jaxlm.core.errors import UserError

Value = TypeVar("Value")

CHECKSUMS = "checksums.json"
FAILED = "failed.json"
LOCK = ".lock"
LOG = "log.txt"
MANIFEST = "manifest.json"
_LOGGED = "The traceback is in "
_PIECE = 2**22


# Who writes: a place that can be written, a new folder, a lock.


def check_place(folder: Path, marker: str | None, what: str) -> None:
    """Refuse a folder that cannot be written or that holds other things, without touching it.

    A folder of the right kind, `what`, holds the file `marker`; None requires an empty folder.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if _exists(p))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "is a folder that cannot be written" if there.is_dir() else "is not a folder"
        raise UserError(f"output: {there} {reason} (got {folder}). Choose another output.")
    if there != folder or (marker is not None and (folder / marker).exists()):
        return
    if any(p.suffix != ".tmp" and p.name != LOCK for p in folder.iterdir()):
        raise UserError(
            f"output: the folder has files but no {what} (got {folder}). Choose another output."
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


@contextlib.contextmanager
def make_folder(folder: Path, *disposable: str) -> Iterator[None]:
    """Create a folder, and remove it again if the block fails before there is work in it.

    Files and empty folders named in `disposable` do not count as work. A folder that exists already
    is never removed.
    """
    new = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    barrier(f"{folder} is known")  # every process has looked before the first one creates it
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
        if new and is_main_process():
            items = [path for path in folder.rglob("*") if path.is_file() or path.parent == folder]
            if all(path.name in disposable and path.parent == folder for path in items):
                with contextlib.suppress(OSError):  # another process may have written beside them
                    for path in items:
                        path.rmdir() if path.is_dir() else path.unlink()
                    for place in new:
                        place.rmdir()
        raise


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into `folder`, which must exist, until the block ends.

    The operating system releases the lock of a process that dies, so no lock is ever stale. With
    several processes, the main process holds the lock for all. The traceback of an unexpected
    error is appended to the folder's `log.txt`, and a note on the error says so.
    """
    try:
        with lock(folder / LOCK, folder):
            yield
    except Exception as error:
        foreseen = isinstance(error, UserError | OSError) or where_logged(error) is not None
        if is_main_process() and not foreseen:
            with contextlib.suppress(OSError), (folder / LOG).open("a", encoding="utf-8") as log:
                traceback.print_exception(error, file=log)
                error.add_note(f"{_LOGGED}{folder / LOG}.")
        raise


@contextlib.contextmanager
def lock(path: Path, place: Path) -> Iterator[None]:
    """Hold the lock file `path` of a folder or file `place`; see `hold`."""
    if not is_main_process():
        yield
        return
    file = acquire(path, place, "output")
    try:
        yield
    finally:
        # Unlink while the lock is held. A process that waits in `acquire` then sees that its file
        # is no longer the one at this path, and tries again.
        path.unlink(missing_ok=True)
        os.close(file)


def where_logged(error: Exception) -> str | None:
    """Return the note in which `hold` says where the traceback is; JAX adds other notes."""
    notes = getattr(error, "__notes__", ())
    return next((note for note in notes if note.startswith(_LOGGED)), None)


def acquire(path: Path, folder: Path, key: str) -> int:
    """Return the descriptor of a locked file; the lock ends when it is closed or the process ends.

    The file is made if it is missing. Unlink it before you close the descriptor.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return file  # the file system has no locks, so there is nothing to hold
            os.close(file)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise UserError(
                f"{key}: another process writes into {folder} ({_holder(path)}). Wait until it is "
                "done, stop it, or choose another folder."
            ) from None
        # The former holder may have unlinked the file between `open` and `flock`.
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
    except (OSError, UserError):  # the process has not written its name yet
        return "which has just started"
    return "process {pid} on {host} since {since}: {command}".format(**owner)


@contextlib.contextmanager
def claim(folder: Path, marker: str, what: str) -> Iterator[None]:
    """Create a folder of one kind, or open one that exists, and hold its lock.

    The caller writes the marker; see `check_place`.
    """
    if is_main_process():
        check_place(folder, marker, what)
    with make_folder(folder, marker), hold(folder):
        yield


# What it was made from: the manifest.


def inputs_digest(inputs: Mapping[str, Any]) -> str:
    """Return 12 hexadecimal digits for JSON values, whatever the order of their names."""
    text = json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield `(dotted key, old value, new value)` for every key in which two records differ."""
    olds, news = dict(_dotted(old)), dict(_dotted(new))
    for key in sorted(olds.keys() | news.keys()):
        if olds.get(key) != news.get(key):
            yield key, olds.get(key), news.get(key)


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_inputs(
    folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], *, key: str | None = None
) -> None:
    """Raise UserError unless a folder, the value of option `key`, was made from these inputs."""
    for name, before, now in differences(_plain(old), _plain(new)):
        what = "was made" if key is None else f"{folder} was made"
        raise UserError(
            f"{key or folder}: {what} with {name} = {short(before)} (got {short(now)}). Choose "
            "another folder, or remove this one."
        )


def _plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs as JSON reads them back: tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(inputs))
    return plain


def short(value: Any) -> str:
    """Return a value as text for a message; a fingerprint is cut to eight digits."""
    is_hash = isinstance(value, str) and len(value) == 64 and " " not in value
    return value[:8] if is_hash else show(value)


def stage(
    root: Path,
    name: str,
    inputs: Mapping[str, Any],
    work: Callable[[Path], dict[str, Any]],
    *,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[Path, dict[str, Any]]:
    """Do `work(folder) -> result` once for its inputs, in a folder of its own; return both.

    The folder is named `NAME-DIGEST`, with a digest of the inputs, so other inputs get another
    folder and nothing is overwritten. Work that was stopped is called again in its folder, so it
    must be able to resume.
    """
    plain = _plain(inputs)
    folder = root / f"{name}-{inputs_digest(plain)}"
    manifest = _read_manifest(folder / MANIFEST)
    barrier(f"{folder} is read")  # by every process, before the first one writes a manifest
    if manifest:
        check_inputs(folder, manifest["inputs"], plain)
    if "result" in manifest:
        log(f"{name}: nothing has changed, {folder}")
        return folder, manifest["result"]
    log(f"{name}: {'resumes' if manifest else 'starts'}, {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    if not manifest:
        write_json(folder / MANIFEST, {"inputs": plain})
    begin = time.perf_counter()
    result = _plain(work(folder))
    seconds = time.perf_counter() - begin
    write_json(folder / MANIFEST, {"inputs": plain, "result": result, "seconds": seconds})
    return folder, result


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return what a stage was made from, and its result once there is one; {} for a new stage."""
    try:
        manifest = read_json(path, inputs=dict)
    except FileNotFoundError:
        return {}
    if not isinstance(manifest.get("result", {}), dict):
        raise UserError(f"{path}: damaged. Remove the folder, and it is made again.")
    return manifest


def mark_failed(folder: Path, reason: str) -> None:
    """Mark the work of a folder as failed, so that it is not repeated; all processes call this."""
    write_json(folder / FAILED, {"failed": reason})


def failure(folder: Path) -> str | None:
    """Return the reason that `mark_failed` wrote, or None."""
    try:
        reason: str = read_json(folder / FAILED, failed=str)["failed"]
    except FileNotFoundError:
        return None
    return reason


# Whether it is whole: checksums, and folders that appear at once.


def crc32(path: Path) -> int:
    """Return the CRC-32 of a file, read piece by piece."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            value = zlib.crc32(piece, value)
    return value


def seal(folder: Path, pattern: str = "*") -> None:
    """Write the size and CRC-32 of the files below `folder` into its `checksums.json`."""
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, crc32(path)]
        for path in sorted(folder.rglob(pattern))
        if path.is_file() and path.name != CHECKSUMS
    }
    write_atomic(folder / CHECKSUMS, to_json({"files": files}, indent=0) + "\n")


def verify(folder: Path, *, below: str = "") -> None:
    """Compare the files of a sealed folder that start with `below` with their checksums."""
    path = folder / CHECKSUMS
    try:
        files = read_json(path, files=dict)["files"]
    except FileNotFoundError:
        raise UserError(
            f"{path}: is missing, so the files beside it cannot be checked. Make them again."
        ) from None
    for name, expected in files.items():
        if not name.startswith(below):
            continue
        place = folder / name
        try:
            if place.stat().st_size == expected[0] and crc32(place) == expected[1]:
                continue
            reason = "differs from its checksum"
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
        except (TypeError, IndexError, KeyError):
            raise UserError(f"{path}: damaged. Make the files beside it again.") from None
        raise UserError(f"{place}: damaged ({reason}). Make it again.")


def ensure_folder(
    folder: Path, make: Callable[[], Value], write: Callable[[Value, Path], None]
) -> None:
    """Write a sealed folder, which is whole or absent, unless it agrees with its checksums.

    `make` returns what the folder will hold, before anything is on the disk. `write(value, place)`
    fills an empty folder beside `folder`, which is then sealed and renamed. All processes call
    this, and the main process writes.
    """
    if is_main_process():
        try:
            verify(folder)
        except (UserError, OSError):
            value = make()
            with report_write_errors(folder):
                aside = folder.with_name(folder.name + ".tmp")
                for old in (aside, folder):
                    shutil.rmtree(old, ignore_errors=True)
                aside.mkdir(parents=True)
                write(value, aside)
                seal(aside)
                aside.rename(folder)
    barrier(str(folder))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(folder: Path, *, last: str, stale: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a new folder inside `folder`, and move its files up when the block ends.

    A stop at any moment leaves the old files, the new files, or a folder without `last`, which no
    reader accepts; never a mixture. `stale` tells which entries belong to an earlier save.
    """
    from safetensors import SafetensorError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="saving-") as name:
            source = Path(name)
            yield source
            for path in source.rglob("*"):
                sync(path)
            (folder / last).unlink(missing_ok=True)
            sync(folder)  # the old `last` must be gone on disk before any of its files changes
            for path in [path for path in folder.iterdir() if stale(path)]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path in source.iterdir():
                if path.name != last:
                    path.replace(folder / path.name)
            sync(folder)
            (source / last).replace(folder / last)
            sync(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{folder}: cannot be written ({reason}). Choose another folder."
        ) from error
