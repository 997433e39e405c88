"""Gradient features of rows at one checkpoint, written into a store that can be resumed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxlm.artifacts.arrays import fingerprint
from jaxlm.artifacts.files import (
    append_jsonl,
    read_jsonl,
    report_write_errors,
    to_jsonl,
    write_atomic,
)
from jaxlm.artifacts.processes import barrier, to_host
from jaxlm.core import paths
from jaxlm.core.checks import seeds, whole
from jaxlm.data.rows import PaddedRows, digest
from jaxlm.influence import (
    Adam,
    GradientStore,
    StoreSpec,
    features_with_info,
    projection_name,
    projector,
)
from jaxlm.models.adapters import LORA
from jaxlm.sharding import make_mesh, mesh_of
from jaxlm.studies.less_rows import Rows
from jaxlm.studies.less_training import Epoch, Recipe
from jaxlm.train.settings import MOST_ROWS

BLOCK = 64
"""Number of rows written at a time."""

MOST_NUMBERS = 2**24
"""Longest row of a store, far above what a projection needs."""

INFO = "info.jsonl"
"""File with statistics of the rows; process p > 0 writes `info.p.jsonl`."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """How the gradient of a row becomes a row of a store.

    Attributes:
        family: kind of projection, see `jaxlm.influence.projector`.
        dim: length of a row.
        seed: seed of the projection.
        dtype: "float32", "float16", "int8" or "1bit".
        variant: variant of Adam's direction, "paper" or "reference" (the authors' code).
        block_size: rows in a backward pass; None for as many as fit into a small machine's memory.
    """

    family: Literal["countsketch", "srht", "rademacher", "gaussian"] = "countsketch"
    dim: int = 8192
    seed: int = 0
    dtype: Literal["float32", "float16", "int8", "1bit"] = "float16"
    variant: Literal["paper", "reference"] = "paper"
    block_size: int | None = None

    def __post_init__(self):
        whole(self, "dim", most=MOST_NUMBERS)
        whole(self, "block_size", most=MOST_ROWS)
        seeds(self, "seed")
        projector(self.family, self.dim, self.seed)
        StoreSpec(dim=self.dim, dtype=self.dtype)


def store_features(
    folder: Path,
    losses: Any,
    rows: Rows,
    epoch: Epoch,
    features: Features,
    recipe: Recipe,
    *,
    number: int,
    adam: bool,
    pad_id: int,
) -> dict[str, Any]:
    """Write the features of rows that are not in the store yet.

    Args:
        folder: folder of `store/` and `info.jsonl`, with a line {id, loss, norm, eps_share,
            skipped} per row. Each of several processes computes and writes a part of the rows.
        losses: `row_losses` of the model; pass the same function each time, to compile it once.
        rows: rows to compute features of.
        epoch: parameters and optimizer state.
        features: projection and encoding.
        recipe: recipe with the constants of Adam.
        number: number of the epoch.
        adam: whether features are Adam's direction (training rows) or the gradient (target).
        pad_id: padding token.

    Returns:
        The number of rows, the number of rows without a gradient, and the mean share of coordinates
        where eps dominates.
    """
    padded = PaddedRows(rows.rows, pad_id, "targets")
    project = projector(features.family, features.dim, features.seed)
    spec = StoreSpec(
        dim=features.dim,
        dtype=features.dtype,
        projection=projection_name(project),
        parameters=LORA,
        gradient=f"adam {features.variant}" if adam else "sgd",
        model=fingerprint(paths.split(epoch.params, LORA)[0]),
        data=digest(rows.rows),
        checkpoint=number,
        weight=epoch.weight,
    )
    optimizer = recipe.optimizer
    process, processes = jax.process_index(), jax.process_count()
    mesh = None
    if mesh_of(epoch.params) is not None:
        mesh = make_mesh(data=-1, devices=jax.local_devices())
        params, opt_state = jax.tree.map(to_host, (epoch.params, epoch.opt_state))
        epoch = Epoch(params, opt_state, epoch.weight)
    options: dict[str, Any] = {}
    if adam:
        constants = (optimizer.b1, optimizer.b2, optimizer.eps, features.variant)
        options["adam_state"] = Adam(epoch.opt_state, *constants)
    each = {"writer": process, "writers": processes}
    with GradientStore.create(folder / "store", spec, **each) as writer:
        info = _Info(folder / _info_name(process), writer.ids)
        part = (process, processes)
        # A block has 8 groups of rows per device, so parameters are sent once for all of them.
        size = (features.block_size or BLOCK) * (1 if mesh is None else 8 * mesh.size)
        for places in padded.blocks(size, len(writer), part):
            found, about = features_with_info(
                losses,
                epoch.params,
                padded.batch(places),
                projector=project,
                select=LORA,
                block_size=features.block_size,
                mesh=mesh,
                **options,
            )
            ids = [rows.rows[place].id for place in places]
            info.append(ids, about)
            writer.append(np.asarray(found), ids)
        writer.commit()
    barrier(str(folder / INFO))
    return _summary(folder, processes)


def _info_name(process: int) -> str:
    return INFO if process == 0 else INFO.replace(".", f".{process}.")


def _summary(folder: Path, processes: int) -> dict[str, Any]:
    """Summarize the rows of all processes."""
    files = [folder / _info_name(process) for process in range(processes)]
    records = [record for file in files for record in _records(file)]
    shares = [record["eps_share"] for record in records]
    return {
        "rows": len(records),
        "skipped": sum(record["skipped"] for record in records),
        "eps_share": float(np.mean(shares)) if shares else 0.0,
    }


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a file of row statistics."""
    return read_jsonl(path, id=str, skipped=(bool, int), eps_share=(float, type(None)))


def stored_order(store: GradientStore, rows: Rows) -> np.ndarray:
    """Return the place in `rows` of each row of a store."""
    places = {row.id: place for place, row in enumerate(rows.rows)}
    return np.array([places[str(name)] for name in store.ids])


class _Info:
    """The file `info.jsonl`; lines of rows that did not reach the store are dropped."""

    def __init__(self, path: Path, ids: list[str | int]):
        self._path = path
        known = {record["id"]: record for record in _records(path)} if path.exists() else {}
        kept = [known[name] for name in ids if name in known]
        with report_write_errors(path):
            write_atomic(path, to_jsonl(kept))

    def append(self, ids: list[str], about: Any) -> None:
        numbers = {
            "loss": np.asarray(about.loss, np.float64),
            "norm": np.asarray(about.norm, np.float64),
            "eps_share": np.asarray(about.eps_share, np.float64),
            "skipped": np.asarray(about.skipped),
        }
        records = [
            {"id": name, **{key: values[i].item() for key, values in numbers.items()}}
            for i, name in enumerate(ids)
        ]
        append_jsonl(self._path, records)
