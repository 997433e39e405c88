"""The configuration and the training that all runs share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax

import jaxlm
from jaxlm.artifacts.files import file_path
from jaxlm.artifacts.folder import hold
from jaxlm.core.checks import distinct, dtype_name, one_of, seeds, whole
from jaxlm.core.errors import UserError
from jaxlm.core.paths import Select
from jaxlm.models import LanguageModel
from jaxlm.sharding import mesh_of
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.dynamics import DYNAMICS, Dynamics, Source, method_and_batches
from jaxlm.train.logging import Progress
from jaxlm.train.loop import LoopConfig, fit
from jaxlm.train.optimizers import OPTIMIZERS, Optimizer
from jaxlm.train.run_folder import Digest, RunFolder, to_dict
from jaxlm.train.settings import MOST_ROWS
from jaxlm.train.state import device_peak_bytes
from jaxlm.train.writers import needed, writing
from jaxlm.typing import LossFn, Params


@dataclass(frozen=True, kw_only=True)
class RunConfig(LoopConfig):
    """The keys of every training run.

    Attributes:
        optimizer: one of `jaxlm.train.optimizers.OPTIMIZERS`, by its name.
        dynamics: a variant of a first-order optimizer's steps, one of
            `jaxlm.train.dynamics.DYNAMICS` by its name.
        batch_size: rows in a step.
        accumulate: number of micro-batches that a step's batch is divided into, one in memory at a
            time; the loss and the gradient are the mean over all targets of the batch.
        compute_dtype: dtype to which parameters are cast when the model reads them, one layer at a
            time; null for their own. With `bfloat16` and parameters in float32, the optimizer has
            float32 master weights and moments.
        remat: what a backward pass computes again instead of keeping it: `none`; `dots`, all but
            the outputs of matrix products; or the whole `layer`, which takes the least memory.
        seed: seed of the order of the data and of the optimizer.
        log_to: where metrics are sent beside the run's folder: tensorboard, wandb; needs
            pip install 'jaxlm[log]'.
        output: folder of the run.
    """

    optimizer: Optimizer = field(metadata={"registry": OPTIMIZERS})
    dynamics: Dynamics | None = field(default=None, metadata={"registry": DYNAMICS})
    batch_size: int
    accumulate: int = 1
    compute_dtype: str | None = None
    remat: Literal["none", "dots", "layer"] = "dots"
    seed: int = 0
    output: str
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self):
        super().__post_init__()
        whole(self, "batch_size", "accumulate", most=MOST_ROWS)
        if self.batch_size % self.accumulate:
            raise UserError(
                f"accumulate: must divide the batch size, {self.batch_size} (got "
                f"{self.accumulate}). Correct it."
            )
        if self.compute_dtype is not None:
            name = dtype_name(self.compute_dtype, "compute_dtype")
            object.__setattr__(self, "compute_dtype", name)
        one_of("remat", self.remat, ("none", "dots", "layer"))
        seeds(self, "seed")
        if self.log_to:
            distinct("log_to", self.log_to)
        file_path(self.output, "output")
        if self.dynamics is not None:
            self.dynamics.check(self.optimizer, self.batch_size // self.accumulate)
            if self.patience is not None:
                raise UserError(
                    f"patience: a run with dynamics takes all its steps (got {self.patience}). "
                    "Leave out one of them."
                )


def finished_or_run(
    config: RunConfig,
    prepare: Callable[[], tuple[Mapping[str, Digest], Callable[[RunFolder], dict[str, Any]]]],
    **fields: Any,
) -> dict[str, Any]:
    """Return the summary of a finished run, or do the run in its folder and write it.

    `prepare` reads what the run needs, before anything is written, and returns the digests of that
    and a function that does the run. `fields` are those of the summary with their types.
    """
    folder = RunFolder(config.output)
    folder.check(config)

    def finished() -> dict[str, Any] | None:
        found = folder.summary(steps=int, seconds=float, config=dict, model=str, **fields)
        done = found is not None and (found["steps"] >= config.steps or found.get("stopped_early"))
        return found if done else None

    if (summary := finished()) is not None and not folder.has_other_names(config):
        return summary
    for name in config.log_to:
        needed(name)
    if folder.path.is_dir():
        with hold(folder.path):  # fail now rather than after minutes of loading
            pass
    digests, work = prepare()
    with folder.held(config, digests):
        summary = finished()
        if summary is None:
            summary = work(folder)
            folder.finish(summary)
    return summary


class Trained(NamedTuple):
    """The best parameters, or the last ones if nothing is monitored; and what `train` found."""

    params: Params
    best_value: float | None
    summary: dict[str, Any]


def train(
    config: RunConfig,
    lm: LanguageModel,
    loss_fn: LossFn,
    source: Source,
    folder: RunFolder,
    progress: Progress,
    *,
    saved: Select = None,
    evaluate: Callable[[Params], dict[str, Any]] | None = None,
    monitor: str | None = None,
    mode: Literal["max", "min"] = "max",
    chance: float | None = None,
) -> Trained:
    """Train a model in a run's folder, or resume there. The parameters of `lm` are donated.

    See `fit`; `saved` are the parameters that checkpoints hold.
    """
    method, batches = method_and_batches(
        config.optimizer,
        config.dynamics,
        loss_fn,
        source,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=config.seed,
        mesh=mesh_of(lm.params),
    )
    checkpoints = Checkpoints(folder.checkpoints, select=saved)
    with writing(config.log_to, folder, to_dict(config)):
        outcome = fit(
            method,
            lm.params,
            batches,
            config,
            key=jax.random.key(config.seed),
            evaluate=evaluate,
            monitor=monitor,
            mode=mode,
            checkpoints=checkpoints,
            trajectory=folder.trajectory,
            metrics=folder.metrics,
            progress=progress,
            chance=chance,
        )
    state, record, steps = outcome.state, outcome.record, outcome.steps
    dynamics = config.dynamics and config.dynamics.report(
        config.optimizer, config.steps, state.opt_state
    )
    tested = steps if record.best_step is None else record.best_step
    params = state.params if tested == steps else checkpoints.in_place_of(state, tested)
    summary = {
        "steps": steps,
        "stopped_early": steps < config.steps,
        "tested_step": tested,
        "diverged_since": record.diverged,
        "forwards": method.forwards * steps,
        "backwards": method.backwards * steps,
        "seconds": record.seconds,
        "goodput": record.goodput,
        "peak_memory_bytes": record.peak_bytes,
        "device_peak_bytes": device_peak_bytes(),
        "checkpoint_bytes": checkpoints.size(steps),
        "dynamics": dynamics,
        "config": to_dict(config),
        "versions": {"jaxlm": jaxlm.__version__, "jax": jax.__version__},
    }
    return Trained(params, record.best_value, summary)
