"""Measure the accuracy of a model on a task, without training it.

usage: jaxlm evaluate MODEL [--task.name=subj] [--split=test] [--icl=k] [--dotted.path=value ...]
       jaxlm evaluate config.yaml [--split=test] [--dotted.path=value ...]

MODEL is a folder, a hub id, or the folder of a run of `jaxlm finetune` or of a PEFT adapter.
Without `task` a run is evaluated on its own task; "step" and "of_steps" in the result tell which of
its steps is tested. If its files have moved, `--base` and `--task.test` say where they are.
The configuration may be that of a fine-tuning run, whose other keys are ignored.

The result is printed as JSON: the accuracy of the highest score, the accuracy with scores
calibrated on the training texts (labels unused), and that of the most frequent class.
`--calibrate=sfc` calibrates by the prompt without the example instead, and `--icl=32` puts 32
solved training examples before each text of the test split. A task whose answers are generated is
measured by the F1 of its words and by exact match.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from jaxlm.artifacts.files import to_json
from jaxlm.cli import config as configs
from jaxlm.core.checks import dtype_name, seeds, whole
from jaxlm.core.errors import UserError
from jaxlm.data import Task, TaskConfig, load_task, prepare_for, task_config, with_demonstrations
from jaxlm.train.run_folder import RunFolder, to_dict
from jaxlm.train.settings import MOST_ROWS


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """An evaluation; all keys but `split` and `icl` are those of a fine-tuning run.

    Attributes:
        model: folder or hub id; null means the model that comes with the package.
        base: where the model is that a run or an adapter began with, if it has moved.
        task: the task, or the name of a shipped one.
        split: examples to evaluate on.
        icl: solved training examples before each text of the test split.
        calibrate: "sfc" subtracts the scores of the options after the prompt without the example
            (arXiv:2104.08315) instead of their median over the training texts.
        seed: seed of the draws of examples.
        eval_batch_size: examples in a forward pass.
        param_dtype: dtype of the parameters, float32 or bfloat16.
        bits: 8 or 4 keeps matrices in that many bits.
    """

    model: str | None = None
    base: str | None = None
    task: TaskConfig = field(metadata={"make": task_config})
    split: Literal["train", "validation", "test"] = "test"
    icl: int = 0
    calibrate: Literal[False, True, "sfc"] = False
    seed: int = 0
    eval_batch_size: int = 64
    param_dtype: str = "float32"
    bits: Literal[8, 4] | None = None

    def __post_init__(self):
        whole(self, "eval_batch_size", most=MOST_ROWS)
        object.__setattr__(self, "param_dtype", dtype_name(self.param_dtype))
        whole(self, "icl", least=0)
        seeds(self, "seed")
        if self.icl and self.split != "test":
            raise UserError(
                f"split: must be test with icl (got {self.split}). Leave one of them out."
            )
        if self.calibrate == "sfc" and self.task.is_generative:
            raise UserError(f"calibrate: {self.task.name} has no options (got sfc). Leave it out.")


KEYS = [f.name for f in dataclasses.fields(EvaluateConfig)]
"""Keys that are read from the file, which may be that of a fine-tuning run."""


def config_class() -> type:
    """Return the class of this command's configuration."""
    return EvaluateConfig


def read_config(args: Sequence[str]) -> EvaluateConfig:
    """Return the configuration that the arguments give."""
    return _read(args)[0]


def run(args: Sequence[str], mesh: Any = None) -> None:
    """Run the command `jaxlm evaluate`."""
    config, base_dir, offsets = _read(args)
    print(to_json(_evaluate(config, base_dir, offsets, mesh), indent=2))


