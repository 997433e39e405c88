"""Fine-tuning from a configuration to a summary: data, model, zero-shot, training, test."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from jaxlm.artifacts.folder import hold
from jaxlm.core import paths
from jaxlm.core.checks import dtype_name, one_of, whole
from jaxlm.core.errors import UserError
from jaxlm.data import EncodedTask, Task, TaskConfig, load_task, prepare_for, task_config
from jaxlm.data.batching import Objective
from jaxlm.evaluation.calibration import CALIBRATION_TEXTS, domain_offsets, option_offsets
from jaxlm.models import LanguageModel
from jaxlm.peft import TUNINGS, Tuning
from jaxlm.train.load import base_digest, changed, load_model, with_head
from jaxlm.train.logging import Progress
from jaxlm.train.measure import GenerationMetric, MultipleChoiceMetric
from jaxlm.train.objective import accuracy_objective, classification_objective, lm_objective
from jaxlm.train.optimizers import OPTIMIZERS, Mezo, Optimizer, ZerothOrder
from jaxlm.train.rewards import f1_objective
from jaxlm.train.run import RunConfig, train
from jaxlm.train.run_folder import RunFolder
from jaxlm.train.settings import MOST_ROWS
from jaxlm.typing import LossFn, Params

_FORMS: dict[str, Objective] = {"accuracy": "classification", "f1": "generation"}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """A fine-tuning run. It adds to the keys of `RunConfig`.

    Attributes:
        model: folder or hub id; null means the shipped model.
        task: the task, or the name of a shipped one.
        peft: what is trained in place of all parameters, one of `jaxlm.peft.TUNINGS` by its name;
            `optimizer.select` chooses among the parameters that it leaves.
        objective: "accuracy" of choices or "f1" of written answers, in place of the likelihood of
            the right one; for optimizers without gradients.
        calibrate: subtract the first model's `option_offsets` from scores, in training and
            evaluation, so that training starts from calibrated zero-shot; "sfc" subtracts its
            scores without the examples, `jaxlm.evaluation.domain_offsets`.
        eval_batch_size: examples in a forward pass of evaluation.
        param_dtype: of the parameters, float32 (fp32) or bfloat16 (bf16).
        bits: 8 or 4 quantizes matrices; then their scales, biases and norms are trained.
    """

    model: str | None = None
    task: TaskConfig = field(metadata={"make": task_config})
    optimizer: Optimizer = field(default=Mezo(), metadata={"registry": OPTIMIZERS})
    peft: Tuning | None = field(default=None, metadata={"registry": TUNINGS})
    objective: Literal["accuracy", "f1"] | None = None
    calibrate: Literal[False, True, "sfc"] = False
    steps: int = 500
    batch_size: int = 16
    eval_batch_size: int = 64
    param_dtype: str = "float32"
    bits: Literal[8, 4] | None = None

    def __post_init__(self):
        super().__post_init__()
        whole(self, "eval_batch_size", most=MOST_ROWS)
        one_of("calibrate", self.calibrate, (False, True, "sfc"))
        one_of("bits", self.bits, (None, 8, 4))
        one_of("objective", self.objective, (None, "accuracy", "f1"))
        object.__setattr__(self, "param_dtype", dtype_name(self.param_dtype))
        coarse = self.bits or (self.param_dtype if self.param_dtype != "float32" else None)
        if self.dynamics is not None and self.dynamics.name == "svag" and coarse:
            raise UserError(
                f"dynamics: svag makes updates that rounding would lose (got {coarse}). Use "
                "param_dtype float32 and no bits."
            )
        if self.objective is not None:
            self._check_objective(self.objective)

    def _check_objective(self, objective: str) -> None:
        right = "f1" if self.task.answered else "accuracy"
        if objective != right:
            raise UserError(
                f"objective: {self.task.name} is measured by {right} (got {objective}). Give that."
            )
        if not isinstance(self.optimizer, ZerothOrder):
            raise UserError(
                f"objective: has no gradient, which {self.optimizer.name} follows (got "
                f"{objective}). Give mezo or another optimizer without gradients."
            )


def finetune(
    config: FinetuneConfig, *, base_dir: Path | None = None, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Runs `config` in its folder, goes on with it, or returns the summary of the finished run.

    The folder is made only when the configuration, the data and the model are known to be good. A
    run goes on wherever it is called again, on another mesh too.

    Args:
        config: the run.
        base_dir: where the relative paths of the task start, before the working directory.
        mesh: of `jaxlm.sharding.make_mesh`; None for one device.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: see `load_task`, `jaxlm.from_pretrained`, `RunFolder.check` and `fit`.
    """
    folder = RunFolder(config.output)
    folder.check(config)
    if (summary := _finished(folder, config)) is not None:
        return summary
    if folder.path.is_dir():
        with hold(folder.path):  # what would fail after minutes of loading fails now
            pass
    task = read_task(config, base_dir=base_dir)
    lm = load_model(config.model, param_dtype=config.param_dtype, bits=config.bits, mesh=mesh)
    encoded = encoded_for(config, lm, task)
    given = config
    config, lm = changed(lm, lambda lm: prepared(given, lm, len(encoded.labels)), mesh)
    read = digests(task, encoded)
    if config.peft is not None:
        read |= base_digest(lm, config.optimizer.select, config.model)
    with folder.held(given):
        if (summary := _finished(folder, given)) is not None:
            return summary
        folder.check_data(read)
        summary = _run(config, folder, lm, task, encoded)
        folder.finish(summary)
    return summary


