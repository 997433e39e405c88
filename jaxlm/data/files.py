"""Read data files from outside: regular files only, unpacked piece by piece within limits.

Reading a device or a named pipe might never end, and a few megabytes of gzip can hold gigabytes of
zeros. A file that is read as a whole may have at most 1/16 of the memory, since rows of
Python objects take up to ten times the memory of their text.
"""

import contextlib
import gzip
import hashlib
import io
import os
import resource
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxlm.artifacts.files import parse_json
from jaxlm.core.errors import UserError

LONGEST_LINE = 2**26
"""Largest line in bytes of a file that is read line by line; documents are shorter."""

_PIECE = 2**20
_SHARE = 16
_FREE, _RATIO = 2**26, 200  # unpacked bytes always allowed; beyond them, per packed byte
_FILES = 10_000  # most files in a folder
_ARCHIVES = (".zip", ".bz2", ".xz", ".zst", ".lz4", ".tar", ".tgz", ".7z", ".rar")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def room() -> int:
    """Return the largest size in bytes of a file read as a whole: a share of the memory."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    with contextlib.suppress(OSError, ValueError):  # limit of a container; "max" for none
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return min(limit for limit in limits if limit > 0) // _SHARE


def pieces(path: Path, where: str) -> Iterator[bytes]:
    """Yield the content of a regular file in pieces, unpacked if its name ends in `.gz`."""
    with _refusing(where), _open(path, where) as packed:
        if path.suffix != ".gz":
            yield from iter(lambda: packed.read(_PIECE), b"")
            return
        size = 0
        with gzip.GzipFile(fileobj=packed) as unpacked:
            while piece := unpacked.read(_PIECE):
                size += len(piece)
                if size > _FREE and size > _RATIO * packed.tell():
                    raise UserError(
                        f"{where}: unpacks to more than {_RATIO} times its size, as text never "
                        "does. Give the file without compression."
                    )
                yield piece


def read_bytes(path: Path, where: str) -> bytes:
    """Return the whole content of a file of at most `room()` bytes."""
    limit, size, parts = room(), 0, []
    for piece in pieces(path, where):
        size += len(piece)
        if size > limit:
            raise too_large(where)
        parts.append(piece)
    return b"".join(parts)


def too_large(where: str) -> UserError:
    """Return the error for data that take more than `room()`."""
    return UserError(
        f"{where}: has more than {room() >> 20} MiB, 1/{_SHARE} of the memory. Give fewer rows."
    )


def check_folder(folder: Path, where: str) -> None:
    """Refuse what `pieces` does, archives and too many files, before a library reads a folder."""
    for count, path in enumerate(folder.rglob("*")):
        if count == _FILES:
            raise UserError(
                f"{where}: holds more than {_FILES} files. Give the folder of a data set."
            )
        name = f"{where}: {path.relative_to(folder)}"
        if path.suffix == ".gz":
            for _ in pieces(path, name):
                pass
        elif path.suffix in _ARCHIVES:
            raise UserError(f"{name}: an archive, which may unpack to any size. Unpack it.")
        elif path.exists() and not path.is_dir() and (what := _special(path.stat().st_mode)):
            raise UserError(f"{name}: not a regular file (got {what}). Remove it.")


def lines(path: Path, where: str) -> Iterator[bytes]:
    """Yield the lines of a file of any size, without their ends."""
    rest, number = b"", 1
    for piece in pieces(path, where):
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
        number += len(whole)
        if len(rest) > LONGEST_LINE:
            raise UserError(
                f"{where}, line {number}: longer than {LONGEST_LINE >> 20} MiB. Write one document "
                "per line."
            )
    if rest:
        yield rest


def json_objects(lines: Iterable[bytes], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the JSON object of every line that is not empty, with its number from 1."""
    for number, line in enumerate(lines, start=1):
        name = f"{where}, line {number}"
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:  # UTF-16 without a mark is UTF-8 with a NUL after each letter
            raise UserError(f"{name}: not a text file in UTF-8. Save it as UTF-8.")
        if text.strip():
            yield number, as_object(parse_json(text, name), name)


def as_object(value: Any, where: str) -> dict[str, Any]:
    """Return a JSON value that must be an object."""
    if not isinstance(value, dict):
        raise UserError(f'{where}: not a JSON object. Write {{"name": value}} there.')
    return value


def digest(path: Path, where: str) -> str:
    """Return SHA-256 of a regular file as it is on disk."""
    with _refusing(where), _open(path, where) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Re-raise read errors as UserError."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{where}: not a whole gzip file. Write it again.") from None
    except OSError as error:
        raise UserError(
            f"{where}: cannot be read ({error.strerror}). Give a file that you may read."
        ) from None


def _open(path: Path, where: str) -> io.BufferedReader:
    # O_NONBLOCK: opening a named pipe would wait for its writer. The check looks at the open file,
    # not at the path, which another process might replace in between.
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if what := _special(os.fstat(number).st_mode):
        os.close(number)
        raise UserError(f"{where}: not a regular file (got {what}). Give a file.")
    return os.fdopen(number, "rb")


def _special(mode: int) -> str:
    """Return what kind of special file a mode means, or an empty string for a regular file."""
    if stat.S_ISREG(mode):
        return ""
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "a device")
