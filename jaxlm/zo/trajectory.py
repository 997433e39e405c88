"""The trajectory of a zeroth-order run: a key and n scalars a step, enough to replay the run.

The file holds little-endian numbers, which NumPy can read:

    16 bytes   "jaxlm trajectory"
    3 uint32   version of the format; length of the header, a multiple of 4; its CRC-32
    header     JSON: jaxlm, key {impl, data}, num_directions, dtype, settings of the optimizer,
               params [{path, shape, dtype, crc32 of the values}]
    chunks     3 uint32 (first step, number of steps, CRC-32 of the rest of the chunk) and, in
               dtype, [number of steps, 1 + num_directions]: the learning rate (NaN if it was not
               given) and the projected gradients
    end        of a complete run: 3 uint32 (number of steps, 0, CRC-32 of the rest), length of what
               follows, a multiple of 4, and JSON: crc32 of the last parameters and some values

A chunk is on disk before the next one is begun. An incomplete last chunk, left by a killed process
or a full disk, is dropped when the file is opened. A file damaged elsewhere is refused.

Reference: Malladi et al., arXiv:2305.17333, section 2.1 and appendix.
"""

import dataclasses
import functools
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.linalg import norm

from jaxlm.artifacts.files import write_shared
from jaxlm.artifacts.processes import is_main_process, to_host
from jaxlm.core import checks, paths
from jaxlm.core.errors import UserError
from jaxlm.zo.optimizers import ZerothOrderOptimizer, hold, release
from jaxlm.zo.perturbation import accepts

MAGIC = b"jaxlm trajectory"
VERSION = 2
LARGEST = 2**30
"""Largest file to open, in bytes: hundreds of millions of slopes."""
_THREE = struct.Struct("<3I")
_HEAD = len(MAGIC) + _THREE.size


