"""Kernels on disk: computed once, block by block, and used again only for what they are of.

A folder has

    manifest.json         what the kernel is of
    kernel.safetensors    the kernel, once it is complete
    checksums.json        of both
    blocks/I-J.safetensors    the blocks that are finished, until then

Every file is written under another name and renamed, so a computation that was killed goes on after
the last finished block. A block has a checksum of itself, since one that is damaged is computed
again.
"""

import dataclasses
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
from jaxlm.artifacts.folder import CHECKSUMS, seal, short, verify
from jaxlm.artifacts.processes import barrier, is_main_process, to_host
from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.core.programs import held
from jaxlm.kernels import _ntk, gram
from jaxlm.kernels.arguments import features_of

KERNEL, MANIFEST, BLOCKS = "kernel.safetensors", "manifest.json", "blocks"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a kernel is of. Two kernels with the same manifest are equal up to rounding.

    Attributes:
      model: fingerprint of the parameters.
      template: what the caller says of f: the prompt, the label words. f itself has no fingerprint.
      examples1, examples2: fingerprints of x1 and x2.
      dtype: of the kernel.
      kind, axes, sign_threshold: see `ntk`; the threshold as it was used.
      select: fingerprint of the selected paths.
      adam: fingerprint of Adam's moments and constants, or None.
    """

    model: str
    template: str
    examples1: str
    examples2: str
    dtype: str
    kind: str
    axes: str
    sign_threshold: float | None
    select: str
    adam: str | None


def describe(
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    template: str = "",
    kind: str = "sgd",
    trace_axes: Sequence[int] = (),
    diagonal_axes: Sequence[int] = (),
    select: paths.Select = None,
    sign_threshold: float | int | None = None,
    adam_state: Any = None,
    b1: float | int = 0.9,
    b2: float | int = 0.999,
    eps: float | int = 1e-8,
) -> Manifest:
    """The manifest of the kernel that `ntk` computes from these arguments.

    Args:
      template: a text that stands for f: a kernel under another text is refused.
      params, x1, x2, kind, trace_axes, diagonal_axes, select, sign_threshold, adam_state, b1, b2,
        eps: of `ntk`.
    """
    params = held(describe, params)[1]
    features = features_of(kind, params, select, sign_threshold, adam_state, b1, b2, eps)
    chosen = paths.flatten(paths.split(params, select)[0])[0]
    dtype = gram.wide(jnp.result_type(*(leaf.value for leaf in chosen)))
    signed = kind in ("signgd", "asymmetric_signgd")
    threshold = gram.threshold_of(dtype) if sign_threshold is None else float(sign_threshold)
    names = [f"{leaf.path}[{leaf.layer}]" for leaf in chosen]
    moments = features.moments
    return Manifest(
        model=fingerprint(params),
        template=template,
        examples1=fingerprint(x1),
        examples2=fingerprint(x1 if x2 is None else x2),
        dtype=str(np.dtype(dtype)),
        kind=kind,
        axes=gram.axes(trace_axes, diagonal_axes),
        sign_threshold=threshold if signed else None,
        select=hashlib.sha256("\n".join(names).encode()).hexdigest(),
        adam=None
        if moments is None
        else fingerprint((moments, moments.b1, moments.b2, moments.eps)),
    )


def save_kernel(directory: str | Path, kernel: Any, manifest: Manifest) -> None:
    """Writes a kernel and what it is of.

    Args:
      directory: made if missing.
      kernel: any shape.
      manifest: of `describe`.

    Raises:
      UserError: if the directory has the kernel of something else, or the kernel is not finite.
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


def load_kernel(directory: str | Path, manifest: Manifest | None = None) -> Array:
    """Reads a kernel.

    Args:
      directory: of `save_kernel` or `saved_ntk`.
      manifest: what the kernel must be of, from `describe`; None for whatever is there.

    Returns:
      The kernel, in the dtype of its manifest (float64 only where JAX allows it).

    Raises:
      UserError: if there is no complete kernel, a file is damaged, or it is the kernel of something
        else; the message says what differs.
    """
    folder = Path(directory)
    if not (folder / KERNEL).exists():
        raise UserError(f"{folder}: has no complete kernel. Compute one with saved_ntk.")
    read_manifest(folder)
    verify(folder)
    if manifest is not None:
        _check(folder, manifest)
    found = _read(folder / KERNEL)
    if found is None:
        raise UserError(f"{folder / KERNEL}: is damaged. Remove the folder and compute it again.")
    return jnp.asarray(found)


def read_manifest(directory: str | Path) -> Manifest:
    """What the kernel in a directory is of.

    Raises:
      UserError: if the file is missing or is no manifest.
    """
    content = _read_manifest(Path(directory) / MANIFEST)
    return Manifest(**{field.name: content[field.name] for field in dataclasses.fields(Manifest)})


