"""What the devices of a compiled program tell each other."""

import math
import re

from jaxlm.cost import hlo


def collectives(compiled) -> list[int]:
    """Numbers in each array that a collective of a compiled program moves."""
    return [each.size for each in hlo.collectives(compiled)]


def largest_array(compiled) -> int:
    """Elements of the largest float array in a compiled program."""
    shapes = re.findall(r"\bf32\[([\d,]*)\]", compiled.as_text())
    return max(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)
