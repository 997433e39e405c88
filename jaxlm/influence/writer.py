"""Rows into a gradient store, so that a process that is killed loses only what it was writing."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float

from jaxlm.artifacts.files import report_write_errors, write_atomic
from jaxlm.core.errors import UserError
from jaxlm.influence import shards
from jaxlm.influence.encodings import encoding
from jaxlm.influence.shards import Shard
from jaxlm.influence.specs import StoreSpec


class StoreWriter:
    """One writer of a store, of `GradientStore.create`.

    When `append` returns, its rows are on disk. The files depend on the rows, their ids and their
    order alone, not on how they were divided into blocks, nor on how often the writer was killed.

    Attributes:
      spec: what the rows are of.
      ids: of the rows that this writer has written, now or before it was killed, in order.
    """

    def __init__(self, folder: Path, spec: StoreSpec, writer: int, shard_rows: int):
        self.spec = spec
        self.ids: list[str | int] = []
        self._folder, self._writer, self._shard_rows = folder, writer, shard_rows
        self._encoding = encoding(spec.dtype)
        self._lock: BinaryIO | None = _locked(folder / f"{writer:03d}.lock", folder, writer)
        self._open: _OpenShard | None = None
        try:
            closed = list(shards.closed_shards(folder, writer))
            self._closed = len(closed)
            self._last = closed[-1] if closed else None
            for shard in closed:
                self.ids += shard.ids
            if self._last is not None:
                self._last.path.with_suffix(".log").unlink(missing_ok=True)
            path = shards.shard_path(folder, writer, self._closed)
            begun = shards.read_log(path)
            if begun.ids:
                self._open = _OpenShard(begun, self._width)
                self.ids += begun.ids
            else:  # killed before its first block was whole
                path.with_suffix(".log").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            self._known = set(self.ids)
        except BaseException:
            self.close()
            raise

    @property
    def _width(self) -> int:
        return self._encoding.width(self.spec.dim)

    def __len__(self) -> int:
        return len(self.ids)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def append(self, rows: Float[Any, "N dim"], ids: Sequence[str | int] | np.ndarray) -> None:
        """Writes rows after those that are there.

        Args:
          rows: finite floats.
          ids: one for each row, texts or integers, that the store does not have.

        Raises:
          UserError: for an id that is there, a row that is not finite, or other shapes; then
            nothing is written.
        """
        if self._lock is None:
            raise UserError(f"this writer of {self._folder} is closed; call GradientStore.create")
        values, names = self._checked(rows, ids)
        while names:
            shard = self._shard()
            count = min(len(names), self._shard_rows - len(shard.ids))
            shard.write(self._encoding.encode(values[:count]), names[:count])
            self.ids += names[:count]
            self._known.update(names[:count])
            values, names = values[count:], names[count:]
            if len(shard.ids) == self._shard_rows:
                self._complete(shard)

    def commit(self) -> None:
        """Says that all rows of this writer are there, and closes it.

        The store can be opened once all its writers have committed. One that is created again may
        go on with more rows.
        """
        if self._lock is None:
            raise UserError(f"this writer of {self._folder} is closed; call GradientStore.create")
        if self._open is not None:
            self._complete(self._open)
        content = {"shards": self._closed, "rows": len(self.ids)}
        write_atomic(shards.committed_path(self._folder, self._writer), shards.sealed(content))
        shards.sync(self._folder)
        self.close()

    def close(self) -> None:
        """Lets another process be this writer. What was appended stays."""
        if self._open is not None:
            self._open.close()
        if self._lock is not None:
            self._lock.close()
        self._open = self._lock = None

    def _checked(self, rows: Any, ids: Any) -> tuple[np.ndarray, list[str | int]]:
        values = np.asarray(rows)
        if values.ndim != 2 or values.shape[1] != self.spec.dim:
            raise UserError(
                f"rows have shape {values.shape}; the store has rows of {self.spec.dim} numbers"
            )
        names = [name.item() if isinstance(name, np.generic) else name for name in ids]
        if len(names) != len(values):
            raise UserError(f"there are {len(names)} ids for {len(values)} rows; give as many")
        new: set[str | int] = set()
        for name in names:
            if isinstance(name, bool) or not isinstance(name, str | int):
                raise UserError(f"the id {name!r} is no text and no integer; give one of them")
            if not _is_readable(name):
                raise UserError(
                    f"the id of row {len(new)} is no Unicode text, or has thousands of digits; "
                    "give another"
                )
            if name in self._known or name in new:
                where = "twice" if name in new else f"in {self._folder} already"
                raise UserError(f"the id {name!r} is {where}; give every example its own")
            new.add(name)
        with np.errstate(over="ignore"):
            values = values.astype(np.float32, copy=False)
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            name = names[int(finite.argmin())]
            raise UserError(f"the row of example {name!r} is not finite; leave the example out")
        return values, names

    def _shard(self) -> "_OpenShard":
        """The shard that has room, begun or opened again where there is none."""
        if self._open is not None and len(self._open.ids) == self._shard_rows:
            self._complete(self._open)  # what a killed process had no time for
        if self._open is not None:
            return self._open
        shards.committed_path(self._folder, self._writer).unlink(missing_ok=True)
        if self._last is not None and len(self._last.ids) < self._shard_rows:
            log = self._last.path.with_suffix(".log")
            write_atomic(log, shards.log_line(self._last.ids, self._last.checksum))
            self._last.path.with_suffix(".json").unlink()
            self._closed -= 1
        path = shards.shard_path(self._folder, self._writer, self._closed)
        self._last = None
        self._open = _OpenShard(shards.read_log(path), self._width)
        return self._open

    def _complete(self, shard: "_OpenShard") -> None:
        self._last = shard.complete()
        self._closed += 1
        self._open = None


class _OpenShard:
    """A shard with room: its rows, and the log of them."""

    def __init__(self, known: Shard, width: int):
        self.ids, self._checksum = list(known.ids), known.checksum
        self._path, self._width = known.path, width
        self._log_path = known.path.with_suffix(".log")
        self._rows = _open(known.path)
        self._log = _open(self._log_path)
        self._log_size = self._log_path.read_bytes().rfind(b"\n") + 1
        there = self._rows.read(len(self.ids) * width)
        if len(there) != len(self.ids) * width or zlib.crc32(there) != self._checksum:
            self.close()
            raise shards.damaged(known.path)

    def write(self, packed: np.ndarray, ids: list[str | int]) -> None:
        """Rows first, and then the line that tells of them."""
        content = packed.tobytes()
        _write_at(self._rows, len(self.ids) * self._width, content)
        checksum = zlib.crc32(content, self._checksum)
        line = shards.log_line(ids, checksum)
        _write_at(self._log, self._log_size, line)
        self._log_size += len(line)
        self.ids, self._checksum = self.ids + ids, checksum

    def complete(self) -> Shard:
        """The shard that it has become."""
        _write_at(self._rows, len(self.ids) * self._width, b"")
        self.close()
        shard = Shard(self._path, self.ids, self._checksum)
        shards.write_shard(shard)
        self._log_path.unlink()
        return shard

    def close(self) -> None:
        self._rows.close()
        self._log.close()


def _is_readable(name: str | int) -> bool:
    """Whether JSON gives an id back: half a character, or thousands of digits, it does not."""
    try:
        str(name).encode()
    except ValueError:
        return False
    return True


def _open(path: Path) -> BinaryIO:
    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CREAT, 0o666)

    with report_write_errors(path):
        return open(path, "r+b", opener=opener)


def _write_at(file: BinaryIO, start: int, content: bytes) -> None:
    """Writes to the disk, and makes it the end of the file."""
    with report_write_errors(Path(file.name)):
        file.seek(start)
        file.write(content)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _locked(path: Path, folder: Path, writer: int) -> BinaryIO:
    """A file that is open in one place at a time, as far as the system has locks."""
    file = _open(path)
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"writer {writer} of {folder} is open already, here or in another process; close it, "
            "or give another writer"
        ) from None
    except (ImportError, OSError):
        pass
    return file
