"""Fine-tuning to compare with a kernel: validation chooses a learning rate from a grid."""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core.checks import one_of, real, whole
from jaxlm.core.errors import UserError
from jaxlm.kernels.solve import Logistic
from jaxlm.studies.kernel_task import KernelTask
from jaxlm.train.loop import Diverged, LoopConfig, fit
from jaxlm.train.losses import classification_objective
from jaxlm.train.optimizers import OPTIMIZERS, Optimizer
from jaxlm.train.settings import MOST_ROWS, MOST_STEPS
from jaxlm.train.state import Program, method

KERNELS = {
    "sgd": ("sgd",),
    "mezo": ("sgd",),
    "adam": ("signgd", "asymmetric_signgd"),
    "adamw": ("signgd", "asymmetric_signgd"),
}
"""The kernels of an optimizer, by its name. Adam's first steps follow the gradient's signs."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Fine-tuning with one optimizer and a grid of its learning rates.

    Attributes:
        optimizer: see `jaxlm.train.optimizers`.
        learning_rates: replace the optimizer's own; empty to use that alone.
        steps: number of updates.
        batch_size: examples per step.
        eval_every: steps between validations; the best parameters are kept.
    """

    optimizer: Optimizer = field(metadata={"registry": OPTIMIZERS})
    learning_rates: tuple[float, ...] = ()
    steps: int = 200
    batch_size: int = 8
    eval_every: int = 50

    def __post_init__(self):
        whole(self, "steps", "eval_every", most=MOST_STEPS)
        whole(self, "batch_size", most=MOST_ROWS)
        for rate in self.learning_rates:
            real("learning_rates", rate, least=0)
        one_of("optimizer.name", self.optimizer.name, KERNELS)


class Tuned(NamedTuple):
    """The best parameters on validation, what led to them, and their validation accuracy."""

    params: Any
    learning_rate: float
    step: int
    validation: float


class _Best:
    """Evaluate on validation, and keep a copy of the best parameters with their rank."""

    def __init__(self, task: KernelTask, training: Training, rate: float, scorer: Any):
        self.task, self.training, self.rate, self.scorer = task, training, rate, scorer
        self.looks = 0
        self.found: tuple[tuple[float, float], Tuned] | None = None

    def __call__(self, params: Any) -> dict[str, float]:
        scores = self.task.values(self.scorer, "validation", params)
        accuracy = self.task.accuracy(scores, "validation")
        rank = (accuracy, -Logistic().loss(scores, self.task.labels("validation")))
        # The first evaluation is before training.
        if self.looks and (self.found is None or rank > self.found[0]):
            step = min(self.looks * self.training.eval_every, self.training.steps)
            self.found = rank, Tuned(jax.tree.map(jnp.copy, params), self.rate, step, accuracy)
        self.looks += 1
        return {"validation_accuracy": accuracy}


def fine_tune(task: KernelTask, training: Training, *, seed: int) -> Tuned:
    """Fine-tune with every learning rate; validation loss breaks ties of validation accuracy.

    Args:
        task: the model and its examples; the model's own parameters are not changed.
        training: the optimizer and its grid.
        seed: of the order of batches, and of the optimizer.

    Raises:
        UserError: if every learning rate diverged.
    """
    loss_fn = classification_objective(task.lm.apply, task.encoded.token_ids, offsets=task.offsets)
    batches = functools.partial(task.encoded.batches, batch_size=training.batch_size, seed=seed)
    scorer, steps, every = Program(task.f), training.steps, training.eval_every
    loop = LoopConfig(steps=steps, eval_every=every, checkpoint_every=steps, log_every=every)
    best: tuple[tuple[float, float], Tuned] | None = None  # of all rates: each holds a model
    reason: Any = "no finite validation loss"
    for rate in training.learning_rates or (training.optimizer.learning_rate,):
        look = _Best(task, training, rate, scorer)
        chosen = method(dataclasses.replace(training.optimizer, learning_rate=rate), loss_fn, steps)
        params, key = jax.tree.map(jnp.copy, task.lm.params), jax.random.key(seed)
        try:
            fit(chosen, params, batches, loop, key=key, evaluate=look)
        except Diverged as error:
            reason = error
        else:
            if look.found is not None and (best is None or look.found[0] > best[0]):
                best = look.found
    if best is None:
        raise UserError(
            f"learning_rates: fine-tuning failed with every one of them (got {reason}). Give "
            "smaller ones."
        )
    return best[1]
