"""What the devices of a compiled program tell each other, by its text."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

KINDS = (
    "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|"
    "collective-broadcast"
)
_ROUNDS: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1.0,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}


class Collective(NamedTuple):
    """An array of each device that a collective operation makes.

    Attributes:
        op: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", ...
        dtype: in XLA's words: "f32", "bf16", "s8", "pred", ...
        shape: of the result on one device.
        devices: that take part, in one group.
        times: how often it happens: the product of the trip counts of the loops around it. A loop
            whose count the compiler does not know counts once.
    """

    op: str
    dtype: str
    shape: tuple[int, ...]
    devices: int
    times: int

    @property
    def size(self) -> int:
        """Numbers in the array."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the array."""
        return -(-self.size * _bits(self.dtype) // 8)

    @property
    def moved(self) -> float:
        """Bytes that a device sends, all times together, where the group is a ring.

        With n devices an array of b bytes takes 2 (n - 1)/n b to be summed everywhere, and
        (n - 1)/n b to be gathered or scattered, of which the result of reduce-scatter is the nth.
        """
        rounds = _ROUNDS.get(self.op, lambda n: (n - 1) / n)(self.devices)
        return self.times * self.bytes * rounds


def collectives(compiled: Any) -> list[Collective]:
    """The collective operations of a compiled program, as often as one call runs them.

    Of the branches of a conditional the one that moves the most is taken.

    Args:
        compiled: what `jax.jit(f).lower(...).compile()` returns.
    """
    text = compiled.as_text()
    computations = _computations(text)
    devices = _devices(text)
    found: dict[str, list[Collective]] = {}

    def within(name: str) -> list[Collective]:
        if name not in found:
            found[name] = [each for line in computations.get(name, ()) for each in of(line)]
        return found[name]

    def of(line: str) -> list[Collective]:
        here = _own(line, devices)
        if " while(" in line:
            times = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            count = 1 if times is None else int(times[1])
            inside = [each for name in _called(line, "body|condition") for each in within(name)]
            return [each._replace(times=count * each.times) for each in inside]
        if " conditional(" in line:
            names = _called(line, "true_computation|false_computation|branch_computations")
            return max(map(within, names), key=_total, default=[])
        if " async-done(" not in line and " async-update(" not in line and not here:
            here = [each for name in _called(line, "calls|to_apply") for each in within(name)]
        return here

    return [each for name in _entries(text) for each in within(name)]


def _total(found: list[Collective]) -> float:
    return sum((each.moved for each in found), 0.0)


def _bits(dtype: str) -> int:
    found = re.search(r"\d+", dtype)
    return 8 * (dtype == "pred") if found is None else int(found[0])


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", re.MULTILINE)


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation that may lead to a collective."""
    wanted = re.compile(rf" (?:{KINDS})(?:-start)?\(|(?:calls|to_apply|body|computations?)=")
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header is not None:
            lines = found.setdefault(header[2], [])
        elif wanted.search(line):
            lines.append(line)
    return found


def _entries(text: str) -> list[str]:
    return [name for entry, name in _HEADER.findall(text) if entry]


def _called(line: str, keys: str) -> list[str]:
    """Names of the computations that an instruction names under some keys."""
    groups = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", line)
    return [name for group in groups for name in re.findall(r"[\w.\-]+", group)]


def _devices(text: str) -> int:
    """All devices of a program."""
    head = text.partition("\n")[0]
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head)
    return math.prod(map(int, counts))


def _own(line: str, devices: int) -> list[Collective]:
    """What an instruction itself makes, if it is a collective."""
    found = re.search(rf"= (.*?) ({KINDS})(-start)?\(", line)
    if found is None:
        return []
    result, op, start = found.groups()
    if start and op != "all-reduce" and result.startswith("("):
        result = _elements(result)[1]  # the first are the operands
    group = _group(line, devices)
    return [
        Collective(op, dtype, tuple(int(size) for size in shape.split(",") if size), group, 1)
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
    ]


def _elements(result: str) -> list[str]:
    """The types in a tuple type."""
    parts, depth = [""], 0
    for letter in result[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _group(line: str, devices: int) -> int:
    """The number of devices in the first group of a collective; pairs are a group of two."""
    if "source_target_pairs=" in line:
        return 2
    if (found := re.search(r"replica_groups=\{\{([\d,]*)\}", line)) is not None:
        return found[1].count(",") + 1
    if (found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)) is not None:
        return int(found[1])
    if (found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line)) is not None:
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return devices
