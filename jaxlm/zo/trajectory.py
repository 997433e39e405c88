"""The trajectory of a zeroth-order run: a key and n scalars a step, from which it can be replayed.

A file of little-endian numbers, which anyone can read with NumPy:

    16 bytes   "jaxlm trajectory"
    3 uint32   version of the format; length of the header, a multiple of 4; its CRC-32
    header     JSON: jaxlm, key {impl, data}, num_directions, settings of the optimizer,
               params [{path, shape, dtype, crc32 of the values}]
    chunks     of 3 uint32 (first step, number of steps, CRC-32 of the rest of the chunk)
               and float32 [number of steps, num_directions]: the projected gradients

A chunk is on disk before the next one is begun. What a killed process or a full disk left of the
last one is dropped when the file is opened; a file damaged elsewhere is refused.

Reference: Malladi et al., arXiv:2305.17333, section 2.1 and appendix.
"""

import functools
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jaxlm.core.errors import UserError
from jaxlm.artifacts.files import write_shared
from jaxlm.artifacts.processes import is_first
from jaxlm.zo.trajectory_header import Header, parameters

MAGIC = b"jaxlm trajectory"
VERSION = 1
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
      torn: bytes after the last good step that were there when the file was opened.
    """

    def __init__(self, path: Path, head: bytes):
        self.path = path
        self.header = Header.decode(head[_HEAD:])
        self.steps = 0
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
          settings: JSON values that tell how the optimizer moves along a direction.
        """
        from jaxlm import __version__

        found = tuple(parameters(params, checksums=True))
        text = Header(__version__, key, num_directions, settings, found).encode()
        head = MAGIC + _THREE.pack(VERSION, len(text), zlib.crc32(text)) + text
        trajectory = cls(Path(path), head)
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
            raise UserError(f"{path}: there is no such file: give a trajectory.")
        data = path.read_bytes()
        if not data.startswith(MAGIC) or len(data) < _HEAD:
            raise UserError(f"{path}: this is no trajectory file: give one that jaxlm wrote.")
        version, length, crc = _THREE.unpack_from(data, len(MAGIC))
        if version != VERSION:
            raise UserError(
                f"{path}: the trajectory has format {version}, and this jaxlm reads {VERSION}: "
                "use the jaxlm that wrote it."
            )
        at = _HEAD + length
        if zlib.crc32(data[_HEAD:at]) != crc:
            raise UserError(f"{path}: the header is damaged: take another copy of the file.")
        trajectory = cls(path, data[:at])
        read = functools.partial(_read_chunk, data, trajectory.header.num_directions)
        while (chunk := read(at)) is not None and chunk[0] == trajectory.steps:
            trajectory._add(chunk[1])
            at = trajectory._end
        if any(read(later) is not None for later in range(at, len(data), 4)):
            raise UserError(
                f"{path}: the trajectory is damaged after step {trajectory.steps}: take another "
                "copy of the file."
            )
        trajectory.torn = len(data) - at
        return trajectory

    @property
    def projected_grad(self) -> Float[np.ndarray, "T n"]:
        """The projected gradients of all steps."""
        empty = np.zeros((0, self.header.num_directions), np.float32)
        return np.concatenate([empty, *self._chunks])

    def append(self, first_step: int, values: Float[Any, "count n"]) -> None:
        """Adds the projected gradients of some steps; they are on disk after the call.

        Args:
          first_step: of the values, `self.steps`.
          values: kept in float32.

        Raises:
          UserError: the file cannot be written; the steps before are kept.
        """
        values = np.array(values, "<f4")
        if first_step != self.steps or values.shape[1] != self.header.num_directions:
            raise ValueError(
                f"values of shape {values.shape} from step {first_step} on do not follow "
                f"{self.steps} steps of {self.header.num_directions} directions"
            )
        if not len(values):
            return
        try:
            if is_first():
                self._write(_encode_chunk(first_step, values))
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror or error}), and its {self.steps} "
                "steps are kept: make room there."
            ) from error
        self._add(values)
        self.torn = 0

    def _write(self, chunk: bytes) -> None:
        with self.path.open("r+b", buffering=0) as file:
            file.truncate(self._end)
            file.seek(self._end)
            rest = memoryview(chunk)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())

    def cut(self, step: int) -> None:
        """Keeps the first `step` steps, for a run that goes on from there.

        Raises:
          UserError: there are fewer.
        """
        if step > self.steps:
            raise UserError(
                f"{self.path}: the trajectory has {self.steps} steps, and {step} are needed: take "
                "another copy of the file."
            )
        kept = Trajectory(self.path, self._head)
        for chunk in self._chunks:
            if step > kept.steps:
                kept._add(chunk[: step - kept.steps])
        write_shared(self.path, kept._encode())
        self.steps, self._chunks, self._end, self.torn = step, kept._chunks, kept._end, 0

    def check(self, params: Any, settings: dict[str, Any]) -> None:
        """Refuses a trajectory that was not made from these parameters with these settings.

        Raises:
          UserError: with the first setting or parameter that differs.
        """
        difference = self.header.difference(params, settings)
        if difference is not None:
            raise UserError(f"{self.path}: {difference}.")

    def _add(self, values: np.ndarray) -> None:
        self._chunks.append(values)
        self.steps += len(values)
        self._end += _THREE.size + values.nbytes

    def _encode(self) -> bytes:
        firsts = np.cumsum([0, *map(len, self._chunks)]).tolist()
        return self._head + b"".join(map(_encode_chunk, firsts, self._chunks))


def _encode_chunk(first: int, values: np.ndarray) -> bytes:
    place, body = struct.pack("<2I", first, len(values)), values.tobytes()
    return place + struct.pack("<I", zlib.crc32(place + body)) + body


def _read_chunk(data: bytes, num_directions: int, at: int) -> tuple[int, np.ndarray] | None:
    """First step and values of the chunk at a place, or None where no good one is."""
    if at + _THREE.size > len(data):
        return None
    first, count, crc = _THREE.unpack_from(data, at)
    begin, size = at + _THREE.size, 4 * count * num_directions
    body = data[begin : begin + size]
    if not count or len(body) < size or zlib.crc32(data[at : at + 8] + body) != crc:
        return None
    return first, np.frombuffer(body, "<f4").reshape(count, num_directions)
