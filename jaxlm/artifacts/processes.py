"""One program in several processes: which one writes, where they wait, what all of them see.

Every process runs the same program. Without `jax.distributed` there is one process, and these
functions do nothing.
"""

from typing import Any

import jax
import numpy as np


def distributed() -> bool:
    """Return whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main_process() -> bool:
    """Return whether this process writes what all share: files, the log, tables."""
    return not distributed() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has called this with the same name."""
    if distributed():
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(name)


def to_host(x: Any) -> np.ndarray:
    """Return an array in the memory of this process, whichever devices it lies on.

    All processes must call it for an array that has shards on devices of other processes.
    """
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental.multihost_utils import process_allgather

        return process_allgather(x, tiled=True)
    return np.asarray(x)