@dataclasses.dataclass(frozen=True)
class Parameter:
    """The identity of a parameter: path (with the layer of a list), shape, dtype and checksum."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    crc32: int | None = None


def _arrays(params: Any) -> Iterator[tuple[str, Any]]:
    for leaf in paths.flatten(params)[0]:
        if hasattr(leaf.value, "dtype"):
            yield leaf.path if leaf.layer is None else f"{leaf.path}[{leaf.layer}]", leaf.value


def parameters(params: Any, *, checksums: bool) -> Iterator[Parameter]:
    """Describe the arrays of a tree; for checksums, copy one after another to the host."""
    for path, value in _arrays(params):
        crc = zlib.crc32(to_host(value).tobytes()) if checksums else None
        yield Parameter(path, tuple(value.shape), str(value.dtype), crc)


def summary(params: Any) -> dict[str, Any]:
    """Return a fingerprint of parameters: a CRC-32 of all, and four values of each with its ulp."""
    total, values, gaps = 0, [], []
    for path, value in sorted(_arrays(params), key=lambda pair: pair[0]):
        host = to_host(value)
        total = zlib.crc32(host.tobytes(), zlib.crc32(path.encode(), total))
        if host.size and jnp.issubdtype(host.dtype, jnp.floating):
            some = host.ravel()[np.linspace(0, host.size - 1, 4).astype(int)].astype(np.float64)
            values += [float(f"{x:.7g}") for x in some]
            gaps += (float(jnp.finfo(host.dtype).eps) * np.abs(some)).tolist()
    return {"crc32": total, "values": values, "gaps": gaps}


def as_json(settings: dict[str, Any], params: Any) -> dict[str, Any]:
    """Return settings as JSON values; a function on paths becomes a checksum of what it matches."""
    names = sorted({leaf.path for leaf in paths.flatten(params)[0]})

    def recorded(value):
        if not callable(value):
            return value
        chosen = [name for name in names if value(name)]
        crc = zlib.crc32("\n".join(chosen).encode())
        return f"a function that takes {len(chosen)} of {len(names)} paths, CRC-32 {crc:08x}"

    return json.loads(json.dumps({name: recorded(value) for name, value in settings.items()}))


@dataclasses.dataclass(frozen=True)
class Header:
    """The constants of a run; see the module for the file.

    `dtype` is that of the numbers of a step; `settings` are JSON values, see `as_json`.
    """

    version: str
    key: Array
    num_directions: int
    dtype: str
    settings: dict[str, Any]
    params: tuple[Parameter, ...]

    def __post_init__(self):
        checks.whole(self, "num_directions", most=2**24)
        checks.one_of("dtype", self.dtype, ("float32", "float64"))
        if not isinstance(self.settings, dict):
            raise TypeError("settings must be an object")
        if not all(isinstance(parameter.path, str) for parameter in self.params):
            raise TypeError("a path must be a string")

    @property
    def row(self) -> np.dtype:
        """The dtype of a step in the file."""
        number = np.dtype(self.dtype).newbyteorder("<")
        return np.dtype(
            [("learning_rate", number), ("projected_grad", number, (self.num_directions,))]
        )

    def encode(self) -> bytes:
        """Return JSON, padded with spaces to a multiple of 4 bytes."""
        data = np.asarray(jax.random.key_data(self.key)).tolist()
        record = {
            "jaxlm": self.version,
            "key": {"impl": str(jax.random.key_impl(self.key)), "data": data},
            "num_directions": self.num_directions,
            "dtype": self.dtype,
            "settings": self.settings,
            "params": [dataclasses.asdict(parameter) for parameter in self.params],
        }
        text = json.dumps(record, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 4)

    @classmethod
    def decode(cls, text: bytes) -> "Header":
        """Inverse of `encode`."""
        record = json.loads(text)
        key, data = record["key"], jnp.asarray(record["key"]["data"], jnp.uint32)
        wanted = [(record["num_directions"], int), (record["settings"], dict)]
        wanted += [(parameter["path"], str) for parameter in record["params"]]
        if not all(isinstance(value, kind) for value, kind in wanted):
            raise TypeError
        return cls(
            record["jaxlm"],
            jax.random.wrap_key_data(data, impl=key["impl"]),
            record["num_directions"],
            record["dtype"],
            record["settings"],
            tuple(Parameter(**x | {"shape": tuple(x["shape"])}) for x in record["params"]),
        )

    def difference(self, params: Any, settings: dict[str, Any]) -> str | None:
        """Return how parameters or settings (`as_json`) first differ from the run, or None."""
        for name in sorted(settings.keys() | self.settings.keys()):
            old, new = (json.dumps(x.get(name), sort_keys=True) for x in (self.settings, settings))
            if old != new:
                return f"was made with {name} = {old} (got {new}). Give the settings of its run."
        found = self._other_parameter(params)
        return found and f"the run began with {found}. Give the model it began with."

    def _other_parameter(self, params: Any) -> str | None:
        known = {parameter.path: parameter for parameter in self.params}
        given = {parameter.path: parameter for parameter in parameters(params, checksums=False)}
        for path in [*known, *given]:
            old, new = (
                f"{x.dtype} {list(x.shape)}" if x else "none"
                for x in (known.get(path), given.get(path))
            )
            if old != new:
                return f"{path} of {old} (got {new})"
        for parameter in parameters(params, checksums=True):
            if parameter.crc32 != known[parameter.path].crc32:
                return f"other values of {parameter.path}"
        return None


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
      header: the constants of the run.
      steps: T, the number of steps.
      end: fingerprint of the parameters at the end of the run; None if the run is incomplete.
      torn: number of bytes after the last good step when the file was opened.
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
        version: str = "",
    ) -> "Trajectory":
        """Create the file of a new run; an existing file is replaced.

        Args:
          path: the file.
          params: initial parameters; each is read once, for its checksum.
          key: typed PRNG key in the initial state of the optimizer.
          num_directions: number of scalars in a step.
          settings: settings of the optimizer: JSON values, and functions on paths, for which the
            file records a checksum of the matched paths. `steps` is the length of the run.
          version: version of the program that makes the run, for readers of the file.
        """
        described = tuple(parameters(params, checksums=True))
        dtype = "float64" if any(x.dtype == "float64" for x in described) else "float32"
        header = Header(version, key, num_directions, dtype, as_json(settings, params), described)
        trajectory = cls(Path(path), _head(header))
        write_shared(trajectory.path, trajectory._encode())
        return trajectory

    @classmethod
    def open(cls, path: str | Path) -> "Trajectory":
        """Read a file without changing it.

        Raises:
          UserError: if it is missing, not a trajectory, of another format, or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: there is no such file. Give the path of a trajectory.")
        if path.stat().st_size > LARGEST:
            raise UserError(
                f"{path}: is larger than {LARGEST} bytes. Give the path of a trajectory."
            )
        try:
            data = path.read_bytes()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{path}: cannot be read ({reason}). Allow it to be read.") from error
        if not data.startswith(MAGIC) or len(data) < _HEAD:
            raise UserError(f"{path}: is not a trajectory file. Give one that jaxlm wrote.")
        version, length, crc = _THREE.unpack_from(data, len(MAGIC))
        if version != VERSION:
            raise UserError(
                f"{path}: has a format that this jaxlm cannot read (got {version}, not {VERSION}). "
                "Use the jaxlm that wrote it."
            )
        at = _HEAD + length
        if zlib.crc32(data[_HEAD:at]) != crc:
            raise UserError(f"{path}: the header is damaged. Take another copy of the file.")
        try:
            trajectory = cls(path, data[:at])
        except _FOREIGN as error:
            raise UserError(
                f"{path}: the header is not that of a trajectory (got {error!r:.80}). Give a file "
                "that jaxlm wrote."
            ) from error
        row = trajectory.header.row
        while (chunk := _read_chunk(data, row, at)) is not None and chunk[0] == trajectory.steps:
            trajectory._add(chunk[1])
            at = trajectory._end
        if (end := _read_end(data, at)) is not None and end[0] == trajectory.steps:
            _, trajectory.end, at = end
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
        """Append the projected gradients of some steps; they are on disk when the call returns.

        Args:
          first_step: number of the first of them, `self.steps`.
          values: projected gradients, stored in float32, or in float64 for float64 parameters.
          learning_rate: learning rate of each step, or of all; a replay uses them.

        Raises:
          UserError: if the values do not follow the last step, or the file cannot be written; the
            earlier steps are kept.
        """
        values = np.asarray(values)
        n = self.header.num_directions
        if first_step != self.steps or values.ndim != 2 or values.shape[1] != n:
            raise UserError(
                f"values: must follow {self.steps} steps of {n} directions (got shape "
                f"{values.shape} from step {first_step}). Append the steps in order."
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
        """Record the result of the run, `finalize(params, state)`, to compare a replay with.

        Raises:
          UserError: if the file cannot be written; the steps are kept.
        """
        end = summary(params)
        self._put(_encode_end(self.steps, end))
        self.end = end

    def _put(self, record: bytes) -> None:
        try:
            if is_main_process():
                with self.path.open("r+b", buffering=0) as file:
                    file.truncate(self._end)  # drop an incomplete chunk, or the end of a run
                    file.seek(self._end)
                    rest = memoryview(record)
                    while rest:  # an unbuffered write may be partial
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror or error}); its {self.steps} "
                "steps are kept. Make room there."
            ) from error
        self.torn = 0

    def cut(self, step: int, length: int | None = None) -> None:
        """Keep the first `step` steps, for a run that resumes there.

        Args:
          step: number of steps to keep.
          length: new length of the run in the header; None leaves it.

        Raises:
          UserError: if there are fewer steps.
        """
        if step > self.steps:
            raise UserError(
                f"{self.path}: must have at least {step} steps (got {self.steps}). Take another "
                "copy of the file."
            )
        if length is not None:
            settings = self.header.settings | {"steps": length}
            self.header = dataclasses.replace(self.header, settings=settings)
        kept = Trajectory(self.path, _head(self.header))
        for chunk in self._chunks:
            if step > kept.steps:
                kept._add(chunk[: step - kept.steps])
        write_shared(self.path, kept._encode())
        vars(self).update(vars(kept))

    def check(
        self,
        params: Any,
        settings: dict[str, Any],
        learning_rate: Callable[[Any], Any] | None = None,
    ) -> None:
        """Require that the trajectory was made from these parameters with these settings.

        Args:
          params: initial parameters of the run.
          settings: as in `create`.
          learning_rate: η of a step; compared with all learning rates in the file.

        Raises:
          UserError: naming the first setting, parameter or learning rate that differs.
        """
        difference = self.header.difference(params, as_json(settings, params))
        if difference is not None:
            raise UserError(f"{self.path}: {difference}")
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
        """Require that the file has this number of steps, or the whole run if it is None.

        Raises:
          UserError: if it has fewer.
        """
        planned = self.header.settings.get("steps")
        if steps is not None and not 0 <= steps <= self.steps:
            raise UserError(
                f"{self.path}: has {self.steps} steps (got steps={steps}). Give that many or fewer."
            )
        # A run that stopped early has the fingerprint of its end.
        unfinished = self.end is None and isinstance(planned, int) and self.steps < planned
        if steps is None and unfinished:
            raise UserError(
                f"{self.path}: has {self.steps} of the {planned} steps of its run. Resume the "
                f"run, take a whole copy, or replay what is there with steps={self.steps}."
            )

    def check_end(self, start: Any, end: Any) -> None:
        """Require that a replay ended at the parameters of the run, up to rounding.

        An incomplete run has no fingerprint to compare with and passes.

        Args:
          start: initial parameters of the run.
          end: result of the replay.

        Raises:
          UserError: if they differ.
        """
        replayed = summary(end)
        if self.end is None or replayed["crc32"] == self.end["crc32"]:
            return
        old, new, first = (np.array(x["values"]) for x in (self.end, replayed, summary(start)))
        same = old.shape == new.shape
        # Other devices round updates differently: allow 1 % of the distance that the run went.
        if not same or not norm(new - old) <= 0.01 * norm(old - first) + norm(replayed["gaps"]):
            raise UserError(
                f"{self.path}: the replay must end at the parameters of the run (got others). Give "
                "its optimizer and model, or verify=False to accept the result."
            )

    def _add(self, values: np.ndarray) -> None:
        self._chunks.append(values)
        self.steps += len(values)
        self._end += _THREE.size + values.nbytes

    def _encode(self) -> bytes:
        firsts = np.cumsum([0, *map(len, self._chunks)]).tolist()
        return self._head + b"".join(map(_encode_chunk, firsts, self._chunks))


