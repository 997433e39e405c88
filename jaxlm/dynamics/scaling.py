"""Rules that carry the hyperparameters of an optimizer from one batch size to another."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxlm.core.errors import UserError
from jaxlm.dynamics.choices import check_choice

RULES = ("linear", "sqrt", "none")
ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class OptHParams:
    r"""What a scaling rule reads and changes of a configuration.

    Attributes:
        lr: η, the learning rate; with momentum that of the form $m \leftarrow \beta m + (1 - \beta)
            g$, which is $1 / (1 - \beta)$ times that of the sum $m \leftarrow \beta m + g$.
        b1: decay of the first moment, or momentum; None or 0 without one, and then so it stays.
        b2: decay of the second moment; None or 0 without one.
        eps: what is added to the root of the second moment, outside of it.
        weight_decay: λ of $\theta \leftarrow \theta - \eta \lambda \theta$ beside the update. Decay
            that is added to the gradient is part of the loss, and the same under every rule.
        steps: length of the run.
        warmup: steps of warm-up.
        decay: steps after which the learning rate drops.

    Raises:
        UserError: a number that no optimizer takes.
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
        for name in ("b1", "b2"):
            beta = getattr(self, name)
            if beta is not None and not 0 <= beta < 1:
                raise UserError(f"{name}={beta:g} is impossible; give 0 <= {name} < 1 or None")
        for name in ("lr", "eps", "weight_decay", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name):g} is impossible; give 0 or more")


def scale_rule(rule: str, k: float | int, hp: OptHParams) -> OptHParams:
    r"""The hyperparameters for a batch k times as large, over the same number of epochs.

    | rule   | η               | β                   | ε                    | λ                  |
    |--------|-----------------|---------------------|----------------------|--------------------|
    | linear | $k\eta$         | β                   | ε                    | λ                  |
    | sqrt   | $\sqrt{k}\eta$  | $1 - k(1 - \beta)$  | $\epsilon/\sqrt{k}$ | $\sqrt{k}\lambda$ |
    | none   | η               | β                   | ε                    | λ                  |

    Steps, warm-up and decay are divided by k and rounded. The linear rule is that of SGD with or
    without momentum, the square-root rule that of Adam and RMSprop: each keeps the stochastic
    differential equation of the optimizer, and so the trajectory, as long as the equation describes
    it. A k below 1 is for a smaller batch. λ keeps $\eta \lambda$ times the number of steps.

    Args:
        rule: "linear", "sqrt" or "none".
        k: new batch size divided by the old.
        hp: at the old batch size.

    Raises:
        UserError: an unknown rule, k not above 0, or a β that would fall to 0 or below: the rule
            ends where k reaches `max_scale(hp)`.

    References:
        Malladi et al. 2022, arXiv:2205.10287 (square root); Li et al. 2021, arXiv:2102.12470
        (when the linear rule holds). λ is not in them; it follows from the equation.

    >>> scaled = scale_rule("sqrt", 4, OptHParams(1e-3, b1=0.9, b2=0.999, steps=1000))
    >>> scaled.lr, round(scaled.b1, 9), round(scaled.b2, 9), scaled.steps
    (0.002, 0.6, 0.996, 250)
    """
    check_choice("rule", rule, RULES)
    if not 0 < k < math.inf:
        raise UserError(f"k={k:g} is no ratio of batch sizes; give a number above 0")
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
        shown = round(scaled, 9) + 0.0  # not -0
        raise UserError(
            f"k={k:g} sends {name}={beta:g} to {shown:g}, and the square-root rule ends at 0; give "
            f"k below {max_scale(hp):g}"
        )
    return scaled


def max_scale(hp: OptHParams) -> float:
    r"""The k at which the square-root rule ends, $1 / (1 - \min\beta)$; infinite without a β.

    >>> round(max_scale(OptHParams(1e-3, b1=0.9, b2=0.999)), 9)
    10.0
    """
    betas = [beta for beta in (hp.b1, hp.b2) if beta]
    return 1 / (1 - min(betas)) if betas else math.inf


def scale_schedule(
    schedule: Callable[[Any], Any], k: float | int, multiplier: float | int
) -> Callable[[Any], Any]:
    """A schedule for a run in which one step does what k steps did.

    `step -> multiplier * schedule(floor(k * step))`, where a k of 1/n is taken as n exactly: the
    learning rate of an old step is held for its n new ones.

    Args:
        schedule: `step -> learning rate`, as optax has them.
        k: old steps for each new one.
        multiplier: of the learning rate, for example $k$ under the linear rule.

    >>> halves = scale_schedule(lambda step: 1.0 + step, 0.5, 0.1)
    >>> [round(float(halves(step)), 2) for step in range(4)]
    [0.1, 0.1, 0.2, 0.2]
    """
    each = round(1 / k)
    whole = math.isclose(each * k, 1, rel_tol=ROUNDING)

    def scaled(step: Any) -> Any:
        if float(k).is_integer():
            return multiplier * schedule(step * int(k))
        return multiplier * schedule(step // each if whole else jnp.floor(step * k))

    return scaled


class StepLaw(NamedTuple):
    """What `step_law` predicts.

    Attributes:
        lr: the best peak learning rate.
        batch_tokens: the best batch size in tokens; divide by the length of a sequence.
    """

    lr: float
    batch_tokens: float


def step_law(N: float | int, D: float | int) -> StepLaw:
    r"""The best learning rate and batch size for pre-training a language model with AdamW.

    $$\eta = 1.79\, N^{-0.713} D^{0.307}, \qquad B = 0.58\, D^{0.571}$$

    Fitted to runs whose cosine schedule ends at a learning rate of 1e-5, not at a share of the
    peak, for dense and mixture-of-experts models.

    Args:
        N: parameters without embeddings.
        D: tokens of the run.

    Raises:
        UserError: N or D is not above 0.

    References:
        Li et al. 2025, arXiv:2503.04715.

    >>> law = step_law(1e9, 1e11)
    >>> f"{law.lr:.3e}, {law.batch_tokens:.0f}"
    '1.632e-03, 1107715'
    """
    if not (0 < N < math.inf and 0 < D < math.inf):
        raise UserError(f"N={N:g} and D={D:g} must be counts above 0; give parameters and tokens")
    return StepLaw(1.79 * N**-0.713 * D**0.307, 0.58 * D**0.571)
