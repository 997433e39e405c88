"""Which way to the kernel of a parameter is the fastest, by its shape."""

from typing import Literal

Method = Literal["paired", "chunked", "matches"]

CHUNK = 2**20
"""Numbers of a piece of gradients, which should stay in a processor's cache."""
PAIRS = 2**22
"""Numbers of a block of products of factors."""
TABLE = 2**24
"""Numbers of a piece of a table's gradients."""


def chunk(each: int, width: int) -> int:
    """Columns of a piece, of which each has `each` numbers."""
    return _even(width, max(1, CHUNK // max(each, 1)))


def chunk_of_table(each: int, count: int) -> int:
    """Rows of a table in a piece, of which each has `each` numbers."""
    return _even(count, max(1, TABLE // max(each, 1)))


def rows(each: int, count: int) -> int:
    """Examples of x in a block of products, of which each has `each` numbers."""
    return _even(count, max(1, PAIRS // max(each, 1)))


def _even(count: int, most: int) -> int:
    blocks = -(-count // most)
    return -(-count // blocks)


def choose(op, counts, outputs, use, shape) -> Method:
    """The way to one use of a parameter.

    Args:
      op: "dense", "embed" or "head".
      counts: examples on either side.
      outputs: C, and of the C^2 pairs of outputs how many the kernel has.
      use: with the shapes of what goes in and comes out.
      shape: of the parameter, without the axis of layers.
    """
    length = 1
    for size in use.x.shape[1:] if op == "embed" else use.x.shape[1:-1]:
        length *= size
    if op == "embed":
        return table(counts, outputs, length, *shape)
    return dense(counts, outputs, length, *shape)


def dense(counts, outputs, length: int, inputs: int, width: int) -> Method:
    """For a matrix [inputs, width] used at `length` places."""
    n, m = counts
    c, pairs = outputs
    paired = n * m * length**2 * 2 * (inputs + pairs * width)
    formed = (n + m) * c * 2 * length * inputs * width
    chunked = formed + n * m * pairs * 2 * inputs * width
    return "paired" if paired < chunked else "chunked"


def table(counts, outputs, length: int, vocab: int, width: int) -> Method:
    """For a table [vocab, width] of which an example uses `length` rows."""
    n, m = counts
    c, pairs = outputs
    matches = n * m * pairs * length**2 * 2 * width
    chunked = n * m * pairs * vocab * 2 * width + (n + m) * c * vocab * width * 4
    return "matches" if matches < chunked else "chunked"