def _finished(folder: RunFolder, config: FinetuneConfig) -> dict[str, Any] | None:
    """The summary of a run that has done all its steps, or None."""
    sections = dict.fromkeys(("zero_shot", "validation", "test", "config"), dict)
    numbers = dict.fromkeys(("forwards", "backwards", "peak_memory_bytes", "tested_step"), int)
    found = folder.summary(
        model=str, task=str, metric=str, steps=int, seconds=float, **sections, **numbers
    )
    return found if found is not None and found["steps"] >= config.steps else None


def digests(task: Task, encoded: EncodedTask) -> dict[str, str]:
    """What tells whether a run reads what it began with, by the names of its files."""
    found, config = {}, task.config
    for split, digest in task.digests().items():
        source = getattr(config, split)
        source = config.train if source == "hold_out" else source
        found[f"task.{split} {source or config.name}"] = digest
    return found | {f"the tokens of task.{k}": digest for k, digest in encoded.digests().items()}


def read_task(config: FinetuneConfig, *, base_dir: Path | None = None) -> Task:
    """The examples of a run.

    Raises:
        UserError: see `load_task`; or there are none to train on or to test on.
    """
    task = load_task(config.task, seed=config.seed, base_dir=base_dir)
    for split in ("train", "test"):
        if not getattr(task, split):
            raise UserError(f"task.{split}: the task has no such examples (got none). Give some.")
    if config.calibrate and config.task.own_options:
        raise UserError(
            "calibrate: needs the same options in every example, and these have their own (got "
            f"{config.calibrate}). Leave it out."
        )
    return task


def encoded_for(config: FinetuneConfig, lm: LanguageModel, task: Task) -> EncodedTask:
    """The tokens of a run."""
    encoded = prepare_for(lm, task)
    if config.objective is None:
        return encoded
    return dataclasses.replace(encoded, objective=_FORMS[config.objective])


def prepared(
    config: FinetuneConfig, lm: LanguageModel, num_labels: int
) -> tuple[FinetuneConfig, LanguageModel]:
    """The model with what is trained, and the configuration with what its optimizer selects.

    Raises:
        UserError: nothing is selected.
    """
    lm = with_head(lm, num_labels, seed=config.seed, names=config.task.class_names)
    select = config.optimizer.select
    if config.peft is not None:
        lm = config.peft.prepare(lm, jax.random.key(config.seed))
        select = config.peft.select(lm) if select is None else select
    try:
        paths.mask(lm.params, select)
    except ValueError as error:
        raise UserError(f"optimizer.{error}") from None
    optimizer = dataclasses.replace(config.optimizer, select=select)
    return dataclasses.replace(config, optimizer=optimizer), lm


def loss_of(
    config: FinetuneConfig,
    lm: LanguageModel,
    task: Task | None,
    encoded: EncodedTask,
    options: Mapping[str, Any],
) -> LossFn:
    """The loss of a batch; `task` is read for written answers alone, `options` are of scores."""
    if encoded.objective == "generation":
        answers = [example.answers for example in task.train] if task is not None else []
        return f1_objective(lm, answers, max_new_tokens=config.task.answer_length)
    if encoded.objective == "completion":
        return lm_objective(lm.log_probs)
    make = accuracy_objective if config.objective == "accuracy" else classification_objective
    return make(lm.apply, encoded.token_ids, log_probs=lm.continuation_log_probs, **options)


