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

from jaxlm.core.checks import seeds, whole
from jaxlm.data import EncodedTask, TaskConfig, load_task, prepare_for, task_config
from jaxlm.train.loop import LoopConfig
from jaxlm.train.optimizers import OPTIMIZERS, Optimizer
from jaxlm.train.settings import MOST_ROWS, MOST_STEPS
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
    """A model and a task, ready for scoring and training.

    Attributes:
        config: see `QuickstartConfig`.
        lm: the model.
        encoded: the task in the model's tokens.
        scorer: compiled `(params, batch) -> scores`.
    """

    config: QuickstartConfig
    lm: Any
    encoded: EncodedTask
    scorer: Any


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
    """Load the model and the task.

    Raises:
        UserError: see `load_task`, `jaxlm.from_pretrained`, `jaxlm.data.prepare`.
    """
    from jaxlm.evaluation import option_scores
    from jaxlm.train.load import load_model, with_head
    from jaxlm.train.state import Program

    task = load_task(config.task, seed=config.seed)
    lm = load_model(config.model)
    encoded = prepare_for(lm, task)
    lm = with_head(lm, len(encoded.labels), seed=config.seed)
    scorer = Program(
        functools.partial(
            option_scores, lm.apply, encoded.token_ids, log_probs=lm.continuation_log_probs
        )
    )
    return Setting(config, lm, encoded, scorer)


def run(config: QuickstartConfig, *, quiet: bool = False) -> list[Row]:
    """Return the rows of the table, in order."""
    from jaxlm.train.load import with_random_params

    where = setting(config)
    rows = [majority(where), *zero_shot(where)]
    rows.append(train(where, "MeZO", config.mezo, where.lm.params, quiet=quiet))
    fresh = with_random_params(where.lm, seed=config.seed).params
    rows.append(train(where, "MeZO, random init", config.random_init, fresh, quiet=quiet))
    rows.append(train(where, "Adam", config.adam, where.lm.params, quiet=quiet))
    return [*rows, probe(where)]


def majority(where: Setting) -> Row:
    """Predict the most frequent class of the test set."""
    import numpy as np

    from jaxlm.evaluation import majority_accuracy

    begin = time.perf_counter()
    labels = np.array([each.label for each in where.encoded.test])
    return Row("majority class", majority_accuracy(labels), 0, 0, None, _since(begin))


def zero_shot(where: Setting) -> tuple[Row, Row]:
    """Test the pretrained model, raw and calibrated at the median scores of unlabelled text."""
    from jaxlm.evaluation import accuracy

    begin = time.perf_counter()
    scores, labels = _score(where, where.lm.params)
    raw = Row("zero-shot", accuracy(scores, labels), 0, 0, where.scorer.peak_bytes, _since(begin))
    offsets, passes = _offsets(where, where.lm.params)
    calibrated = accuracy(scores - offsets, labels)
    row = Row("zero-shot, calibrated", calibrated, passes, 0, raw.peak_bytes, _since(begin))
    return raw, row


def train(
    where: Setting,
    name: str,
    training: Training,
    params: Params,
    *,
    seed: int | None = None,
    quiet: bool = False,
) -> Row:
    """Train from a copy of `params`, and test the last parameters."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxlm.evaluation import accuracy
    from jaxlm.train.logging import Progress
    from jaxlm.train.loop import fit
    from jaxlm.train.losses import classification_objective
    from jaxlm.train.state import method

    begin = time.perf_counter()
    seed = where.config.seed if seed is None else seed
    steps = training.steps
    offsets, passes = np.zeros(len(where.encoded.labels), np.float32), 0
    if where.config.calibrate:
        offsets, passes = _offsets(where, params)
    loss_fn = classification_objective(
        where.lm.apply,
        where.encoded.token_ids,
        offsets=offsets,
        log_probs=where.lm.continuation_log_probs,
    )
    chosen = method(training.optimizer, loss_fn, steps)
    with Progress(steps, quiet=quiet) as progress:
        progress.say(f"{name}: {steps} steps of {training.batch_size} texts")
        outcome = fit(
            chosen,
            jax.tree.map(jnp.copy, params),
            functools.partial(where.encoded.batches, batch_size=training.batch_size, seed=seed),
            LoopConfig(
                steps=steps,
                eval_every=steps,
                checkpoint_every=steps,
                log_every=where.config.log_every,
            ),
            key=jax.random.key(seed),
            progress=progress,
        )
    scores, labels = _score(where, outcome.state.params)
    result = accuracy(scores - offsets, labels)
    passes += chosen.forwards * steps
    backwards = chosen.backwards * steps
    return Row(name, result, passes, backwards, outcome.record.peak_bytes, _since(begin))


def probe(where: Setting) -> Row:
    """Fit logistic regression on the standardised mean of the token embeddings."""
    import numpy as np
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


def _score(where: Setting, params: Params) -> Any:
    from jaxlm.evaluation import score_split

    size = where.config.eval_batch_size
    return score_split(where.scorer, params, where.encoded, "test", batch_size=size)


def _offsets(where: Setting, params: Params) -> tuple[Any, int]:
    from jaxlm.evaluation import option_offsets

    size, texts = where.config.eval_batch_size, where.config.unlabelled
    offsets = option_offsets(where.scorer, params, where.encoded, batch_size=size, texts=texts)
    return offsets, -(-min(texts, len(where.encoded.train)) // size)


def _since(begin: float) -> float:
    return time.perf_counter() - begin