def evaluate(
    config: EvaluateConfig | str | Path | None = None,
    *,
    mesh: Mesh | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Measure a model on a task without training it, as the command `jaxlm evaluate` does.

    Args:
        config: a configuration, its YAML file, or a model: a folder, a hub id, the folder of a run.
        mesh: see `jaxlm.sharding.make_mesh`; None for one device.
        **overrides: keys of `EvaluateConfig`; see `jaxlm.finetune`. Without `task` a run is
            evaluated on its own task.

    Returns:
        What the command prints: the accuracies, by name.

    Raises:
        UserError: a key is unknown, a value does not fit, or the task has no such examples.
    """
    if isinstance(config, str | Path) and not configs.is_file(config):
        config, overrides = None, {**overrides, "model": config}
    file, offsets = _own_task(overrides) if config is None else (None, None)
    built, base_dir = configs.from_call(
        EvaluateConfig, file or config, overrides, "evaluate", only=KEYS
    )
    return _evaluate(built, base_dir, offsets, mesh)


def _read(args: Sequence[str]) -> tuple[EvaluateConfig, Path | None, Any]:
    """Return the configuration, the folder of its file, and the offsets of a calibrated run."""
    path, flags = configs.parse_model_args(args)
    file, offsets = (Path(path), None) if path else _own_task(flags)
    config = configs.load(EvaluateConfig, file, flags, only=KEYS)
    return config, file.parent if file else None, offsets


def _own_task(keys: Mapping[str, Any]) -> tuple[Path | None, Any]:
    """Return the configuration and the offsets of the run that is evaluated on its own task."""
    if keys.get("model") is None or {"task", "task.name"} & keys.keys():
        return None, None
    folder = RunFolder(keys["model"], "model")
    if "task" not in (folder.config() or {}):
        return None, None
    return folder.path / "config.yaml", folder.option_offsets()


def _evaluate(
    config: EvaluateConfig, base_dir: Path | None, offsets: Any, mesh: Mesh | None
) -> dict[str, Any]:
    """Score one split and return the accuracies; `offsets` are subtracted as in training."""
    task = _load(config, base_dir)
    if not getattr(task, config.split):
        raise UserError(
            f"task.{config.split}: the task has no such examples (got none). Name a file of them."
        )

    _check_task(config, task)
    from jaxlm import evaluation
    from jaxlm.train.load import load_model
    from jaxlm.train.measure import GenerationMetric, MultipleChoiceMetric

    options: dict[str, Any] = {"param_dtype": config.param_dtype, "bits": config.bits}
    lm = load_model(config.model, base=config.base, **options, mesh=mesh)
    if lm.config.head == "none":
        raise UserError(f"model: has no head to evaluate (got {config.model}). Fine-tune it first.")
    result: dict[str, Any] = {
        "model": config.model or "shipped",
        **_tested(config.model),
        "task": config.task.name,
        "split": config.split,
        "examples": len(getattr(task, config.split)),
    }
    size, split = config.eval_batch_size, config.split
    if task.config.is_generative:
        return result | GenerationMetric(lm, task, batch_size=size)(split, lm.params)
    encoded = prepare_for(lm, task)
    sfc = config.calibrate == "sfc"
    reduction: Literal["mean", "sum"] = "mean" if offsets is None or not sfc else "sum"
    choices = MultipleChoiceMetric(lm, encoded, batch_size=size, reduction=reduction)
    choices.offsets = offsets
    scores, labels = choices.scores(split, lm.params)
    result["accuracy"] = evaluation.accuracy(scores, labels)
    calibrated = None
    if sfc:
        by_sum = MultipleChoiceMetric(lm, encoded, batch_size=size, reduction="sum")
        domain = evaluation.domain_scores(lm, lm.params, task, split, batch_size=size)
        calibrated = evaluation.subtract_domain_scores(by_sum.scores(split, lm.params)[0], domain)
    elif encoded.train and encoded.labels:
        calibrated = evaluation.calibrate(scores, choices.scores("train", lm.params)[0])
    if calibrated is not None:
        result["calibrated_accuracy"] = evaluation.accuracy(calibrated, labels)
    if (majority := choices.majority[split]) is not None:
        result["majority_accuracy"] = majority
    return result | {"peak_memory_bytes": choices.peak_bytes}


def _check_task(config: EvaluateConfig, task: Task) -> None:
    """Refuse other data in the files of a run that is evaluated on its own, unchanged task."""
    from jaxlm.train.finetuning import data_digests

    if config.model is None or config.icl:
        return
    folder = RunFolder(config.model, "model")
    own = {"task": to_dict(config.task), "seed": config.seed}
    if own.items() <= (folder.config() or {}).items():
        key = f"task.{config.split}"
        folder.check_unchanged({key: data_digests(task, "task")[key]})


def _tested(model: str | None) -> dict[str, int]:
    """Return which step of a run is tested, and how many steps the run has."""
    steps = None if model is None else RunFolder(model, "model").tested_step()
    return {} if steps is None else {"step": steps[0], "of_steps": steps[1]}


def _load(config: EvaluateConfig, base_dir: Path | None) -> Task:
    """Return the task; demonstrations are drawn from all of its training examples."""
    if not config.icl:
        return load_task(config.task, seed=config.seed, base_dir=base_dir)
    whole_task = dataclasses.replace(config.task, k=None, num_train=None, validation=None)
    task = load_task(whole_task, seed=config.seed, base_dir=base_dir)
    return with_demonstrations(task, config.icl)
