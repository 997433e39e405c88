r"""When workers average: the number H of local steps in a round, from the learning rate.

Everything here runs on the host in float64: in float32 the integer part of $(\alpha/\eta)^2$ would
fall on the wrong side of a boundary now and then. H never depends on data, so that all averages of
a run are known before it begins.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxlm.core.errors import UserError

HSchedule = Callable[[int, float], int]
"""`(step, learning rate at that step) -> H` of the round that begins there."""

LearningRate = Callable[[int], Any]
"""`step -> learning rate`; an optax schedule is one, computed in its own precision."""

NEVER = 2**31 - 1


def constant_h(h: int) -> HSchedule:
    """H local steps in every round; with 1, workers average after every step.

    >>> constant_h(4)(1000, 1e-3)
    4
    """
    if h < 1:
        raise UserError(f"constant_h got h={h}: give 1 or more.")
    return lambda step, lr: h


def linear_h(
    beta: float | int,
    h_base: int = 1,
    *,
    warmup_steps: int = 0,
    warmup_h: int | None = None,
    total_steps: int | None = None,
) -> HSchedule:
    r"""$H = \max(H_{base}, \lfloor \beta/\eta \rfloor)$.

    Arguments, errors and references are those of `qsr`.

    >>> linear_h(0.02, 2)(0, 0.001)
    20
    """
    return _power("linear_h", beta, h_base, 1.0, warmup_steps, warmup_h, total_steps)


def qsr(
    alpha: float | int,
    h_base: int,
    power: float | int = 2.0,
    *,
    warmup_steps: int = 0,
    warmup_h: int | None = None,
    total_steps: int | None = None,
) -> HSchedule:
    r"""The quadratic synchronisation rule, $H = \max(H_{base}, \lfloor(\alpha/\eta)^2\rfloor)$.

    η is the learning rate at the first step of the round.

    Args:
      alpha: α, above 0.
      h_base: the least H.
      power: 2; the paper compares with 1 and 3.
      warmup_steps: rounds that begin before this step have `warmup_h`.
      warmup_h: H during warm-up; `h_base` if None. The paper takes the rule's H at the peak.
      total_steps: where given, no round goes beyond it.

    Raises:
      UserError: α is not positive, or `h_base` is below 1.

    References:
      Gu, Lyu, Arora, Zhang, Huang 2023, arXiv:2310.14423. In the authors' code power is 1 and α is
      0 unless set, and α = 0 means a constant H.

    >>> [qsr(0.0175, 4)(0, lr) for lr in (0.008, 0.004, 0.001)]
    [4, 19, 306]
    """
    return _power("qsr", alpha, h_base, power, warmup_steps, warmup_h, total_steps)


def _power(
    name: str,
    alpha: float | int,
    h_base: int,
    power: float | int,
    warmup_steps: int,
    warmup_h: int | None,
    total_steps: int | None,
) -> HSchedule:
    first = "beta" if name == "linear_h" else "alpha"
    if not 0 < alpha < float("inf"):
        raise UserError(
            f"{name} got {first}={alpha:g}: give a positive number, or take "
            f"constant_h({h_base}) for rounds of one length."
        )
    if h_base < 1 or (warmup_h is not None and warmup_h < 1):
        raise UserError(f"{name} got h_base={h_base}, warmup_h={warmup_h}: give 1 or more.")

    def schedule(step: int, lr: float | int) -> int:
        if step < warmup_steps:
            h = h_base if warmup_h is None else warmup_h
        else:
            h = max(h_base, _floor(alpha, lr, power))
        return h if total_steps is None else max(1, min(h, total_steps - step))

    return schedule


def _floor(alpha: float | int, lr: float | int, power: float | int) -> int:
    if not lr >= 0:
        raise UserError(f"the learning rate of a round is {lr:g}: give one that is not negative.")
    if lr == 0 or power * np.log(alpha / lr) > np.log(NEVER):
        return NEVER
    return int((alpha / lr) ** power)


def _ends(h_schedule: HSchedule, lr_schedule: LearningRate, total_steps: int) -> Iterator[int]:
    step = 0
    while step < total_steps:
        h = int(h_schedule(step, float(lr_schedule(step))))
        if h < 1:
            raise UserError(f"the schedule gave H = {h} at step {step}: give 1 or more.")
        step = min(step + h, total_steps)
        yield step


def sync_steps(
    h_schedule: HSchedule, lr_schedule: LearningRate, total_steps: int
) -> Int[np.ndarray, " rounds"]:
    """Numbers of steps after which workers average, ascending; the last is `total_steps`.

    >>> sync_steps(constant_h(4), lambda step: 0.1, 10).tolist()
    [4, 8, 10]
    """
    return np.fromiter(_ends(h_schedule, lr_schedule, total_steps), np.int64)


def comm_fraction(h_schedule: HSchedule, lr_schedule: LearningRate, total_steps: int) -> float:
    """Averages over steps: the communication of a run, relative to averaging at every step.

    >>> comm_fraction(constant_h(4), lambda step: 0.1, 100)
    0.25
    """
    return len(sync_steps(h_schedule, lr_schedule, total_steps)) / total_steps
