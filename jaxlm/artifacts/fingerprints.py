"""SHA-256 of trees of arrays: two stores or kernels are of the same parameters, or they are not."""

import hashlib
from typing import Any

import jax
import numpy as np

from jaxlm.artifacts.processes import to_host


def fingerprint(tree: Any) -> str:
    """SHA-256 of the paths, dtypes, shapes and bytes of a pytree of arrays, as hexadecimal digits.

    >>> fingerprint({"a": np.zeros(2)}) == fingerprint({"b": np.zeros(2)})
    False
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        value = to_host(leaf)
        name = f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape};"
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def short(value: Any) -> str:
    """A value for a message; of a fingerprint its first eight digits."""
    is_hash = isinstance(value, str) and len(value) == 64 and " " not in value
    return value[:8] if is_hash else repr(value)
