"""Arrays on disk: files of them, fingerprints that tell two trees apart, finite numbers."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.artifacts.files import report_write_errors, write_shared
from jaxlm.artifacts.processes import to_host
from jaxlm.core.errors import UserError


def fingerprint(tree: Any) -> str:
    """Return the SHA-256 of the paths, dtypes, shapes and bytes of a pytree of arrays, in hex."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        value = to_host(leaf)
        name = f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape};"
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def all_finite(values: np.ndarray) -> bool:
    """Return whether no number is infinite or NaN; integers are always finite."""
    return not jnp.issubdtype(values.dtype, jnp.inexact) or bool(np.isfinite(values).all())


def check_finite(values: np.ndarray, name: str, where: object) -> None:
    """Raise UserError if the tensor `name`, read from `where`, has an infinite number or a NaN."""
    if not all_finite(values):
        first = values.flat[int(np.argmin(np.isfinite(values)))]
        raise UserError(
            f"{where}: {name} holds numbers that are not finite (got {first}). Use other weights: "
            "these are damaged, or come from a run that diverged."
        )


def check_tree_finite(tree: Any, where: object) -> None:
    """Apply `check_finite` to every leaf of a pytree of arrays, sharded or not."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        shards = leaf.addressable_shards if isinstance(leaf, jax.Array) else ()
        for part in [shard.data for shard in shards] or [np.asarray(leaf)]:
            # Test on the device, so that only a faulty shard is copied to the host.
            if jnp.issubdtype(part.dtype, jnp.inexact) and not jnp.isfinite(part).all():
                check_finite(np.asarray(part), name, where)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a safetensors file that all processes share, with their `fingerprint`."""
    from safetensors.numpy import save

    # safetensors writes the memory of an array, whatever its strides.
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    with report_write_errors(path):
        write_shared(path, save(arrays, {"sha256": fingerprint(arrays)}))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read what `write_arrays` wrote; raise UserError if a byte of it has changed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if (file.metadata() or {}).get("sha256") == fingerprint(arrays):
                return arrays
    except (SafetensorError, OSError):
        pass
    raise UserError(f"{path}: is damaged (got another checksum). Remove it, and start again.")
