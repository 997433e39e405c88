"""Fine-tuning from a configuration to a summary: data, model, zero-shot, training, test."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.artifacts.files import absolute
from jaxlm.core import paths
from jaxlm.core.checks import dtype_name, number, one_of, whole
from jaxlm.core.errors import UserError
from jaxlm.data import (
    DATA_FORMS,
    DataConfig,
    EncodedTask,
    ForgetConfig,
    MessagesConfig,
    PairsConfig,
    Task,
    TaskConfig,
    TextConfig,
    TokensConfig,
    task_config,
)
from jaxlm.evaluation.calibration import CALIBRATION_TEXTS, domain_offsets, option_offsets
from jaxlm.evaluation.classification import Reduction
from jaxlm.models import LanguageModel
from jaxlm.peft import TUNINGS, Tuning
from jaxlm.train.load import (
    base_digest,
    changed,
    load_model,
    tuned,
    with_head,
    with_random_params,
    with_token_head,
)
from jaxlm.train.logging import Progress, shown
from jaxlm.train.losses import accumulate
from jaxlm.train.measure import Metric, MultipleChoiceMetric
from jaxlm.train.objectives import OBJECTIVES, Objective
from jaxlm.train.objectives.base import Data, Encoded
from jaxlm.train.optimizers import OPTIMIZERS, FirstOrder, Mezo, Optimizer
from jaxlm.train.run import RunConfig, finished_or_run, train
from jaxlm.train.run_folder import Digest, RunFolder
from jaxlm.train.settings import MOST_ROWS
from jaxlm.typing import Params


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """A fine-tuning run: the keys of `RunConfig` and those below, with one of the data forms.

    Attributes:
        model: folder or hub id; null means the shipped model.
        task: a task with prompts and right answers, or the name of a shipped one.
        messages: conversations; the loss is on the assistant's turns.
        text: documents; the loss is on every token.
        pairs: prompts with a chosen and a rejected response.
        tokens: words with tags; the loss is on the first token of each word.
        forget: rows to forget, and rows to keep.
        objective: one of `jaxlm.train.objectives.OBJECTIVES` by its name; null for the likelihood
            of the right answers.
        peft: what is trained in place of all parameters, one of `jaxlm.peft.TUNINGS` by its name;
            `optimizer.select`, if given, replaces its choice of trained parameters.
        calibrate: subtract the initial model's `option_offsets` from scores, in training and
            evaluation, so that training starts from calibrated zero-shot; "sfc" subtracts its
            scores of the options without an example, `jaxlm.evaluation.domain_offsets`.
        steps: total number of updates; null for 500, or as many as `epochs` needs.
        epochs: passes over the training rows, in place of `steps`; a part of one counts, too.
        monitor: validation metric by which the best checkpoint is chosen and `patience` counts;
            null for the first that is measured.
        eval_batch_size: examples in a forward pass of evaluation.
        param_dtype: dtype of the parameters, float32 (fp32), bfloat16 (bf16), or auto: that of the
            model's files.
        bits: 8 or 4 quantizes the matrices; then their scales, biases and norms are trained.
        random_init: start from random parameters in the model's shape, drawn from the seed: a
            baseline that shows what pretraining gives.
    """

    model: str | None = None
    task: TaskConfig | None = field(default=None, metadata={"make": task_config})
    messages: MessagesConfig | None = None
    text: TextConfig | None = None
    pairs: PairsConfig | None = None
    tokens: TokensConfig | None = None
    forget: ForgetConfig | None = None
    objective: Objective | None = field(default=None, metadata={"registry": OBJECTIVES})
    optimizer: Optimizer = field(default=Mezo(), metadata={"registry": OPTIMIZERS})
    peft: Tuning | None = field(default=None, metadata={"registry": TUNINGS})
    calibrate: Literal[False, True, "sfc"] = False
    steps: int | None = None  # type: ignore[assignment]
    epochs: float | int | None = None
    monitor: str | None = None
    batch_size: int = 16
    eval_batch_size: int = 64
    param_dtype: str = "float32"
    bits: Literal[8, 4] | None = None
    random_init: bool = False

    def __post_init__(self):
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "steps", 500)
        super().__post_init__()
        number(self, "epochs", above=0)
        if self.epochs is not None and self.steps is not None:
            raise UserError(
                f"epochs: cannot be given together with steps (got {self.epochs} and "
                f"{self.steps}). Drop one of them."
            )
        whole(self, "eval_batch_size", most=MOST_ROWS)
        one_of("calibrate", self.calibrate, (False, True, "sfc"))
        one_of("bits", self.bits, (None, 8, 4))
        object.__setattr__(self, "param_dtype", dtype_name(self.param_dtype))
        coarse = self.bits or (self.param_dtype if self.param_dtype != "float32" else None)
        if self.dynamics is not None and self.dynamics.name == "svag" and coarse:
            raise UserError(
                f"dynamics: svag makes updates that rounding would lose (got {coarse}). Use "
                "param_dtype float32 and no bits."
            )
        if self.random_init and self.bits:
            raise UserError(
                f"random_init: cannot be quantized (got bits {self.bits}). Drop one of them."
            )
        given = [form for form in DATA_FORMS if getattr(self, form, None) is not None]
        if len(given) != 1:
            raise UserError(
                f"task: a run must have one of {', '.join(DATA_FORMS)} (got "
                f"{' and '.join(given) or 'none'}). Give one of them."
            )
        objective = self.chosen_objective
        objective.check(self.form, self.data, self.optimizer, accumulate=self.accumulate)
        if self.calibrate and (self.task is None or self.task.has_per_example_options):
            raise UserError(
                "calibrate: needs the same options in every example, and these have their own or "
                f"none (got {self.calibrate}). Leave it out."
            )

    @property
    def form(self) -> str:
        """Name of the data form: the key that is given."""
        return next(form for form in DATA_FORMS if getattr(self, form, None) is not None)

    @property
    def data(self) -> DataConfig:
        """Where the data come from."""
        config: DataConfig = getattr(self, self.form)
        return config

    @property
    def chosen_objective(self) -> Objective:
        """The objective, by default that of the data form."""
        name = self.data.objective or "classification"
        return self.objective or OBJECTIVES[name](name=name)


class Setting(NamedTuple):
    """The parts of a run, or of a dry run, where the parameters are shapes.

    Attributes:
        config: the configuration, with `steps` and `optimizer.select` filled in.
        lm: the model, with the new parameters that are trained.
        data, encoded: the examples, None in a dry run without a tokenizer; and their tokens.
    """

    config: FinetuneConfig
    lm: LanguageModel
    objective: Objective
    data: Data | None
    encoded: Encoded

    @property
    def reduction(self) -> Reduction:
        """How the log-probabilities of an option's tokens are reduced to its score."""
        return "sum" if self.config.calibrate == "sfc" else "mean"

    def metric(self) -> Metric:
        """Return the metric of the run."""
        size = self.config.eval_batch_size
        return self.objective.metric(
            self.lm, self.data, self.encoded, batch_size=size, reduction=self.reduction
        )

    def loss_fn(self, offsets: Any) -> Any:
        """Return the loss of a batch; `offsets` are subtracted from the scores of options."""
        scoring = {"offsets": offsets, "reduction": self.reduction}
        loss_fn = self.objective.loss_fn(self.lm, self.data, self.encoded, scoring)
        if (count := self.config.accumulate) == 1:
            return loss_fn
        return accumulate(loss_fn, count, share=self.objective.share)


