"""Metrics of a run: accuracy of its choices, F1 of answers or of tags, or the loss of tokens."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm.core.checks import MOST
from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError
from jaxlm.data import EncodedTask, Example, Task, prepare_for, prompted
from jaxlm.data.rows import EncodedRows, PaddedRows, SplitName, fixed_buckets
from jaxlm.evaluation import (
    GenerationResult,
    accuracy,
    evaluate_generation,
    majority_accuracy,
    option_scores,
    score_split,
    tag_report,
)
from jaxlm.evaluation.classification import Reduction
from jaxlm.evaluation.tagging import marks_entities
from jaxlm.models import LanguageModel
from jaxlm.train.state import Program
from jaxlm.typing import Batch, Params


class Metric:
    """A function `(split, params) -> {name: value}`; a value is a number, or a list of named ones.

    Attributes:
        main: the value by which the best checkpoint is chosen.
        mode: whether that is the highest or the lowest value.
        others: other values that the key `monitor` may name, with their modes.
        keeps_best: whether the best checkpoint is the result where nothing is monitored by name;
            otherwise that is the last one.
        offsets: [C], subtracted from the scores of options; None subtracts nothing.
        scorer: the compiled program, `(params, batch) -> ...`, if there is one.
        majority: for each split measured so far, the accuracy of its most frequent class; None
            where examples have their own options.
        tell: called with a line about what is being measured.
    """

    main: str
    mode: Literal["max", "min"] = "max"
    others: Mapping[str, Literal["max", "min"]] = MappingProxyType({})
    keeps_best: bool = True
    scorer: Program

    def __init__(self) -> None:
        self.offsets: Float[np.ndarray, " C"] | None = None
        self.majority: dict[str, float | None] = {}
        self.tell: Callable[[str], None] = lambda line: None

    def __call__(self, split: SplitName, params: Params) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def modes(self) -> dict[str, Literal["max", "min"]]:
        """The values that a run can be monitored by, with their modes."""
        return {self.main: self.mode, **self.others}

    @property
    def peak_bytes(self) -> int:
        """Memory of the largest compiled program."""
        return self.scorer.peak_bytes


class MultipleChoiceMetric(Metric):
    """Accuracy of choosing the option with the highest score; the program has no offsets."""

    main = "accuracy"

    def __init__(
        self,
        lm: LanguageModel,
        encoded: EncodedTask,
        *,
        batch_size: int,
        reduction: Reduction = "mean",
    ):
        super().__init__()
        if lm.config.head == "classifier" and lm.config.num_labels != encoded.num_options:
            raise UserError(
                f"model: its classifier is not for {encoded.num_options} classes (got "
                f"{lm.config.num_labels}). Fine-tune it on the task first."
            )
        self.scorer = Program(
            functools.partial(
                option_scores,
                lm.apply,
                encoded.token_ids,
                log_probs=lm.continuation_log_probs,
                reduction=reduction,
            )
        )
        self.encoded, self._batch_size = encoded, batch_size

    def __call__(self, split: SplitName, params: Params) -> dict[str, float]:
        return {"accuracy": accuracy(*self.scores(split, params))}

    def scores(self, split: SplitName, params: Params) -> tuple[np.ndarray, np.ndarray]:
        """Return scores minus the offsets [N, C], and labels; see `evaluation.score_split`."""
        done, total = 0, len(getattr(self.encoded, split))

        def scorer(params: Params, batch: Batch) -> Any:
            nonlocal done
            self.tell(f"evaluating {split} {done}/{total}")
            done += int(batch["weights"].sum())
            return self.scorer(params, batch)

        scores, labels = score_split(
            scorer, params, self.encoded, split, batch_size=self._batch_size
        )
        self.majority[split] = majority_accuracy(labels) if self.encoded.labels else None
        return (scores if self.offsets is None else scores - self.offsets[None]), labels


CHUNK = 16
"""Batches of rows that are read, encoded and sorted by length together where rows are streamed."""


class Choices:
    """Scores of the options of any examples of a task, in chunks of `chunk` examples.

    The scores of a chunk depend on nothing but its examples: not on other splits, on other chunks,
    or on how many of these there are.

    Attributes:
        chunk: examples in a chunk.
        offsets: subtracted from the scores; None subtracts nothing.
        peak_bytes: memory of the largest compiled program.
    """

    def __init__(
        self,
        lm: LanguageModel,
        task: Task,
        *,
        batch_size: int,
        reduction: Reduction = "mean",
        offsets: Float[np.ndarray, " C"] | None = None,
    ):
        self.chunk, self.offsets, self.peak_bytes = CHUNK * batch_size, offsets, 0
        self._lm = lm
        self._metric = functools.partial(
            MultipleChoiceMetric, lm, batch_size=batch_size, reduction=reduction
        )
        self._task = dataclasses.replace(task, train=(), validation=(), test=())
        self._metrics: dict[tuple[int, ...], MultipleChoiceMetric] = {}

    def scores(self, examples: Sequence[Example]) -> Float[np.ndarray, "N C"]:
        """Return the scores minus the offsets; minus infinity for options that are not there."""
        chunks = [
            self._score(examples[start : start + self.chunk])
            for start in range(0, len(examples), self.chunk)
        ]
        width = max(chunk.shape[1] for chunk in chunks)
        pads = [((0, 0), (0, width - chunk.shape[1])) for chunk in chunks]
        padded = [
            np.pad(chunk, pad, constant_values=-np.inf)
            for chunk, pad in zip(chunks, pads, strict=True)
        ]
        return np.concatenate(padded)

    def _score(self, examples: Sequence[Example]) -> Float[np.ndarray, "N C"]:
        task = dataclasses.replace(self._task, test=tuple(examples))
        encoded = prepare_for(self._lm, task)
        limit = min(self._lm.config.max_positions, task.config.max_length or MOST)
        encoded = dataclasses.replace(encoded, buckets=fixed_buckets(encoded.buckets[-1], limit))
        ids = () if encoded.token_ids is None else tuple(encoded.token_ids.tolist())
        if ids not in self._metrics:
            self._metrics[ids] = self._metric(encoded)
        metric = self._metrics[ids]
        metric.encoded, metric.offsets = encoded, self.offsets
        scores, _ = metric.scores("test", self._lm.params)
        self.peak_bytes = max(self.peak_bytes, metric.peak_bytes)
        return scores


class GenerationMetric(Metric):
    """F1 and exact match of greedily written answers.

    Attributes:
        result: the answers of the last call, and their scores.
    """

    main = "f1"
    others = MappingProxyType({"exact_match": "max"})
    result: GenerationResult
    peak_bytes = 0  # there is no program whose memory is known

    def __init__(self, lm: LanguageModel, task: Task, *, batch_size: int):
        super().__init__()
        self._lm, self._task, self._batch_size = lm, task, batch_size

    def __call__(self, split: SplitName, params: Params) -> dict[str, float]:
        questions = [prompted(self._task, example) for example in getattr(self._task, split)]
        config, longest = self._task.config, self._lm.config.max_positions
        self.tell(f"writing answers to {len(questions)} questions of {split}")
        self.result = evaluate_generation(
            self._lm,
            params,
            [question.prompt for question in questions],
            [question.answers for question in questions],
            max_new_tokens=config.answer_length,
            batch_size=self._batch_size,
            max_length=min(longest, config.max_length or longest),
        )
        return {"f1": self.result.f1, "exact_match": self.result.exact_match}


class TokenLossMetric(Metric):
    """Mean cross-entropy of the tokens in the loss, in nats a token."""

    main = "loss"
    mode: Literal["max", "min"] = "min"

    def __init__(self, lm: LanguageModel, encoded: EncodedRows, *, batch_size: int):
        def total(params: Params, batch: Batch) -> tuple[Array, Array]:
            log_probs = lm.log_probs(params, batch["input_ids"], batch["attention_mask"])
            weights = batch["weights"][:, 1:]
            return -jnp.sum(log_probs * weights), jnp.sum(weights)

        super().__init__()
        self.scorer = Program(total)
        self._encoded, self._batch_size = encoded, batch_size

    def __call__(self, split: SplitName, params: Params) -> dict[str, float]:
        return {"loss": self.mean(split, getattr(self._encoded, split), params)}

    def mean(self, name: str, rows: PaddedRows, params: Params) -> float:
        """Return the loss of rows, whose name is for messages."""
        totals = np.zeros(2)
        for batch in rows.eval_batches(self._batch_size):
            self.tell(f"evaluating {name}")
            del batch["index"]
            totals += np.asarray(jax.device_get(self.scorer(params, batch)), np.float64)
        if not np.isfinite(totals[0]):
            raise UserError(
                f"{name}: the loss is not finite (got {totals[0]}). Check that the model's "
                "weights are finite, and lower optimizer.learning_rate."
            )
        return float(totals[0] / totals[1])


class Tagger:
    """The most likely class of the tokens in the loss, and its probability.

    Attributes:
        program: the compiled program.
    """

    def __init__(self, lm: LanguageModel, *, batch_size: int):
        def best(params: Params, batch: Batch) -> tuple[Array, Array]:
            logits = wide(lm.apply(params, batch["input_ids"], batch["attention_mask"]))
            return jnp.argmax(logits, axis=-1), jnp.max(jax.nn.softmax(logits), axis=-1)

        self.program = Program(best)
        self._batch_size = batch_size

    def __call__(self, rows: PaddedRows, params: Params) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return classes and probabilities at the `loss_positions` of each row."""
        found = [(np.zeros(0, int), np.zeros(0))] * len(rows)
        for batch in rows.eval_batches(self._batch_size):
            index = batch.pop("index")
            classes, shares = map(np.asarray, self.program(params, batch))
            for line, place in enumerate(index.tolist()):
                if place >= 0:
                    at = list(rows.rows[place].loss_positions)
                    found[place] = classes[line, at], shares[line, at]
        for row, (_, shares) in zip(rows.rows, found, strict=True):
            if not np.isfinite(shares).all():
                raise UserError(
                    f"{row.id}: its probabilities are not finite (got {shares.max()}). Check that "
                    "the model's weights are finite, and lower optimizer.learning_rate."
                )
        return found


class TaggingMetric(Metric):
    """F1 of entities, or the macro F1 of tags that mark none, and accuracy; see `tag_report`."""

    others = MappingProxyType({"accuracy": "max"})

    def __init__(self, lm: LanguageModel, encoded: EncodedRows, *, batch_size: int):
        super().__init__()
        self._encoded, self._tagger = encoded, Tagger(lm, batch_size=batch_size)
        self.scorer = self._tagger.program
        self.main = "f1" if marks_entities(encoded.labels) else "macro_f1"

    def __call__(self, split: SplitName, params: Params) -> dict[str, float]:
        rows: PaddedRows = getattr(self._encoded, split)
        self.tell(f"evaluating {split}")
        tags = [np.array(row.tags) for row in rows.rows]
        predicted = [classes for classes, _ in self._tagger(rows, params)]
        report = tag_report(tags, predicted, self._encoded.labels)
        self.majority[split] = report["majority_accuracy"]
        return {name: report[name] for name in (self.main, "accuracy")}
