"""The trajectory of a zeroth-order run: a key and n scalars a step, from which it can be replayed.

A file of little-endian numbers, which anyone can read with NumPy:

    16 bytes   "jaxlm trajectory"
    3 uint32   version of the format; length of the header, a multiple of 4; its CRC-32
    header     JSON: jaxlm, key {impl, data}, num_directions, dtype, settings of the optimizer,
               params [{path, shape, dtype, crc32 of the values}]
    chunks     of 3 uint32 (first step, number of steps, CRC-32 of the rest of the chunk)
               and, in dtype, [number of steps, 1 + num_directions]: the learning rate (NaN where
               it was not given) and the projected gradients
    end        of a run that came to its end: 3 uint32 (number of steps, 0, CRC-32 of the rest),
               length of what follows, a multiple of 4, and JSON: crc32 of the last parameters and
               a few of their values

A chunk is on disk before the next one is begun. What a killed process or a full disk left of the
last one is dropped when the file is opened; a file damaged elsewhere is refused.

Reference: Malladi et al., arXiv:2305.17333, section 2.1 and appendix.
"""

import dataclasses
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.linalg import norm

from jaxlm.artifacts.files import write_shared
from jaxlm.artifacts.processes import is_main_process
from jaxlm.core.errors import UserError
from jaxlm.zo.trajectory_header import Header, as_json, parameters, summary

MAGIC = b"jaxlm trajectory"
VERSION = 2
LARGEST = 2**30
"""Bytes of a file that is opened: hundreds of millions of slopes."""
_THREE = struct.Struct("<3I")
_HEAD = len(MAGIC) + _THREE.size


