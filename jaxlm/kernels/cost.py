"""Cost model: which contraction is the fastest for a parameter's kernel, and in what chunk size.

Time is estimated as flops plus entries moved, with an entry priced in flops. Only ratios matter,
and they are measured: `python -m benchmarks.ntk` prints, for matrices and tables of several
lengths, the seconds of both contractions (`pairs_s`, `chunked_s`), the one that is chosen here, and
its time over that of the faster one (`over_best`). The constants below are from 2 shared CPU cores
in float32. To renew them on another machine, take its rate from `pairs_s` (flops of `paired` in
`dense` below, divided by seconds), convert `chunked_s` to flops by this rate, subtract the flops of
`chunked`, and divide by the entries moved; then check that `over_best` stays near 1.
"""

from typing import Literal

Contraction = Literal["paired", "chunked", "matches"]

CHUNK_SLOWDOWN = 1.7
"""How many times as long a flop takes on chunks of gradients as on products of factors.

The products of factors are batched small matrices that stay in cache; chunks are long and thin.
"""

FLOPS_PER_DENSE_ENTRY = 170
"""Flops on products of factors that take as long as writing and reading one gradient entry."""

FLOPS_PER_GATHERED_ENTRY = 300
"""The same for an entry of a table's gradient, which is scattered from the rows that are used."""

MAX_CHUNK_ENTRIES = 2**22
"""Entries of a chunk of gradients: 16 MiB in float32, few enough to stay in a cache."""

MAX_PAIR_ENTRIES = 2**22
"""Entries of a block of products of factors."""

MAX_TABLE_ENTRIES = 2**24
"""Entries of a chunk of a table's gradients. Larger, since each chunk scatters all ids again."""


def part_size(count: int, each: int, most: int) -> int:
    """Return how many of `count` items of `each` entries go into a part of `most` entries.

    A divisor of `count` if one is near: it needs no padding. Below half of the largest there would
    be twice as many steps.
    """
    largest = min(count, max(1, most // max(each, 1)))
    for size in range(largest, largest // 2, -1):
        if count % size == 0:
            return size
    return -(-count // -(-count // largest))


def choose(
    op: str,
    counts: tuple[int, int],
    outputs: tuple[int, int],
    length: int,
    shape: tuple[int, ...],
) -> Contraction:
    """Return the fastest contraction for one use, "dense", "embed" or "head", of a parameter.

    `outputs` are C and the number of pairs of outputs that the kernel has, `length` the positions
    at which an example uses the parameter, `shape` that of the parameter in one layer.
    """
    rule = table if op == "embed" else dense
    return rule(counts, outputs, length, *shape)


def dense(
    counts: tuple[int, int], outputs: tuple[int, int], length: int, inputs: int, width: int
) -> Contraction:
    """Return the fastest contraction for a matrix [inputs, width] used at `length` positions."""
    pairs, examples = counts[0] * counts[1], sum(counts)
    paired = pairs * length**2 * 2 * (inputs + outputs[1] * width)
    form = examples * outputs[0] * length * 2 * inputs * width
    multiply = pairs * outputs[1] * 2 * inputs * width
    moved = examples * outputs[0] * inputs * width
    chunked = CHUNK_SLOWDOWN * (form + multiply) + FLOPS_PER_DENSE_ENTRY * moved
    return "paired" if paired < chunked else "chunked"


def table(
    counts: tuple[int, int], outputs: tuple[int, int], length: int, vocab: int, width: int
) -> Contraction:
    """Return the fastest contraction for a table [vocab, width] with `length` rows per example."""
    pairs, examples = counts[0] * counts[1], sum(counts)
    matches = pairs * outputs[1] * length**2 * 2 * width
    multiply = pairs * outputs[1] * vocab * 2 * width
    moved = examples * outputs[0] * vocab * width
    return "matches" if matches < multiply + FLOPS_PER_GATHERED_ENTRY * moved else "chunked"
