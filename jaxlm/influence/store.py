"""Gradient features on disk: written by several processes, read as if they were one array."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxlm.core.errors import UserError
from jaxlm.influence import shards
from jaxlm.influence.encodings import encoding
from jaxlm.influence.specs import StoreSpec, check_equal
from jaxlm.influence.writer import StoreWriter

SHARD_BYTES = 2**26


class GradientStore:
    """Rows of numbers with ids, whose files are `jaxlm.influence.shards`.

    A shard is compared with its checksum when rows of it are first read.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with GradientStore.create(folder, StoreSpec(dim=4, dtype="float16")) as writer:
    ...     writer.append(np.ones((3, 4)), ["a", "b", "c"])
    ...     writer.commit()
    >>> store = GradientStore.open(folder)
    >>> store[1:3].shape, store.ids[1:3]
    ((2, 4), ['b', 'c'])

    Attributes:
      directory: where it lies.
      spec: what the rows are of.
      ids: of the rows, in order: those of writer 0, then those of writer 1, ...
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        manifest = _read_manifest(self.directory)
        self.spec = manifest.spec
        self._encoding = encoding(self.spec.dtype)
        self._shards = [
            shard for writer in range(manifest.writers) for shard in self._committed(writer)
        ]
        self.ids = [name for shard in self._shards for name in shard.ids]
        self._ends = np.cumsum([len(shard.ids) for shard in self._shards], dtype=np.int64)
        self._checked: set[int] = set()
        self._check_ids()

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
        """Begins a store, or goes on with one.

        Args:
          directory: made if missing. Where a store of the same spec is begun already, the writer
            has the ids of the rows that it wrote: go on with the others.
          spec: what the rows are of.
          writer: which writer this is, 0 to writers - 1: `jax.process_index()` where every process
            writes the rows that it computes.
          writers: how many there are.
          shard_rows: rows in a full shard; by default 64 MiB of them.

        Returns:
          A writer, to be committed; also a context manager that closes it.

        Raises:
          UserError: if the directory has a store of another spec or for other writers, or this
            writer is open elsewhere.
        """
        if not 0 <= writer < writers:
            raise UserError(f"writer={writer} of {writers} is impossible; count from 0")
        width = encoding(spec.dtype).width(spec.dim)
        rows = max(1, SHARD_BYTES // width) if shard_rows is None else shard_rows
        if rows < 1:
            raise UserError(f"shard_rows is {rows}; give the rows of a shard, 1 or more")
        folder = Path(directory)
        manifest = Manifest(spec, writers, rows)
        manifest = _write_manifest(folder, manifest, writer, any_size=shard_rows is None)
        return StoreWriter(folder, spec, writer, manifest.shard_rows)

    @classmethod
    def open(cls, directory: str | Path) -> "GradientStore":
        """A store that is complete.

        Raises:
          UserError: if there is none, a writer has not committed, a file is missing or damaged, or
            two rows have one id.
        """
        return cls(directory)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.ids), self.spec.dim

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Float[np.ndarray, "..."]:
        """Rows as float32: one by an integer, several by a slice or an array of integers.

        Raises:
          UserError: if a shard that has some of them is damaged.
          IndexError: if there is no such row.
        """
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._range(start, max(start, stop))
            index = range(start, stop, step)
        wanted = np.asarray(index)
        if not np.issubdtype(wanted.dtype, np.integer) and wanted.size:
            raise IndexError(f"rows are taken by integers, not by {wanted.dtype}")
        found = np.where(wanted < 0, wanted + len(self), wanted).astype(np.int64)
        if ((found < 0) | (found >= len(self))).any():
            raise IndexError(f"the store has rows 0 to {len(self) - 1}")
        rows = self._gather(found.reshape(-1))
        return rows.reshape(*found.shape, self.spec.dim)

    def blocks(self, size: int) -> Iterator[Float[np.ndarray, "N dim"]]:
        """All rows in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def verify(self) -> None:
        """Reads every shard and compares its checksum.

        Raises:
          UserError: naming the first shard that is damaged.
        """
        for shard in self._shards:
            shard.check(self._width)

    @property
    def _width(self) -> int:
        return self._encoding.width(self.spec.dim)

    def _bytes(self, shard: int) -> np.ndarray:
        if shard not in self._checked:
            self._shards[shard].check(self._width)
            self._checked.add(shard)
        return self._shards[shard].bytes(self._width)

    def _range(self, start: int, stop: int) -> np.ndarray:
        rows = np.empty((stop - start, self.spec.dim), np.float32)
        at = start
        while at < stop:
            shard = int(np.searchsorted(self._ends, at, side="right"))
            end = min(stop, int(self._ends[shard]))
            first = int(self._ends[shard]) - len(self._shards[shard].ids)
            packed = self._bytes(shard)[at - first : end - first]
            rows[at - start : end - start] = self._encoding.decode(packed, self.spec.dim)
            at = end
        return rows

    def _gather(self, wanted: np.ndarray) -> np.ndarray:
        rows = np.empty((len(wanted), self.spec.dim), np.float32)
        where = np.searchsorted(self._ends, wanted, side="right")
        for shard in np.unique(where):
            here = where == shard
            first = self._ends[shard] - len(self._shards[shard].ids)
            packed = self._bytes(int(shard))[wanted[here] - first]
            rows[here] = self._encoding.decode(packed, self.spec.dim)
        return rows

    def _committed(self, writer: int) -> list[shards.Shard]:
        path = shards.committed_path(self.directory, writer)
        try:
            content = shards.unsealed(path, shards=int, rows=int)
        except FileNotFoundError:
            raise UserError(
                f"{self.directory}: writer {writer} has not committed. Let it finish and commit."
            ) from None
        found = []
        for index in range(content["shards"]):
            path = shards.shard_path(self.directory, writer, index)
            try:
                found.append(shards.read_shard(path))
            except FileNotFoundError:
                missing = path.with_suffix(".json")
                raise UserError(f"{missing}: is missing. Compute its rows again.") from None
        return found

    def _check_ids(self) -> None:
        if len(set(self.ids)) == len(self.ids):
            return
        place: dict[str | int, Path] = {}
        for shard in self._shards:
            for name in shard.ids:
                if name in place:
                    raise UserError(
                        f"{shard.path}: the id {name!r} is in {place[name]} too. Give every writer "
                        "other examples."
                    )
                place[name] = shard.path


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is fixed when a store is begun."""

    spec: StoreSpec
    writers: int
    shard_rows: int


