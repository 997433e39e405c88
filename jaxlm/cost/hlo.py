"""FLOPs, memory traffic and collectives of a compiled program on one device, read from its text.

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
    """The dtype of an array, as XLA names it ("f32", "bf16", "pred", ...), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        bits = re.search(r"\d+", self.dtype)
        width = 8 * (self.dtype == "pred") if bits is None else int(bits[0])
        return -(-self.size * width // 8)


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        type: type of the result, as text.
        operands: names of the instructions that it reads.
        text: rest of the line, after the name of the operation.
        root: whether its result is that of its computation.
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
        """Return the names of the computations that it calls by keys such as `body`."""
        groups = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.text)
        return [name for group in groups for name in re.findall(r"[\w.\-]+", group)]


class Module(NamedTuple):
    """A compiled program on some devices: its computations, and the one that starts it.

    A computation maps the names of instructions to them.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    devices: int


def arrays(text: str) -> list[Shaped]:
    """Return the arrays in a type.

    >>> arrays("(f32[2,3]{1,0}, s32[])")
    [Shaped(dtype='f32', shape=(2, 3)), Shaped(dtype='s32', shape=())]
    """
    return [
        Shaped(dtype, tuple(int(size) for size in shape.split(",") if size))
        for dtype, shape in _ARRAY.findall(text)
    ]


def elements(text: str) -> list[str]:
    """Return the types in the type of a tuple.

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
    """Parse the text of a compiled program, `compiled.as_text()`."""
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
    """Return the text before the parenthesis that closes the operands."""
    depth = 0
    for place, letter in enumerate(tail):
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            return tail[:place]
    return tail


Known = Mapping[str, Instruction]


class Collective(NamedTuple):
    """An array that a collective operation makes on each device.

    Attributes:
        op: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", ...
        dtype: as XLA names it: "f32", "bf16", "s8", "pred", ...
        shape: shape of the result on one device.
        devices: number of devices in one group.
        times: number of runs: the product of the trip counts of the loops around it. A loop whose
            trip count the compiler does not know counts once.
    """

    op: str
    dtype: str
    shape: tuple[int, ...]
    devices: int
    times: int

    @property
    def size(self) -> int:
        """Number of elements of the array."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the array."""
        return Shaped(self.dtype, self.shape).bytes

    @property
    def moved(self) -> float:
        """Bytes that a device sends in all runs, if the group is a ring.

        With n devices, an array of b bytes takes 2 (n - 1)/n b to be summed everywhere, and
        (n - 1)/n b to be gathered or scattered; a reduce-scatter returns an nth of that array.
        """
        rounds = _ROUNDS.get(self.op, lambda n: (n - 1) / n)(self.devices)
        return self.times * self.bytes * rounds


class Costs(NamedTuple):
    """Costs of one call of a program on one device.

    Attributes:
        products: FLOPs of matrix products.
        bytes: bytes read from and written to memory, if nothing stays in a cache between two
            operations of the program.
        collectives: the collective operations.
    """

    products: int = 0
    bytes: int = 0
    collectives: tuple[Collective, ...] = ()

    @property
    def moved(self) -> float:
        """Bytes that the device sends, see `Collective.moved`."""
        return sum((each.moved for each in self.collectives), 0.0)

    def plus(self, other: "Costs", times: int = 1) -> "Costs":
        """Return `self + times * other`."""
        more = tuple(each._replace(times=times * each.times) for each in other.collectives)
        return Costs(
            self.products + times * other.products,
            self.bytes + times * other.bytes,
            self.collectives + more,
        )


def collectives(compiled: Any) -> list[Collective]:
    """Return the collective operations of a compiled program, with how often one call runs them."""
    return list(costs(compiled).collectives)


def costs(compiled: Any) -> Costs:
    """Return the costs of one call, on each device, of `jax.jit(f).lower(...).compile()`.

    A conditional counts as its largest branch. A product that the compiler has replaced by a
    library call is not counted.
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
    """Return the FLOPs of a matrix product, 0 for other instructions."""
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.text)
    if each.op != "dot" or found is None:
        return 0
    (left,) = known[each.operands[0]].arrays
    return 2 * each.arrays[0].size * math.prod(left.shape[int(i)] for i in found[1].split(",") if i)


def _own(each: Instruction, devices: int) -> list[Collective]:
    """Return what an instruction makes itself, if it is a collective."""
    op = each.op.removesuffix("-start")
    if op not in KINDS:
        return []
    made = each.type
    if op != each.op and op != "all-reduce" and made.startswith("("):
        made = elements(made)[1]  # a start returns (operands, results, ...)
    group = _group(each.text, devices)
    return [Collective(op, *array, group, 1) for array in arrays(made)]


def _group(text: str, devices: int) -> int:
    """Return the number of devices in the first group of a collective; pairs are groups of two."""
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
    """Return the bytes of operands and result; if sliced or written in place, only of that part.

    The instruction is not inside a fusion; `known` are those of its computation by their names.
    """
    if each.op in _FREE or each.op.endswith(("-done", "-update")):
        return 0
    if each.op == "fusion":
        return _fusion(each, known, module)
    return _written(each, known) + _read(each, known)


def _read(each: Instruction, known: Known) -> int:
    """Return the bytes that an instruction reads, if it is not a fusion."""
    sizes = [known[name].bytes for name in each.operands if name in known]
    if each.op in _PARTS:
        return each.bytes + sum(sizes[1:])
    if each.op in ("dynamic-update-slice", "scatter"):
        return sum(sizes[1:])
    return sum(sizes)


def _written(each: Instruction, known: Known) -> int:
    """Return the bytes that an instruction writes, if it is not a fusion."""
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
    """Return the instruction behind bitcasts, which only change the shape."""
    while each.op == "bitcast":
        each = inside[each.operands[0]]
    return each


def _parameter(parameter: Instruction, inside: Known) -> int:
    """Return the bytes that a fusion reads of one operand."""
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