class Trajectory:
    """A trajectory file; see the module for its format.

    >>> import jax, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "trajectory.zo"
    >>> start = {"w": np.zeros(3, np.float32)}
    >>> log = Trajectory.create(path, start, key=jax.random.key(0), num_directions=1, settings={})
    >>> log.append(0, np.ones((10, 1), np.float32))
    >>> Trajectory.open(path).projected_grad.shape
    (10, 1)

    Attributes:
      path: the file.
      header: what does not change.
      steps: T.
      end: what is known of the parameters at the end; None unless the run came to it.
      torn: bytes after the last good step that were there when the file was opened.
    """

    def __init__(self, path: Path, head: bytes):
        self.path = path
        self.header = Header.decode(head[_HEAD:])
        self.steps = 0
        self.end: dict[str, Any] | None = None
        self.torn = 0
        self._head = head
        self._chunks: list[np.ndarray] = []
        self._end = len(head)

    @classmethod
    def create(
        cls,
        path: str | Path,
        params: Any,
        *,
        key: Array,
        num_directions: int,
        settings: dict[str, Any],
    ) -> "Trajectory":
        """Makes the file of a run that begins, in place of one that is there.

        Args:
          path: the file.
          params: where the run starts; each is read once, for its checksum.
          key: typed PRNG key of the optimizer's state at the start.
          num_directions: scalars in a step.
          settings: how the optimizer moves along a direction: JSON values, and functions that
            choose paths, of which it is written down what they choose. `steps` among them is the
            length of the run.
        """
        from jaxlm import __version__

        found = tuple(parameters(params, checksums=True))
        dtype = "float64" if any(each.dtype == "float64" for each in found) else "float32"
        header = Header(__version__, key, num_directions, dtype, as_json(settings, params), found)
        trajectory = cls(Path(path), _head(header))
        write_shared(trajectory.path, trajectory._encode())
        return trajectory

    @classmethod
    def open(cls, path: str | Path) -> "Trajectory":
        """Reads a file; does not change it.

        Raises:
          UserError: it is not there, is no trajectory, has another version, or is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: there is no such file. Give a trajectory.")
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path}: is larger than {LARGEST} bytes. Give a trajectory.")
        try:
            data = path.read_bytes()
        except OSError as error:
            what = error.strerror or error
            raise UserError(f"{path}: cannot be read ({what}). Allow it to be read.") from error
        if not data.startswith(MAGIC) or len(data) < _HEAD:
            raise UserError(f"{path}: this is no trajectory file. Give one that jaxlm wrote.")
        version, length, crc = _THREE.unpack_from(data, len(MAGIC))
        if version != VERSION:
            raise UserError(
                f"{path}: the trajectory has format {version}, and this jaxlm reads {VERSION}. "
                "Use the jaxlm that wrote it."
            )
        at = _HEAD + length
        if zlib.crc32(data[_HEAD:at]) != crc:
            raise UserError(f"{path}: the header is damaged. Take another copy of the file.")
        try:
            trajectory = cls(path, data[:at])
        except _FOREIGN as error:
            raise UserError(
                f"{path}: the header is not that of a trajectory ({error!r:.80}). Give a file "
                "that jaxlm wrote."
            ) from error
        row = trajectory.header.row
        while (chunk := _read_chunk(data, row, at)) is not None and chunk[0] == trajectory.steps:
            trajectory._add(chunk[1])
            at = trajectory._end
        if (found := _read_end(data, at)) is not None and found[0] == trajectory.steps:
            _, trajectory.end, at = found
        elif _chunk_after(data, row, at):
            raise UserError(
                f"{path}: the trajectory is damaged after step {trajectory.steps}. Take another "
                "copy of the file."
            )
        trajectory.torn = len(data) - at
        return trajectory

    @property
    def _rows(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, self.header.row), *self._chunks])

    @property
    def projected_grad(self) -> Float[np.ndarray, "T n"]:
        """The projected gradients of all steps."""
        return self._rows["projected_grad"]

    @property
    def learning_rate(self) -> Float[np.ndarray, "T"]:
        """The learning rates of all steps; NaN where none was given."""
        return self._rows["learning_rate"]

    def append(
        self, first_step: int, values: Float[Any, "count n"], learning_rate: Any = None
    ) -> None:
        """Adds the projected gradients of some steps; they are on disk after the call.

        Args:
          first_step: of the values, `self.steps`.
          values: kept in float32, of float64 parameters in float64.
          learning_rate: of each step, or of all; a replay uses them, and refuses others.

        Raises:
          UserError: the file cannot be written; the steps before are kept.
        """
        values = np.asarray(values)
        n = self.header.num_directions
        if first_step != self.steps or values.ndim != 2 or values.shape[1] != n:
            raise ValueError(
                f"values of shape {values.shape} from step {first_step} on do not follow "
                f"{self.steps} steps of {n} directions"
            )
        if not len(values):
            return
        rows = np.zeros(len(values), self.header.row)
        rows["projected_grad"] = values
        rows["learning_rate"] = np.nan if learning_rate is None else learning_rate
        self._put(_encode_chunk(first_step, rows))
        self._add(rows)
        self.end = None

    def finish(self, params: Any) -> None:
        """Notes what the run came to, `finalize(params, state)`, for a replay to be compared with.

        Raises:
          UserError: the file cannot be written; the steps are kept.
        """
        found = summary(params)
        self._put(_encode_end(self.steps, found))
        self.end = found

    def _put(self, record: bytes) -> None:
        try:
            if is_main_process():
                self._write(record)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror or error}), and its {self.steps} "
                "steps are kept. Make room there."
            ) from error
        self.torn = 0

    def _write(self, chunk: bytes) -> None:
        with self.path.open("r+b", buffering=0) as file:
            file.truncate(self._end)
            file.seek(self._end)
            rest = memoryview(chunk)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())

    def cut(self, step: int, length: int | None = None) -> None:
        """Keeps the first `step` steps, for a run that goes on from there.

        Args:
          step: how many.
          length: what the header is to call the length of the run; None leaves it.

        Raises:
          UserError: there are fewer.
        """
        if step > self.steps:
            raise UserError(
                f"{self.path}: the trajectory has {self.steps} steps, and {step} are needed. Take "
                "another copy of the file."
            )
        if length is not None:
            settings = self.header.settings | {"steps": length}
            self.header = dataclasses.replace(self.header, settings=settings)
        kept = Trajectory(self.path, _head(self.header))
        for chunk in self._chunks:
            if step > kept.steps:
                kept._add(chunk[: step - kept.steps])
        write_shared(self.path, kept._encode())
        self._head, self._chunks, self._end = kept._head, kept._chunks, kept._end
        self.steps, self.torn = step, 0
        self.end = None

    def check(
        self,
        params: Any,
        settings: dict[str, Any],
        learning_rate: Callable[[Any], Any] | None = None,
    ) -> None:
        """Refuses a trajectory that was not made from these parameters with these settings.

        Args:
          params: where the run began.
          settings: as in `create`.
          learning_rate: η of a step, of which all that are in the file are compared.

        Raises:
          UserError: with the first setting, parameter or learning rate that differs.
        """
        difference = self.header.difference(params, as_json(settings, params))
        if difference is not None:
            raise UserError(f"{self.path}: {difference}.")
        known = self.learning_rate
        if learning_rate is None or np.isnan(known).all():
            return
        given = jax.jit(lambda steps: jax.lax.map(learning_rate, steps))
        own = np.asarray(given(jnp.arange(self.steps, dtype=jnp.int32)))
        other = np.flatnonzero(np.abs(own - known) > 1e-5 * np.abs(known))
        if other.size:
            t = other[0]
            raise UserError(
                f"{self.path}: the learning rate of step {t} was {known[t]:.6g} (got "
                f"{own[t]:.6g}). Give the schedule of its run."
            )

    def check_steps(self, steps: int | None = None) -> None:
        """Refuses a number of steps that the file has not; None is the whole run.

        Raises:
          UserError: there are fewer, or the file ends before the run did.
        """
        planned = self.header.settings.get("steps")
        if steps is not None and not 0 <= steps <= self.steps:
            raise UserError(
                f"{self.path}: has {self.steps} steps (got steps={steps}). Give that many or fewer."
            )
        if steps is None and isinstance(planned, int) and self.steps < planned:
            raise UserError(
                f"{self.path}: has {self.steps} of the {planned} steps of its run. Resume the "
                f"run, take a whole copy, or replay what is there with steps={self.steps}."
            )

    def check_end(self, start: Any, end: Any) -> None:
        """Refuses parameters that are not those at the end of the run, beyond rounding.

        Of the same bits, or as far from the run's as 1 % of how far it went: on other devices
        updates are rounded otherwise. Nothing is known of a run that has not come to its end.

        Args:
          start: where the run began.
          end: what a replay came to.

        Raises:
          UserError: they are others.
        """
        found = summary(end)
        if self.end is None or found["crc32"] == self.end["crc32"]:
            return
        old, new, first = (np.array(x["values"]) for x in (self.end, found, summary(start)))
        same = old.shape == new.shape
        if not same or not norm(new - old) <= 0.01 * norm(old - first) + norm(found["gaps"]):
            raise UserError(
                f"{self.path}: the replay ends at other parameters than the run did. Give the "
                "optimizer and the model of the run; verify=False takes what the steps lead to."
            )

    def _add(self, values: np.ndarray) -> None:
        self._chunks.append(values)
        self.steps += len(values)
        self._end += _THREE.size + values.nbytes

    def _encode(self) -> bytes:
        firsts = np.cumsum([0, *map(len, self._chunks)]).tolist()
        return self._head + b"".join(map(_encode_chunk, firsts, self._chunks))


_FOREIGN = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What reading JSON of another shape can raise."""


