"""Baselines that do not train the model, with the configuration, folder and summary of a run."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxlm.core.errors import UserError
from jaxlm.data import Task, prepare_for, with_demonstrations
from jaxlm.studies.probe import linear_probe
from jaxlm.train.finetuning import FinetuneConfig, read_data
from jaxlm.train.load import load_model
from jaxlm.train.measure import GenerationMetric, MultipleChoiceMetric
from jaxlm.train.run_folder import RunFolder, to_dict
from jaxlm.train.state import device_peak_bytes

DEMONSTRATIONS = 32
"""Solved training examples before each test example, as in Malladi et al. (arXiv:2305.17333)."""


def probe_run(
    config: FinetuneConfig, *, base_dir: Path | None = None, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Run a linear probe in place of `finetune`; settings of training are ignored."""

    def measure(lm: Any, task: Task) -> dict[str, Any]:
        probe = linear_probe(lm, prepare_for(lm, task), batch_size=config.eval_batch_size)
        return {
            "validation": {"accuracy": probe.accuracy.get("validation")},
            "test": {"accuracy": probe.accuracy["test"]},
            "forwards": -(-len(task.train) // config.eval_batch_size),
            "peak_memory_bytes": probe.peak_bytes,
        }

    return _run(config, measure, base_dir, mesh)


def icl_run(
    config: FinetuneConfig, *, base_dir: Path | None = None, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Run in-context learning in place of `finetune`, from the training examples of the run.

    The run's seed draws one set of demonstrations, which precedes every test example. It is cut on
    the left where it exceeds the model's length; `task.max_length` is ignored.
    """

    def measure(lm: Any, task: Task) -> dict[str, Any]:
        task = dataclasses.replace(task, config=dataclasses.replace(task.config, max_length=None))
        task = with_demonstrations(task, DEMONSTRATIONS, seed=config.seed)
        metric: GenerationMetric | MultipleChoiceMetric
        if task.config.is_generative:
            metric = GenerationMetric(lm, task, batch_size=config.eval_batch_size)
        else:
            size = config.eval_batch_size
            metric = MultipleChoiceMetric(lm, prepare_for(lm, task), batch_size=size)
        return {
            "validation": {metric.main: None},
            "test": metric("test", lm.params),
            "forwards": 0,
            "peak_memory_bytes": metric.peak_bytes,
        }

    return _run(config, measure, base_dir, mesh)


def _run(
    config: FinetuneConfig,
    measure: Callable[[Any, Task], dict[str, Any]],
    base_dir: Path | None,
    mesh: Mesh | None,
) -> dict[str, Any]:
    folder = RunFolder(config.output)
    folder.check(config)
    if (summary := folder.summary()) is not None:
        return summary
    begin = time.perf_counter()
    if config.task is None:
        raise UserError(f"task: a baseline needs one (got {config.form}). Give a task.")
    task = read_data(config, base_dir=base_dir)
    assert isinstance(task, Task)
    lm = load_model(config.model, param_dtype=config.param_dtype, bits=config.bits, mesh=mesh)
    found = measure(lm, task)
    metric = next(iter(found["test"]))
    summary = {
        "model": config.model or "shipped",
        "task": config.task.name,
        "metric": metric,
        "zero_shot": {metric: None},
        **found,
        "tested_step": 0,
        "steps": 0,
        "backwards": 0,
        "seconds": time.perf_counter() - begin,
        "device_peak_bytes": device_peak_bytes(),
        "config": to_dict(config),
    }
    with folder.held(config):
        folder.finish(summary)
    return summary
