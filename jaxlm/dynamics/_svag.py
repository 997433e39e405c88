r"""SVAG: train with any optimizer in steps that approach its stochastic differential equation.

Stochastic variance amplified gradient replaces one step by l steps, or l^2 for adaptive optimizers,
each smaller and with proportionally more noise. As l grows, the run converges to the equation. So
if runs with l = 1 and a large l agree, the equation describes the run (Li, Malladi, Arora 2021,
arXiv:2102.12470; adaptive optimizers: Malladi et al. 2022, arXiv:2205.10287).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import paths
from jaxlm.core.checks import one_of, real
from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError
from jaxlm.dynamics.scaling import OptHParams, scale_rule
from jaxlm.typing import Batch, LossFn


def svag_coefficients(amplification: float | int) -> tuple[float, float]:
    r"""Return the weights of the two halves, $c = (1 \pm \sqrt{2a - 1}) / 2$.

    $c_1 + c_2 = 1$ keeps the mean of the gradient, and $c_1^2 + c_2^2 = a$ multiplies its
    covariance by a.

    Args:
        amplification: a, at least 1: l for SGD with and without momentum, $l^2$ for adaptive
            methods.

    Raises:
        UserError: if a is below 1 or not finite.

    >>> svag_coefficients(5)
    (2.0, -1.0)
    """
    real("amplification", amplification, least=1)
    root = math.sqrt(2 * amplification - 1)
    return (1 + root) / 2, (1 - root) / 2


def svag_value_and_grad(
    loss_fn: LossFn, amplification: float | int, *, has_aux: bool = False
) -> Callable[..., Any]:
    r"""Return a function for the gradient $\nabla (c_1 L_a + c_2 L_b)$ of two batches.

    It takes one backward pass. Draw the two batches independently of each other. Pass the gradient
    to any optax optimizer with the hyperparameters of `SVAG.hparams`. Do not clip the gradient: one
    weight is above 1 and one below 0, and a clipped gradient no longer follows the equation.

    Memory: that of one batch as large as both.

    Args:
        loss_fn: `(params, batch, *rest) -> loss`, or `(loss, aux)` with `has_aux`. The halves run
            under `vmap`, so that each has its own batch statistics.
        amplification: see `svag_coefficients`.
        has_aux: as in `jax.value_and_grad`.

    Returns:
        `fn(params, batch_a, batch_b, *rest, key=None, **options)` that returns `(loss, grads)`, or
        `((loss, aux), grads)` with leaves of `aux` stacked, [2, ...]. `loss` is the mean of both
        halves, which is the number to log, and not the weighted sum. A key is split between the
        halves.

    Raises:
        UserError: if the amplification is below 1; or, when called, if the halves differ in shape.

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
            def half_loss(batch: Any, key: Any) -> Any:
                given = options if key is None else {**options, "key": key}
                value = loss_fn(params, batch, *rest, **given)
                return value if has_aux else (value, None)

            # The halves have different weights and so need separate losses, but one backward pass
            # of the weighted sum is enough.
            losses, aux = jax.vmap(half_loss)(halves, keys)
            losses = wide(losses)
            total = jnp.sum(jnp.asarray(weights, losses.dtype) * losses)
            return total, (losses.mean(), aux)

        (_, (loss, aux)), grads = jax.value_and_grad(weighted, has_aux=True)(params)
        return ((loss, aux) if has_aux else loss), grads

    return value_and_grad


def _stacked(batch_a: Batch, batch_b: Batch) -> Batch:
    shapes = [jax.tree.map(jnp.shape, batch) for batch in (batch_a, batch_b)]
    if jax.tree.flatten(shapes[0]) != jax.tree.flatten(shapes[1]):
        raise UserError(
            f"batch_b: must have the fields and shapes of batch_a, {shapes[0]} (got {shapes[1]}). "
            "Give two batches of one kind and size."
        )
    return jax.tree.map(lambda a, b: jnp.stack([a, b]), batch_a, batch_b)


