"""LoRA training on chosen rows, the epoch checkpoints that LESS needs, and the target's metric."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.checks import number, whole
from jaxlm.core.errors import UserError
from jaxlm.data import load_task, prepare_for
from jaxlm.data.messages import MessageTemplate
from jaxlm.data.rows import PaddedRows, digest
from jaxlm.models.adapters import LORA
from jaxlm.peft import Lora
from jaxlm.sharding import abstract, mesh_of, place_params
from jaxlm.studies.less_rows import PoolRow, Rows, Source, Target, read_source
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.logging import Metrics
from jaxlm.train.loop import LoopConfig, fit
from jaxlm.train.losses import mean_row_loss, row_losses
from jaxlm.train.measure import MultipleChoiceMetric
from jaxlm.train.optimizers import Adam
from jaxlm.train.settings import MOST_ROWS, MOST_STEPS
from jaxlm.train.state import Program, TrainState, method
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
    """The state at the end of an epoch.

    Attributes:
        params: parameters of the whole model.
        opt_state: state of the optimizer, with Adam's moments.
        weight: mean learning rate of the epoch.
    """

    params: Any
    opt_state: Any
    weight: float


def epoch_weights(optimizer: Adam, epochs: int, epoch_steps: int) -> list[float]:
    """Return the mean learning rate over the steps of each epoch.

    Args:
        optimizer: the optimizer, with its schedule.
        epochs: number of epochs.
        epoch_steps: number of steps in an epoch.
    """
    steps = epochs * epoch_steps
    rate = optimizer.rate(steps)
    if not callable(rate):
        return [float(rate)] * epochs
    rates = np.asarray(jax.vmap(rate)(jnp.arange(steps)), np.float64)
    means: list[float] = rates.reshape(epochs, epoch_steps).mean(axis=1).tolist()
    return means


def train(
    folder: Path, lm: Any, rows: Sequence[PoolRow], recipe: Recipe, *, seed: int, keep: bool = False
) -> Any:
    """Train adapters in a folder, or resume there.

    Args:
        folder: folder of `checkpoints/` and `metrics.jsonl`.
        lm: the model without adapters; its parameters are not changed.
        rows: rows to train on.
        recipe: how to train.
        seed: seed of the adapters and of the order of rows.
        keep: whether to keep a checkpoint of every epoch, with the optimizer's state.

    Returns:
        The final parameters.

    Raises:
        UserError: as `jaxlm.train.loop.fit`, or no step has a learning rate above 0.
    """
    padded = PaddedRows(rows, lm.config.pad_id or 0, "targets")
    ready = _prepared(lm, recipe, seed)
    each = recipe.epoch_steps(len(rows))
    steps = recipe.epochs * each
    optimizer = dataclasses.replace(recipe.optimizer_for(len(rows)), select=LORA)
    if not any(epoch_weights(optimizer, recipe.epochs, each)):
        raise UserError(
            f"recipe.warmup_share: all steps have the learning rate 0 (got {steps} steps on "
            f"{len(rows)} rows). Give more rows or epochs, a smaller recipe.batch_size, or 0."
        )
    places = folder / "checkpoints"
    checkpoints = Checkpoints(places, select=LORA, keep_every=each if keep else None)
    metrics = Metrics(folder / "metrics.jsonl")
    metrics.cut(checkpoints.latest_step)
    outcome = fit(
        method(optimizer, mean_row_loss(ready), steps),
        jax.tree.map(jnp.copy, ready.params),
        lambda first, count: padded.batches(first, count, batch_size=recipe.batch_size, seed=seed),
        LoopConfig(steps=steps, eval_every=each, checkpoint_every=each),
        key=jax.random.key(seed),
        checkpoints=checkpoints,
        metrics=metrics,
    )
    return outcome.state.params


def load_epoch(folder: Path, lm: Any, rows: int, recipe: Recipe, epoch: int, *, seed: int) -> Epoch:
    """Load the end of an epoch that `train` kept in a folder; other arguments as there.

    Args:
        rows: number of rows that it trained on.
        epoch: number of the epoch, from 1.

    Raises:
        UserError: the checkpoint is missing or damaged.
    """
    ready = _prepared(lm, recipe, seed)
    each = recipe.epoch_steps(rows)
    optimizer = dataclasses.replace(recipe.optimizer_for(rows), select=LORA)
    chosen = method(optimizer, mean_row_loss(ready), recipe.epochs * each)
    opt_state = abstract(chosen.init, mesh_of(ready.params), ready.params, jax.random.key(0))
    kept = Checkpoints(folder / "checkpoints", select=LORA, read_only=True)
    if epoch * each not in kept.steps():
        place = kept.folder / str(epoch * each)
        raise UserError(f"{place}: there is no checkpoint. Remove {folder} to train again.")
    found = kept.restore(TrainState(ready.params, opt_state), epoch * each)
    assert found is not None
    weights = epoch_weights(optimizer, recipe.epochs, each)
    return Epoch(found[1].params, found[1].opt_state, weights[epoch - 1])


def _prepared(lm: Any, recipe: Recipe, seed: int) -> Any:
    """Return the model with new adapters, on the mesh of its parameters."""
    ready, mesh = recipe.prepare(lm, seed), mesh_of(lm.params)
    return ready if mesh is None else ready.replace(params=place_params(ready.params, mesh))


class Measure:
    """Accuracy on a task's test examples, or the mean loss of conversations, in nats a token.

    Attributes:
        metric: "accuracy" or "loss".
        data: text that identifies the examples measured on.
    """

    def __init__(
        self,
        lm: Any,
        target: Target,
        *,
        batch_size: int,
        template: MessageTemplate,
        max_length: int,
        seed: int,
        base_dir: Path | None,
    ):
        self._measure: MultipleChoiceMetric | _Loss
        if target.task is not None:
            task = load_task(target.task, seed=seed, base_dir=base_dir)
            if not task.test:
                raise UserError(
                    "target.task.test: there are no such examples (got none). Name a file of them."
                )
            task = dataclasses.replace(task, train=(), validation=())
            encoded = prepare_for(lm, task, max_length=max_length)
            self.metric = "accuracy"
            self._measure = MultipleChoiceMetric(lm, encoded, batch_size=batch_size)
            self.data = repr((encoded.test, encoded.token_ids))
            return
        source = Source(messages=target.test or target.messages)
        rows = read_source(
            "test",
            source,
            lm,
            template=template,
            max_length=max_length,
            seed=seed,
            base_dir=base_dir,
        )
        self.metric, self._measure = "loss", _Loss(lm, rows, batch_size)
        self.data = digest(rows.rows)

    def __call__(self, params: Params) -> float:
        return float(self._measure("test", params)[self.metric])


class _Loss:
    """The mean over rows of the mean loss over their answer tokens."""

    def __init__(self, lm: Any, rows: Rows, batch_size: int):
        self._padded = PaddedRows(rows.rows, lm.config.pad_id or 0, "targets")
        self._losses, self._batch_size = Program(row_losses(lm)), batch_size

    def __call__(self, split: str, params: Params) -> dict[str, float]:
        del split
        total = 0.0
        for places in self._padded.blocks(self._batch_size):
            filled = places + places[:1] * (self._batch_size - len(places))
            losses = np.asarray(self._losses(params, self._padded.batch(filled)), np.float64)
            total += losses[: len(places)].sum()
        return {"loss": total / len(self._padded)}
