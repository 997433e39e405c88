"""Bytes that an instruction of a compiled program reads and writes."""

from collections.abc import Mapping

from jaxlm.sharding.hlo_text import Instruction, Module

Known = Mapping[str, Instruction]
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "while", "conditional", "call"),
}
_PARTS = {"dynamic-slice", "slice", "gather"}


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
