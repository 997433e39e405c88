"""How fast, and in how much memory, are the examples of a gradient store scored and chosen?

    python -m benchmarks.scoring [--quick]

Writes a store of 1,000,000 rows of 1,024 random numbers for each encoding, and scores it against
targets of several subtasks in a process of its own. The columns of the first table are

    write_s       seconds to write and commit the store
    GB            its size on disk
    first_s       seconds of the first score in a process, with compilation and checksums
    again_s       seconds of a second score
    cpu_s         CPU seconds of the second score, which other load on the cores does not change
    resident_MB   peak resident memory of the process
    difference    largest |score - NumPy's in float64| over largest |score|, of a part of the rows

Rows are read from the page cache if they fit into memory. The second table compares with the
selection of the authors of LESS, rewritten in PyTorch: all rows of a checkpoint are loaded from one
file, normalized, multiplied with every normalized target, and averaged over the targets of each
subtask; a row's score is its maximum over subtasks. It has 50,000 rows of 2,048 numbers and 285
targets of 57 subtasks. `same` tells whether both choose the same 5 % in the same order, except for
scores that agree to 1e-6. --quick uses 20,000 rows of 256. The last line is one JSON object.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from jaxlm import influence
from jaxlm.influence import GradientStore, StoreSpec

ENCODINGS = ("float32", "float16", "int8", "1bit")
SUBTASKS = 9
BLOCK = 16384
PART = 2000


def rows_of(start: int, count: int, dim: int) -> np.ndarray:
    """Draw normal numbers, seeded by the place where their block starts."""
    rng = np.random.default_rng([start, dim])
    return rng.standard_normal((count, dim), np.float32)


def targets_of(count: int, dim: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((1, count, dim), np.float32)


def write(folder: Path, dtype: str, count: int, dim: int) -> float:
    """Write a store, and return the seconds that takes, without drawing its rows."""
    seconds = 0.0
    with GradientStore.create(folder, StoreSpec(dim=dim, dtype=dtype)) as writer:
        for start in range(0, count, BLOCK):
            rows = rows_of(start, min(BLOCK, count - start), dim)
            begin = time.perf_counter()
            writer.append(rows, range(start, start + len(rows)))
            seconds += time.perf_counter() - begin
        begin = time.perf_counter()
        writer.commit()
    return seconds + time.perf_counter() - begin


def numpy_scores(rows: np.ndarray, targets: np.ndarray, subtask: np.ndarray) -> np.ndarray:
    """Return cosines with the mean of each subtask, in float64."""
    wide, found = rows.astype(np.float64), []
    for s in range(subtask.max() + 1):
        mean = targets[0, subtask == s].astype(np.float64).mean(axis=0)
        lengths = np.linalg.norm(wide, axis=1) * np.linalg.norm(mean)
        found.append(wide @ mean / lengths)
    return np.stack(found, axis=1)


def score(folder: str) -> dict[str, Any]:
    """Score a store in this process."""
    begin = time.perf_counter()
    store = GradientStore.open(folder)
    targets = targets_of(5 * SUBTASKS, store.spec.dim)
    subtask = np.arange(5 * SUBTASKS) % SUBTASKS
    scores = influence.score(store, targets, subtask=subtask)
    first = time.perf_counter() - begin
    begin, cpu = time.perf_counter(), time.process_time()
    again = influence.score(store, targets, subtask=subtask)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    resident = common.resident_bytes() / 1e6
    part = np.linspace(0, len(store) - 1, min(PART, len(store))).astype(int)
    wanted = numpy_scores(store[part], targets, subtask)
    difference = float(np.abs(scores[part] - wanted).max() / np.abs(wanted).max())
    assert (scores == again).all()
    return {
        "first_s": first,
        "again_s": seconds,
        "cpu_s": cpu,
        "resident_MB": resident,
        "difference": difference,
    }


Begin = tuple[float, float]


def clocks() -> Begin:
    """Return wall-clock and CPU seconds."""
    return time.perf_counter(), time.process_time()


def selection(folder: str, targets: int, subtasks: int) -> dict[str, Any]:
    """Choose rows from a store in this process."""
    begin = clocks()
    store = GradientStore.open(folder)
    rows = targets_of(targets, store.spec.dim)
    subtask = np.repeat(np.arange(subtasks), targets // subtasks)
    scores = influence.score(store, rows, None, subtask, "mean_of_cosines", over="max")
    chosen = influence.select(scores)
    return result(folder, "jaxlm", begin, scores, chosen)


def authors(folder: str, targets: int, subtasks: int) -> dict[str, Any]:
    """Choose rows as the authors of LESS do, in PyTorch."""
    import torch

    torch.set_num_threads(2)
    begin = clocks()
    train = torch.load(Path(folder) / "all.pt", weights_only=True)
    train = train / train.norm(dim=1, keepdim=True)
    rows = torch.from_numpy(targets_of(targets, train.shape[1])[0])
    similar = train @ (rows / rows.norm(dim=1, keepdim=True)).T
    scores = similar.reshape(len(train), subtasks, -1).mean(dim=2).max(dim=1).values
    chosen = torch.topk(scores, int(0.05 * len(train))).indices
    return result(folder, "authors", begin, scores.numpy(), chosen.numpy())


def result(folder: str, name: str, begin: Begin, scores: Any, chosen: Any) -> dict[str, Any]:
    """Return the costs since `begin`, and save the scores beside the store."""
    wall, cpu = (now - then for now, then in zip(clocks(), begin, strict=True))
    resident = common.resident_bytes() / 1e6
    np.savez(Path(folder).with_name(f"{name}.npz"), scores=scores, chosen=chosen)
    return {"seconds": wall, "cpu_s": cpu, "resident_MB": resident}


def stores(count: int, dim: int, encodings: tuple[str, ...], root: Path) -> list[dict[str, Any]]:
    """Return the rows of the first table."""
    table = []
    for dtype in encodings:
        with tempfile.TemporaryDirectory(dir=root) as name:
            folder = Path(name) / "store"
            row = {
                "dtype": dtype,
                "N": count,
                "R": dim,
                "write_s": write(folder, dtype, count, dim),
            }
            row["GB"] = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
            table.append(row | common.in_fresh_process(f"scoring.score({str(folder)!r})"))
    return table


def against_authors(count: int, dim: int, repeats: int, root: Path) -> list[dict[str, Any]]:
    """Return the rows of the second table."""
    try:
        import torch
    except ImportError:
        print("no second table, since torch is not installed (extra: parity)")
        return []
    with tempfile.TemporaryDirectory(dir=root) as name:
        folder = Path(name) / "store"
        write(folder, "float32", count, dim)
        torch.save(torch.from_numpy(GradientStore.open(folder)[:]), folder / "all.pt")
        runs: dict[str, list[dict[str, Any]]] = {"selection": [], "authors": []}
        for _ in range(repeats):
            for each, found in runs.items():
                found.append(common.in_fresh_process(f"scoring.{each}({str(folder)!r}, 285, 57)"))
        ours, theirs = (np.load(Path(name) / f"{each}.npz") for each in ("jaxlm", "authors"))
    difference = float(np.abs(ours["scores"] - theirs["scores"]).max())
    in_order = np.abs(theirs["scores"][ours["chosen"]] - theirs["scores"][theirs["chosen"]])
    same = bool(in_order.max() < 1e-6)
    table = []
    for each, found in runs.items():
        middle = {key: float(np.median([row[key] for row in found])) for key in found[0]}
        method = "jaxlm" if each == "selection" else "LESS's selection, torch"
        row = {"method": method, "N": count, "R": dim, "targets": 285, **middle}
        table.append(row | {"difference": difference, "same": same})
    return table


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 rows of 256 numbers")
    parser.add_argument("--encodings", nargs="+", default=list(ENCODINGS), choices=ENCODINGS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=None, help="where stores are written")
    options = parser.parse_args()
    count, dim = (20_000, 256) if options.quick else (1_000_000, 1024)
    first = stores(count, dim, tuple(options.encodings), options.directory)
    common.print_table(first)
    count, dim = (20_000, 256) if options.quick else (50_000, 2048)
    second = against_authors(count, dim, 1 if options.quick else options.repeats, options.directory)
    if second:
        common.print_table(second)
    tables = {"stores": first, "authors": second}
    rows = [{"table": name, **row} for name, table in tables.items() for row in table]
    common.print_report("scoring", rows)


if __name__ == "__main__":
    main()
