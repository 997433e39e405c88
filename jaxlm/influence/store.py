"""Gradient features on disk: written by several processes, read as one array.

    000.json                       writer 0: the spec, and how many rows it has committed
    000-000000000000.safetensors   rows of writer 0 from its row 0 on, at most one shard
    000.lock                       exists while writer 0 is open

A file of rows has the tensors `values` [N, dim], `scale` [N] (not for float32) and `ids`, a JSON
list in UTF-8. Rows take 32, 16, 8 or 1 bits per number:

    float32   the numbers
    float16   scale 2^k, and the numbers over 2^k in half precision; max|x| / 2^k is in [1, 2)
    int8      scale s = max|x| / 127, and x / s rounded to nearest
    1bit      scale ||x||, and the signs as packed bits: x is read as sign(x) ||x|| / sqrt(dim)

Every row has its own scale, so a small gradient is kept as precisely as a large one; a plain cast
to half precision would lose numbers below 6e-8.

All files are written atomically. Each tensor has a CRC-32 in the metadata of its file, and each
JSON record contains its own; a CRC-32 detects every change of up to four adjacent bytes.

References: Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning",
arXiv:2402.04333 (half precision); Ananta et al., "QLESS: A Quantized Approach for Data Valuation
and Selection in Large Language Model Fine-Tuning", arXiv:2502.01703 (8 bits to 1).
"""

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from jaxlm.artifacts.files import parse_json, read_json, report_write_errors, write_atomic
from jaxlm.artifacts.folder import acquire, check_inputs, sync
from jaxlm.core.checks import integer, one_of, real
from jaxlm.core.errors import UserError
from jaxlm.gradients.projection import Projector

Id = str | int
Tensors = dict[str, np.ndarray]
Record = dict[str, Any]

