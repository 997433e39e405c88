"""Scaling rules: carry the hyperparameters of an optimizer from one batch size to another."""

import dataclasses
import math
from typing import Any

from jaxlm.core.checks import number, one_of, real
from jaxlm.core.errors import UserError

ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class OptHParams:
    r"""The hyperparameters that a scaling rule reads and changes.

    Attributes:
        lr: η, the learning rate; with momentum that of the form $m \leftarrow \beta m + (1 - \beta)
            g$, which is $1 / (1 - \beta)$ times that of the sum $m \leftarrow \beta m + g$.
        b1: decay of the first moment, or momentum; None or 0 means none, and the rules keep it.
        b2: decay of the second moment; None or 0 means none.
        eps: ε, added to the root of the second moment, outside the root.
        weight_decay: λ of decoupled decay, $\theta \leftarrow \theta - \eta \lambda \theta$. Decay
            that is added to the gradient is part of the loss, and no rule changes it.
        steps: length of the run.
        warmup: steps of warm-up.
        decay: steps after which the learning rate drops.

    Raises:
        UserError: if a number is out of range.
    """

    lr: float | int
    b1: float | int | None = None
    b2: float | int | None = None
    eps: float | int = 1e-8
    weight_decay: float | int = 0.0
    steps: int | None = None
    warmup: int = 0
    decay: tuple[int, ...] = ()

    def __post_init__(self):
        number(self, "b1", "b2", least=0, below=1)
        number(self, "lr", "eps", "weight_decay", "warmup", least=0)


def scale_rule(rule: str, k: float | int, hp: OptHParams) -> OptHParams:
    r"""Return the hyperparameters for a batch k times as large, over the same number of epochs.

    | rule   | η               | β                   | ε                    | λ                  |
    |--------|-----------------|---------------------|----------------------|--------------------|
    | linear | $k\eta$         | β                   | ε                    | λ                  |
    | sqrt   | $\sqrt{k}\eta$  | $1 - k(1 - \beta)$  | $\epsilon/\sqrt{k}$ | $\sqrt{k}\lambda$ |
    | none   | η               | β                   | ε                    | λ                  |

    Steps, warm-up and decay are divided by k and rounded. The linear rule is for SGD with or
    without momentum, and the square-root rule for Adam and RMSprop: each keeps the stochastic
    differential equation of the optimizer, and so the trajectory if the equation describes the run.
    The rule for λ keeps $\eta \lambda$ times the number of steps.

    Args:
        rule: "linear", "sqrt" or "none".
        k: the new batch size divided by the old one; below 1 for a smaller batch.
        hp: the hyperparameters at the old batch size.

    Raises:
        UserError: if the rule is unknown, k is not above 0, or a β would fall to 0 or below: the
            square-root rule requires $k < 1 / (1 - \min\beta)$.

    References:
        Malladi et al. 2022, arXiv:2205.10287 (square root); Li et al. 2021, arXiv:2102.12470 (when
        the linear rule holds). The rule for λ is not in them; it follows from the equation.

    >>> scaled = scale_rule("sqrt", 4, OptHParams(1e-3, b1=0.9, b2=0.999, steps=1000))
    >>> scaled.lr, round(scaled.b1, 9), round(scaled.b2, 9), scaled.steps
    (0.002, 0.6, 0.996, 250)
    """
    one_of("rule", rule, ("linear", "sqrt", "none"))
    real("k", k, above=0)
    root = math.sqrt(k)
    changed: dict[str, Any] = {}
    if rule == "linear":
        changed = {"lr": k * hp.lr}
    elif rule == "sqrt":
        changed = {
            "lr": root * hp.lr,
            "b1": _scaled_beta("b1", hp, k),
            "b2": _scaled_beta("b2", hp, k),
            "eps": hp.eps / root,
            "weight_decay": root * hp.weight_decay,
        }
    return dataclasses.replace(
        hp,
        **changed,
        steps=None if hp.steps is None else max(1, round(hp.steps / k)),
        warmup=round(hp.warmup / k),
        decay=tuple(round(step / k) for step in hp.decay),
    )


def _scaled_beta(name: str, hp: OptHParams, k: float | int) -> float | int | None:
    beta = getattr(hp, name)
    if not beta:
        return beta
    scaled = 1 - k * (1 - beta)
    if scaled < ROUNDING:
        largest = 1 / (1 - min(b for b in (hp.b1, hp.b2) if b))
        shown = round(scaled, 9) + 0.0  # 0, and not -0
        raise UserError(
            f"k: makes {name}={beta:g} fall to {shown:g}, where the square-root "
            f"rule does not hold (got {k:g}). Give k below {largest:g}."
        )
    return scaled
