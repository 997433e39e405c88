"""One program in several processes: which of them writes, where they meet, what all of them see.

Every process runs the same program. Without `jax.distributed` there is one, and nothing is done
here.
"""

from typing import Any

import jax
import numpy as np


def distributed() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes what all have in common: files, the log, tables.

    >>> is_first()
    True
    """
    return not distributed() or jax.process_index() == 0


def meet(name: str) -> None:
    """Waits until every process is here.

    Args:
      name: of the place, the same in all.
    """
    if distributed():
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(name)


def to_host(x: Any) -> np.ndarray:
    """An array in the memory of this process, whichever devices of the program it lies on.

    A part of it may lie on devices of other processes; all of them then call this.

    >>> to_host(jax.numpy.ones(2))
    array([1., 1.], dtype=float32)
    """
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental.multihost_utils import process_allgather

        return process_allgather(x, tiled=True)
    return np.asarray(x)
