"""How fast are random projections, compared with trak's BasicProjector on the same rows?

usage: python -m benchmarks.projection [--quick] [--repeats 3] [--sizes 1000000 10000000]
                                       [--no-torch]

16 rows of P normal numbers are projected to 2048 numbers in float32. The peer draws a matrix of
signs, 100 columns at a time, and multiplies by it, as trak's BasicProjector does; its seconds are
extrapolated from two such blocks. If the package `trak` is installed, its own class gets a row too,
for P up to 2,000,000.

  seconds      median over interleaved repeats
  times        seconds of the peer over these
  resident_MB  increase of the peak memory of a fresh process
  error        root mean square error of the inner products of unit rows, over the theoretical
               error of Rademacher, sqrt((1 + c^2) / 2048) with c the inner product

--quick uses 20,000 numbers and two repeats. The last line is one JSON object.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from jaxlm.influence import projector

FAMILIES = ("rademacher", "countsketch", "srht", "kronecker", "gaussian")
ROWS, DIM = 16, 2048
COLUMNS = 100
"""Columns in a part of the peer's matrix."""
TIMED = 2
PEER, TRAK = "BasicProjector, two parts", "trak.BasicProjector"


def rows_of(numbers: int) -> np.ndarray:
    """Draw rows [16, P] with a common part, so that their cosines are not zero."""
    rng = np.random.default_rng(0)
    common_part = rng.standard_normal(numbers, np.float32)
    return rng.standard_normal((ROWS, numbers), np.float32) + common_part


def ours(family: str, numbers: int) -> Callable[[], Any]:
    """Return a function without arguments that projects the rows."""
    rows = {"w": jnp.asarray(rows_of(numbers)).reshape(ROWS, -1, 1000)}
    drawn = projector(family, DIM)
    return functools.partial(jax.jit(lambda rows: drawn.project(rows)), rows)


def peer(numbers: int) -> Callable[[], Any]:
    """Return a function that projects to two parts of the columns."""
    import torch

    from benchmarks.torch_influence import Projector

    drawn = Projector(numbers, TIMED * COLUMNS, COLUMNS)
    rows = torch.from_numpy(rows_of(numbers))
    return lambda: drawn(rows)


def trak(numbers: int) -> Callable[[], Any]:
    """Return a function that calls trak's own class."""
    import torch
    from trak.projectors import BasicProjector, ProjectionType

    kind = ProjectionType.rademacher
    drawn = BasicProjector(numbers, DIM, 0, kind, torch.device("cpu"), block_size=COLUMNS)
    rows = torch.from_numpy(rows_of(numbers))
    return lambda: drawn.project(rows, model_id=0)


def call(name: str, numbers: int) -> Callable[[], Any]:
    """Return the function that is timed."""
    if name in FAMILIES:
        return ours(name, numbers)
    return peer(numbers) if name == PEER else trak(numbers)


def resident(name: str, numbers: int) -> float:
    """Return the MB that a call, already compiled, adds to the peak of this process."""
    function = call(name, numbers)
    if name in FAMILIES:
        jax.block_until_ready(function())
    before = common.fresh_peak()
    jax.block_until_ready(function())
    return (common.resident_bytes() - before) / 1e6


def error(projected: np.ndarray, whole: np.ndarray) -> float:
    """Return the error of inner products of unit rows, over that of Rademacher in theory."""
    size = np.linalg.norm(whole, axis=1, keepdims=True)
    some, exact = (np.asarray(rows, np.float64) / size for rows in (projected, whole))
    pairs = np.triu_indices(len(whole), 1)
    some, exact = ((rows @ rows.T)[pairs] for rows in (some, exact))
    return float(np.sqrt(np.mean((some - exact) ** 2) / np.mean((1 + exact**2) / DIM)))


def peers(options: argparse.Namespace) -> list[str]:
    """Return the names of the peers that are installed."""
    names = []
    for name, module in ((PEER, "benchmarks.torch_influence"), (TRAK, "trak")):
        try:
            __import__(module)
        except ImportError as missing:
            print(f"no row for {name}: {missing.name} is not installed")
        else:
            names.append(name)
    return [] if options.no_torch else names


def measure(numbers: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the table for one P."""
    names = [*FAMILIES, *peers(options)]
    if TRAK in names and numbers > 2_000_000:
        names.remove(TRAK)
    calls = {name: call(name, numbers) for name in names if name != TRAK}
    whole = rows_of(numbers)
    errors = {name: error(np.asarray(calls[name]()), whole) for name in FAMILIES}
    times = common.interleaved(calls, options.repeats)
    if TRAK in names:
        times[TRAK] = common.seconds(call(TRAK, numbers))
    if PEER in times:
        times[PEER] *= DIM / COLUMNS / TIMED
    basic = times.get(PEER)
    return [
        {
            "projection": name.replace(", two parts", ", estimated"),
            "P": numbers,
            "seconds": seconds,
            "times": None if basic is None else basic / seconds,
            "resident_MB": None
            if options.quick
            else common.in_fresh_process(f"projection.resident({name!r}, {numbers})"),
            "error": errors.get(name),
        }
        for name, seconds in times.items()
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 numbers, two repeats")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--no-torch", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.repeats = [20_000], 2
    table = []
    for numbers in options.sizes:
        rows = measure(numbers, options)
        common.print_table(rows)
        table += rows
    common.print_report("projection", table)


if __name__ == "__main__":
    main()
