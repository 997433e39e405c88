"""What one call of a compiled program does on each of its devices, by its text.

The compiler's own count, `compiled.cost_analysis()`, takes the body of a loop once; here it counts
as often as the loop turns.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxlm.sharding.hlo_bytes import bytes_accessed
from jaxlm.sharding.hlo_text import Instruction, Shaped, arrays, elements, parse

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
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
        return Shaped(self.dtype, self.shape).bytes

    @property
    def moved(self) -> float:
        """Bytes that a device sends, all times together, where the group is a ring.

        With n devices an array of b bytes takes 2 (n - 1)/n b to be summed everywhere, and
        (n - 1)/n b to be gathered or scattered, of which the result of reduce-scatter is the nth.
        """
        rounds = _ROUNDS.get(self.op, lambda n: (n - 1) / n)(self.devices)
        return self.times * self.bytes * rounds


class Costs(NamedTuple):
    """What a device does in one call of a program.

    Attributes:
        products: FLOPs of matrix products.
        bytes: read from and written to memory, as if nothing stayed in a cache between two
            operations of the program.
        collectives: what it tells other devices.
    """

    products: int = 0
    bytes: int = 0
    collectives: tuple[Collective, ...] = ()

    @property
    def moved(self) -> float:
        """Bytes that it sends, see `Collective.moved`."""
        return sum((each.moved for each in self.collectives), 0.0)

    def plus(self, other: "Costs", times: int = 1) -> "Costs":
        """The sum with `times` as much as `other`."""
        more = tuple(each._replace(times=times * each.times) for each in other.collectives)
        return Costs(
            self.products + times * other.products,
            self.bytes + times * other.bytes,
            self.collectives + more,
        )


def collectives(compiled: Any) -> list[Collective]:
    """The collective operations of a compiled program, as often as one call runs them.

    Args:
        compiled: what `jax.jit(f).lower(...).compile()` returns.
    """
    return list(costs(compiled).collectives)


def costs(compiled: Any) -> Costs:
    """What each device does in one call; of the branches of a conditional the largest one.

    A product that the compiler has handed to a library is not seen.

    Args:
        compiled: what `jax.jit(f).lower(...).compile()` returns.
    """
    module = parse(compiled.as_text())

    @functools.cache
    def within(name: str) -> Costs:
        total, known = Costs(), module.computations.get(name, {})
        for each in known.values():
            total = total.plus(of(each, known))
        return total

    def of(each: Instruction, known: dict[str, Instruction]) -> Costs:
        if each.op == "while":
            found = re.search(r'"known_trip_count":\{"n":"(\d+)"', each.text)
            times, inside = 1 if found is None else int(found[1]), Costs()
            for name in each.called("body", "condition"):
                inside = inside.plus(within(name), times)
            return inside
        if each.op == "conditional":
            keys = ("true_computation", "false_computation", "branch_computations")
            return max(map(within, each.called(*keys)), key=lambda cost: cost.bytes)
        own = Costs(_products(each, known), 0, tuple(_own(each, module.devices)))
        if each.op in ("call", "async-start"):
            for name in each.called("calls", "to_apply"):
                own = own.plus(within(name))
            return own
        for name in each.called("calls") if each.op == "fusion" else ():
            own = own._replace(products=own.products + within(name).products)
        return own._replace(bytes=bytes_accessed(each, known, module))

    return within(module.entry)


def _products(each: Instruction, known: dict[str, Instruction]) -> int:
    """FLOPs of a matrix product."""
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.text)
    if each.op != "dot" or found is None:
        return 0
    (left,) = known[each.operands[0]].arrays
    return 2 * each.arrays[0].size * math.prod(left.shape[int(i)] for i in found[1].split(",") if i)


def _own(each: Instruction, devices: int) -> list[Collective]:
    """What an instruction itself makes, if it is a collective."""
    op = each.op.removesuffix("-start")
    if op not in KINDS:
        return []
    made = each.type
    if op != each.op and op != "all-reduce" and made.startswith("("):
        made = elements(made)[1]  # the first are the operands
    group = _group(each.text, devices)
    return [Collective(op, *array, group, 1) for array in arrays(made)]


def _group(text: str, devices: int) -> int:
    """The number of devices in the first group of a collective; pairs are a group of two."""
    if "source_target_pairs=" in text:
        return 2
    if (found := re.search(r"replica_groups=\{\{([\d,]*)\}", text)) is not None:
        return found[1].count(",") + 1
    if (found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text)) is not None:
        return int(found[1])
    if (found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text)) is not None:
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return devices
