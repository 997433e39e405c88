"""What the devices of a compiled program tell each other."""

import math
import re

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"


def collectives(compiled) -> list[int]:
    """Numbers in each array that a collective of a compiled program moves."""
    found = re.findall(rf"= (.*?) (?:{KINDS})(?:-start)?\(", compiled.as_text())
    shapes = [shape for result in found for shape in re.findall(r"\w+\[([\d,]*)\]", result)]
    return [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]


def largest_array(compiled) -> int:
    """Elements of the largest float array in a compiled program."""
    shapes = re.findall(r"\bf32\[([\d,]*)\]", compiled.as_text())
    return max(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)
