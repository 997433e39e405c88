"""The files of a gradient store.

    manifest.json         the spec, how many writers there are, rows in a full shard
    000-000000.rows       rows of writer 0, shard 0, one after another; see `encodings`
    000-000000.json       how many, their ids and checksum: the shard is complete
    000-000000.log        until then, one line for every block: its ids, checksum of the rows so far
    000.json              writer 0 has committed: its shards and rows
    000.lock              held by the process that is writer 0

Rows are read as far as a shard's JSON or log tells of them, and no further: what a killed process
left after them is written over. Every JSON file and every line of a log has a checksum of itself.
Checksums are CRC-32, which finds every change of up to four adjacent bytes.
"""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.artifacts.files import parse_json, read_json, read_text, write_atomic
from jaxlm.core.errors import UserError

MANIFEST = "manifest.json"


class Shard(NamedTuple):
    """A complete shard.

    Attributes:
      path: of its rows.
      ids: of its rows, in order.
      checksum: CRC-32 of the rows.
    """

    path: Path
    ids: list[str | int]
    checksum: int

    def bytes(self, width: int) -> np.ndarray:
        """The file as a memory map [rows, width].

        Raises:
          UserError: if it is missing or has another size.
        """
        try:
            if self.path.stat().st_size != len(self.ids) * width:
                raise damaged(self.path)
            return np.memmap(self.path, np.uint8, "r", shape=(len(self.ids), width))
        except FileNotFoundError:
            raise UserError(f"{self.path}: is missing. Compute its rows again.") from None
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read ({error.strerror}). Give a store that you may read."
            ) from None

    def check(self, width: int) -> None:
        """Compares the checksum.

        Raises:
          UserError: naming the file, if it differs.
        """
        if zlib.crc32(self.bytes(width).data) != self.checksum:
            raise damaged(self.path)


def damaged(path: Path) -> UserError:
    """The error of a file that is not as it was written."""
    return UserError(f"{path}: is damaged. Remove the store and compute its rows again.")


def shard_path(folder: Path, writer: int, index: int) -> Path:
    """Where the rows of a shard are."""
    return folder / f"{writer:03d}-{index:06d}.rows"


def committed_path(folder: Path, writer: int) -> Path:
    """The file that says that a writer has committed."""
    return folder / f"{writer:03d}.json"


def sealed(content: dict[str, Any], indent: int | None = 1) -> str:
    """A JSON text with a checksum of itself."""
    return json.dumps({**content, "checksum": _own_checksum(content)}, indent=indent) + "\n"


def unsealed(path: Path, **fields: type) -> dict[str, Any]:
    """Reads what `sealed` made.

    Args:
      path: of the file.
      fields: types of what must be in it.

    Raises:
      UserError: if it differs, or cannot be read.
      FileNotFoundError: if there is none.
    """
    try:
        content = read_json(path, checksum=int, **fields)
    except UserError as error:
        if isinstance(error.__context__, OSError):  # not allowed to read it, for example
            raise
        raise damaged(path) from None
    del content["checksum"]
    if sealed(content) != read_text(path):
        raise damaged(path)
    return content


def _own_checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def write_shard(shard: Shard) -> None:
    """Declares a shard complete. Its rows are there."""
    content = {"rows": len(shard.ids), "rows_checksum": shard.checksum, "ids": shard.ids}
    write_atomic(shard.path.with_suffix(".json"), sealed(content))
    sync(shard.path.parent)


def read_shard(path: Path) -> Shard:
    """A complete shard, from the path of its rows."""
    content = unsealed(path.with_suffix(".json"), ids=list, rows_checksum=int)
    return Shard(path, content["ids"], content["rows_checksum"])


def closed_shards(folder: Path, writer: int) -> Iterator[Shard]:
    """The complete shards of a writer, in order."""
    index = 0
    while (path := shard_path(folder, writer, index)).with_suffix(".json").exists():
        yield read_shard(path)
        index += 1


def read_log(path: Path) -> Shard:
    """What the log of a shard tells, from the path of its rows. A half line at its end is nothing.

    Raises:
      UserError: if another line is damaged.
    """
    log = path.with_suffix(".log")
    ids: list[str | int] = []
    checksum = 0
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    for line in lines:
        try:
            content = parse_json(line.decode(), str(log))
            if log_line(content["ids"], content["rows_checksum"]) != line + b"\n":
                raise damaged(log)
        except (ValueError, KeyError, TypeError):
            raise damaged(log) from None
        ids += content["ids"]
        checksum = content["rows_checksum"]
    return Shard(path, ids, checksum)


def log_line(ids: list[str | int], checksum: int) -> bytes:
    """What `read_log` reads."""
    return sealed({"ids": ids, "rows_checksum": checksum}, indent=None).encode()


def sync(folder: Path) -> None:
    """Waits until the names of a folder are on disk, where the system can tell."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
