"""The quickstart: MeZO on one model and one task, beside its baselines.

Zero-shot accuracy, raw and calibrated, shows what the pretrained model knows about the task. MeZO
shows what forward passes learn from labels; MeZO from random parameters of the same shape shows how
much of that rests on pretraining. Adam shows what gradients give, and logistic regression what
plain features give.
"""

import functools
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.checks import seeds, whole
from jaxlm.data import EncodedTask, TaskConfig, load_task, prepare_for, task_config
from jaxlm.evaluation import accuracy, majority_accuracy
from jaxlm.evaluation.calibration import option_offsets
from jaxlm.models import LanguageModel
from jaxlm.train.load import load_model, with_head, with_random_params
from jaxlm.train.logging import Progress
from jaxlm.train.loop import LoopConfig, fit
from jaxlm.train.losses import classification_objective
from jaxlm.train.measure import MultipleChoiceMetric
from jaxlm.train.optimizers import OPTIMIZERS, Optimizer
from jaxlm.train.settings import MOST_ROWS, MOST_STEPS
from jaxlm.train.state import method
from jaxlm.typing import Params


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of a row of the table that trains.

    Attributes:
        optimizer: see `jaxlm.train.optimizers`.
        steps: number of updates.
        batch_size: examples per step.
    """

    optimizer: Optimizer = field(metadata={"registry": OPTIMIZERS})
    steps: int
    batch_size: int = 32

    def __post_init__(self):
        whole(self, "steps", most=MOST_STEPS)
        whole(self, "batch_size", most=MOST_ROWS)


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Settings of the quickstart; `jaxlm/assets/quickstart.yaml` has those of the shipped model.

    Attributes:
        model: folder or hub id; null means the shipped model.
        task: the task.
        seed: seed of the batches, of MeZO's directions and of the random parameters.
        unlabelled: number of training texts whose scores calibrate a model; labels are not used.
        calibrate: whether training starts from calibrated scores of the initial parameters.
        eval_batch_size: examples in a forward pass of evaluation.
        log_every: steps in one dispatch.
        mezo: MeZO from the pretrained parameters.
        random_init: MeZO from random parameters.
        adam: Adam from the pretrained parameters.
    """

    model: str | None = None
    task: TaskConfig = field(metadata={"make": task_config})
    seed: int = 0
    unlabelled: int = 1000
    calibrate: bool = False
    eval_batch_size: int = 50
    log_every: int = 10
    mezo: Training
    random_init: Training
    adam: Training

    def __post_init__(self):
        whole(self, "unlabelled", "log_every")
        whole(self, "eval_batch_size", most=MOST_ROWS)
        seeds(self, "seed")


class Setting(NamedTuple):
    """A model and a task, ready for scoring and training."""

    config: QuickstartConfig
    lm: LanguageModel
    encoded: EncodedTask
    metric: MultipleChoiceMetric

    def offsets(self, params: Params) -> tuple[np.ndarray, int]:
        """Return the median scores of unlabelled text, and the number of forward passes."""
        size, texts = self.config.eval_batch_size, self.config.unlabelled
        offsets = option_offsets(
            self.metric.scorer, params, self.encoded, batch_size=size, texts=texts
        )
        return offsets, -(-min(texts, len(self.encoded.train)) // size)


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        method: name of the method.
        accuracy: test accuracy.
        forwards: forward passes over a batch, without those of the test.
        backwards: backward passes over a batch.
        peak_bytes: memory of the largest compiled program; None if nothing is compiled.
        seconds: wall time, with compilation and test.
    """

    method: str
    accuracy: float
    forwards: int
    backwards: int
    peak_bytes: int | None
    seconds: float


def setting(config: QuickstartConfig) -> Setting:
    """Load the model and the task."""
    lm = load_model(config.model)
    encoded = prepare_for(lm, load_task(config.task, seed=config.seed))
    lm = with_head(lm, len(encoded.labels), seed=config.seed)
    metric = MultipleChoiceMetric(lm, encoded, batch_size=config.eval_batch_size)
    return Setting(config, lm, encoded, metric)


def run(config: QuickstartConfig, *, quiet: bool = False) -> list[Row]:
    """Return the rows of the table, in order."""
    where = setting(config)
    begin = time.perf_counter()
    labels = np.array([example.label for example in where.encoded.test])
    rows = [Row("majority class", majority_accuracy(labels), 0, 0, None, _since(begin))]
    rows += zero_shot(where)
    rows.append(train(where, "MeZO", config.mezo, where.lm.params, quiet=quiet))
    fresh = with_random_params(where.lm, seed=config.seed).params
    rows.append(train(where, "MeZO, random init", config.random_init, fresh, quiet=quiet))
    rows.append(train(where, "Adam", config.adam, where.lm.params, quiet=quiet))
    return [*rows, probe(where)]


def zero_shot(where: Setting) -> tuple[Row, Row]:
    """Test the pretrained model, raw and calibrated at the median scores of unlabelled text."""
    begin = time.perf_counter()
    scores, labels = where.metric.scores("test", where.lm.params)
    memory = where.metric.peak_bytes
    raw = Row("zero-shot", accuracy(scores, labels), 0, 0, memory, _since(begin))
    offsets, passes = where.offsets(where.lm.params)
    calibrated = accuracy(scores - offsets, labels)
    return raw, Row("zero-shot, calibrated", calibrated, passes, 0, memory, _since(begin))


def train(
    where: Setting, name: str, training: Training, params: Params, *, quiet: bool = False
) -> Row:
    """Train from a copy of `params`, and test the last parameters."""
    begin = time.perf_counter()
    config, steps = where.config, training.steps
    offsets, passes = np.zeros(len(where.encoded.labels), np.float32), 0
    if config.calibrate:
        offsets, passes = where.offsets(params)
    loss_fn = classification_objective(
        where.lm.apply,
        where.encoded.token_ids,
        offsets=offsets,
        log_probs=where.lm.continuation_log_probs,
    )
    chosen = method(training.optimizer, loss_fn, steps)
    batches = functools.partial(
        where.encoded.batches, batch_size=training.batch_size, seed=config.seed
    )
    loop = LoopConfig(
        steps=steps, eval_every=steps, checkpoint_every=steps, log_every=config.log_every
    )
    key = jax.random.key(config.seed)
    with Progress(steps, quiet=quiet) as progress:
        progress.say(f"{name}: {steps} steps of {training.batch_size} texts")
        params = jax.tree.map(jnp.copy, params)
        outcome = fit(chosen, params, batches, loop, key=key, progress=progress)
    scores, labels = where.metric.scores("test", outcome.state.params)
    return Row(
        name,
        accuracy(scores - offsets, labels),
        passes + chosen.forwards * steps,
        chosen.backwards * steps,
        outcome.record.peak_bytes,
        _since(begin),
    )


def probe(where: Setting) -> Row:
    """Fit logistic regression on the standardised mean of the token embeddings."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    begin = time.perf_counter()
    table = np.asarray(where.lm.params["embed"]["tokens"]["embedding"], np.float32)

    def features(split: Any) -> tuple[Any, list[int]]:
        means = [table[list(each.input_ids[0])].mean(axis=0) for each in split]
        return np.stack(means), [each.label for each in split]

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(*features(where.encoded.train))
    result = float(model.score(*features(where.encoded.test)))
    return Row("logistic regression", result, 0, 0, None, _since(begin))


def _since(begin: float) -> float:
    return time.perf_counter() - begin
