r"""SVAG: steps of any optimizer that follow its stochastic differential equation ever closer.

Stochastic variance amplified gradient takes l steps, or l^2 for adaptive optimizers, in place of
one, each smaller and with a noise larger in proportion. What survives as l grows is the equation,
so where l = 1 and a large l train alike the equation describes the run (Li, Malladi, Arora 2021,
arXiv:2102.12470; adaptive optimizers: Malladi et al. 2022, arXiv:2205.10287).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.dynamics.choices import check_choice
from jaxlm.dynamics.pairs import PAIRINGS, pair_indices
from jaxlm.dynamics.scaling import OptHParams, scale_rule, scale_schedule
from jaxlm.typing import Batch, LossFn, PRNGKey

KINDS = ("sgd", "sgdm", "adaptive")


def svag_coefficients(amplification: float | int) -> tuple[float, float]:
    r"""The weights of the two halves, $c = (1 \pm \sqrt{2a - 1}) / 2$.

    $c_1 + c_2 = 1$ keeps the mean of the gradient and $c_1^2 + c_2^2 = a$ multiplies its covariance
    by a.

    Args:
        amplification: a, from 1: l for SGD with and without momentum, $l^2$ for adaptive methods.

    Raises:
        UserError: a is below 1 or not finite.

    >>> svag_coefficients(5)
    (2.0, -1.0)
    """
    if not 1 <= amplification < math.inf:
        raise UserError(f"amplification={amplification:g} is impossible; give a number from 1")
    root = math.sqrt(2 * amplification - 1)
    return (1 + root) / 2, (1 - root) / 2


def svag_value_and_grad(
    loss_fn: LossFn, amplification: float | int, *, has_aux: bool = False
) -> Callable[..., Any]:
    r"""Gradient $\nabla (c_1 L_a + c_2 L_b)$ of two batches, in one backward pass.

    The batches must be drawn independently of each other, see `pair_indices`. Feed the gradient to
    any optax optimizer with hyperparameters of `SVAG.hparams`. Weights above 1 and below 0 change
    what clipping does: a chain with clipping by norm no longer follows the equation.

    Memory: that of one batch of both sizes together.

    Args:
        loss_fn: `(params, batch, *rest) -> loss`, or `(loss, aux)` with `has_aux`. The halves run
            under `vmap`, so that each has its own batch statistics.
        amplification: see `svag_coefficients`.
        has_aux: as in `jax.value_and_grad`.

    Returns:
        `fn(params, batch_a, batch_b, *rest, key=None, **options)` that returns `(loss, grads)`, or
        `((loss, aux), grads)` with leaves of `aux` stacked, [2, ...]. `loss` is the mean of both
        halves, the number to log, and not the weighted sum. A key is split: each half has its own.

    Raises:
        UserError: the amplification is below 1; or, when called, the halves differ in shape.

    >>> fn = svag_value_and_grad(lambda w, x: jnp.mean(w * x), 5)
    >>> loss, grad = fn(1.0, jnp.array([1.0, 3.0]), jnp.array([0.0, 2.0]))
    >>> float(loss), float(grad)
    (1.5, 3.0)
    """
    weights = np.array(svag_coefficients(amplification))

    def value_and_grad(
        params: Any, batch_a: Batch, batch_b: Batch, *rest: Any, key: Any = None, **options: Any
    ) -> Any:
        halves = _stacked(batch_a, batch_b)
        keys = None if key is None else jax.random.split(key)

        def weighted(params: Any) -> Any:
            def of_half(batch: Any, key: Any) -> Any:
                given = options if key is None else {**options, "key": key}
                value = loss_fn(params, batch, *rest, **given)
                return value if has_aux else (value, None)

            losses, aux = jax.vmap(of_half)(halves, keys)
            losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
            total = jnp.sum(jnp.asarray(weights, losses.dtype) * losses)
            return total, (losses.mean(), aux)

        (_, (loss, aux)), grads = jax.value_and_grad(weighted, has_aux=True)(params)
        return ((loss, aux) if has_aux else loss), grads

    return value_and_grad


def _stacked(batch_a: Batch, batch_b: Batch) -> Batch:
    (first, structure), (second, other) = paths.flatten(batch_a), paths.flatten(batch_b)
    if structure != other:
        raise UserError("the two halves have different fields; give two batches of the same kind")
    for a, b in zip(first, second, strict=True):
        shapes = [list(jnp.shape(leaf.value)) for leaf in (a, b)]
        if shapes[0] != shapes[1]:
            place = f" at {a.path}" if a.path else ""
            raise UserError(
                f"the two halves have shapes {shapes[0]} and {shapes[1]}{place}; give two batches "
                "of the same size"
            )
    return jax.tree.map(lambda a, b: jnp.stack([a, b]), batch_a, batch_b)


@dataclasses.dataclass(frozen=True)
class SVAG:
    """A degree of amplification, and what it makes of a configuration; see `svag`.

    Attributes:
        l: from 1, where it is the optimizer itself.
        kind: "sgd", "sgdm" or "adaptive".
        pairing: how `pair_indices` draws the halves.
    """

    l: float | int
    kind: str = "sgd"
    pairing: str = "independent"

    def __post_init__(self):
        if not 1 <= self.l < math.inf:
            raise UserError(f"l={self.l:g} is impossible; give a number from 1")
        check_choice("kind", self.kind, KINDS)
        check_choice("pairing", self.pairing, PAIRINGS)

    @property
    def amplification(self) -> float | int:
        """What the covariance of the gradient is multiplied by."""
        return self.l**2 if self.kind == "adaptive" else self.l

    @property
    def steps_mult(self) -> float | int:
        """Steps in place of one; the amplification keeps pace with them."""
        return self.amplification

    @property
    def lr_mult(self) -> float:
        """What the learning rate is multiplied by, 1/l."""
        return 1 / self.l

    @property
    def eps_mult(self) -> float | int:
        """What ε is multiplied by."""
        return self.l if self.kind == "adaptive" else 1

    def beta_map(self, beta: float | int) -> float | int:
        """The decay of a moment: $1 - (1 - β)/l^2$ for adaptive methods, otherwise unchanged."""
        return 1 - (1 - beta) / self.l**2 if self.kind == "adaptive" and beta else beta

    def hparams(self, hp: OptHParams) -> OptHParams:
        """The configuration of the run, from that of the optimizer itself.

        A scaling rule with `k = 1 / steps_mult`: the square-root rule for adaptive methods, the
        linear rule for others, momentum untouched.
        """
        rule = "sqrt" if self.kind == "adaptive" else "linear"
        return scale_rule(rule, 1 / self.steps_mult, hp)

    def wrap_schedule(self, schedule: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The learning rate of a step from a schedule over effective steps.

        An effective step holds its learning rate, divided by l, for all of its steps.
        """
        return scale_schedule(schedule, 1 / self.steps_mult, self.lr_mult)

    def effective_step(self, step: Any) -> Any:
        """Steps of the optimizer itself that as many steps stand for: the axis to compare on."""
        return step / self.steps_mult

    def time_per_step(self, lr: Any) -> Any:
        r"""Time of the equation that a step takes: $\eta / l$, for adaptive methods $(\eta/l)^2$.

        Args:
            lr: η of the optimizer itself, not of the SVAG run.
        """
        return (lr / self.l) ** 2 if self.kind == "adaptive" else lr / self.l

    def value_and_grad(self, loss_fn: LossFn, *, has_aux: bool = False) -> Callable[..., Any]:
        """`svag_value_and_grad` with this amplification."""
        return svag_value_and_grad(loss_fn, self.amplification, has_aux=has_aux)

    def batches(
        self, key: PRNGKey, step: int | Array, num_examples: int, batch_size: int
    ) -> Int[Array, "2 B"]:
        """`pair_indices` with this pairing."""
        return pair_indices(key, step, num_examples, batch_size, pairing=self.pairing)