def _read_manifest(folder: Path) -> Manifest:
    path = folder / shards.MANIFEST
    try:
        if not folder.is_dir():
            raise FileNotFoundError
        content = shards.unsealed(path, spec=dict, writers=int, shard_rows=int)
        return Manifest(StoreSpec(**content["spec"]), content["writers"], content["shard_rows"])
    except FileNotFoundError:
        raise UserError(f"{path}: is missing. Give the folder of a gradient store.") from None
    except TypeError:  # of a field of the spec
        raise shards.damaged(path) from None


def _write_manifest(folder: Path, manifest: Manifest, writer: int, *, any_size: bool) -> Manifest:
    """Writes a manifest unless there is one, and checks that it is the same."""
    path = folder / shards.MANIFEST
    aside = folder / f"{shards.MANIFEST}.{writer:03d}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _create(path, shards.sealed(dataclasses.asdict(manifest)), aside)
        aside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}). Choose another folder."
        ) from error
    there = _read_manifest(folder)
    names = [field.name for field in dataclasses.fields(StoreSpec)]
    check_equal([(f"the store in {folder}", there.spec), ("this spec", manifest.spec)], names)
    fields = ["writers"] if any_size else ["writers", "shard_rows"]
    check_equal([(f"the store in {folder}", there), ("this call", manifest)], fields)
    return there


def _create(path: Path, content: str, aside: Path) -> None:
    """Writes a file that is whole or absent, and never over one of another process."""
    with aside.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(aside, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        aside.replace(path)
    shards.sync(path.parent)