def _read_manifest(path: Path, **more: type) -> dict[str, Any]:
    kinds = {field.name: str for field in dataclasses.fields(Manifest)}
    optional: dict[str, Any] = {"sign_threshold": (float, type(None)), "adam": (str, type(None))}
    try:
        return read_json(path, **{**kinds, **optional, **more})
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a kernel is not used without it") from None
    except UserError as error:
        if isinstance(error.__context__, OSError):  # not allowed to read it, for example
            raise
        raise UserError(
            f"{path}: is not the manifest of a kernel. Remove the folder and compute it again."
        ) from None


def saved_ntk(
    directory: str | Path,
    f: Callable[..., Array],
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    template: str,
    method: str = "auto",
    block_size: int | None = None,
    mesh: Any = None,
    check: bool = True,
    **options: Any,
) -> Array:
    """`ntk` of what lies in a directory, or computed and written there block by block.

    A computation that was killed goes on after its last finished block and gives the same numbers.

    Args:
      directory: made if missing.
      f, params, x1, x2: of `ntk`.
      template: a text that stands for f, see `describe`.
      method, block_size, mesh, check, **options: of `ntk`. Blocks are those of `block_size`, so the
        work between two files is that of one block.

    Returns:
      The kernel.

    Raises:
      UserError: as `ntk` and `load_kernel`; if the blocks there are of another size.
    """
    folder = Path(directory)
    manifest = describe(params, x1, x2, template=template, **options)
    _check(folder, manifest)
    if (folder / KERNEL).exists() and (folder / CHECKSUMS).exists():
        return load_kernel(folder)
    if method == "projected":
        raise UserError("method='projected' has no blocks to save; give its kernel to save_kernel")
    work = _ntk.prepare(
        f, params, x1, x2, method=method, block_size=block_size, mesh=mesh, check=check, **options
    )
    _write_manifest(folder, manifest, sizes=list(work.sizes), method=work.method)
    (folder / BLOCKS).mkdir(exist_ok=True)
    finished = {}
    for i, j in work.pairs():
        path = folder / BLOCKS / f"{i}-{j}.safetensors"
        block = _read(path) if path.exists() else None
        if block is None:
            block = to_host(work.compute(i, j))
            if check:
                _ntk.check_kernel(work, block)
            _write(path, block)
        finished[i, j] = block
    kernel = work.join(finished)
    _complete(folder, to_host(kernel))
    return kernel


def _complete(folder: Path, kernel: np.ndarray) -> None:
    """Writes the kernel, and what says that it is whole."""
    _write(folder / KERNEL, kernel)
    if is_main_process():
        shutil.rmtree(folder / BLOCKS, ignore_errors=True)
        with report_write_errors(folder):
            seal(folder)
    barrier(str(folder / CHECKSUMS))


def _check(folder: Path, manifest: Manifest) -> None:
    """Raises UserError if the folder has a manifest of something else."""
    if not (folder / MANIFEST).exists() and not (folder / KERNEL).exists():
        return
    there = dataclasses.asdict(read_manifest(folder))
    for name, here in dataclasses.asdict(manifest).items():
        if there[name] != here:
            both = f"{short(there[name])} there, {short(here)} here"
            raise UserError(
                f"{folder}: has the kernel of another {WORDS.get(name, name)} ({both}). Give the "
                "same, or another folder."
            )


WORDS = {
    "examples1": "x1",
    "examples2": "x2",
    "sign_threshold": "sign threshold",
    "select": "selection of parameters",
    "adam": "state of Adam",
}


def _write_manifest(folder: Path, manifest: Manifest, **more: Any) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}). Choose another folder."
        ) from error
    path = folder / MANIFEST
    if more and path.exists():
        sizes = _read_manifest(path).get("sizes", more["sizes"])
        if sizes != more["sizes"]:
            there, here = (" by ".join(map(str, each)) for each in (sizes, more["sizes"]))
            raise UserError(
                f"{folder}: has blocks of {there} examples (got {here}). Give the same block_size "
                "and mesh."
            )
    if is_main_process():  # what is being written is not complete
        (folder / CHECKSUMS).unlink(missing_ok=True)
    write_json(path, {**dataclasses.asdict(manifest), **more})


def _write(path: Path, value: np.ndarray) -> None:
    from safetensors.numpy import save

    value = np.ascontiguousarray(value)
    with report_write_errors(path):
        write_shared(path, save({"kernel": value}, {"crc32": str(zlib.crc32(value.data))}))


def _read(path: Path) -> np.ndarray | None:
    """The array of a file, or None where it cannot be read or differs from its checksum."""
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
