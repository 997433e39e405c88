"""Checkpoints of a run, each written to a temporary folder, read back and renamed.

A checkpoint holds the whole training state (parameters, optimizer state, random key) and a small
JSON record. If a process is killed while it writes one, the previous one stays valid. On disk:

    <step>/record.json      the record
    <step>/<p>/arrays.bin   the parts of the arrays that process p holds, one after another
    <step>/<p>/index.json   path, dtype and shape of each array; place and CRC-32 of each part
    <step>/checksums.json   checksums of the JSON files

Each part records its place in the array, so a checkpoint can be read on any mesh.
"""

import contextlib
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.artifacts.arrays import check_finite
from jaxlm.artifacts.files import read_json, report_write_errors, to_json, write_atomic
from jaxlm.artifacts.folder import seal, verify
from jaxlm.artifacts.processes import barrier, is_main_process
from jaxlm.core.errors import UserError
from jaxlm.core.paths import Select, merge, split
from jaxlm.train.state import TrainState, free
from jaxlm.typing import Params

_ARRAYS, _INDEX, _RECORD = "arrays.bin", "index.json", "record.json"
_ASIDE = ".tmp"

Keys = tuple[str | int, ...]
"""Keys of dicts, names of fields and indices of lists, from the root of a state to a leaf."""


def copied_bytes(state: Any) -> int:
    """Return the bytes of host memory that saving or restoring needs beside the state itself.

    Only one array at a time is in memory: its parts, and the array assembled from them.
    """
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)]
    return min(sum(sizes), 2 * max(sizes, default=0))


class _Part(NamedTuple):
    """A block of an array in a file: `values[start[0] : start[0] + shape[0], ...]`."""

    file: Path
    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    crc32: int


class _Leaf(NamedTuple):
    """An array of a checkpoint; `key` names the PRNG implementation if it holds random keys."""

    dtype: Any
    shape: tuple[int, ...]
    key: str | None
    parts: dict[Any, _Part]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _path(keys: Any) -> Keys:
    """Return the path of a leaf from its key entries in `jax.tree_util`."""
    names = ("key", "name", "idx")
    return tuple(next(getattr(key, n) for n in names if hasattr(key, n)) for key in keys)


