"""Checkpoints of a run: the latest and the best, written aside and renamed, by orbax.

A checkpoint holds the whole training state (parameters, optimizer state, random key) and a small
JSON record. A process killed while it writes one leaves the former one in force.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxlm.core.errors import UserError
from jaxlm.artifacts.files import writing
from jaxlm.train.state import free

_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")
AT_ONCE = 2**27
"""Bytes that are copied at a time, where no array asks for more."""


def copied_bytes(state: Any) -> int:
    """Bytes of the host that a checkpoint takes beside `state` itself while it is written or read.

    An array that is read is there twice before it is where it belongs.

    Args:
        state: pytree of arrays, or of their shapes.
    """
    sizes = _sizes(state)
    return min(sum(sizes), max(AT_ONCE, 2 * max(sizes, default=0)))


def _sizes(state: Any) -> list[int]:
    return [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)]


def _at_once(state: Any) -> int:
    """Bytes to copy at a time: more than the largest array has."""
    return max(AT_ONCE, max(_sizes(state), default=0) + 1)


def _handler(at_once: int) -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(
        save_device_host_concurrent_gb=at_once / 1e9,
        restore_concurrent_gb=at_once / 1e9,
        use_compression=False,
    )


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """What the operating system refuses is an `OSError`, and its traceback is not printed."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except ValueError as error:  # from TensorStore
        code = _SYSTEM_ERROR.search(str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
    finally:
        log.setLevel(level)


def _wanted(like: Any, **options: Any) -> Any:
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    places = ocp.checkpoint_utils.construct_restore_args(like)
    return ocp.args.PyTreeRestore(item=like, restore_args=places, **options)


def _views(state: Any) -> Any:
    """The same arrays anew: what writers remember of an array would keep its memory."""

    def again(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        shards = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

    return jax.tree.map(again, state)


class Checkpoints:
    """The checkpoints in one folder, named by their step.

    Attributes:
        folder: where they are; `read_only` leaves what another process is writing there alone.
    """

    def __init__(self, folder: Path | str, *, read_only: bool = False):
        self.folder = Path(folder).absolute()
        self._options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            enable_async_checkpointing=False,
            lightweight_initialize=True,
            save_root_metadata=False,
        )
        self._manage(AT_ONCE)

    def _manage(self, at_once: int) -> None:
        handlers = {"state": _handler(at_once), "record": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            self.folder, options=self._options, item_handlers=handlers
        )
        self._at_once = at_once

    def _allow(self, state: Any) -> None:
        """Lets as much of a state be copied at a time as its largest array asks for."""
        if _at_once(state) > self._at_once:
            self._manager.close()
            self._manage(_at_once(state))

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Writes the checkpoint of `step`, then removes all others but the best.

        Args:
            step: number of updates done.
            state: pytree of arrays.
            record: JSON values; `record["best_step"]`, where given, names the checkpoint to keep
                beside this one.

        Raises:
            UserError: it cannot be written; the former one is kept.
        """
        self._allow(state)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_views(state)), record=ocp.args.JsonSave(record)
        )
        with writing(self.folder / str(step)), _system_errors():
            self._manager.save(step, args=args, force=True)
        for old in list(self._manager.all_steps()):
            if old not in (step, record.get("best_step")):
                self._manager.delete(old)

    def restore(
        self, like: Any, step: int | None = None, *, donate: bool = False
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Reads the checkpoint of `step` (None: the latest) into a tree shaped as `like`.

        Args:
            like: pytree of arrays.
            step: of the checkpoint.
            donate: whether to give back the memory of `like` before, where there is a checkpoint.

        Returns:
            (step, state, record), or None where there is no checkpoint.

        Raises:
            UserError: the checkpoint does not fit `like`, or its files are damaged.
        """
        step = self.latest_step if step is None else step
        if step is None:
            return None
        self._allow(like)
        wanted = _wanted(like)
        if donate:
            free(like)
        found = self._read(step, state=wanted, record=ocp.args.JsonRestore())
        return step, found["state"], found["record"]

    def restore_params(self, like: Any, step: int) -> Any:
        """Reads the parameters alone of a checkpoint's state, where and shaped as `like`.

        Args:
            like: `jax.ShapeDtypeStruct`s with shardings, so that no others need be there.
            step: of the checkpoint.

        Raises:
            UserError: the checkpoint does not fit `like`, or its files are damaged.
        """
        with self._reading(step), ocp.Checkpointer(_handler(_at_once(like))) as reader:
            args = _wanted({"params": like}, partial_restore=True)
            return reader.restore(self.folder / str(step) / "state", args=args)["params"]

    def _read(self, step: int, **items: Any) -> Any:
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(
                f"{self.folder / str(step)}: this checkpoint cannot be read "
                f"({str(error).splitlines()[0]}): remove the run's folder to start again."
            ) from error

    def steps(self) -> list[int]:
        """The steps of all checkpoints."""
        return list(self._manager.all_steps())

    def read(self, step: int, *names: str) -> Any:
        """The state of one checkpoint as plain dicts and lists of NumPy arrays.

        Whatever devices it was on: none of them need be here.

        Args:
            step: of the checkpoint.
            names: of the state's parts to read; all of them where none is given.
        """
        folder = self.folder / str(step) / "state"
        with self._reading(step), ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(folder).item_metadata.tree
            wanted = {name: tree[name] for name in names} if names else tree
            host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            args = ocp.args.PyTreeRestore(
                item=wanted, restore_args=host, partial_restore=bool(names)
            )
            return reader.restore(folder, args=args)

    def best_params(self) -> Any | None:
        """Those of the best checkpoint, or of the latest where none is called so; see `read`."""
        if self.latest_step is None:
            return None
        record = self._read(self.latest_step, record=ocp.args.JsonRestore())["record"]
        step = record.get("best_step")
        return self.read(self.latest_step if step is None else step, "params")["params"]

    def close(self) -> None:
        """Frees the threads of the manager."""
        self._manager.close()
