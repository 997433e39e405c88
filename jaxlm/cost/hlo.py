"""What one call of a compiled program does on each of its devices, read from its text.

The compiler's own count, `compiled.cost_analysis()`, takes the body of a loop once. Here the body
counts as often as the loop runs.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "while", "conditional", "call"),
}
_PARTS = {"dynamic-slice", "slice", "gather"}
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


Known = Mapping[str, Instruction]


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


def bytes_accessed(each: Instruction, known: Known, module: Module) -> int:
    """Its operands and its result; of what is only sliced, or written in place, the part.

    Args:
        each: the instruction, of a computation that is no fusion's.
        known: the instructions of its computation, by their names.
        module: the program.
    """
    if each.op in _FREE or each.op.endswith(("-done", "-update")):
        return 0
    if each.op == "fusion":
        return _fusion(each, known, module)
    return _written(each, known) + _read(each, known)


def _read(each: Instruction, known: Known) -> int:
    """Of an instruction that is no fusion."""
    sizes = [known[name].bytes for name in each.operands if name in known]
    if each.op in _PARTS:
        return each.bytes + sum(sizes[1:])
    if each.op in ("dynamic-update-slice", "scatter"):
        return sum(sizes[1:])
    return sum(sizes)


def _written(each: Instruction, known: Known) -> int:
    """Of an instruction that is no fusion."""
    place = {"dynamic-update-slice": 1, "scatter": 2}.get(each.op)
    if place is None or each.operands[place] not in known:
        return each.bytes
    return known[each.operands[place]].bytes


def _fusion(each: Instruction, known: Known, module: Module) -> int:
    (name,) = each.called("calls")
    inside = module.computations[name]
    total = 0
    for instruction in inside.values():
        if instruction.op == "parameter":
            total += _parameter(instruction, inside)
    (root,) = (instruction for instruction in inside.values() if instruction.root)
    results = root.operands if root.op == "tuple" else (root.name,)
    return total + sum(_written(_source(inside[result], inside), inside) for result in results)


def _source(each: Instruction, inside: Known) -> Instruction:
    """What a result is, behind changes of its shape alone."""
    while each.op == "bitcast":
        each = inside[each.operands[0]]
    return each


def _parameter(parameter: Instruction, inside: Known) -> int:
    """Bytes of a fusion's operand that are read."""
    total, names = 0, [parameter.name]
    while names:
        name = names.pop()
        for user in inside.values():
            if name not in user.operands:
                continue
            if user.op == "bitcast":
                names.append(user.name)
            elif user.op in _PARTS and user.operands.index(name) == 0:
                total += user.bytes
            elif user.op != "dynamic-update-slice" or user.operands.index(name) != 0:
                return parameter.bytes
    return min(total, parameter.bytes)
