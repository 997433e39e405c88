"""Predict for the rows of a file: classes, completions, tags, or log-probabilities of texts.

usage: jaxlm predict MODEL ROWS [--output=predictions.jsonl] [--key=value ...]
       jaxlm predict config.yaml ROWS [--output=predictions.jsonl] [--key=value ...]

MODEL is a folder, a hub id, a GGUF file, or the folder of a run of `jaxlm finetune`, which predicts
for its own task. ROWS is a file or data set that a run can train on, with or without labels:

  with a task           prediction, prediction_index, probabilities: {class: p}
  prompt or messages    completion, log_probability; --samples=4 writes four rows for each
  text                  log_probability, num_tokens, log_probability_per_token, perplexity
  tokens                prediction: [tag, ...], probabilities: [p, ...], one of each for a word

A row of predictions is a line of JSON with the fields of its input and these, in the order of the
input; an input field that has one of these names becomes input_NAME. Without --output the rows are
printed. With it, rows are read, predicted and written a chunk at a time, so a file of JSON lines or
Parquet may be larger than the memory. The same command resumes after a stop; a header beside
the output refuses other rows, another model and other settings.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jax.sharding import Mesh

from jaxlm.artifacts.files import file_path, to_json
from jaxlm.artifacts.processes import is_main_process
from jaxlm.cli import config as configs
from jaxlm.cli.evaluate import own_config
from jaxlm.core.checks import dtype_name, integer, seeds, whole
from jaxlm.core.errors import UserError
from jaxlm.data import (
    DATA_FORMS,
    MessagesConfig,
    Task,
    TaskConfig,
    TextConfig,
    TokensConfig,
    prompted,
    task_config,
)
from jaxlm.data.messages import prompt_of
from jaxlm.data.rows import tokenizer_of
from jaxlm.data.sources import Record, stream_rows
from jaxlm.train.run_folder import to_dict
from jaxlm.train.settings import MOST_ROWS, MOST_STEPS

NEW_TOKENS = 64
"""Most tokens of a completion, if neither the task nor `max_new_tokens` says another number."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """A prediction; `task`, `messages`, `text`, `tokens` and the model's keys are those of a run.

    Attributes:
        model: folder or hub id; null means the model that comes with the package.
        base: where the model is that a run or an adapter began with, if it has moved.
        rows: file or data set, see `jaxlm.data.sources.read_rows`.
        output: file of the predictions; null prints them. It is never read from a file.
        task: the task, or the name of a shipped one; by default that of the run.
        messages: how conversations are written; a prompt that is text is then a turn of the user.
        text: how documents are read.
        tokens: how words are read.
        calibrate: as in the run, whose offsets are subtracted from the scores of its own task.
        max_new_tokens: most tokens of a completion; null for those of the task, or 64.
        temperature: 0 takes the most likely token.
        top_p: keep only the most likely tokens up to this probability.
        samples: completions of each row.
        seed: seed of the draws.
        eval_batch_size: rows in a forward pass; samples depend on it.
        param_dtype: dtype of the parameters, float32 or bfloat16.
        bits: 8 or 4 keeps matrices in that many bits.
    """

    model: str | None = None
    base: str | None = None
    rows: str
    output: str | None = None
    task: TaskConfig | None = field(default=None, metadata={"make": task_config})
    messages: MessagesConfig | None = None
    text: TextConfig | None = None
    tokens: TokensConfig | None = None
    calibrate: Literal[False, True, "sfc"] = False
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    eval_batch_size: int = 64
    param_dtype: str = "float32"
    bits: Literal[8, 4] | None = None

    def __post_init__(self):
        integer("max_new_tokens", self.max_new_tokens, most=MOST_STEPS)
        whole(self, "samples", "eval_batch_size", most=MOST_ROWS)
        seeds(self, "seed")
        object.__setattr__(self, "param_dtype", dtype_name(self.param_dtype))
        for name, default in (("samples", 1), ("top_p", 1.0)):
            if self.temperature == 0 and (value := getattr(self, name)) != default:
                raise UserError(
                    f"{name}: has no effect at temperature 0 (got {value}). Give temperature."
                )
        self.sampling()

    def sampling(self) -> Any:
        """Return how tokens are drawn."""
        from jaxlm.models.generation import Sampling

        return Sampling(temperature=self.temperature, top_p=self.top_p)


KEYS = [f.name for f in fields(PredictConfig) if f.name != "output"]
"""Keys that are read from a file, which may be that of a fine-tuning run."""


def config_class() -> type:
    """Return the class of this command's configuration."""
    return PredictConfig


