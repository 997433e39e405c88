"""Checksums of the files of a folder: what is read back is what was written.

They find damage, not malice: whoever can change a file can change its checksum.
"""

import os
import zlib
from pathlib import Path

from jaxlm.artifacts.files import read_json, to_json, write_atomic
from jaxlm.core.errors import UserError

CHECKSUMS = "checksums.json"
_PIECE = 2**22


def crc32(path: Path) -> int:
    """CRC-32 of a file, a piece at a time."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            value = zlib.crc32(piece, value)
    return value


def _measure(path: Path) -> list[int]:
    return [path.stat().st_size, crc32(path)]


def seal(folder: Path, pattern: str = "*") -> None:
    """Writes the size and CRC-32 of the files below `folder` into its `checksums.json`.

    Args:
      folder: whose files are whole.
      pattern: of the names of those that are sealed.
    """
    files = {
        path.relative_to(folder).as_posix(): _measure(path)
        for path in sorted(folder.rglob(pattern))
        if path.is_file() and path.name != CHECKSUMS
    }
    write_atomic(folder / CHECKSUMS, to_json({"files": files}, indent=0) + "\n")


def verify(folder: Path, *, below: str = "") -> None:
    """Compares the files of a sealed folder with their checksums.

    Args:
      folder: of `seal`.
      below: a subfolder, to compare no others.

    Raises:
      UserError: naming the first file that is missing or was changed, or the checksums themselves.
    """
    path = folder / CHECKSUMS
    try:
        files = read_json(path, files=dict)["files"]
    except FileNotFoundError:
        raise UserError(
            f"{path}: is missing, so nothing says whether the files beside it are whole. Make them "
            "again."
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