def _held(leaf: Any) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield the start and the values of each part of an array that this process writes."""
    if not isinstance(leaf, jax.Array):
        if is_main_process():
            yield [0] * np.ndim(leaf), np.asarray(leaf)
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            # A separate array, since JAX caches the host copy for as long as the array lives.
            data = shard.data
            alone = jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])
            yield [axis.start or 0 for axis in shard.index], np.asarray(alone)


def _write(folder: Path, state: Any) -> None:
    """Write the parts of a state that this process holds, one at a time."""
    leaves = []
    with (folder / _ARRAYS).open("wb") as file:
        for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
            key = str(jax.random.key_impl(leaf)) if _is_key(leaf) else None
            values = leaf if key is None else jax.random.key_data(leaf)
            parts = []
            for start, part in _held(values):
                # As bytes, since NumPy exports no buffer of bfloat16.
                data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
                place = {"start": start, "shape": part.shape, "offset": file.tell()}
                parts.append(place | {"crc32": zlib.crc32(data)})
                file.write(data)
            kind = {"dtype": str(values.dtype), "shape": values.shape, "key": key}
            leaves.append({"path": _path(keys), **kind, "parts": parts})
        file.flush()
        os.fsync(file.fileno())
    write_atomic(folder / _INDEX, to_json({"leaves": leaves}))


def _read(part: _Part, dtype: Any) -> np.ndarray:
    """Return the values of a part; raise UserError if their checksum differs."""
    values = np.empty(part.shape, dtype)
    data = values.reshape(-1).view(np.uint8).data
    with part.file.open("rb") as file:
        file.seek(part.offset)
        count = file.readinto(data)
    if count < data.nbytes or zlib.crc32(data) != part.crc32:
        raise UserError(f"{part.file}: is damaged (got another checksum). Remove it.")
    return values


def _block(leaf: _Leaf, index: tuple[slice, ...], read: Callable[[_Part], np.ndarray]) -> Any:
    """Return the values of an array at `index`, assembled from the parts that overlap it."""
    spans = [axis.indices(size)[:2] for axis, size in zip(index, leaf.shape, strict=True)]
    place = tuple(start for start, _ in spans), tuple(stop - start for start, stop in spans)
    if place in leaf.parts:
        return read(leaf.parts[place])  # without the copy that an assembled block is
    low, high = np.array(spans, int).reshape(-1, 2).T
    out, filled = np.empty(high - low, leaf.dtype), 0
    for part in leaf.parts.values():
        begin = np.array(part.start, int)
        start, end = np.maximum(low, begin), np.minimum(high, begin + np.array(part.shape, int))
        if (start < end).all():
            target, source = (tuple(map(slice, start - o, end - o)) for o in (low, begin))
            out[target] = read(part)[source]
            filled += math.prod(end - start)
    if filled != out.size:
        raise ValueError("a part of an array is missing")
    return out


class _Misfit(UserError):
    """A sound checkpoint is of another run."""


class _Stored:
    """The arrays of one checkpoint; its JSON files are verified when it is opened."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.leaves: dict[Keys, _Leaf] = {}
        verify(folder)
        self.record = read_json(folder / _RECORD)
        for index in sorted(folder.glob(f"*/{_INDEX}")):
            for leaf in read_json(index, leaves=list)["leaves"]:
                new = _Leaf(jnp.dtype(leaf["dtype"]), tuple(leaf["shape"]), leaf["key"], {})
                known = self.leaves.setdefault(tuple(leaf["path"]), new)
                for part in leaf["parts"]:
                    place = tuple(part["start"]), tuple(part["shape"])
                    new_part = _Part(index.parent / _ARRAYS, *place, part["offset"], part["crc32"])
                    known.parts.setdefault(place, new_part)

    def _reader(self, path: Keys) -> Callable[[_Part], np.ndarray]:
        """Return a function that reads each part once and refuses non-finite parameters."""
        found: dict[_Part, np.ndarray] = {}

        def read(part: _Part) -> np.ndarray:
            if part not in found:
                found[part] = _read(part, self.leaves[path].dtype)
                if path[0] == "params":
                    check_finite(found[part], ".".join(map(str, path[1:])), part.file)
            return found[part]

        return read

    def placed(self, path: Keys, like: jax.ShapeDtypeStruct) -> Any:
        """Return an array sharded like `like`, which for random keys describes their data."""
        leaf = self.leaves.get(path)
        if leaf is None or (leaf.shape, leaf.dtype) != (like.shape, like.dtype):
            stored = "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
            raise _Misfit(
                f"{self.folder}: does not fit, since {'.'.join(map(str, path))} must be "
                f"{like.dtype}{list(like.shape)} (got {stored}). Choose another output."
            )
        read = self._reader(path)
        sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        # Copies, since a buffer that aliases a NumPy array cannot be donated to the first step.
        places = sharding.addressable_devices_indices_map(leaf.shape)
        arrays = [
            jax.device_put(_block(leaf, index or (), read), device, may_alias=False)
            for device, index in places.items()
        ]
        made = jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)
        made.block_until_ready()  # so that the host copy is freed before the next array is read
        return made if leaf.key is None else jax.random.wrap_key_data(made, impl=leaf.key)

    def tree(self, names: tuple[str, ...]) -> Any:
        """Return the arrays under some names, all if none is given, as nested dicts and lists."""
        root: dict[Any, Any] = {}
        for path, leaf in self.leaves.items():
            if not names or path[0] in names:
                node = root
                for key in path[:-1]:
                    node = node.setdefault(key, {})
                everywhere = (slice(None),) * len(leaf.shape)
                node[path[-1]] = _block(leaf, everywhere, self._reader(path))
        return _with_lists(root)


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    values = {key: _with_lists(value) for key, value in node.items()}
    is_list = isinstance(next(iter(values), ""), int)
    return [values[i] for i in sorted(values)] if is_list else values


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, leaf)
        place = jax.random.key_data(leaf).sharding if isinstance(leaf, jax.Array) else None
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=place)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


