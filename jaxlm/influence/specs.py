"""What the rows of a gradient store are of, and which stores may be scored together."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxlm.artifacts.folder import short
from jaxlm.core.errors import UserError
from jaxlm.gradients.projection import Projector
from jaxlm.influence.encodings import encoding


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What the rows of a store are of. Whatever is left empty is compared too, as empty.

    Attributes:
      dim: numbers in a row.
      dtype: how they are written: "float32", "float16", "int8" or "1bit", see
        `jaxlm.influence.encodings`.
      projection: `projection_name` of the projector.
      parameters: which parameters have gradients: a regular expression, or any text.
      gradient: which gradient: "sgd", "adam paper", ...
      model: `fingerprint` of the parameters.
      data: `fingerprint` of the examples.
      checkpoint: name or step of the checkpoint.
      weight: of the checkpoint in a score: the mean learning rate of its epoch.

    >>> StoreSpec(dim=8, projection="srht, seed 0", checkpoint=100, weight=1e-5).dtype
    'float32'
    """

    dim: int
    dtype: str = "float32"
    projection: str = ""
    parameters: str = ""
    gradient: str = ""
    model: str = ""
    data: str = ""
    checkpoint: str | int = ""
    weight: float | int = 1.0

    def __post_init__(self) -> None:
        for name in ("dim", "checkpoint", "weight"):
            value: Any = getattr(self, name)
            if hasattr(value, "item"):  # a scalar of NumPy or JAX, such as the value of a schedule
                object.__setattr__(self, name, value.item())
        encoding(self.dtype)
        if self.dim < 1:
            raise UserError(f"dim is {self.dim}: give the numbers of a row, 1 or more")
        if not 0 <= self.weight < float("inf"):
            raise UserError(f"weight is {self.weight}: give a learning rate, 0 or more")


def projection_name(projector: Projector | None) -> str:
    """What makes two projections the same, as a text.

    >>> from jaxlm.gradients.projection import projector
    >>> projection_name(projector("srht", dim=64, seed=3))
    'srht to 64, seed 3'
    """
    if projector is None:
        return "none"
    return f"{projector.family} to {projector.dim}, seed {int(projector.seed)}"


OF_ALL = ("dim", "projection", "parameters")
"""What rows must share for inner products between them to mean anything."""

OF_CHECKPOINT = (*OF_ALL, "model", "checkpoint", "weight")
"""What training and target rows of one checkpoint must share."""

OF_SIDE = (*OF_ALL, "dtype", "gradient", "data")
"""What the rows of one side must share over the checkpoints."""


def check_equal(specs: Sequence[tuple[str, Any]], fields: Sequence[str]) -> None:
    """Checks that all specs have the same fields.

    Args:
      specs: pairs of a name, for the message, and a `StoreSpec`.
      fields: to be compared.

    Raises:
      UserError: naming the first field that differs, and both values.
    """
    (name, first), *others = specs
    for field in fields:
        for other_name, other in others:
            a, b = getattr(first, field), getattr(other, field)
            if a != b:
                raise UserError(
                    f"{name} and {other_name} differ in {field} ({short(a)} and {short(b)}); "
                    "give stores that agree"
                )