def read_config(args: Sequence[str]) -> PredictConfig:
    """Return the configuration that the arguments give."""
    return _read(args)[0]


def _read(args: Sequence[str]) -> tuple[PredictConfig, Any]:
    """Return the configuration, and the offsets of a calibrated run."""
    words, flags = configs.split_args(args)
    if "rows" not in flags and len(words) > (not {"model", "config"} & flags.keys()):
        flags["rows"] = words.pop()
    if len(words) > 1:
        raise UserError(f"MODEL: is given twice (got {' and '.join(words)}). Keep one.")
    path, flags = configs.parse_model_args([*words, *(f"--{k}={v}" for k, v in flags.items())])
    file, offsets = (Path(path), None) if path else own_config(flags)
    return configs.load(PredictConfig, file, flags, only=KEYS), offsets


def predict(
    config: PredictConfig | str | Path | None = None,
    rows: str | Path | None = None,
    *,
    mesh: Mesh | None = None,
    **overrides: Any,
) -> list[dict[str, Any]] | Path:
    """Predict for the rows of a file, as the command `jaxlm predict` does.

    Args:
        config: a configuration, its YAML file, or a model: a folder, a hub id, the folder of a run.
        rows: file or data set with the rows.
        mesh: see `jaxlm.sharding.make_mesh`; None for one device.
        **overrides: keys of `PredictConfig`; see `jaxlm.finetune`.

    Returns:
        The rows of predictions; or, with `output`, which may be larger than memory, its path.

    Raises:
        UserError: a key is unknown, a value does not fit, a row lacks what is predicted from, or
            `output` was made from something else.
    """
    if rows is not None:
        overrides = {**overrides, "rows": rows}
    if isinstance(config, str | Path) and not configs.is_file(config):
        config, overrides = None, {**overrides, "model": config}
    if isinstance(config, PredictConfig) and not any(getattr(config, x, None) for x in DATA_FORMS):
        # By its keys, so that a run's own task is found as for a run that is given by its name.
        given = {f.name: getattr(config, f.name) for f in fields(config)}
        changed = {f.name: given[f.name] for f in fields(config) if given[f.name] != f.default}
        config, overrides = None, {**changed, **overrides}
    file, offsets = own_config(overrides) if config is None else (None, None)
    only = None if isinstance(config, PredictConfig) else KEYS
    built, _ = configs.from_call(PredictConfig, file or config, overrides, "predict", only=only)
    found = _predictions(built, offsets, mesh)
    if built.output is None:
        return [row for chunk in found for row in chunk]
    for _ in found:
        pass
    return Path(built.output)


def run(args: Sequence[str], mesh: Any = None) -> None:
    """Run the command `jaxlm predict`."""
    config, offsets = _read(args)
    for chunk in _predictions(config, offsets, mesh):
        if config.output is None and is_main_process():
            for row in chunk:
                print(to_json(row), flush=True)


class _Form(NamedTuple):
    """How rows are read, before a model is loaded, and the predictor of a model."""

    read: Callable[[Record], Any]
    predictor: Callable[[Any], Any]


