"""Baselines that do not train the model, with the configuration, folder and summary of a run."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxlm.core.errors import UserError
from jaxlm.data import Task, load_task, prepare_for, with_demonstrations
from jaxlm.studies.probe import linear_probe
from jaxlm.train.finetuning import FinetuneConfig
from jaxlm.train.load import load_model
from jaxlm.train.run_folder import RunFolder, to_dict

DEMONSTRATIONS = 32
"""Solved training examples before each test example, as in Malladi et al. (arXiv:2305.17333)."""


class Measured(NamedTuple):
    """Results of a baseline.

    Attributes:
        test: test accuracy; for generated answers F1 and exact match.
        validation: validation accuracy; None if it was not measured.
        forwards: forward passes over a batch, without those of evaluation.
        peak_bytes: memory of the largest compiled program.
    """

    test: dict[str, float]
    validation: float | None
    forwards: int
    peak_bytes: int


def probe_run(
    config: FinetuneConfig, *, base_dir: Path | None = None, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Run a linear probe in place of `finetune`; settings of training are ignored.

    Raises:
        UserError: see `finetune` and `linear_probe`.
    """

    def measure(lm: Any, task: Task) -> Measured:
        encoded = prepare_for(lm, task)
        probe = linear_probe(lm, encoded, batch_size=config.eval_batch_size)
        forwards = -(-len(task.train) // config.eval_batch_size)
        found = probe.accuracy
        test = {"accuracy": found["test"]}
        return Measured(test, found.get("validation"), forwards, probe.peak_bytes)

    return _run(config, measure, base_dir, mesh)


def icl_run(
    config: FinetuneConfig, *, base_dir: Path | None = None, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Run in-context learning in place of `finetune`, from the training examples of the run.

    The run's seed draws one set of demonstrations, which precedes every test example. It is cut on
    the left where it exceeds the model's length; `task.max_length` is ignored.

    Raises:
        UserError: see `finetune` and `jaxlm.data.with_demonstrations`.
    """
    from jaxlm.train.measure import GenerationMetric, MultipleChoiceMetric

    def measure(lm: Any, task: Task) -> Measured:
        task = dataclasses.replace(task, config=dataclasses.replace(task.config, max_length=None))
        task = with_demonstrations(task, DEMONSTRATIONS, seed=config.seed)
        found: GenerationMetric | MultipleChoiceMetric
        if task.config.is_generative:
            found = GenerationMetric(lm, task, batch_size=config.eval_batch_size)
        else:
            size = config.eval_batch_size
            found = MultipleChoiceMetric(lm, prepare_for(lm, task), batch_size=size)
        return Measured(found("test", lm.params), None, 0, found.peak_bytes)

    return _run(config, measure, base_dir, mesh)


def _run(
    config: FinetuneConfig,
    measure: Callable[[Any, Task], Measured],
    base_dir: Path | None,
    mesh: Mesh | None,
) -> dict[str, Any]:
    from jaxlm.train.state import device_peak_bytes

    folder = RunFolder(config.output)
    folder.check(config)
    summary = folder.summary()
    if summary is not None:
        return summary
    begin = time.perf_counter()
    if config.task is None:
        raise UserError(f"task: a baseline needs one (got {config.form}). Give a task.")
    task = load_task(config.task, seed=config.seed, base_dir=base_dir)
    for split in ("train", "test"):
        if not getattr(task, split):
            raise UserError(
                f"task.{split}: the task has no such examples (got none). Name a file of them."
            )
    lm = load_model(config.model, param_dtype=config.param_dtype, bits=config.bits, mesh=mesh)
    found = measure(lm, task)
    metric = next(iter(found.test))
    summary = {
        "model": config.model or "shipped",
        "task": config.task.name,
        "metric": metric,
        "zero_shot": {metric: None},
        "validation": {metric: found.validation},
        "test": found.test,
        "tested_step": 0,
        "steps": 0,
        "forwards": found.forwards,
        "backwards": 0,
        "seconds": time.perf_counter() - begin,
        "peak_memory_bytes": found.peak_bytes,
        "device_peak_bytes": device_peak_bytes(),
        "config": to_dict(config),
    }
    with folder.held(config):
        folder.finish(summary)
    return summary
