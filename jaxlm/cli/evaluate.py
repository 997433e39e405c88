"""Measure the accuracy of a model on a task or on words with tags, without training it.

usage: jaxlm evaluate MODEL [--task.name=subj] [--split=test] [--icl=k] [--dotted.path=value ...]
       jaxlm evaluate MODEL OTHER [--dotted.path=value ...]
       jaxlm evaluate config.yaml [--split=test] [--dotted.path=value ...]

MODEL is a folder, a hub id, or the folder of a run of `jaxlm finetune` or of a PEFT adapter.
Without `task` a run is evaluated on its own task; "step" and "of_steps" in the result tell which of
its steps is tested. If its files have moved, `--base` and `--task.test` say where they are.
The configuration may be that of a fine-tuning run, whose other keys are ignored.

The result is printed as JSON: the accuracy of the highest score with its standard error, the
accuracy with scores calibrated on the training texts (labels unused), that of the most frequent
class, the expected calibration error, and for each class counts, precision, recall and F1.
OTHER is a second model, on the same examples; its accuracy is subtracted, with the standard error
of the paired difference. `--predictions=FILE` writes the rows that `jaxlm predict` would write.
`--calibrate=sfc` calibrates by the prompt without the example instead, and `--icl=32` puts 32
solved training examples before each text of the test split. A task whose answers are generated is
measured by the F1 of its words and by exact match. Words with tags, `--tokens.test=FILE`, are
measured by the F1 of the entities that their tags mark, or else by the macro F1 of the tags.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxlm.artifacts.files import file_path, to_json
from jaxlm.artifacts.processes import is_main_process
from jaxlm.cli import config as configs
from jaxlm.cli.generate import check_new, write_samples
from jaxlm.core.checks import dtype_name, seeds, show, whole
from jaxlm.core.errors import UserError
from jaxlm.data import (
    DATA_FORMS,
    Task,
    TaskConfig,
    Texts,
    TokensConfig,
    load_task,
    task_config,
    with_demonstrations,
)
from jaxlm.train.run_folder import RunFolder, to_dict
from jaxlm.train.settings import MOST_ROWS


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """An evaluation; the keys that a fine-tuning run has too mean the same.

    Attributes:
        model: folder or hub id; null means the model that comes with the package.
        base: where the model is that a run or an adapter began with, if it has moved.
        task: the task, or the name of a shipped one.
        tokens: words with tags, in place of a task.
        other: another model on the same examples, whose accuracy is subtracted.
        predictions: new file for the rows of `jaxlm predict`.
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
    task: TaskConfig | None = field(default=None, metadata={"make": task_config})
    tokens: TokensConfig | None = None
    other: str | None = None
    predictions: str | None = None
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
        if (self.task is None) == (self.tokens is None):
            given = "nothing" if self.task is None else "task and tokens"
            raise UserError(f"task: one of task and tokens must be given (got {given}). Give one.")
        if self.tokens is not None and (self.icl or self.calibrate):
            raise UserError(
                f"tokens: have neither prompts nor options (got icl {self.icl} and calibrate "
                f"{self.calibrate}). Leave these out."
            )
        if self.calibrate == "sfc" and self.task is not None and self.task.is_generative:
            raise UserError(f"calibrate: {self.task.name} has no options (got sfc). Leave it out.")

    @property
    def form(self) -> Literal["task", "tokens"]:
        """Name of the data form: the key that is given."""
        return "task" if self.tokens is None else "tokens"

    @property
    def data(self) -> TaskConfig | TokensConfig:
        """Where the data come from."""
        config: TaskConfig | TokensConfig = getattr(self, self.form)
        return config


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
    print(to_json(_evaluate(_read(args), mesh), indent=2))


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
    file, offsets = own_config(overrides) if config is None else (None, None)
    built, base_dir = configs.from_call(
        EvaluateConfig, file or config, overrides, "evaluate", only=KEYS
    )
    return _evaluate(Setting(built, base_dir, offsets, overrides if file else None), mesh)


class Setting(NamedTuple):
    """What is evaluated.

    Attributes:
        config: the configuration.
        base_dir: folder of its file.
        offsets: subtracted from the scores, those of a calibrated run.
        own: the flags, if the task is that of the run which is evaluated.
    """

    config: EvaluateConfig
    base_dir: Path | None = None
    offsets: Any = None
    own: Mapping[str, Any] | None = None


def _read(args: Sequence[str]) -> Setting:
    words, flags = configs.split_args(args)
    if len(words) == 2 and "other" not in flags:
        flags["other"] = words.pop()
    path, flags = configs.parse_model_args([*words, *(f"--{k}={v}" for k, v in flags.items())])
    file, offsets = (Path(path), None) if path else own_config(flags)
    config = configs.load(EvaluateConfig, file, flags, only=KEYS)
    own = None if path or file is None else flags
    return Setting(config, file.parent if file else None, offsets, own)


