"""What the configuration of every optimizer has."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxlm.core.errors import UserError


def check(
    name: str, value: float | int | None, *, positive: bool = False, below: float = math.inf
) -> None:
    """Raises UserError for a number below 0, `below` or more, or 0 if it must be positive."""
    if value is None:
        return
    low = value > 0 if positive else value >= 0
    if not (low and value < below):
        least = "a positive number" if positive else "a number from 0"
        most = "" if below == math.inf else f" to below {below:g}"
        raise UserError(f"optimizer.{name} is {value:g}: give {least}{most}.")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What every optimizer has.

    Attributes:
        name: key in `jaxlm.train.optimizers.OPTIMIZERS`.
        learning_rate: the highest of the schedule.
        schedule: constant, or linear down to 0 after the last step.
        warmup: steps over which the learning rate rises from 0.
        weight_decay: decoupled decay; biases and norms are not decayed.
        select: regular expression searched in parameter paths; the other parameters stay as they
            are.
    """

    name: str
    learning_rate: float
    schedule: Literal["constant", "linear"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    select: str | None = None

    def __post_init__(self):
        check("learning_rate", self.learning_rate)
        check("weight_decay", self.weight_decay)
        check("warmup", self.warmup)
        try:
            re.compile(self.select or "")
        except re.error as error:
            raise UserError(
                f"optimizer.select is '{self.select}': give a regular expression ({error})."
            ) from None

    def rate(self, steps: int) -> Any:
        """The learning rate as a number or an optax schedule over `steps` steps."""
        import optax

        if self.schedule == "constant" and not self.warmup:
            return self.learning_rate
        end = self.learning_rate if self.schedule == "constant" else 0.0
        decay = max(steps - self.warmup, 1)
        return optax.schedules.join_schedules(
            [
                optax.schedules.linear_schedule(0.0, self.learning_rate, self.warmup),
                optax.schedules.linear_schedule(self.learning_rate, end, decay),
            ],
            [self.warmup],
        )

    def rates(self, steps: int) -> np.ndarray:
        """The learning rate of every step in float64, [steps]; see `rate`."""
        end = self.learning_rate if self.schedule == "constant" else 0.0
        after = self.warmup + max(steps - self.warmup, 1)
        places = [0, self.warmup, after] if self.warmup else [0, after]
        values = [0.0, self.learning_rate, end] if self.warmup else [self.learning_rate, end]
        return np.interp(np.arange(steps), places, values)