_FOREIGN = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What decoding JSON of another structure can raise."""


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
    """Return the first number and the body of the record at a place; None if it is not intact."""
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
    """Return the first step and the rows of the chunk at a place; None if it is not intact."""
    record = _read_record(data, at, lambda count: count * row.itemsize)
    return record and (record[0], np.frombuffer(record[1], row))


def _read_end(data: bytes, at: int) -> tuple[int, dict[str, Any], int] | None:
    """Return steps, summary and end offset of the last record; None if it is not intact."""
    words = data[at + _THREE.size : at + _THREE.size + 4]
    length = 4 + int.from_bytes(words, "little")
    record = _read_record(data, at, lambda count: 0 if count or len(words) < 4 else length)
    if record is None:
        return None
    try:
        end = json.loads(record[1][4:])
        end = {"crc32": int(end["crc32"]), "values": [float(x) for x in end["values"]]}
    except _FOREIGN:
        return None
    return record[0], end, at + _THREE.size + length


def _chunk_after(data: bytes, row: np.dtype, at: int) -> bool:
    """Return whether an intact chunk begins later, so that the bytes at this place are damaged."""
    if len(data) - at < _THREE.size:
        return False
    words = np.frombuffer(data, "<u4", (len(data) - at) // 4, at)
    room = 4.0 * np.arange(len(words), 0, -1) - _THREE.size
    counts = words[1:].astype(np.float64)
    fits = (counts > 0) & (counts * row.itemsize <= room[:-1])
    # A hostile file may look like a chunk at every place. Checksums over 16 times its length are
    # enough; whatever looks like more chunks than that is damaged as well.
    budget = 16 * len(data)
    for place in np.flatnonzero(fits):
        budget -= int(counts[place]) * row.itemsize
        if budget < 0 or _read_chunk(data, row, at + 4 * int(place)) is not None:
            return True
    return False


def replay(
    opt: ZerothOrderOptimizer,
    params: Any,
    trajectory: Trajectory | Path | str,
    *,
    steps: int | None = None,
    verify: bool = True,
) -> Any:
    """Return the final parameters of a run from its initial parameters and its trajectory.

    A step costs one update and no forward pass. On the same backend the result equals that of the
    run bit for bit; on another one it differs by the rounding of the updates.

    Args:
      opt: the optimizer of the run, or one with the same settings.
      params: initial parameters of the run; they are not changed.
      trajectory: the trajectory of the run, or its file.
      steps: number of steps, at most those of the file; None for the whole run.
      verify: compare the result with the fingerprint in the file, if there is one.

    Raises:
      UserError: if the file is damaged, has too few steps, or belongs to other parameters or
        another optimizer; or if the result differs from that of the run, beyond rounding.
    """
    if not isinstance(trajectory, Trajectory):
        trajectory = Trajectory.open(trajectory)
    trajectory.check(
        params, {**trajectory.header.settings, **opt.settings}, learning_rate=opt.learning_rate
    )
    trajectory.check_steps(steps)
    state = opt.init(params, trajectory.header.key)
    # Copies, since the update donates them and the parameters are the user's.
    start, state = hold(params), jax.tree.map(jnp.copy, state)
    moved = jax.tree.map(jnp.copy, start)

    @functools.partial(jax.jit, donate_argnums=(0, 1), keep_unused=True)
    def update(params, state, slopes, rate):
        # The recorded rates, since a schedule may compute other last bits on another backend.
        options = {"learning_rate": rate} if accepts(opt.update, "learning_rate") else {}
        params, state, _ = opt.update(release(params), state, slopes, **options)
        return hold(params), state

    rates = trajectory.learning_rate
    for t, slopes in enumerate(trajectory.projected_grad[:steps]):
        rate = None if np.isnan(rates[t]) else jnp.asarray(rates[t])
        moved, state = update(moved, state, jnp.asarray(slopes), rate)
    end = opt.finalize(release(moved), state)
    if verify and steps is None:
        trajectory.check_end(params, end)
    return end