class Checkpoints:
    """The checkpoints in one folder, named by their step.

    Attributes:
        folder: the folder.
        select: parameters that a checkpoint holds, see `jaxlm.core.paths.path_predicate`; None for
            all. The others must equal those at the start of the run.
        keep_every: checkpoints at multiples of this number of steps are never removed; None keeps
            only the best and the latest.
        read_only: create and remove nothing, since another process may be writing there.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        select: Select = None,
        keep_every: int | None = None,
        read_only: bool = False,
    ):
        self.folder = Path(folder).absolute()
        self.select = select
        self.keep_every = keep_every
        self.read_only = read_only
        if not read_only and is_main_process():
            with report_write_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            for aside in self.folder.glob(f"*{_ASIDE}"):
                shutil.rmtree(aside, ignore_errors=True)

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, in ascending order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, read it back, and remove those no longer needed.

        Every process must call it. `record["best_step"]`, if given, is the step of the checkpoint
        to keep beside this one. If this one cannot be written, the previous one is kept.
        """
        place = self.folder / str(step)
        aside = self.folder / f"{step}{_ASIDE}"
        state = self._divide(state)[0]
        try:
            with report_write_errors(place):
                own = aside / str(jax.process_index())
                own.mkdir(parents=True, exist_ok=True)
                _write(own, state)
                barrier(f"{aside} is written")
                if is_main_process():
                    write_atomic(aside / _RECORD, to_json(record))
                    seal(aside, "*.json")
                barrier(f"{aside} is sealed")
                for leaf in _Stored(aside).leaves.values():
                    for part in leaf.parts.values():
                        if part.file.parent == own:
                            _read(part, leaf.dtype)
                barrier(f"{aside} is read")
                if is_main_process():
                    self._remove(step)
                    aside.rename(place)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        if is_main_process():
            self._keep(step, record)
        barrier(f"{place} is there")

    def _keep(self, step: int, record: dict[str, Any]) -> None:
        """Remove all checkpoints except that of `step`, the best, and those of `keep_every`."""
        for old in self.steps():
            kept = old and self.keep_every and old % self.keep_every == 0
            if not kept and old not in (step, record.get("best_step")):
                self._remove(old)

    def _divide(self, state: Any) -> tuple[Any, Params | None]:
        """Return the part of a state that a checkpoint holds, and the other parameters."""
        if self.select is None:
            return state, None
        held, rest = split(state.params, self.select)
        return state._replace(params=held), rest

    def size(self, step: int) -> int:
        """Return the size in bytes of the arrays in the checkpoint of `step`."""
        return sum(path.stat().st_size for path in (self.folder / str(step)).glob(f"*/{_ARRAYS}"))

    def _remove(self, step: int) -> None:
        """Remove a checkpoint; it is renamed first, so that a half-removed one is never read."""
        place, aside = self.folder / str(step), self.folder / f"{step}.old{_ASIDE}"
        with contextlib.suppress(FileNotFoundError):
            place.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def restore(
        self, like: Any, step: int | None = None, *, donate: bool = False
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Return (step, state, record) in the structure, dtypes and shardings of `like`, or None.

        Parameters that are not selected are taken from `like`, whose arrays may be
        `jax.ShapeDtypeStruct`s. With `donate`, those that are replaced are deleted before reading.
        """
        step = self.latest_step if step is None else step
        if step is None:
            return None
        held, rest = self._divide(like)
        with self._reading(step) as stored:
            shapes = jax.tree.map(_shape, held)
            if donate:
                free(held)
            state = jax.tree_util.tree_map_with_path(
                lambda keys, leaf: stored.placed(_path(keys), leaf), shapes
            )
        if not self.read_only and is_main_process() and step == self.latest_step:
            # A killed process may have left checkpoints that it was about to remove.
            self._keep(step, stored.record)
        if rest is not None:
            state = state._replace(params=merge(state.params, rest))
        return step, state, stored.record

    def in_place_of(self, state: TrainState, step: int) -> Params:
        """Return the parameters of a checkpoint; the arrays of `state` are deleted first."""
        like = TrainState(state.params, ())
        free(state.opt_state)
        result = self.restore(like, step, donate=True)
        assert result is not None
        return result[1].params

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[_Stored]:
        place = self.folder / str(step)
        advice = "Remove the run's folder to start again."
        if older := [other for other in self.steps() if other < step]:
            advice = f"Remove {place} to resume from step {older[-1]}."
        try:
            yield _Stored(place)
        except _Misfit:
            raise
        except UserError as error:
            raise UserError(f"{str(error).rpartition('. ')[0]}. {advice}") from error
        except (ValueError, KeyError, TypeError, IndexError, OverflowError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{place}: this checkpoint cannot be read ({reason}). {advice}"
            ) from error

    def read(self, step: int, *names: str) -> Any:
        """Return the named parts of a state, or all, as plain dicts and lists of NumPy arrays.

        The devices of the run need not be present.
        """
        with self._reading(step) as stored:
            return stored.tree(names)

    def best_step(self) -> int | None:
        """Return the step of the best checkpoint, or of the latest if none is marked best."""
        return self._best(lambda step: step)

    def best_params(self) -> Any | None:
        """Return the parameters at `best_step`, see `read`; None if there is no checkpoint."""
        return self._best(lambda step: self.read(step, "params")["params"])

    def _best(self, get: Callable[[int], Any]) -> Any | None:
        while (latest := self.latest_step) is not None:
            try:
                with self._reading(latest) as stored:
                    best = stored.record.get("best_step")
                return get(latest if best is None else best)
            except UserError:
                if latest == self.latest_step:  # otherwise a running process has replaced it
                    raise
        return None
