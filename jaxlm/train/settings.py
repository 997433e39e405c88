"""Options shared by all optimizers."""

import inspect
import math
import re
import textwrap
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from jaxlm.core import checks
from jaxlm.core.checks import in_float32, number, one_of, whole
from jaxlm.core.errors import UserError

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


SCHEDULES = Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Options shared by all optimizers.

    Attributes:
        name: key in `jaxlm.train.optimizers.OPTIMIZERS`.
        learning_rate: highest learning rate of the schedule.
        schedule: of the learning rate after the warm-up: constant; linear or cosine down to the
            floor after the last step; wsd, constant and then linear down to the floor in the last
            `cooldown` of the steps; or inverse_sqrt, which falls as 1 / sqrt(step).
        warmup: number of steps in which the learning rate rises linearly from 0; below 1, their
            share of all steps.
        floor: lowest learning rate after the warm-up, as a share of the highest.
        cooldown: share of all steps in which the schedule wsd falls.
        weight_decay: decoupled weight decay, without biases and norms.
        select: regular expression searched in parameter paths; other parameters stay fixed.
    """

    name: str
    learning_rate: float
    schedule: SCHEDULES = "constant"
    warmup: float | int = 0
    floor: float = 0.0
    cooldown: float = 0.2
    weight_decay: float = 0.0
    select: str | None = None

    def __post_init__(self):
        check(self, "learning_rate", "weight_decay", "warmup")
        number(self, "floor", "cooldown", least=0.0, most=1.0, section=SECTION)
        if self.warmup >= 1 or self.warmup == 0:
            if self.warmup != int(self.warmup):
                raise UserError(
                    f"{SECTION}warmup: must be a whole number of steps, or a share below 1 (got "
                    f"{self.warmup}). Correct it."
                )
            object.__setattr__(self, "warmup", int(self.warmup))
            whole(self, "warmup", least=0, section=SECTION)
        one_of("optimizer.schedule", self.schedule, get_args(SCHEDULES))
        checks.regex("optimizer.select", self.select)

    @property
    def needs_steps(self) -> bool:
        """Whether the learning rate of a step depends on the number of steps of the run."""
        return self.schedule not in ("constant", "inverse_sqrt") or 0 < self.warmup < 1

    def warmup_steps(self, steps: int) -> int:
        """Return the number of steps of the warm-up in a run of `steps` steps."""
        return math.ceil(self.warmup * steps) if self.warmup < 1 else int(self.warmup)

    def rate(self, steps: int) -> Any:
        """Return the learning rate as a number, or as an optax schedule over `steps` steps."""
        return scheduled(self, self.learning_rate, steps)

    def rates(self, steps: int) -> np.ndarray:
        """Return the learning rate of every step in float64, [steps]; see `rate`."""
        import jax

        rate = self.rate(steps)
        with jax.enable_x64(True):
            rates = rate(np.arange(steps)) if callable(rate) else rate
            return np.broadcast_to(np.asarray(rates, np.float64), (steps,))


def scheduled(config: Optimizer, peak: float, steps: int) -> Any:
    """Return a learning rate of this height with the schedule of an optimizer, see `rate`."""
    import jax.numpy as jnp
    from optax import schedules

    if config.schedule == "constant" and not config.warmup:
        return peak
    warmup, end = config.warmup_steps(steps), config.floor * peak
    rest = max(steps - warmup, 1)
    fall = min(max(math.ceil(config.cooldown * steps), 1), rest)

    def inverse_sqrt(count: Any) -> Any:  # optax has none
        start = max(warmup, 1)
        return jnp.maximum(peak * jnp.sqrt(start / (start + jnp.maximum(count, 0))), end)

    after = {
        "constant": lambda: schedules.constant_schedule(peak),
        "linear": lambda: schedules.linear_schedule(peak, end, rest),
        "cosine": lambda: schedules.cosine_decay_schedule(peak, rest, alpha=config.floor),
        "wsd": lambda: schedules.linear_schedule(peak, end, fall, transition_begin=rest - fall),
        "inverse_sqrt": lambda: inverse_sqrt,
    }[config.schedule]()
    if not warmup:
        return after
    rise = schedules.linear_schedule(0.0, peak, warmup)
    return schedules.join_schedules([rise, after], [warmup])


def meanings(function: Any, *, without: Collection[str] = ()) -> str:
    """Return the docstring of a configuration: the first line of a function's and its arguments."""
    text = inspect.cleandoc(function.__doc__ or "")
    section = re.search(r"^Args:\n((?: +.*\n?)+)", text, re.MULTILINE)
    lines = re.split(r"\n(?=\w)", textwrap.dedent(section[1]).rstrip()) if section else []
    own = [x for x in lines if x.split(":")[0] not in without]
    return "\n".join([text.partition("\n")[0], "", "Attributes:", *own])