def own_config(keys: Mapping[str, Any]) -> tuple[Path | None, Any]:
    """Return the configuration and the offsets of the run that is used on its own task."""
    if keys.get("model") is None or {"task", "task.name", "tokens"} & keys.keys():
        return None, None
    folder = RunFolder(keys["model"], "model")
    if not any((folder.config() or {}).get(form) for form in DATA_FORMS):
        return None, None
    return folder.path / "config.yaml", folder.option_offsets()


def _evaluate(setting: Setting, mesh: Mesh | None) -> dict[str, Any]:
    """Measure one model, or two on the same examples."""
    config = setting.config
    if config.predictions is not None:
        check_new(file_path(config.predictions, "predictions"), "predictions")
    ours = _measure(setting, mesh)
    if config.other is None:
        return ours.result
    keys: dict[str, Any] = {"model": config.other, "other": None, "predictions": None}
    second = setting._replace(config=dataclasses.replace(config, **keys), offsets=None)
    file, offsets = (None, None) if setting.own is None else own_config(keys)
    if file is not None:
        keys = {**(setting.own or {}), **keys}
        again, folder = configs.from_call(EvaluateConfig, file, keys, "evaluate", only=KEYS)
        second = Setting(again, folder, offsets)
    theirs = _measure(second, mesh)
    if ours.examples != theirs.examples:
        raise UserError(
            f"other: is tested on other examples than {config.model} (got {config.other}). Give "
            "--task.name, or the keys of one task or of tokens for both."
        )
    from jaxlm.evaluation import paired_standard_error

    main = "accuracy" if "accuracy" in ours.result else "f1"
    difference = {
        main: ours.result[main] - theirs.result[main],
        "standard_error": paired_standard_error(ours.values, theirs.values),
    }
    return {**ours.result, "other": theirs.result, "difference": difference}


class _Measured(NamedTuple):
    """The result of one model; its accuracy or F1 on each example; and which these are."""

    result: dict[str, Any]
    values: np.ndarray
    examples: list[Any]


def _measure(setting: Setting, mesh: Mesh | None) -> _Measured:
    config = setting.config
    data = _load(config, setting.base_dir)
    examples = getattr(data, config.split)
    if not examples:
        raise UserError(
            f"{config.form}.{config.split}: there are no such examples (got none). Name a file of "
            "them."
        )

    _check_data(config, data)
    from jaxlm.train.load import load_model

    options: dict[str, Any] = {"param_dtype": config.param_dtype, "bits": config.bits}
    lm = load_model(config.model, base=config.base, **options, mesh=mesh)
    result: dict[str, Any] = {
        "model": config.model or "shipped",
        **_tested(config.model),
        "task": getattr(config.data, "name", config.form),
        "split": config.split,
        "examples": len(examples),
    }
    if isinstance(data, Task):
        return _measure_task(setting, lm, data, result)
    return _measure_tokens(setting, lm, data, result)


def _measure_task(setting: Setting, lm: Any, task: Task, result: dict[str, Any]) -> _Measured:
    """Score one split; offsets are subtracted as in training."""
    from jaxlm import evaluation
    from jaxlm.train.measure import Choices, GenerationMetric
    from jaxlm.train.predictions import choice_fields, completion_fields

    config, offsets = setting.config, setting.offsets
    if lm.config.head in ("none", "token_classifier"):
        raise UserError(f"model: has no head to evaluate (got {config.model}). Fine-tune it first.")
    size, split = config.eval_batch_size, config.split
    examples = getattr(task, split)
    whose = [dataclasses.replace(example, id="", context="") for example in examples]
    if task.config.is_generative:
        metric = GenerationMetric(lm, task, batch_size=size)
        result |= metric(split, lm.params)
        found = metric.result
        result["standard_error"] = evaluation.standard_error(found.f1s)
        _write(setting, examples, map(completion_fields, found.texts, found.log_probs))
        return _Measured(result, found.f1s, whose)
    sfc = config.calibrate == "sfc"
    reduction: Literal["mean", "sum"] = "mean" if offsets is None or not sfc else "sum"
    choices = Choices(lm, task, batch_size=size, reduction=reduction, offsets=offsets)
    scores = choices.scores(examples)
    labels = evaluation.right_options(examples, scores.shape[1])
    result |= _report(scores, labels, task.config)
    calibrated = None
    if sfc:
        by_sum = Choices(lm, task, batch_size=size, reduction="sum")
        domain = evaluation.domain_scores(lm, lm.params, task, split, batch_size=size)
        calibrated = evaluation.subtract_domain_scores(by_sum.scores(examples), domain)
    elif task.train and task.config.labels:
        calibrated = evaluation.calibrate(scores, choices.scores(task.train))
    if calibrated is not None:
        result["calibrated_accuracy"] = evaluation.accuracy(calibrated, labels)
    _write(setting, examples, choice_fields(examples, scores, task.config.class_names))
    right = evaluation.is_right(scores, labels)
    return _Measured(result | {"peak_memory_bytes": choices.peak_bytes}, right, whose)


