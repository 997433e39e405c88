"""Fine-tuning from a configuration to a summary: data, model, zero-shot, training, test."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from jaxlm.artifacts.files import file_path
from jaxlm.artifacts.folder import hold
from jaxlm.core import paths
from jaxlm.core.checks import dtype_name, one_of, seeds, whole
from jaxlm.core.errors import UserError
from jaxlm.data import EncodedTask, Task, TaskConfig, load_task, prepare_for, task_config
from jaxlm.data.batching import Objective
from jaxlm.evaluation.calibration import CALIBRATION_TEXTS, domain_offsets, option_offsets
from jaxlm.peft import TUNINGS, Tuning
from jaxlm.sharding import mesh_of, place_params, placed_like
from jaxlm.train.dynamics import DYNAMICS, Dynamics, method_and_batches
from jaxlm.train.loop import LoopConfig
from jaxlm.train.optimizers import OPTIMIZERS, Mezo, Optimizer, ZerothOrder
from jaxlm.train.run_folder import RunFolder, to_dict
from jaxlm.train.settings import MOST_ROWS
from jaxlm.typing import LossFn

_FORMS: dict[str, Objective] = {"accuracy": "classification", "f1": "generation"}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LoopConfig):
    """A fine-tuning run.

    Attributes:
        model: folder or hub id; null means the model that comes with the package.
        task: the task, or the name of a shipped one.
        optimizer: one of `jaxlm.train.optimizers.OPTIMIZERS`, by its name.
        peft: what is trained in place of all parameters, one of `jaxlm.peft.TUNINGS` by its name;
            `optimizer.select`, where it is given, chooses among the parameters as they then are.
        dynamics: what becomes of the steps of a first-order optimizer, one of
            `jaxlm.train.dynamics.DYNAMICS` by its name.
        objective: "accuracy" of choices or "f1" of written answers in place of the likelihood of
            what is right; for optimizers without gradients.
        calibrate: whether scores are taken less the first model's `option_offsets`, in training and
            after it, so that training starts from calibrated zero-shot; "sfc" takes its scores
            without the examples, `jaxlm.evaluation.domain_offsets`.
        batch_size: training examples in a step.
        eval_batch_size: examples in a forward pass of evaluation.
        seed: of the k examples drawn, the order of the batches, and the optimizer's randomness.
        param_dtype: of the parameters, float32 (fp32) or bfloat16 (bf16).
        bits: 8 or 4 keeps matrices in that many bits; what is trained then are their scales, biases
            and norms.
        output: the run's folder.
    """

    model: str | None = None
    task: TaskConfig = field(metadata={"make": task_config})
    optimizer: Optimizer = field(default=Mezo(), metadata={"registry": OPTIMIZERS})
    peft: Tuning | None = field(default=None, metadata={"registry": TUNINGS})
    dynamics: Dynamics | None = field(default=None, metadata={"registry": DYNAMICS})
    objective: Literal["accuracy", "f1"] | None = None
    calibrate: Literal[False, True, "sfc"] = False
    steps: int = 500
    batch_size: int = 16
    eval_batch_size: int = 64
    seed: int = 0
    param_dtype: str = "float32"
    bits: Literal[8, 4] | None = None
    output: str

    def __post_init__(self):
        super().__post_init__()
        whole(self, "batch_size", "eval_batch_size", most=MOST_ROWS)
        seeds(self, "seed")
        one_of("calibrate", self.calibrate, (False, True, "sfc"))
        one_of("bits", self.bits, (None, 8, 4))
        one_of("objective", self.objective, (None, "accuracy", "f1"))
        object.__setattr__(self, "param_dtype", dtype_name(self.param_dtype))
        file_path(self.output, "output")
        if self.dynamics is not None:
            self.dynamics.check(self.optimizer, self.batch_size)
            if self.dynamics.name == "svag" and (self.param_dtype != "float32" or self.bits):
                raise UserError(
                    "dynamics: svag makes updates that are lost in few bits (got "
                    f"{self.bits or self.param_dtype}). Give param_dtype float32 and no bits."
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
    given, (config, lm) = config, prepared(config, lm, len(encoded.labels))
    if mesh is not None:
        lm = lm.replace(params=place_params(lm.params, mesh))
    with folder.held(given):
        if (summary := _finished(folder, given)) is not None:
            return summary
        folder.check_data(digests(task, encoded))
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


def encoded_for(config: FinetuneConfig, lm: Any, task: Task) -> EncodedTask:
    """The tokens of a run."""
    encoded = prepare_for(lm, task)
    if config.objective is None:
        return encoded
    return dataclasses.replace(encoded, objective=_FORMS[config.objective])


def prepared(config: FinetuneConfig, lm: Any, num_labels: int) -> tuple[FinetuneConfig, Any]:
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


def load_model(
    name: str | Path | None,
    *,
    param_dtype: str = "float32",
    bits: Literal[8, 4] | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """A language model from a folder, a hub id, a run's folder, or (None) from the package.

    A run gives its best parameters on validation, or the last ones where it had no validation. Its
    matrices come in the bits that it was trained in, if there were any. A folder with no more than
    `config.yaml` and the `trajectory.zo` of a zeroth-order run gives its last parameters: the model
    that it began with is loaded, and the run replayed. A run is read whichever mesh it was on.

    Args:
        name: which model.
        param_dtype, bits, mesh: see `jaxlm.from_pretrained`.

    Raises:
        UserError: there is no model there, or the run has neither checkpoint nor trajectory.
    """
    from jaxlm.models import from_pretrained

    folder = RunFolder(name, "model") if name is not None else None
    stored = folder.config() if folder is not None else None
    if folder is None or stored is None:
        return from_pretrained(name, param_dtype=param_dtype, bits=bits, mesh=mesh)
    if "corpus" in stored:
        from jaxlm.train.pretraining import trained_model

        return trained_model(folder, param_dtype=param_dtype, bits=bits, mesh=mesh)
    check_run(folder, stored)
    from jaxlm.core.precision import quantize
    from jaxlm.train.checkpoint import Checkpoints

    found = None
    if folder.checkpoints.is_dir():
        found = Checkpoints(folder.checkpoints, read_only=True).best_params()
    if found is None and not folder.trajectory.exists():
        raise UserError(f"{name}: the run has no checkpoint yet. Start it again.")
    dtype, trained_bits = stored["param_dtype"] if found is None else param_dtype, stored["bits"]
    lm = load_model(stored["model"], param_dtype=dtype, bits=trained_bits, mesh=mesh)
    lm = with_run(lm, folder, stored)
    if mesh is not None:
        lm = lm.replace(params=place_params(lm.params, mesh))
    if found is None:
        params = _replayed(folder, lm.params, stored["steps"])
    else:
        trained = {leaf.path: leaf.value for leaf in paths.flatten(found)[0]}
        places = {leaf.path: leaf.value.shape for leaf in paths.flatten(lm.params)[0]}
        if {path: value.shape for path, value in trained.items()} != places:
            raise UserError(
                f"{folder.checkpoints}: its parameters are not those of the model that config.yaml "
                f"names (got {stored['model']}). Put back the model that the run began with."
            )
        params = paths.map_with_path(
            lambda leaf: placed_like(trained[leaf.path], leaf.value), lm.params
        )
    if found is None and dtype != param_dtype:
        params = jax.tree.map(lambda x: x.astype(param_dtype), params)
    if bits is not None and trained_bits is None:
        params = quantize(params, bits=bits)
    return lm.replace(params=params)


def check_run(folder: RunFolder, stored: Mapping[str, Any]) -> None:
    """Refuses a `config.yaml` that is not of a fine-tuning run, and one that leads to itself.

    Raises:
        UserError: as said.
    """
    task = stored.get("task")
    kinds: dict[str, Any] = {"steps": int, "seed": int}
    kinds |= {"model": str | None, "bits": int | None}
    kinds |= {"param_dtype": str, "peft": dict | None}
    if (
        not all(isinstance(stored.get(name), kind) for name, kind in kinds.items())
        or not {"model", "bits"} <= stored.keys()
        or not isinstance(task, dict)
        or not isinstance(task.get("labels"), list)
        or (stored.get("peft") or {"name": "lora"}).get("name") not in TUNINGS
    ):
        raise folder.foreign()
    seen = [folder.path.resolve()]
    model = stored["model"]
    while model is not None and (config := RunFolder(model, "model").config()) is not None:
        place = RunFolder(model).path.resolve()
        if place in seen:
            raise UserError(
                f"{folder.path / 'config.yaml'}: model leads back to {place}, a run that it began "
                "with. Give the model that the first run began with."
            )
        seen.append(place)
        model = config.get("model") if "corpus" not in config else None


def with_run(lm: Any, folder: RunFolder, stored: Mapping[str, Any]) -> Any:
    """The model that a run began with, with the head and the tuning of the run.

    Raises:
        UserError: `config.yaml` has a tuning that there is not.
    """
    labels, classes = (stored["task"].get(key) for key in ("labels", "classes"))
    named = isinstance(classes, list) and len(classes) == len(labels)
    names = tuple(map(str, classes if named else labels))
    lm = with_head(lm, len(labels), seed=stored["seed"], names=names)
    if (tuning := stored.get("peft")) is None:
        return lm
    try:
        chosen = TUNINGS[tuning["name"]](**tuning)
    except TypeError:  # other keys than it has
        raise folder.foreign() from None
    return chosen.prepare(lm, jax.random.key(stored["seed"]))


def _replayed(folder: RunFolder, params: Any, steps: int) -> Any:
    from jaxlm import zo

    trajectory = zo.Trajectory.open(folder.trajectory)
    settings = trajectory.header.settings
    try:
        optimizer = OPTIMIZERS[settings["optimizer"]["name"]](**settings["optimizer"])
        length = settings["steps"]
    except (KeyError, TypeError):
        raise UserError(
            f"{folder.trajectory}: not of such a run. Put back what was there."
        ) from None
    if not isinstance(optimizer, ZerothOrder):
        raise UserError(f"{folder.trajectory}: of {optimizer.name}, which is not replayed.")
    if length != steps:
        raise UserError(
            f"{folder.trajectory}: of a run of {length} steps (got {steps} in config.yaml). Put "
            "back what was there."
        )
    return zo.replay(optimizer.build(length), params, trajectory)


def with_head(lm: Any, num_labels: int, *, seed: int, names: Sequence[str] = ()) -> Any:
    """The model itself, or an encoder without a masked-token head with a new classifier on top.

    Args:
        lm: the model.
        num_labels: classes of the task.
        seed: of the new classifier.
        names: of its classes, in the order of the task.
    """
    head, labels = lm.config.head, lm.config.num_labels
    if head in ("lm", "mlm") or (head == "classifier" and labels == num_labels):
        return lm
    from jaxlm.models import add_classifier

    return add_classifier(lm, num_labels, jax.random.key(seed), names)


def loss_of(
    config: FinetuneConfig,
    lm: Any,
    task: Task | None,
    encoded: EncodedTask,
    options: Mapping[str, Any],
) -> LossFn:
    """The loss of a batch; `task` is read for written answers alone, `options` are of scores."""
    from jaxlm.train.objective import accuracy_objective, classification_objective, lm_objective

    if encoded.objective == "generation":
        from jaxlm.train.rewards import f1_objective

        answers = [example.answers for example in task.train] if task is not None else []
        return f1_objective(lm, answers, max_new_tokens=config.task.answer_length)
    if encoded.objective == "completion":
        return lm_objective(lm.log_probs)
    make = accuracy_objective if config.objective == "accuracy" else classification_objective
    return make(lm.apply, encoded.token_ids, log_probs=lm.continuation_log_probs, **options)


def _calibration(config: FinetuneConfig, lm: Any, task: Task, encoded: Any, scorer: Any) -> Any:
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
    config: FinetuneConfig, folder: RunFolder, lm: Any, task: Task, encoded: EncodedTask
) -> dict[str, Any]:
    from jaxlm.train.checkpoint import Checkpoints
    from jaxlm.train.logging import Progress
    from jaxlm.train.loop import fit
    from jaxlm.train.measure import GenerationMetric, MultipleChoiceMetric
    from jaxlm.train.state import device_peak_bytes

    size = config.eval_batch_size
    reduction: Literal["mean", "sum"] = "sum" if config.calibrate == "sfc" else "mean"
    measure: GenerationMetric | MultipleChoiceMetric
    if config.task.answered:
        measure = GenerationMetric(lm, task, batch_size=size)
    else:
        measure = MultipleChoiceMetric(lm, encoded, batch_size=size, reduction=reduction)

    def validate(params: Any) -> dict[str, float]:
        return _named("validation", measure("validation", params))

    checkpoints = Checkpoints(folder.checkpoints)
    start = checkpoints.latest_step
    folder.metrics.cut(start)
    first = folder.metrics.first() if start is not None else None
    with Progress(config.steps, start=start or 0, log=folder.log) as progress:
        measure.tell = progress.waiting
        progress.say(f"start from step {start}" if start is not None else f"start {folder.path}")
        if repeated := task.repeated("test"):
            progress.say(f"{repeated} of {len(task.test)} test rows are training rows, too")
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
        loss_fn = loss_of(config, lm, task, encoded, options)
        chosen, batches = method_and_batches(
            config.optimizer,
            config.dynamics,
            loss_fn,
            lambda batch_size, seeds: functools.partial(
                encoded.streams, batch_size=batch_size, seeds=seeds
            ),
            steps=config.steps,
            batch_size=config.batch_size,
            seed=config.seed,
            mesh=mesh_of(lm.params),
        )
        outcome = fit(
            chosen,
            lm.params,
            batches,
            config,
            key=jax.random.key(config.seed),
            evaluate=validate if encoded.validation else None,
            maximize=f"validation_{measure.main}",
            checkpoints=checkpoints,
            trajectory=folder.trajectory,
            metrics=folder.metrics,
            progress=progress,
            chance=_chance(encoded),
        )
        state, record = outcome.state, outcome.record
        dynamics = config.dynamics and config.dynamics.report(
            config.optimizer, config.steps, state.opt_state
        )
        params = state.params
        if record.best_step not in (None, config.steps):
            params = checkpoints.in_place_of(state, record.best_step)
        test = measure("test", params)
        progress.say(f"test {_shown(test)}")
    before = {name: first[f"zero_shot_{name}"] for name in test}
    if isinstance(measure, MultipleChoiceMetric):
        before["calibrated_accuracy"] = first.get("calibrated_accuracy")
    return {
        "model": config.model or "shipped",
        "task": config.task.name,
        "metric": measure.main,
        "zero_shot": before,
        "validation": {measure.main: record.best_value},
        "test": test,
        "majority_accuracy": measure.majority.get("test"),
        "test_rows_in_training": repeated,
        "tested_step": config.steps if record.best_step is None else record.best_step,
        "steps": config.steps,
        "diverged_since": record.diverged,
        "forwards": chosen.forwards * config.steps + _calibration_passes(config, encoded),
        "backwards": chosen.backwards * config.steps,
        "seconds": record.seconds,
        "goodput": record.goodput,
        "peak_memory_bytes": max(outcome.peak_bytes, measure.peak_bytes),
        "device_peak_bytes": device_peak_bytes(),
        "dynamics": dynamics,
        "config": to_dict(config),
    }


def _named(what: str, values: Mapping[str, float]) -> dict[str, Any]:
    return {f"{what}_{name}": value for name, value in values.items()}


def _shown(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())
