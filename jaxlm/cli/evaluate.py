"""Accuracy of a model, as it is, on a task.

usage: jaxlm evaluate MODEL [--task.name=subj] [--split=test] [--dotted.path=value ...]
       jaxlm evaluate config.yaml [--split=test] [--dotted.path=value ...]

MODEL is a folder, a hub id, or the folder of a run of `jaxlm finetune`; a run is evaluated on its
own task where none is given. The configuration may be that of a fine-tuning run: what does not
concern evaluation is passed over. Printed as JSON are the accuracy of the highest score, the
accuracy with scores calibrated on the training texts (labels unused), and that of the most frequent
class.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from jaxlm.cli import config as configs
from jaxlm.core.errors import UserError
from jaxlm.data import TaskConfig, load_task, prepare_for, task_config
from jaxlm.train.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """An evaluation; the keys are those of a fine-tuning run, and `split`."""

    model: str | None = None
    task: TaskConfig = field(metadata={"make": task_config})
    split: Literal["train", "validation", "test"] = "test"
    seed: int = 0
    eval_batch_size: int = 64
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    bits: Literal[8, 4] | None = None

    def __post_init__(self):
        if self.eval_batch_size < 1:
            raise UserError(f"eval_batch_size is {self.eval_batch_size}: give 1 or more.")


def run(args: Sequence[str]) -> None:
    """The command `jaxlm evaluate`."""
    path, overrides = configs.parse_args(args)
    file = Path(path) if path else None
    offsets = None
    if file is not None and file.suffix not in (".yaml", ".yml"):
        overrides.setdefault("model", str(path))
        own_task = (file / "config.yaml").exists() and "task.name" not in overrides
        offsets = RunFolder(file).option_offsets() if own_task else None
        file = file / "config.yaml" if own_task else None
    known = {f.name for f in fields(EvaluateConfig)}
    config = configs.load(EvaluateConfig, file, overrides, only=known)
    base_dir = file.parent if file else None
    print(json.dumps(evaluate(config, base_dir=base_dir, offsets=offsets), indent=2))


def evaluate(
    config: EvaluateConfig, *, base_dir: Path | None = None, offsets: Any = None
) -> dict[str, Any]:
    """Scores one split, less `offsets` if there are any, and returns the accuracies."""
    task = load_task(config.task, seed=config.seed, base_dir=base_dir)
    if not getattr(task, config.split):
        raise UserError(f"task has no {config.split} examples: give task.{config.split}.")

    from jaxlm import evaluation
    from jaxlm.train.run import load_model
    from jaxlm.train.state import Program

    lm = load_model(config.model, param_dtype=config.param_dtype, bits=config.bits)
    if lm.config.head == "none":
        raise UserError(f"{config.model} has no head to evaluate: fine-tune it first.")
    encoded = prepare_for(lm, task)
    scorer = Program(
        functools.partial(evaluation.option_scores, lm.apply, encoded.token_ids, offsets=offsets)
    )
    score = functools.partial(
        evaluation.score_split, scorer, lm.params, encoded, batch_size=config.eval_batch_size
    )
    scores, labels = score(config.split)
    result: dict[str, Any] = {
        "model": config.model or "shipped",
        "task": config.task.name,
        "split": config.split,
        "examples": len(labels),
        "accuracy": evaluation.accuracy(scores, labels),
    }
    if encoded.train:
        unlabelled, train_labels = score("train")
        calibrated = evaluation.calibrate(scores, unlabelled)
        result["calibrated_accuracy"] = evaluation.accuracy(calibrated, labels)
        result["majority_accuracy"] = evaluation.majority_accuracy(train_labels, labels)
    return result | {"peak_memory_bytes": scorer.peak_bytes}
