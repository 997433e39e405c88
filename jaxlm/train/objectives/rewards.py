"""Objectives without a gradient, for zeroth-order optimizers: the metrics of tasks."""

from dataclasses import dataclass
from typing import ClassVar

from jaxlm.core.errors import UserError
from jaxlm.data import DataConfig, EncodedTask, Task, TaskConfig
from jaxlm.data.batching import Objective as Batches
from jaxlm.models import LanguageModel
from jaxlm.train.losses import accuracy_objective
from jaxlm.train.objectives.base import Data, Encoded, Objective, Scoring
from jaxlm.train.rewards import f1_objective
from jaxlm.train.settings import Optimizer
from jaxlm.typing import LossFn


@dataclass(frozen=True, kw_only=True)
class Accuracy(Objective):
    """One minus the accuracy of the batch."""

    name: str = "accuracy"

    differentiable: ClassVar[bool] = False
    measured_by: ClassVar[str] = "accuracy"

    def check(
        self, form: str, data: DataConfig, optimizer: Optimizer, *, accumulate: int = 1
    ) -> None:
        """See `Objective`; the task must be measured by this metric."""
        if isinstance(data, TaskConfig) and data.metric != self.measured_by:
            raise UserError(
                f"objective: {data.name} is measured by {data.metric} (got {self.name}). Give that."
            )
        super().check(form, data, optimizer, accumulate=accumulate)

    def loss_fn(
        self, lm: LanguageModel, data: Data | None, encoded: Encoded, scoring: Scoring
    ) -> LossFn:
        assert isinstance(encoded, EncodedTask)
        log_probs = lm.continuation_log_probs
        return accuracy_objective(lm.apply, encoded.token_ids, log_probs=log_probs, **scoring)


@dataclass(frozen=True, kw_only=True)
class F1(Accuracy):
    """Minus the mean F1 of the answers that the model writes."""

    name: str = "f1"

    batches: ClassVar[Batches] = "generation"
    measured_by: ClassVar[str] = "f1"

    def loss_fn(
        self, lm: LanguageModel, data: Data | None, encoded: Encoded, scoring: Scoring
    ) -> LossFn:
        assert isinstance(data, Task)
        answers = [example.answers for example in data.train]
        return f1_objective(lm, answers, max_new_tokens=data.config.answer_length)
