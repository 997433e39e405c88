"""Kernels on disk: computed once, block by block, and reused only for the same inputs.

The files of a folder:

    manifest.json             what the kernel was computed from, see `describe`
    kernel.safetensors        the kernel, once it is complete
    checksums.json            of both
    blocks/I-J.safetensors    until then, the finished blocks

Every file is written under another name and renamed, so a computation that was killed resumes after
the last finished block. A block carries its own checksum: one that is damaged is computed again.
"""

import hashlib
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlm.artifacts.arrays import fingerprint
from jaxlm.artifacts.files import read_json, report_write_errors, write_json, write_shared
from jaxlm.artifacts.folder import CHECKSUMS, check_inputs, seal, verify
from jaxlm.artifacts.processes import barrier, is_main_process, to_host
from jaxlm.core import paths
from jaxlm.core.dtypes import wide_dtype
from jaxlm.core.errors import UserError
from jaxlm.core.programs import held
from jaxlm.kernels.blocks import KernelOptions
from jaxlm.kernels.contraction import KernelSpec, kernel_spec
from jaxlm.kernels.empirical import DEFAULT, check_kernel, prepare
from jaxlm.kernels.kinds import Adam, Kind

KERNEL, MANIFEST, BLOCKS = "kernel.safetensors", "manifest.json", "blocks"

_TEXTS = ("model", "template", "examples1", "examples2", "dtype", "kind", "axes", "select")
_FIELDS: dict[str, Any] = {
    **dict.fromkeys(_TEXTS, str),
    "sign_threshold": (float, type(None)),
    "adam": (str, type(None)),
}


def describe(
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    template: str = "",
    kind: str | Kind = "sgd",
    trace_axes: Sequence[int] = (),
    diagonal_axes: Sequence[int] = (),
    select: paths.Select = None,
) -> dict[str, Any]:
    """Return the manifest of the kernel that `ntk` computes from these arguments.

    Two kernels with the same manifest are equal up to rounding.

    Args:
      template: a text that identifies f, such as its prompt and label words, since a function has
        no fingerprint.
      params, x1, x2, kind, trace_axes, diagonal_axes, select: see `ntk`.

    Returns:
      `model`, `examples1`, `examples2`, `select` and `adam`: fingerprints of the parameters, the
      examples, the selected paths, and Adam's variant, moments and constants (or None);
      `template`, `dtype`, `kind` and `axes`; and `sign_threshold`, as it is used.
    """
    params = held(describe, params)[1]
    spec = kernel_spec(params, kind, trace_axes, diagonal_axes, select)
    return _describe(params, x1, x2, spec, template)


def _describe(params, x1, x2, spec: KernelSpec, template: str) -> dict[str, Any]:
    leaves, kind = spec.leaves(params), spec.kind
    names = "\n".join(f"{leaf.path}[{leaf.layer}]" for leaf in leaves)
    adam = None
    if isinstance(kind, Adam):
        adam = f"{kind.variant} {fingerprint((kind.state, kind.b1, kind.b2, kind.eps))}"
    return {
        "model": fingerprint(params),
        "template": template,
        "examples1": fingerprint(x1),
        "examples2": fingerprint(x1 if x2 is None else x2),
        "dtype": str(wide_dtype(jnp.result_type(*(leaf.value for leaf in leaves)))),
        "kind": kind.name,
        "axes": spec.over,
        "sign_threshold": kind.threshold,
        "select": hashlib.sha256(names.encode()).hexdigest(),
        "adam": adam,
    }


def save_kernel(directory: str | Path, kernel: Any, manifest: dict[str, Any]) -> None:
    """Write a kernel that was computed elsewhere, and what it was computed from.

    Args:
      directory: created if missing.
      kernel: any shape.
      manifest: from `describe`.

    Raises:
      UserError: if the directory holds the kernel of other inputs, or the kernel is not finite.
    """
    folder = Path(directory)
    value = to_host(kernel)
    if not np.isfinite(value).all():
        at = np.argwhere(~np.isfinite(value))[0].tolist()
        raise UserError(
            f"kernel: not finite (got {value[tuple(at)]} at {at}). Look at the gradients of those "
            "examples, or compute it in float32."
        )
    _check(folder, manifest)
    _write_manifest(folder, manifest)
    _complete(folder, value)