def _calibration(
    config: FinetuneConfig, lm: LanguageModel, task: Task, encoded: EncodedTask, scorer: Any
) -> Any:
    """What is taken from the score of each option, [C]."""
    if config.calibrate == "sfc":
        return domain_offsets(lm, task)
    return option_offsets(scorer, lm.params, encoded, batch_size=config.eval_batch_size)


def _chance(encoded: EncodedTask) -> float | None:
    """The loss of guessing among the options, where the loss is of them."""
    count = encoded.num_options if encoded.objective == "classification" else 0
    return math.log(count) if count > 1 else None


def _calibration_passes(config: FinetuneConfig, encoded: EncodedTask) -> int:
    """Forward passes over a batch that calibration took."""
    texts = {False: 0, True: min(len(encoded.train), CALIBRATION_TEXTS), "sfc": 1}
    return -(-texts[config.calibrate] // config.eval_batch_size)


def _run(
    config: FinetuneConfig, folder: RunFolder, lm: LanguageModel, task: Task, encoded: EncodedTask
) -> dict[str, Any]:
    size = config.eval_batch_size
    reduction: Literal["mean", "sum"] = "sum" if config.calibrate == "sfc" else "mean"
    measure: GenerationMetric | MultipleChoiceMetric
    if config.task.answered:
        measure = GenerationMetric(lm, task, batch_size=size)
    else:
        measure = MultipleChoiceMetric(lm, encoded, batch_size=size, reduction=reduction)

    def validate(params: Params) -> dict[str, float]:
        return _named("validation", measure("validation", params))

    start = folder.resume()
    with Progress(config.steps, start=start or 0, log=folder.log) as progress:
        measure.tell = progress.waiting
        progress.say(f"start from step {start}" if start is not None else f"start {folder.path}")
        if repeated := task.repeated("test"):
            progress.say(f"{repeated} of {len(task.test)} test rows are training rows, too")
        first = folder.metrics.first() if start is not None else None
        if first is None or ("option_offsets" not in first and config.calibrate):
            zero_shot = measure("test", lm.params)
            first = {"step": 0, **_named("zero_shot", zero_shot)}
            if isinstance(measure, MultipleChoiceMetric) and config.calibrate:
                measure.offsets = _calibration(config, lm, task, encoded, measure.scorer)
                first |= _named("calibrated", measure("test", lm.params))
                first["option_offsets"] = measure.offsets.tolist()
            folder.metrics.put_first(first)
            progress.say(f"zero-shot test {_shown(zero_shot)}")
        elif isinstance(measure, MultipleChoiceMetric):
            measure.offsets = folder.option_offsets()
        options = {"offsets": measure.offsets, "reduction": reduction}
        trained = train(
            config,
            lm,
            loss_of(config, lm, task, encoded, options),
            lambda batch_size, seeds: functools.partial(
                encoded.streams, batch_size=batch_size, seeds=seeds
            ),
            folder,
            progress,
            saved=config.optimizer.select if config.peft else None,
            evaluate=validate if encoded.validation else None,
            maximize=f"validation_{measure.main}" if encoded.validation else None,
            chance=_chance(encoded),
        )
        test = measure("test", trained.params)
        progress.say(f"test {_shown(test)}")
    before = {name: first[f"zero_shot_{name}"] for name in test}
    if isinstance(measure, MultipleChoiceMetric):
        before["calibrated_accuracy"] = first.get("calibrated_accuracy")
    common = trained.summary
    return {
        "model": config.model or "shipped",
        "task": config.task.name,
        "metric": measure.main,
        "zero_shot": before,
        "validation": {measure.main: trained.best_value},
        "test": test,
        "majority_accuracy": measure.majority.get("test"),
        "test_rows_in_training": repeated,
        **common,
        "forwards": common["forwards"] + _calibration_passes(config, encoded),
        "peak_memory_bytes": max(common["peak_memory_bytes"], measure.peak_bytes),
    }


def _named(what: str, values: Mapping[str, float]) -> dict[str, Any]:
    return {f"{what}_{name}": value for name, value in values.items()}


def _shown(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())
