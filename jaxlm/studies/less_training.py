"""LoRA training on chosen rows, the epoch checkpoints that LESS needs, and the target's metric."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.checks import number, whole
from jaxlm.core.errors import UserError
from jaxlm.data import prepare_for
from jaxlm.data.rows import digest
from jaxlm.models.adapters import LORA
from jaxlm.peft import Lora
from jaxlm.sharding import abstract, mesh_of, place_params
from jaxlm.studies.less_rows import PoolRow, Reader, Source, Target, padded, row_values
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.logging import Metrics
from jaxlm.train.loop import LoopConfig, fit
from jaxlm.train.losses import mean_row_loss, row_losses
from jaxlm.train.measure import MultipleChoiceMetric
from jaxlm.train.optimizers import Adam
from jaxlm.train.settings import MOST_ROWS, MOST_STEPS
from jaxlm.train.state import Method, Program, TrainState, method
from jaxlm.typing import Params


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train adapters, both in the warm-up and on chosen rows.

    Defaults are those of LESS for models of billions of parameters.

    Attributes:
        peft: the adapters.
        optimizer: Adam; `warmup_share` sets its `warmup`.
        warmup_share: fraction of the steps over which the learning rate rises.
        epochs: number of passes over the rows.
        batch_size: rows per step.
    """

    peft: Lora = field(default=Lora(rank=128, alpha=512.0, targets=r"attention\.(q|k|v|o)_proj"))
    optimizer: Adam = field(default=Adam(learning_rate=2e-5, schedule="linear"))
    warmup_share: float = 0.03
    epochs: int = 4
    batch_size: int = 128

    def __post_init__(self):
        whole(self, "epochs", most=MOST_STEPS)
        whole(self, "batch_size", most=MOST_ROWS)
        number(self, "warmup_share", least=0, below=1)
        if self.optimizer.warmup:
            raise UserError(
                f"optimizer.warmup: differs from stage to stage (got {self.optimizer.warmup}). "
                "Give recipe.warmup_share."
            )

    def epoch_steps(self, rows: int) -> int:
        """Return the number of steps in an epoch of that many rows."""
        return -(-rows // self.batch_size)

    def optimizer_for(self, rows: int) -> Adam:
        """Return the optimizer with its warm-up steps for a run over that many rows."""
        steps = self.epochs * self.epoch_steps(rows)
        return dataclasses.replace(self.optimizer, warmup=math.ceil(self.warmup_share * steps))

    def prepare(self, lm: Any, seed: int) -> Any:
        """Return the model with new adapters."""
        return self.peft.prepare(lm, jax.random.key(seed))


class Epoch(NamedTuple):
    """The state at the end of an epoch; `weight` is its mean learning rate."""

    params: Params
    opt_state: Any
    weight: float


def epoch_weights(optimizer: Adam, epochs: int, epoch_steps: int) -> list[float]:
    """Return the mean learning rate over the steps of each epoch."""
    steps = epochs * epoch_steps
    rate = optimizer.rate(steps)
    if not callable(rate):
        return [float(rate)] * epochs
    rates = np.asarray(jax.vmap(rate)(jnp.arange(steps)), np.float64)
    means: list[float] = rates.reshape(epochs, epoch_steps).mean(axis=1).tolist()
    return means


class _Run(NamedTuple):
    """Training on a number of rows: what `train` does, and `load_epoch` reads back."""

    lm: Any
    epoch_steps: int
    method: Method
    weights: list[float]

    @classmethod
    def of(cls, lm: Any, rows: int, recipe: Recipe, seed: int) -> "_Run":
        ready, mesh = recipe.prepare(lm, seed), mesh_of(lm.params)
        if mesh is not None:
            ready = ready.replace(params=place_params(ready.params, mesh))
        each = recipe.epoch_steps(rows)
        optimizer = dataclasses.replace(recipe.optimizer_for(rows), select=LORA)
        chosen = method(optimizer, mean_row_loss(ready), recipe.epochs * each)
        return cls(ready, each, chosen, epoch_weights(optimizer, recipe.epochs, each))


def train(
    folder: Path, lm: Any, rows: Sequence[PoolRow], recipe: Recipe, *, seed: int, keep: bool = False
) -> Params:
    """Train adapters in a folder, or resume there, and return the final parameters.

    The parameters of `lm`, which has no adapters, do not change. `seed` is that of the adapters and
    of the order of rows. With `keep`, the folder keeps a checkpoint of every epoch, with the
    optimizer's state.
    """
    run = _Run.of(lm, len(rows), recipe, seed)
    batches, steps = padded(lm, rows), recipe.epochs * run.epoch_steps
    if not any(run.weights):
        raise UserError(
            f"recipe.warmup_share: all steps have the learning rate 0 (got {steps} steps on "
            f"{len(rows)} rows). Give more rows or epochs, a smaller recipe.batch_size, or 0."
        )
    every = run.epoch_steps if keep else None
    checkpoints = Checkpoints(folder / "checkpoints", select=LORA, keep_every=every)
    metrics = Metrics(folder / "metrics.jsonl")
    metrics.cut(checkpoints.latest_step)
    outcome = fit(
        run.method,
        jax.tree.map(jnp.copy, run.lm.params),
        functools.partial(batches.batches, batch_size=recipe.batch_size, seed=seed),
        LoopConfig(steps=steps, eval_every=run.epoch_steps, checkpoint_every=run.epoch_steps),
        key=jax.random.key(seed),
        checkpoints=checkpoints,
        metrics=metrics,
    )
    return outcome.state.params


def load_epoch(folder: Path, lm: Any, rows: int, recipe: Recipe, epoch: int, *, seed: int) -> Epoch:
    """Load the end of an epoch, from 1, that `train` kept of a run over that many rows."""
    run = _Run.of(lm, rows, recipe, seed)
    params, step = run.lm.params, epoch * run.epoch_steps
    opt_state = abstract(run.method.init, mesh_of(params), params, jax.random.key(0))
    kept = Checkpoints(folder / "checkpoints", select=LORA, read_only=True)
    found = kept.restore(TrainState(params, opt_state), step) if step in kept.steps() else None
    if found is None:
        raise UserError(
            f"{kept.folder / str(step)}: there is no checkpoint. Remove {folder} to train again."
        )
    return Epoch(found[1].params, found[1].opt_state, run.weights[epoch - 1])


class Measure(NamedTuple):
    """Accuracy on a task's test examples, or the mean loss of conversations, in nats a token.

    Attributes:
        metric: "accuracy" or "loss".
        data: text that identifies the examples measured on.
        value: returns the metric at parameters.
    """

    metric: str
    data: str
    value: Callable[[Params], float]

    @classmethod
    def of(cls, target: Target, lm: Any, reader: Reader, *, batch_size: int) -> "Measure":
        """Return the metric of a target for a model, on the data that a reader reads."""
        if target.task is not None:
            task = reader.task(target.task)
            if not task.test:
                raise UserError(
                    "target.task.test: there are no such examples (got none). Name a file of them."
                )
            task = dataclasses.replace(task, train=(), validation=())
            encoded = prepare_for(lm, task, max_length=reader.max_length)
            score = MultipleChoiceMetric(lm, encoded, batch_size=batch_size)
            data = repr((encoded.test, encoded.token_ids))
            return cls("accuracy", data, lambda params: score("test", params)["accuracy"])
        rows = reader.source("test", Source(messages=target.test or target.messages)).rows
        losses = Program(row_losses(lm))

        def value(params: Params) -> float:
            values = row_values(losses, params, lm, rows, batch_size)
            return float(values.mean(dtype=np.float64))

        return cls("loss", digest(rows), value)