def _measure_tokens(setting: Setting, lm: Any, texts: Texts, result: dict[str, Any]) -> _Measured:
    from jaxlm import evaluation
    from jaxlm.train.predictions import class_names, tagging

    config = setting.config
    assert config.tokens is not None
    predictor = tagging(lm, config.tokens, batch_size=config.eval_batch_size)
    names = class_names(lm, config.tokens)
    indexed, classes = config.tokens.resolve(texts, lm.config.replace(label_names=names))
    if classes != names:
        raise UserError(
            f"model: its classes are not {show(', '.join(classes))} (got {show(', '.join(names))})."
            " Fine-tune it on them first."
        )
    examples = getattr(indexed, config.split)
    fields = [
        row
        for first in range(0, len(examples), predictor.chunk)
        for (row,) in predictor.predict(examples[first : first + predictor.chunk], first)
    ]
    _write(setting, examples, fields)
    place: dict[str | None, int] = {None: -1} | {name: i for i, name in enumerate(names)}
    tags = [np.array(example.tags) for example in examples]
    chosen = [np.array([place[name] for name in row["prediction"]]) for row in fields]
    read = [row >= 0 for row in chosen]
    labels, found = ([x[y] for x, y in zip(rows, read, strict=True)] for rows in (tags, chosen))
    report = evaluation.tag_report(labels, found, names)
    right = np.concatenate(tags) == np.concatenate(chosen)
    error = evaluation.standard_error(right[np.concatenate(read)])
    whose = [example.content for example in getattr(texts, config.split)]
    return _Measured({**result, "standard_error": error, **report}, right, whose)


def _report(scores: np.ndarray, labels: np.ndarray, task: TaskConfig) -> dict[str, Any]:
    """Return the accuracy, and what else a paper prints about choices."""
    from jaxlm import evaluation

    right = evaluation.is_right(scores, labels)
    confidences = evaluation.probabilities(scores).max(axis=1)
    report: dict[str, Any] = {
        "accuracy": float(np.mean(right)),
        "standard_error": evaluation.standard_error(right),
        "expected_calibration_error": evaluation.expected_calibration_error(confidences, right),
    }
    if task.has_per_example_options:
        return report
    report["majority_accuracy"] = evaluation.majority_accuracy(labels)
    if labels.ndim > 1:  # an example with several right classes counts for none of them
        return report
    confusion = evaluation.confusion_matrix(scores.argmax(axis=1), labels, len(task.labels))
    columns = evaluation.class_report(confusion)
    report["macro_f1"] = float(columns["f1"].mean())
    report["classes"] = {
        name: {column: values[place].item() for column, values in columns.items()}
        for place, name in enumerate(task.class_names)
    }
    return report | {"confusion_matrix": confusion.tolist()}


def _write(setting: Setting, examples: Sequence[Any], fields: Iterable[dict[str, Any]]) -> None:
    """Write the rows of predictions, with the input's fields."""
    from jaxlm.train.predictions import with_input

    config = setting.config
    if config.predictions is None or not is_main_process():
        return
    records = config.data.records(setting.base_dir)
    # Held-out rows are those of the training source.
    of_split = records[config.split] or records["train"]
    rows = {f"{record.source}:{record.number}": record for record in of_split}
    pairs = zip(examples, fields, strict=True)
    lines = [to_json(with_input(rows[example.id], each)) for example, each in pairs]
    write_samples(file_path(config.predictions, "predictions"), lines, key="predictions")


def _check_data(config: EvaluateConfig, data: Task | Texts) -> None:
    """Refuse other data in the files of a run that is evaluated on its own, unchanged data."""
    from jaxlm.train.finetuning import data_digests

    if config.model is None or config.icl:
        return
    folder = RunFolder(config.model, "model")
    own = {config.form: to_dict(config.data), "seed": config.seed}
    if own.items() <= (folder.config() or {}).items():
        key = f"{config.form}.{config.split}"
        folder.check_unchanged({key: data_digests(data, config.form)[key]})


def _tested(model: str | None) -> dict[str, int]:
    """Return which step of a run is tested, and how many steps the run has."""
    steps = None if model is None else RunFolder(model, "model").tested_step()
    return {} if steps is None else {"step": steps[0], "of_steps": steps[1]}


def _load(config: EvaluateConfig, base_dir: Path | None) -> Task | Texts:
    """Return the data; demonstrations of a task are drawn from all of its training examples."""
    if config.task is None:
        return config.data.load(seed=config.seed, base_dir=base_dir)
    if not config.icl:
        return load_task(config.task, seed=config.seed, base_dir=base_dir)
    whole_task = dataclasses.replace(config.task, k=None, num_train=None, validation=None)
    task = load_task(whole_task, seed=config.seed, base_dir=base_dir)
    return with_demonstrations(task, config.icl)