def svag(l: float | int, kind: str = "sgd", *, pairing: str = "independent") -> SVAG:
    r"""How to run an optimizer with its noise amplified.

    | kind     | covar. | η   | β                     | ε   | steps | time of a step | error      |
    |----------|--------|-----|-----------------------|-----|-------|----------------|------------|
    | sgd      | l      | η/l |                       |     | l     | η/l            | O(1/l)     |
    | sgdm     | l      | η/l | β                     |     | l     | η/l            | O(1/l)     |
    | adaptive | $l^2$  | η/l | $1 - (1 - \beta)/l^2$ | ε l | $l^2$ | $(\eta/l)^2$   | $O(1/l^2)$ |

    The weak errors are at a fixed η, against the equation that the optimizer has. A step reads two
    batches, so the run reads `2 * steps_mult` times the data of the optimizer itself. In float32 a
    β above 1 - 1e-4 loses digits in bias corrections.

    Args:
        l: from 1; whole numbers make steps that fit exactly into those of the optimizer.
        kind: "sgd"; "sgdm", momentum as in `jaxlm.dynamics.sgdm`; "adaptive": Adam, RMSprop.
        pairing: "independent" or "consecutive", see `pair_indices`.

    Raises:
        UserError: l is below 1, or kind or pairing are not known.

    References:
        arXiv:2102.12470 (SGD), arXiv:2205.10287 (adaptive), arXiv:2307.15196 (momentum).

    >>> method = svag(4, "adaptive")
    >>> method.amplification, method.hparams(OptHParams(1e-3, b1=0.9, b2=0.99, steps=100)).steps
    (16, 1600)
    """
    return SVAG(l, kind, pairing)