def split_halves(batch: Batch) -> tuple[Batch, Batch]:
    """Split a batch of leaves [2 B, ...] into its first and its second half.

    Raises:
        UserError: if a leaf does not have an even number of examples.

    >>> split_halves(np.arange(4))
    (array([0, 1]), array([2, 3]))
    """
    for leaf in paths.flatten(batch)[0]:
        shape = list(np.shape(leaf.value))
        if not shape or shape[0] % 2 or shape[0] == 0:
            place = f".{leaf.path}" if leaf.path else ""
            raise UserError(
                f"batch{place}: must have an even number of examples (got the shape {shape}). Give "
                "two batches in one."
            )
    return (
        jax.tree.map(lambda x: x[: len(x) // 2], batch),
        jax.tree.map(lambda x: x[len(x) // 2 :], batch),
    )


@dataclasses.dataclass(frozen=True)
class SVAG:
    """A degree of amplification, and the hyperparameters that belong to it; see `svag`.

    Attributes:
        l: degree of amplification, at least 1; 1 is the optimizer itself.
        kind: "sgd", "sgdm" or "adaptive".
    """

    l: float | int
    kind: str = "sgd"

    def __post_init__(self):
        real("l", self.l, least=1)
        one_of("kind", self.kind, ("sgd", "sgdm", "adaptive"))

    @property
    def amplification(self) -> float | int:
        """The factor on the covariance of the gradient."""
        return self.l**2 if self.kind == "adaptive" else self.l

    @property
    def steps_mult(self) -> float | int:
        """The number of steps that replace one; it equals the amplification."""
        return self.amplification

    @property
    def lr_mult(self) -> float:
        """The factor on the learning rate, 1/l."""
        return 1 / self.l

    def hparams(self, hp: OptHParams) -> OptHParams:
        """Return the hyperparameters of the SVAG run, given those of the optimizer itself.

        This is a scaling rule with `k = 1 / steps_mult`: the square-root rule for adaptive methods,
        and the linear rule for others, which leaves momentum as it is.
        """
        rule = "sqrt" if self.kind == "adaptive" else "linear"
        return scale_rule(rule, 1 / self.steps_mult, hp)

    def wrap_schedule(self, schedule: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Convert a learning rate schedule over steps of the optimizer to one over SVAG steps.

        The learning rate of a step, divided by l, is held for all SVAG steps that replace it.
        """
        count = self.steps_mult

        def scaled(step: Any) -> Any:
            # Whole numbers are divided as integers: float32 would lose steps above 2^24.
            whole = float(count).is_integer()
            effective = step // int(count) if whole else jnp.floor(step / count)
            return self.lr_mult * schedule(effective)

        return scaled

    def value_and_grad(self, loss_fn: LossFn, *, has_aux: bool = False) -> Callable[..., Any]:
        """Return `svag_value_and_grad` with this amplification."""
        return svag_value_and_grad(loss_fn, self.amplification, has_aux=has_aux)


def svag(l: float | int, kind: str = "sgd") -> SVAG:
    r"""Return the settings for running an optimizer with its noise amplified.

    | kind     | covar. | η   | β                     | ε   | steps | time of a step | error      |
    |----------|--------|-----|-----------------------|-----|-------|----------------|------------|
    | sgd      | l      | η/l |                       |     | l     | η/l            | O(1/l)     |
    | sgdm     | l      | η/l | β                     |     | l     | η/l            | O(1/l)     |
    | adaptive | $l^2$  | η/l | $1 - (1 - \beta)/l^2$ | ε l | $l^2$ | $(\eta/l)^2$   | $O(1/l^2)$ |

    The errors are weak errors at a fixed η, against the equation of the optimizer. A step reads two
    batches, so a run reads `2 * steps_mult` times the data of the optimizer itself. The paper draws
    the two batches independently; the authors' code takes consecutive batches of one shuffled pass.
    In float32, a β above 1 - 1e-4 loses digits in bias corrections.

    Args:
        l: at least 1; with a whole number, SVAG steps divide the optimizer's steps exactly.
        kind: "sgd"; "sgdm", momentum as in `dynamics.momentum.sgdm`; "adaptive": Adam, RMSprop.

    Raises:
        UserError: if l is below 1, or the kind is unknown.

    References:
        arXiv:2102.12470 (SGD), arXiv:2205.10287 (adaptive), arXiv:2307.15196 (momentum).

    >>> method = svag(4, "adaptive")
    >>> method.amplification, method.hparams(OptHParams(1e-3, b1=0.9, b2=0.99, steps=100)).steps
    (16, 1600)
    """
    return SVAG(l, kind)