def finetune(
    config: FinetuneConfig, *, base_dir: Path | None = None, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Run `config` in its folder, resume it, or return the summary of the finished run.

    See `jaxlm.finetune`. The folder is created only after the configuration, the data and the model
    have been checked. A run can resume on another mesh, and in another place.
    """
    given, config = None, with_own_classes(config)
    # The folder is compared with the number of steps, and holds the names of the classes.
    if config.epochs is not None or (config.tokens and config.tokens.labels is None):
        given = read_data(config, base_dir=base_dir)
        # Only to count: without weights a classifier's classes are not known.
        encoded = given.encode(load_model(config.model, shapes_only=True))
        config = with_classes(in_steps(config, encoded), encoded.labels)

    # A command that is typed in another directory must not read another file of the same name.
    places: dict[str, Any] = {config.form: config.data.located(base_dir)}
    places["objective"] = config.objective and config.objective.located()
    stored = dataclasses.replace(config, model=absolute(config.model, "model"), **places)

    def prepare() -> tuple[dict[str, Digest], Callable[[RunFolder], dict[str, Any]]]:
        data = given or read_data(config, base_dir=base_dir)
        lm = load_model(config.model, param_dtype=config.param_dtype, bits=config.bits, mesh=mesh)
        digests = base_digest(lm, config.model) | data_digests(data, config.form)
        setting = build(config, lm, data, mesh=mesh)
        # Loaded again for its one use, so that its memory is free during training.
        reference = functools.partial(_reference, setting, mesh)
        if (name := setting.objective.reference_model) is not None:
            digests |= base_digest(reference(), name, "objective.reference")
        for split, digest in setting.encoded.digests().items():
            name = f"{config.form}.{split}"
            digests[f"{name}.tokens"] = Digest(digests[name].name, digest)
        return digests, functools.partial(_run, setting, reference)

    sections = dict.fromkeys(("zero_shot", "validation", "test"), dict)
    numbers = dict.fromkeys(("forwards", "backwards", "peak_memory_bytes", "tested_step"), int)
    return finished_or_run(stored, prepare, task=str, metric=str, **sections, **numbers)


def _reference(setting: Setting, mesh: Mesh | None) -> LanguageModel:
    """Return the model itself, or load the objective's, which must read the same tokens."""
    config, lm, objective, data, encoded = setting
    name = objective.reference_model
    if name is None:
        return lm
    assert data is not None
    try:
        lm = load_model(name, param_dtype=config.param_dtype, mesh=mesh)
        same = objective.batched(data.encode(lm)).digests() == encoded.digests()
    except UserError as error:
        raise UserError(f"objective.reference: {str(error).partition(': ')[2]}") from None
    if not same:
        raise UserError(
            f"objective.reference: reads the {config.form} as other tokens than the model (got "
            f"{name}). Give one with the same tokenizer that reads texts as long."
        )
    return lm.replace(config=lm.config.replace(compute_dtype=config.compute_dtype))


def data_digests(data: Data, form: str) -> dict[str, Digest]:
    """Return the digests of the examples of each split, by key."""
    digests = {}
    for split, digest in data.digests().items():
        source = getattr(data.config, split)
        source = data.config.train if source == "hold_out" else source
        name = source or getattr(data.config, "name", form)
        digests[f"{form}.{split}"] = Digest(str(name), digest)
    return digests


def read_data(config: FinetuneConfig, *, base_dir: Path | None = None) -> Data:
    """Return the examples of a run, which must have some for training, and a task for its test."""
    data: Data = config.data.load(seed=config.seed, base_dir=base_dir)
    for split in ("train", "test") if config.task is not None else ("train",):
        if not getattr(data, split):
            raise UserError(
                f"{config.form}.{split}: there are no such examples (got none). Give some."
            )
    return data


def in_steps(config: FinetuneConfig, encoded: Encoded) -> FinetuneConfig:
    """Return the configuration with the number of steps that its epochs need."""
    if config.epochs is None:
        return config
    rows = Fraction(str(config.epochs)) * encoded.sizes["train"]
    return dataclasses.replace(config, steps=math.ceil(rows / config.batch_size), epochs=None)


def with_classes(config: FinetuneConfig, labels: Sequence[str]) -> FinetuneConfig:
    """Return the configuration with the names of the classes of `tokens`, if it has none."""
    if config.tokens is None or config.tokens.labels is not None or not labels:
        return config
    tokens = dataclasses.replace(config.tokens, labels=tuple(labels))
    return dataclasses.replace(config, tokens=tokens)


def with_own_classes(config: FinetuneConfig) -> FinetuneConfig:
    """Return the configuration with those of the run in its folder, which needs no data then."""
    folder = RunFolder(config.output)
    if config.tokens is None or folder.tested_step() is None:
        return config
    stored = (folder.config() or {}).get("tokens")
    return with_classes(config, stored.get("labels") or () if isinstance(stored, dict) else ())


def build(
    config: FinetuneConfig,
    lm: LanguageModel,
    data: Data | None,
    *,
    encoded: Encoded | None = None,
    mesh: Mesh | None = None,
) -> Setting:
    """Assemble a run, or its shapes if the parameters of `lm` are shapes.

    Tokens that are `encoded` already replace those of `data`. Without a mesh the parameters stay
    where they are.
    """
    if encoded is None:
        assert data is not None
        encoded = data.encode(lm)
    config, objective = in_steps(config, encoded), config.chosen_objective
    if config.patience is not None and data is not None and not encoded.sizes["validation"]:
        raise UserError(
            f"patience: counts evaluations, and there are no validation rows (got "
            f"{config.patience}). Give {config.form}.validation, or leave it out."
        )
    if config.param_dtype == "auto":
        dtype_name(lm.params["embed"]["tokens"]["embedding"].dtype)
    encoded = objective.batched(encoded)
    select, lm = changed(lm, lambda lm: _prepared(config, lm, encoded.labels), mesh)
    optimizer = dataclasses.replace(config.optimizer, select=select)
    config = dataclasses.replace(config, optimizer=optimizer)
    setting = Setting(config, lm, objective, data, encoded)
    if config.monitor is not None:
        one_of("monitor", config.monitor, setting.metric().modes)
    elif config.patience is not None and not (metric := setting.metric()).keeps_best:
        raise UserError(
            f"patience: needs a value to watch (got no monitor). Give one of "
            f"{', '.join(metric.modes)}."
        )
    return setting


def _prepared(
    config: FinetuneConfig, lm: LanguageModel, labels: tuple[str, ...]
) -> tuple[str | None, LanguageModel]:
    """Return the selection of trained parameters, and the model that has them."""
    choices = {"compute_dtype": config.compute_dtype, "remat": config.remat}
    lm = lm.replace(config=lm.config.replace(**choices))
    if config.random_init:
        lm = with_random_params(lm, seed=config.seed)
    if config.task is not None:
        lm = with_head(lm, len(labels), seed=config.seed, names=config.task.class_names)
    if config.tokens is not None:
        lm = with_token_head(lm, labels, seed=config.seed)
    select = config.optimizer.select
    if config.peft is not None:
        lm = config.peft.prepare(lm, jax.random.key(config.seed))
        select = tuned(config.peft, lm) if select is None else select
    try:
        paths.mask(lm.params, select)
    except ValueError as error:
        raise UserError(f"optimizer.{error}") from None
    if isinstance(config.optimizer, FirstOrder):
        config.optimizer.labels(paths.split(lm.params, select)[0])
    return select, lm


def _run(
    setting: Setting, reference: Callable[[], LanguageModel], folder: RunFolder
) -> dict[str, Any]:
    config, lm, objective, data, encoded = setting
    columns = folder.columns(
        lambda: objective.columns(lm, reference(), encoded, batch_size=config.eval_batch_size)
    )
    encoded = dataclasses.replace(encoded, columns=columns)
    setting = setting._replace(encoded=encoded)
    assert data is not None
    assert config.steps is not None
    metric, sizes = setting.metric(), encoded.sizes
    monitor = config.monitor or (metric.main if metric.keeps_best else None)
    tested: Literal["test", "validation"] = "test" if sizes["test"] else "validation"

    def measure(name: str, split: Any, params: Params) -> dict[str, Any]:
        values = metric(split, params) if sizes[split] else {}
        return {f"{name}_{key}": value for key, value in values.items()}

    start = folder.resume()
    with Progress(config.steps, start=start or 0, log=folder.log) as progress:
        metric.tell = progress.waiting
        progress.say(f"start from step {start}" if start is not None else f"start {folder.path}")
        if repeated := data.repeated("test"):
            progress.say(f"{repeated} of {sizes['test']} test rows are training rows, too")
        for split, rows in encoded.dropped.items():
            if rows:
                progress.say(
                    f"left out {len(rows)} {split} rows, of which nothing is learnt within "
                    f"max_length, the first {rows[0]}"
                )
        first = folder.metrics.first() if start is not None else None
        if first is None or ("option_offsets" not in first and config.calibrate):
            zero_shot = measure("zero_shot", tested, lm.params)
            first = {"step": 0, **zero_shot}
            if isinstance(metric, MultipleChoiceMetric) and config.calibrate:
                metric.offsets = _calibration(setting, metric)
                first |= measure("calibrated", "test", lm.params)
                first["option_offsets"] = metric.offsets.tolist()
            folder.metrics.put_first(first)
            progress.say(shown(zero_shot))
        elif isinstance(metric, MultipleChoiceMetric):
            metric.offsets = folder.option_offsets()
        validated = bool(sizes["validation"])
        trained = train(
            config,
            lm,
            setting.loss_fn(metric.offsets),
            lambda batch_size, seeds: functools.partial(
                encoded.streams, batch_size=batch_size, seeds=seeds
            ),
            folder,
            progress,
            saved=config.optimizer.select if config.peft else None,
            evaluate=functools.partial(measure, "validation", "validation") if validated else None,
            monitor=f"validation_{monitor}" if validated and monitor else None,
            mode=metric.modes[monitor or metric.main],
            chance=objective.chance(lm, encoded),
        )
        test = measure("test", tested, trained.params)
        progress.say(shown(test))
    test = {name.removeprefix("test_"): value for name, value in test.items()}
    before = {name: first.get(f"zero_shot_{name}") for name in test}
    if isinstance(metric, MultipleChoiceMetric):
        before["calibrated_accuracy"] = first.get("calibrated_accuracy")
    return {
        "model": config.model or "shipped",
        "task": getattr(data.config, "name", config.form),
        "metric": metric.main,
        "zero_shot": before,
        "validation": {monitor: trained.best_value} if monitor else {},
        "test": test,
        "majority_accuracy": metric.majority.get("test"),
        "test_rows_in_training": repeated,
        **trained.summary,
        "forwards": trained.summary["forwards"] + _calibration_passes(setting),
        "peak_memory_bytes": max(trained.summary["peak_memory_bytes"], metric.peak_bytes),
    }


def _calibration(setting: Setting, metric: MultipleChoiceMetric) -> np.ndarray:
    """Return the offsets to subtract from the scores of the options, [C]."""
    config, lm, _, data, encoded = setting
    assert isinstance(data, Task)
    assert isinstance(encoded, EncodedTask)
    if config.calibrate == "sfc":
        return domain_offsets(lm, data)
    return option_offsets(metric.scorer, lm.params, encoded, batch_size=config.eval_batch_size)


def _calibration_passes(setting: Setting) -> int:
    """Return the number of forward passes that calibration took."""
    config = setting.config
    texts = {False: 0, True: min(setting.encoded.sizes["train"], CALIBRATION_TEXTS), "sfc": 1}
    return -(-texts[config.calibrate] // config.eval_batch_size)
