"""The text of a compiled program, read into instructions."""

import math
import re
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


class Shaped(NamedTuple):
    """An array's dtype, in XLA's words ("f32", "bf16", "pred", ...), and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of it."""
        bits = re.search(r"\d+", self.dtype)
        width = 8 * (self.dtype == "pred") if bits is None else int(bits[0])
        return -(-self.size * width // 8)


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: of its result.
        op: what is done.
        type: of the result, as text.
        operands: names of the instructions that it reads.
        text: the line after the name of the operation.
        root: whether it is the result of its computation.
    """

    name: str
    op: str
    type: str
    operands: tuple[str, ...]
    text: str
    root: bool

    @property
    def arrays(self) -> list[Shaped]:
        """The arrays of the result."""
        return arrays(self.type)

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(each.bytes for each in self.arrays)

    def called(self, *keys: str) -> list[str]:
        """Names of the computations that it calls under some keys."""
        groups = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.text)
        return [name for group in groups for name in re.findall(r"[\w.\-]+", group)]


class Module(NamedTuple):
    """A program.

    Attributes:
        computations: the instructions of each, by their names.
        entry: the computation that it begins with.
        devices: that run it together.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    devices: int


def arrays(text: str) -> list[Shaped]:
    """The arrays in a type.

    >>> arrays("(f32[2,3]{1,0}, s32[])")
    [Shaped(dtype='f32', shape=(2, 3)), Shaped(dtype='s32', shape=())]
    """
    return [
        Shaped(dtype, tuple(int(size) for size in shape.split(",") if size))
        for dtype, shape in _ARRAY.findall(text)
    ]


def elements(text: str) -> list[str]:
    """The types in the type of a tuple.

    >>> elements("((f32[2], f32[3]), (f32[4], f32[6]))")
    ['(f32[2], f32[3])', '(f32[4], f32[6])']
    """
    parts, depth = [""], 0
    for letter in text[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def parse(text: str) -> Module:
    """Reads what `compiled.as_text()` gives."""
    head, _, rest = text.partition("\n")
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head)
    computations: dict[str, dict[str, Instruction]] = {}
    entry, here = "", {}
    for line in rest.splitlines():
        header = _HEADER.match(line)
        if header is not None:
            here = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif (found := _INSTRUCTION.match(line)) is not None:
            root, name, type_, op, tail = found.groups()
            names = () if op == "constant" else tuple(re.findall(r"%([\w.\-]+)", _inside(tail)))
            here[name] = Instruction(name, op, type_, names, tail, root is not None)
    return Module(computations, entry, math.prod(map(int, counts)))


def _inside(tail: str) -> str:
    """What is before the parenthesis that closes the operands."""
    depth = 0
    for place, letter in enumerate(tail):
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            return tail[:place]
    return tail