def _head(header: Header) -> bytes:
    text = header.encode()
    return MAGIC + _THREE.pack(VERSION, len(text), zlib.crc32(text)) + text


def _record(first: int, count: int, body: bytes) -> bytes:
    place = struct.pack("<2I", first, count)
    return place + struct.pack("<I", zlib.crc32(place + body)) + body


def _encode_chunk(first: int, rows: np.ndarray) -> bytes:
    return _record(first, len(rows), rows.tobytes())


def _encode_end(steps: int, end: dict[str, Any]) -> bytes:
    text = json.dumps(end, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    return _record(steps, 0, struct.pack("<I", len(text)) + text)


def _read_record(data: bytes, at: int, size: Callable[[int], int]) -> tuple[int, bytes] | None:
    """First number and body of the record at a place, or None where no good one is."""
    if at + _THREE.size > len(data):
        return None
    first, count, crc = _THREE.unpack_from(data, at)
    begin, length = at + _THREE.size, size(count)
    if not 0 < length <= len(data) - begin:
        return None
    body = memoryview(data)[begin : begin + length]
    good = zlib.crc32(body, zlib.crc32(data[at : at + 8])) == crc
    return (first, bytes(body)) if good else None


def _read_chunk(data: bytes, row: np.dtype, at: int) -> tuple[int, np.ndarray] | None:
    """First step and rows of the chunk at a place, or None where no good one is."""
    found = _read_record(data, at, lambda count: count * row.itemsize)
    return found and (found[0], np.frombuffer(found[1], row))


def _read_end(data: bytes, at: int) -> tuple[int, dict[str, Any], int] | None:
    """Number of steps, summary and end of the last record, or None where no good one is."""
    words = data[at + _THREE.size : at + _THREE.size + 4]
    length = 4 + int.from_bytes(words, "little")
    found = _read_record(data, at, lambda count: 0 if count or len(words) < 4 else length)
    if found is None:
        return None
    try:
        end = json.loads(found[1][4:])
        end = {"crc32": int(end["crc32"]), "values": [float(x) for x in end["values"]]}
    except _FOREIGN:
        return None
    return found[0], end, at + _THREE.size + length


def _chunk_after(data: bytes, row: np.dtype, at: int) -> bool:
    """Whether a good chunk begins at a later place, so that what is at this one is damage.

    Places that cannot be one are passed over together. What is checked in all is bounded, so that
    no file takes long: one that looks like many chunks and is none is as damaged.
    """
    if len(data) - at < _THREE.size:
        return False
    words = np.frombuffer(data, "<u4", (len(data) - at) // 4, at)
    room = 4.0 * np.arange(len(words), 0, -1) - _THREE.size
    counts = words[1:].astype(np.float64)
    fits = (counts > 0) & (counts * row.itemsize <= room[:-1])
    budget = 16 * len(data)
    for place in np.flatnonzero(fits):
        budget -= int(counts[place]) * row.itemsize
        if budget < 0 or _read_chunk(data, row, at + 4 * int(place)) is not None:
            return True
    return False
