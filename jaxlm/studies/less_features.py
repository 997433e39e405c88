"""Gradient features of rows at one checkpoint, written into a store that can be resumed."""

from collections.abc import Sequence
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

INFO = ("loss", "norm", "eps_share", "skipped")
"""Statistics of a row in `info.jsonl`; process p > 0 writes `info.p.jsonl`."""


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

    The folder has `store/` and `info.jsonl`, with a line {id, loss, norm, eps_share, skipped} per
    row. Each of several processes computes and writes a part of the rows. Features are Adam's
    direction (`adam`, training rows) or the gradient (target). Pass the same `losses` each time, to
    compile them once. Returns the number of rows, of rows without a gradient, and the mean share of
    coordinates where eps dominates.
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
    params, opt_state, _ = epoch
    mesh = None
    if mesh_of(params) is not None:
        mesh = make_mesh(data=-1, devices=jax.local_devices())
        params, opt_state = jax.tree.map(to_host, (params, opt_state))
    optimizer = recipe.optimizer
    constants = (optimizer.b1, optimizer.b2, optimizer.eps, features.variant)
    process, processes = jax.process_index(), jax.process_count()
    infos = [folder / (f"info.{i}.jsonl" if i else "info.jsonl") for i in range(processes)]
    with GradientStore.create(folder / "store", spec, writer=process, writers=processes) as writer:
        _keep(infos[process], writer.ids)
        # A block has 8 groups of rows per device, so parameters are sent once for all of them.
        size = (features.block_size or BLOCK) * (1 if mesh is None else 8 * mesh.size)
        for places in padded.blocks(size, len(writer), (process, processes)):
            found, about = features_with_info(
                losses,
                params,
                padded.batch(places),
                projector=project,
                adam_state=Adam(opt_state, *constants) if adam else None,
                select=LORA,
                block_size=features.block_size,
                mesh=mesh,
            )
            ids = [rows.rows[place].id for place in places]
            numbers = {name: np.asarray(getattr(about, name)).tolist() for name in INFO}
            lines = zip(*numbers.values(), strict=True)
            records = [
                {"id": name, **dict(zip(INFO, line, strict=True))}
                for name, line in zip(ids, lines, strict=True)
            ]
            append_jsonl(infos[process], records)
            writer.append(np.asarray(found), ids)
        writer.commit()
    barrier(str(infos[0]))
    records = [record for path in infos for record in _records(path)]
    shares = [record["eps_share"] for record in records]
    return {
        "rows": len(records),
        "skipped": sum(record["skipped"] for record in records),
        "eps_share": float(np.mean(shares)) if shares else 0.0,
    }


def _keep(path: Path, ids: Sequence[str | int]) -> None:
    """Leave only the lines of rows in a file of statistics, which is made if it is missing."""
    known = {record["id"]: record for record in _records(path)} if path.exists() else {}
    with report_write_errors(path):
        write_atomic(path, to_jsonl([known[name] for name in ids if name in known]))


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a file of row statistics."""
    return read_jsonl(path, id=str, skipped=(bool, int), eps_share=(float, type(None)))


def stored_order(store: GradientStore, rows: Rows) -> np.ndarray:
    """Return the place in `rows` of each row of a store."""
    places = {row.id: place for place, row in enumerate(rows.rows)}
    return np.array([places[str(name)] for name in store.ids])