DTYPES = ("float32", "float16", "int8", "1bit")
SHARD_BYTES = 2**26


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What the rows of a store are. Stores are compared by all fields, including empty ones.

    Attributes:
      dim: length of a row.
      dtype: how rows are stored: "float32", "float16", "int8" or "1bit".
      projection: `projection_name` of the projector.
      parameters: the parameters of the gradients: a regular expression, or any text.
      gradient: the kind of gradient: "sgd", "adam paper", ...
      model: `jaxlm.artifacts.arrays.fingerprint` of the parameters.
      data: fingerprint of the examples.
      checkpoint: name or step of the checkpoint.
      weight: weight of the checkpoint in a score: the mean learning rate of its epoch.

    >>> StoreSpec(dim=8, projection="srht, seed 0", checkpoint=100, weight=1e-5).dtype
    'float32'
    """

    dim: int
    dtype: str = "float32"
    projection: str = ""
    parameters: str = ""
    gradient: str = ""
    model: str = ""
    data: str = ""
    checkpoint: str | int | np.integer = ""
    weight: float | int | np.number | Array = 1.0

    def __post_init__(self) -> None:
        for name in ("dim", "checkpoint", "weight"):
            value: Any = getattr(self, name)
            if hasattr(value, "item"):  # a scalar of NumPy or JAX, as schedules return
                object.__setattr__(self, name, value.item())
        integer("dim", self.dim)
        one_of("dtype", self.dtype, DTYPES)
        real("weight", self.weight, least=0)


def projection_name(projector: Projector | None) -> str:
    """Return a text that is equal for equal projections, and only for those.

    >>> from jaxlm.gradients.projection import projector
    >>> projection_name(projector("srht", dim=64, seed=3))
    'srht to 64, seed 3'
    """
    if projector is None:
        return "none"
    return f"{projector.family} to {projector.dim}, seed {int(projector.seed)}"


# How rows are stored.


def row_bytes(dtype: str, dim: int) -> int:
    """Return the bytes of a stored row, without its id.

    >>> row_bytes("int8", 8192)
    8196
    """
    sizes = {"float32": 4 * dim, "float16": 2 * dim, "int8": dim, "1bit": (dim + 7) // 8}
    return sizes[dtype] + (4 if dtype != "float32" else 0)


def _encode(rows: Float[np.ndarray, "N dim"], dtype: str) -> Tensors:
    if dtype == "float32":
        return {"values": rows}
    if dtype == "1bit":
        scale = np.linalg.norm(rows.astype(np.float64), axis=1).astype(np.float32)
        return {"scale": scale, "values": np.packbits(rows >= 0, axis=1, bitorder="little")}
    largest = np.abs(rows).max(axis=1, initial=0)
    if dtype == "float16":
        exponents = np.maximum(np.frexp(largest)[1] - 1, np.finfo(np.float32).minexp)
        halves = np.ldexp(rows, -exponents[:, None]).astype(np.float16)
        return {"scale": np.ldexp(np.float32(1), exponents), "values": halves}
    scale = (largest / np.float32(127)).astype(np.float32)
    unit = np.where(scale == 0, np.float32(1), scale)[:, None]
    return {"scale": scale, "values": np.clip(np.rint(rows / unit), -127, 127).astype(np.int8)}


def _decode(tensors: Tensors, spec: StoreSpec) -> Float[np.ndarray, "N dim"]:
    values = tensors["values"]
    if spec.dtype == "float32":
        return values
    scale = tensors["scale"][:, None]
    if spec.dtype == "1bit":
        bits = np.unpackbits(values, axis=1, count=spec.dim, bitorder="little")
        return (2 * bits.astype(np.float32) - 1) * (scale / np.float32(spec.dim**0.5))
    return values.astype(np.float32) * scale


# Files.


def _record_path(folder: Path, writer: int) -> Path:
    return folder / f"{writer:03d}.json"


def _rows_path(folder: Path, writer: int, start: int) -> Path:
    return folder / f"{writer:03d}-{start:012d}.safetensors"


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: is damaged. Remove the store and compute its rows again.")


def _missing(path: Path) -> UserError:
    return UserError(f"{path}: is missing. Compute its rows again.")


def _seal(record: Record) -> str:
    """Return a JSON text with a checksum of itself."""
    checksum = zlib.crc32(json.dumps(record).encode())
    return json.dumps({**record, "checksum": checksum}, indent=1) + "\n"


def _write(path: Path, content: str | bytes) -> None:
    with report_write_errors(path):
        write_atomic(path, content)
        sync(path.parent)


def _read_record(path: Path) -> Record | None:
    """Read the record of a writer; None if there is none."""
    try:
        record = read_json(
            path, spec=dict, writers=int, shard_rows=int, rows=(int, type(None)), checksum=int
        )
        del record["checksum"]
        StoreSpec(**record["spec"])
        if _seal(record) == path.read_text():
            return record
    except FileNotFoundError:
        return None
    except (UserError, TypeError) as error:
        if isinstance(error.__context__, OSError):  # for example, no permission to read it
            raise
    raise _damaged(path) from None


def _write_rows(path: Path, ids: list[Id], tensors: Tensors) -> None:
    from safetensors.numpy import save

    tensors = tensors | {"ids": np.frombuffer(json.dumps(ids).encode(), np.uint8)}
    checksums = {name: zlib.crc32(tensor.tobytes()) for name, tensor in sorted(tensors.items())}
    # All checksums under one key, because safetensors writes several keys in random order.
    _write(path, save(tensors, {"checksums": json.dumps(checksums)}))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            yield file
    except FileNotFoundError:
        raise _missing(path) from None
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise _damaged(path) from None


def _read_rows(path: Path, spec: StoreSpec | None = None) -> tuple[list[Id], Tensors]:
    """Read the ids of a file and, with a spec, its rows, and verify their checksums."""
    expected = {} if spec is None else _encode(np.zeros((0, spec.dim), np.float32), spec.dtype)
    with _opened(path) as file:
        checksums = parse_json(file.metadata()["checksums"], str(path))
        tensors = {name: file.get_tensor(name) for name in [*expected, "ids"]}
        if any(zlib.crc32(tensor.tobytes()) != checksums[name] for name, tensor in tensors.items()):
            raise ValueError
        ids = parse_json(tensors.pop("ids").tobytes().decode(), str(path))
        for name, tensor in tensors.items():
            row = expected[name]
            if tensor.dtype != row.dtype or tensor.shape != (len(ids), *row.shape[1:]):
                raise ValueError
    return ids, tensors


# Writing.


class _Piece(NamedTuple):
    """Rows of a writer from its row `start` on, stored in one file."""

    start: int
    ids: list[Id]
    tensors: Tensors


class StoreWriter:
    """A writer of a store, made by `GradientStore.create`.

    When `append` returns, its rows are on disk. The files of a committed store depend only on the
    rows, their ids and their order, and not on how rows were divided into calls or how often the
    writer was killed.

    Attributes:
      spec: what the rows are.
      ids: ids of all rows of this writer, in order, including those from before a restart.
    """

    # The rows of the last shard are in pieces, one per file. A new piece is merged with the pieces
    # before it that are not longer, so that the number of files, and of times that a row is
    # written, grow with the logarithm of the number of calls. The merged piece replaces the file of
    # its first piece. If the writer is killed before it removes the other files, these begin before
    # the end of the merged piece, by which `_resume` recognizes them.

    def __init__(self, folder: Path, writer: int, record: Record):
        self.spec = StoreSpec(**record["spec"])
        self.ids: list[Id] = []
        self._folder, self._writer, self._record = folder, writer, record
        self._pieces: list[_Piece] = []
        self._lock_path = folder / f"{writer:03d}.lock"
        self._lock: Any = os.fdopen(acquire(self._lock_path, folder, f"writer {writer}"), "rb")
        try:
            there = _read_record(_record_path(folder, writer))
            self._committed = there is not None and there["rows"] is not None
            if there is None:
                self._declare(None)
            self._resume()
        except BaseException:
            self.close()
            raise
        self._known = set(self.ids)

    def _resume(self) -> None:
        """Find the rows on disk, and remove the leftovers of a killed writer."""
        for path in self._folder.glob(f"{self._writer:03d}[.-]*.tmp"):
            path.unlink()
        starts: list[int] = []
        for path in sorted(self._folder.glob(f"{self._writer:03d}-*.safetensors")):
            start = int(path.stem.partition("-")[2])
            if start < len(self.ids):  # it was merged into the piece before it
                path.unlink()
                continue
            if start > len(self.ids):
                raise _missing(_rows_path(self._folder, self._writer, len(self.ids)))
            self.ids += _read_rows(path)[0]
            starts = [*starts, start] if len(self.ids) % self._record["shard_rows"] else []
        for start in starts:
            rows = _read_rows(_rows_path(self._folder, self._writer, start), self.spec)
            self._pieces.append(_Piece(start, *rows))

    def __len__(self) -> int:
        return len(self.ids)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def append(self, rows: Float[Any, "N dim"], ids: Sequence[Id] | np.ndarray) -> None:
        """Append rows to those that are already written.

        Args:
          rows: finite floats.
          ids: a new text or integer for each row.

        Raises:
          UserError: if an id is already written, a row is not finite, or shapes do not fit; then
            nothing is written.
        """
        values, names = self._checked(rows, ids)
        if names and self._committed:
            self._declare(None)
        while names:
            room = self._record["shard_rows"] - len(self.ids) % self._record["shard_rows"]
            some = names[:room]
            piece = _Piece(len(self.ids), some, _encode(values[:room], self.spec.dtype))
            self._write(piece, whole=len(some) == room)
            self.ids += some
            self._known.update(some)
            values, names = values[room:], names[room:]

    def commit(self) -> None:
        """Record that this writer is complete, and close it.

        The store can be opened once all its writers have committed. Creating the writer again
        allows it to append more rows.
        """
        self._check_open()
        if len(self._pieces) > 1:
            self._write(self._pieces.pop(), whole=True)
        self._declare(len(self.ids))
        self.close()

    def close(self) -> None:
        """Release the lock, so that another process can be this writer. Appended rows are kept."""
        if self._lock is not None:
            lock, self._lock = self._lock, None
            with lock:  # unlink while the lock is held, as `jaxlm.artifacts.folder.hold` does
                self._lock_path.unlink(missing_ok=True)

    def _check_open(self) -> None:
        if self._lock is None:
            raise UserError(f"{self._folder}: this writer is closed. Call GradientStore.create.")

    def _declare(self, rows: int | None) -> None:
        """Write the number of committed rows, or None for a writer that has not committed."""
        _write(_record_path(self._folder, self._writer), _seal(self._record | {"rows": rows}))
        self._committed = rows is not None

    def _write(self, piece: _Piece, *, whole: bool) -> None:
        """Write a piece, merged with the pieces before it that are not longer, or with all."""
        kept, rows = len(self._pieces), len(piece.ids)
        while kept and (whole or len(self._pieces[kept - 1].ids) <= rows):
            kept -= 1
            rows += len(self._pieces[kept].ids)
        parts = [*self._pieces[kept:], piece]
        start = parts[0].start
        ids = [name for part in parts for name in part.ids]
        tensors = {
            name: np.concatenate([part.tensors[name] for part in parts]) for name in piece.tensors
        }
        _write_rows(_rows_path(self._folder, self._writer, start), ids, tensors)
        full = len(ids) == self._record["shard_rows"]
        self._pieces[kept:] = [] if full else [_Piece(start, ids, tensors)]
        for part in parts[1:]:
            _rows_path(self._folder, self._writer, part.start).unlink(missing_ok=True)

    def _checked(self, rows: Any, ids: Any) -> tuple[np.ndarray, list[Id]]:
        self._check_open()
        values = np.asarray(rows)
        if values.ndim != 2 or values.shape[1] != self.spec.dim:
            raise UserError(
                f"rows: must have shape [N, {self.spec.dim}] (got {values.shape}). Give rows of "
                "the spec's dim."
            )
        names = [name.item() if isinstance(name, np.generic) else name for name in ids]
        if len(names) != len(values):
            raise UserError(
                f"ids: must be {len(values)}, one per row (got {len(names)}). Correct it."
            )
        new: set[Id] = set()
        for row, name in enumerate(names):
            if isinstance(name, bool) or not isinstance(name, str | int):
                raise UserError(f"ids: must be texts or integers (got {name!r}). Correct it.")
            try:
                str(name).encode()
            except ValueError:  # lone surrogates and integers of 5,000 digits do not survive JSON
                raise UserError(
                    f"ids: the id of row {row} cannot be written as JSON. Give another."
                ) from None
            if name in self._known or name in new:
                raise UserError(
                    f"ids: must be unique in {self._folder} (got {name!r} again). Give every "
                    "example its own."
                )
            new.add(name)
        with np.errstate(over="ignore"):
            values = values.astype(np.float32, copy=False)
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            name = names[int(finite.argmin())]
            raise UserError(f"rows: the row of example {name!r} is not finite. Leave it out.")
        return values, names


# Reading.


class GradientStore:
    """Rows of numbers with ids on disk, which are read like an array.

    The checksums of a file are verified when a row of it is first read.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with GradientStore.create(folder, StoreSpec(dim=4, dtype="float16")) as writer:
    ...     writer.append(np.ones((3, 4)), ["a", "b", "c"])
    ...     writer.commit()
    >>> store = GradientStore.open(folder)
    >>> store[1:3].shape, store.ids[1:3]
    ((2, 4), ['b', 'c'])

    Attributes:
      directory: the folder.
      spec: what the rows are.
      ids: ids of the rows, in order: those of writer 0, then those of writer 1, ...
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        path = _record_path(self.directory, 0)
        first = _read_record(path) if self.directory.is_dir() else None
        if first is None:
            raise UserError(f"{path}: is missing. Give the folder of a gradient store.")
        self.spec = StoreSpec(**first["spec"])
        self._paths: list[Path] = []
        edges, owners = [0], dict[Id, Path]()
        for path, ids in self._committed(first):
            for name in ids:
                if owners.setdefault(name, path) != path:
                    raise UserError(
                        f"{path}: the id {name!r} is in {owners[name]} too. Give every writer "
                        "other examples."
                    )
            self._paths.append(path)
            edges.append(len(owners))
        self.ids = list(owners)
        self._edges = np.array(edges)
        self._verified: set[int] = set()

    @classmethod
    def create(
        cls,
        directory: str | Path,
        spec: StoreSpec,
        *,
        writer: int = 0,
        writers: int = 1,
        shard_rows: int | None = None,
    ) -> StoreWriter:
        """Create a store, or resume one.

        Args:
          directory: folder, created if missing. If it has a store of the same spec, the `ids` of
            the writer are those already written: append the others.
          spec: what the rows are.
          writer: which writer this is, from 0 to writers - 1: `jax.process_index()` where every
            process writes the rows that it computes.
          writers: how many writers there are.
          shard_rows: rows in a full shard; 64 MiB of them by default.

        Returns:
          A writer, to be committed; also a context manager that closes it.

        Raises:
          UserError: if the folder has a store of another spec or number of writers, or this writer
            is open elsewhere.
        """
        integer("writers", writers)
        integer("writer", writer, least=0, most=writers - 1)
        integer("shard_rows", shard_rows)
        folder = Path(directory)
        with report_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        record: Record = {
            "spec": dataclasses.asdict(spec),
            "writers": writers,
            "shard_rows": shard_rows or max(1, SHARD_BYTES // row_bytes(spec.dtype, spec.dim)),
            "rows": None,
        }
        for path in sorted(folder.glob("[0-9][0-9][0-9]*.json")):
            other = _read_record(path)
            if other is not None:
                if shard_rows is None:
                    record["shard_rows"] = other["shard_rows"]
                check_inputs(folder, other | {"rows": None}, record)
        return StoreWriter(folder, writer, record)

    @classmethod
    def open(cls, directory: str | Path) -> "GradientStore":
        """Open a store that is complete.

        Raises:
          UserError: if there is no store, a writer has not committed, a file is missing or damaged,
            or two rows have the same id.
        """
        return cls(directory)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.ids), self.spec.dim

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Float[np.ndarray, "..."]:
        """Return rows as float32, indexed as axis 0 of an array.

        Raises:
          UserError: if a file with some of the rows is damaged.
          IndexError: if there is no such row.
        """
        places = np.asarray(np.arange(len(self))[index])
        wanted = places.reshape(-1)
        rows = np.empty((len(wanted), self.shape[1]), np.float32)
        files = np.searchsorted(self._edges[1:], wanted, side="right")
        for file in np.unique(files):
            here = files == file
            rows[here] = self._read(int(file), wanted[here] - self._edges[file])
        return rows.reshape(*places.shape, self.shape[1])

    def verify(self) -> None:
        """Read every file and verify its checksums.

        Raises:
          UserError: naming the first file that is damaged.
        """
        for path in self._paths:
            _read_rows(path, self.spec)

    def _read(self, file: int, rows: np.ndarray) -> np.ndarray:
        """Read some rows of one file."""
        path = self._paths[file]
        if file not in self._verified:
            _read_rows(path, self.spec)
            self._verified.add(file)
        low, high = int(rows.min()), int(rows.max()) + 1
        names = ["values"] if self.spec.dtype == "float32" else ["scale", "values"]
        with _opened(path) as opened:
            tensors = {name: opened.get_slice(name)[low:high][rows - low] for name in names}
        return _decode(tensors, self.spec)

    def _committed(self, first: Record) -> Iterator[tuple[Path, list[Id]]]:
        """Yield the files of all writers, with the ids of their rows."""
        for writer in range(first["writers"]):
            record = _read_record(_record_path(self.directory, writer))
            if record is None or record["rows"] is None:
                raise UserError(
                    f"{self.directory}: writer {writer} has not committed. Let it finish and "
                    "commit."
                )
            check_inputs(self.directory, first | {"rows": None}, record | {"rows": None})
            rows, size = record["rows"], record["shard_rows"]
            for start in range(0, rows, size):
                path = _rows_path(self.directory, writer, start)
                ids = _read_rows(path)[0]
                if len(ids) != min(size, rows - start):
                    raise _damaged(path)
                yield path, ids