def _form(config: PredictConfig, offsets: Any, first: Record) -> _Form:
    """Choose by the configuration, or else by the fields of the first row."""
    from jaxlm.train import predictions
    from jaxlm.train.measure import Choices

    task, size = config.task, config.eval_batch_size
    completing = functools.partial(
        predictions.Completing,
        max_new_tokens=config.max_new_tokens or (task.answer_length if task else NEW_TOKENS),
        sampling=config.sampling(),
        samples=config.samples,
        seed=config.seed,
        batch_size=size,
    )
    if task is not None:
        template, read = task.reader(tuple(first.values))
        empty = Task(task, template, (), (), ())
        if task.is_generative:
            work = completing(
                lambda each: prompted(empty, each).prompt,
                stop=("\n",),
                strip=True,
                max_length=task.max_length,
            )
            return _Form(read, work.predictor)
        sfc = config.calibrate == "sfc" and offsets is not None
        reduction: Any = "sum" if sfc else "mean"
        options = {"batch_size": size, "reduction": reduction, "offsets": offsets}
        names = task.class_names
        return _Form(read, lambda lm: predictions.choosing(Choices(lm, empty, **options), names))
    text, words = config.text or TextConfig(), config.tokens or TokensConfig()
    tagging = functools.partial(predictions.tagging, config=words, batch_size=size)
    if config.tokens is not None:
        return _Form(words.parse_words, tagging)
    named = config.text is not None and text.field in first.values
    if {"messages", "prompt"} & first.values.keys() and not named:
        written = (config.messages or MessagesConfig()).template

        def answering(lm: Any) -> Any:
            tokenizer = tokenizer_of(lm)
            ends = () if tokenizer.eos_token is None else (tokenizer.eos_token,)
            prompt = functools.partial(prompt_of, tokenizer=tokenizer, template=written)
            return completing(prompt, stop=ends).predictor(lm)

        return _Form(predictions.prompt_reader(config.messages is not None), answering)
    if text.field in first.values:
        return _Form(text.parse, lambda lm: predictions.scoring_texts(lm, text, batch_size=size))
    if words.field in first.values:
        return _Form(words.parse_words, tagging)
    raise UserError(
        f"{first.where}: has neither prompt, messages, {text.field} nor {words.field} (got "
        f"{', '.join(map(repr, first.values))}). Give a task that reads these fields, or name "
        "the field of the texts in text.field, or of the words in tokens.field."
    )


def _predictions(config: PredictConfig, offsets: Any, mesh: Any) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of predictions of each chunk that is not in `output` yet, and write them."""
    from jaxlm.artifacts.arrays import fingerprint
    from jaxlm.artifacts.lines import GrowingLines
    from jaxlm.train.load import load_model
    from jaxlm.train.logging import Progress
    from jaxlm.train.predictions import as_json, predicted, settings_of

    output = None if config.output is None else GrowingLines(file_path(config.output, "output"))
    if output is not None:
        output.check()
    rows = functools.partial(stream_rows, config.rows, key="rows")
    form = _form(config, offsets, next(rows()))
    # Every row is read before the first is predicted, so a damaged one costs no work.
    digest, count = hashlib.sha256(), 0
    for record in rows():
        form.read(record)
        digest.update(as_json(record).encode())
        count += 1
    options: dict[str, Any] = {"param_dtype": config.param_dtype, "bits": config.bits}
    lm = load_model(config.model, base=config.base, **options, mesh=mesh)
    if lm.config.head == "none" or (config.task and lm.config.head == "token_classifier"):
        raise UserError(f"model: has no head to predict (got {config.model}). Fine-tune it first.")
    predictor = form.predictor(lm)
    if output is None:
        yield from predicted(rows(), form.read, predictor)
        return
    weights = hashlib.sha256(f"{fingerprint(lm.params)} {lm.config}".encode()).hexdigest()
    inputs = {"model": weights, "rows": digest.hexdigest(), **settings_of(to_dict(config))}
    inputs["option_offsets"] = None if offsets is None else offsets.tolist()
    about = {"model": config.model or "shipped", "rows": config.rows}
    with output.held(inputs, about):
        done = output.resume(predictor.chunk * predictor.each) // predictor.each
        with Progress(count, start=done, unit="row") as progress:
            for chunk in predicted(rows(), form.read, predictor, done):
                output.append(chunk)
                done += len(chunk) // predictor.each
                progress.update(done, {})
                yield chunk
        output.finish(done * predictor.each)
