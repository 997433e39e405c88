"""Which way to the kernel of a parameter is the fastest, by its shape, and in blocks of which size.

Seconds are estimated as operations over a rate plus numbers moved over a rate. Only their ratios
count, and those are measured by `benchmarks.ntk`.
"""

from typing import Literal

Method = Literal["paired", "chunked", "matches"]

SLOWER = 1.7
"""Time of an operation on pieces of gradients over that of one on products of factors."""
MOVED = 170
"""Operations on products of factors while a number of a gradient is written and read again."""
SCATTERED = 300
"""The same for a number of a table's gradients, which are gathered from the rows in use."""
CHUNK = 2**22
"""Numbers of a piece of gradients, few enough to stay near the processor."""
PAIRS = 2**22
"""Numbers of a block of products of factors."""
TABLE = 2**24
"""Numbers of a piece of a table's gradients."""


def chunk(each: int, count: int) -> int:
    """Columns in a piece of gradients, each of `each` numbers; of `count` there are."""
    return _even(count, max(1, CHUNK // max(each, 1)))


def chunk_of_table(each: int, count: int) -> int:
    """Rows of a table in a piece of gradients, each of `each` numbers."""
    return _even(count, max(1, TABLE // max(each, 1)))


def rows(each: int, count: int) -> int:
    """Examples of x in a block of products, each of `each` numbers."""
    return _even(count, max(1, PAIRS // max(each, 1)))


def _even(count: int, most: int) -> int:
    """The size of equal parts of at most `most`: a divisor of `count` if one is near."""
    most = min(count, most)
    for size in range(most, most // 2, -1):
        if count % size == 0:
            return size
    return -(-count // -(-count // most))


def choose(
    op: str,
    counts: tuple[int, int],
    outputs: tuple[int, int],
    length: int,
    shape: tuple[int, ...],
) -> Method:
    """The way to one use of a parameter.

    Args:
      op: "dense", "embed" or "head".
      counts: examples on either side.
      outputs: C, and how many of the pairs of outputs the kernel has.
      length: places where an example uses the parameter.
      shape: of the parameter, without the axis of layers.
    """
    way = table if op == "embed" else dense
    return way(counts, outputs, length, *shape)


def dense(
    counts: tuple[int, int], outputs: tuple[int, int], length: int, inputs: int, width: int
) -> Method:
    """For a matrix [inputs, width] used at `length` places."""
    pairs, some = counts[0] * counts[1], sum(counts)
    paired = pairs * length**2 * 2 * (inputs + outputs[1] * width)
    formed = some * outputs[0] * length * 2 * inputs * width
    products = pairs * outputs[1] * 2 * inputs * width
    moved = some * outputs[0] * inputs * width
    chunked = SLOWER * (formed + products) + MOVED * moved
    return "paired" if paired < chunked else "chunked"


def table(
    counts: tuple[int, int], outputs: tuple[int, int], length: int, vocab: int, width: int
) -> Method:
    """For a table [vocab, width] of which an example uses `length` rows."""
    pairs, some = counts[0] * counts[1], sum(counts)
    matches = pairs * outputs[1] * length**2 * 2 * width
    products = pairs * outputs[1] * vocab * 2 * width
    chunked = products + SCATTERED * some * outputs[0] * vocab * width
    return "matches" if matches < chunked else "chunked"
