"""Options shared by all optimizers."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxlm.core import checks
from jaxlm.core.checks import in_float32, number, one_of, whole

SECTION = "optimizer."

MOST_STEPS = 10**9
"""Largest number of steps: schedules and orders are arrays over the steps."""

MOST_ROWS = 2**20
"""Largest number of examples in a step or a forward pass."""


def check(
    config: Any, *names: str, least: float = 0.0, positive: bool = False, below: float = math.inf
) -> None:
    """Require fields to be numbers from `least`, or above 0, to below `below`, in float32 too."""
    above = 0.0 if positive else -math.inf
    number(config, *names, least=least, above=above, below=below, section=SECTION)
    for name in names:
        in_float32(SECTION + name, getattr(config, name), below=below)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Options shared by all optimizers.

    Attributes:
        name: key in `jaxlm.train.optimizers.OPTIMIZERS`.
        learning_rate: highest learning rate of the schedule.
        schedule: constant, or linear down to 0 after the last step.
        warmup: number of steps in which the learning rate rises from 0.
        weight_decay: decoupled weight decay, without biases and norms.
        select: regular expression searched in parameter paths; other parameters stay fixed.
    """

    name: str
    learning_rate: float
    schedule: Literal["constant", "linear"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    select: str | None = None

    def __post_init__(self):
        check(self, "learning_rate", "weight_decay")
        whole(self, "warmup", least=0, section=SECTION)
        one_of("optimizer.schedule", self.schedule, ("constant", "linear"))
        checks.regex("optimizer.select", self.select)

    def rate(self, steps: int) -> Any:
        """Return the learning rate as a number, or as an optax schedule over `steps` steps."""
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
        """Return the learning rate of every step in float64, [steps]; see `rate`."""
        end = self.learning_rate if self.schedule == "constant" else 0.0
        after = self.warmup + max(steps - self.warmup, 1)
        places = [0, self.warmup, after] if self.warmup else [0, after]
        values = [0.0, self.learning_rate, end] if self.warmup else [self.learning_rate, end]
        return np.interp(np.arange(steps), places, values)