def load_kernel(directory: str | Path, manifest: dict[str, Any] | None = None) -> Array:
    """Read a kernel.

    Args:
      directory: written by `save_kernel` or `saved_ntk`.
      manifest: the manifest that the kernel must have, from `describe`; None accepts any.

    Returns:
      The kernel, in the dtype of its manifest (float64 only where JAX allows it).

    Raises:
      UserError: if there is no complete kernel, a file is damaged, or the manifest differs; the
        message names the difference.
    """
    from safetensors.numpy import load_file

    folder = Path(directory)
    if not (folder / KERNEL).exists():
        raise UserError(f"{folder}: has no complete kernel. Compute one with saved_ntk.")
    read_manifest(folder)
    verify(folder)
    if manifest is not None:
        _check(folder, manifest)
    return jnp.asarray(load_file(folder / KERNEL)["kernel"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what the kernel in a folder was computed from, and how."""
    path = folder / MANIFEST
    try:
        return read_json(path, **_FIELDS)
    except FileNotFoundError:
        raise UserError(
            f"{path}: is missing, so the inputs of the kernel are unknown. Remove the folder and "
            "compute it again."
        ) from None


def saved_ntk(
    directory: str | Path,
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    template: str,
    kind: str | Kind = "sgd",
    method: str = "auto",
    trace_axes: Sequence[int] = (),
    diagonal_axes: Sequence[int] = (),
    select: paths.Select = None,
    options: KernelOptions = DEFAULT,
) -> Array:
    """Return `ntk` from a directory, or compute it and write it there block by block.

    A computation that was killed resumes after its last finished block and gives the same numbers.

    Args:
      directory: created if missing.
      f, params, x1, x2, kind, method, trace_axes, diagonal_axes, select: see `ntk`.
      template: a text that identifies f, see `describe`.
      options: see `ntk`. Its `block_size` sets how much work is lost when the process is killed.

    Raises:
      UserError: as `ntk` and `load_kernel`; if the blocks in the directory have another size.
    """
    folder = Path(directory)
    f, params = held(f, params)
    spec = kernel_spec(params, kind, trace_axes, diagonal_axes, select)
    manifest = _describe(params, x1, x2, spec, template)
    _check(folder, manifest)
    if (folder / KERNEL).exists() and (folder / CHECKSUMS).exists():
        return load_kernel(folder)
    if method == "projected":
        raise UserError(
            "method: computes no blocks to save (got 'projected'). Give the kernel to save_kernel."
        )
    work = prepare(f, params, x1, x2, spec, method, options)
    _write_manifest(folder, manifest, sizes=list(work.sizes), method=work.method)
    (folder / BLOCKS).mkdir(exist_ok=True)
    finished = {}
    for i, j in work.pairs():
        path = folder / BLOCKS / f"{i}-{j}.safetensors"
        block = _read(path) if path.exists() else None
        if block is None:
            block = to_host(work.compute(i, j))
            if options.check:
                check_kernel(work, block)
            _write(path, block)
        finished[i, j] = block
    kernel = work.join(finished)
    _complete(folder, to_host(kernel))
    return kernel


def _complete(folder: Path, kernel: np.ndarray) -> None:
    """Write the kernel, and then the checksums, which say that it is complete."""
    _write(folder / KERNEL, kernel)
    if is_main_process():
        shutil.rmtree(folder / BLOCKS, ignore_errors=True)
        with report_write_errors(folder):
            seal(folder)
    barrier(str(folder / CHECKSUMS))


def _check(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise UserError if the folder holds the kernel of other inputs."""
    if (folder / MANIFEST).exists() or (folder / KERNEL).exists():
        there = read_manifest(folder)
        check_inputs(folder, {name: there[name] for name in _FIELDS}, manifest)


def _write_manifest(folder: Path, manifest: dict[str, Any], **computed: Any) -> None:
    with report_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if computed and (folder / MANIFEST).exists():
        sizes = read_manifest(folder).get("sizes", computed["sizes"])
        if sizes != computed["sizes"]:
            raise UserError(
                f"options: {folder} has blocks of {sizes} examples (got {computed['sizes']}). Give "
                "the same block_size and mesh."
            )
    if is_main_process():  # Until the new kernel is complete, the folder has no checksums.
        (folder / CHECKSUMS).unlink(missing_ok=True)
    write_json(folder / MANIFEST, {**manifest, **computed})


def _write(path: Path, value: np.ndarray) -> None:
    from safetensors.numpy import save

    value = np.ascontiguousarray(value)
    with report_write_errors(path):
        write_shared(path, save({"kernel": value}, {"crc32": str(zlib.crc32(value.data))}))


def _read(path: Path) -> np.ndarray | None:
    """Return the array of a file, or None if it cannot be read or differs from its checksum."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            value, checksum = file.get_tensor("kernel"), (file.metadata() or {})["crc32"]
    except (SafetensorError, KeyError, TypeError):
        return None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error}). Give a file that you may read."
        ) from None
    return value if str(zlib.crc32(np.ascontiguousarray(value).data)) == checksum else None
