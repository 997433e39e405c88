"""Objectives that maximize the likelihood of right answers or tokens."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from jaxlm.data import EncodedTask
from jaxlm.data.batching import Objective as Batches
from jaxlm.data.rows import EncodedRows
from jaxlm.evaluation.classification import Reduction
from jaxlm.models import LanguageModel
from jaxlm.train.losses import classification_objective, tagging_objective, token_objective
from jaxlm.train.measure import Metric, TaggingMetric
from jaxlm.train.objectives.base import Data, Encoded, Objective, Scoring
from jaxlm.typing import Batch, LossFn


@dataclass(frozen=True, kw_only=True)
class Classification(Objective):
    """Cross-entropy of the right option among all options."""

    name: str = "classification"

    def loss_fn(
        self, lm: LanguageModel, data: Data | None, encoded: Encoded, scoring: Scoring
    ) -> LossFn:
        assert isinstance(encoded, EncodedTask)
        log_probs = lm.continuation_log_probs
        return classification_objective(lm.apply, encoded.token_ids, log_probs=log_probs, **scoring)

    def chance(self, lm: LanguageModel, encoded: Encoded) -> float | None:
        """Return the log of the number of options; None if there is only one."""
        assert isinstance(encoded, EncodedTask)
        return math.log(encoded.num_options) if encoded.num_options > 1 else None


@dataclass(frozen=True, kw_only=True)
class Completion(Objective):
    """Cross-entropy of the tokens in the loss: right answers, the assistant's turns, documents."""

    name: str = "completion"

    forms: ClassVar[tuple[str, ...]] = ("task", "messages", "text")
    batches: ClassVar[Batches] = "completion"

    def loss_fn(
        self, lm: LanguageModel, data: Data | None, encoded: Encoded, scoring: Scoring
    ) -> LossFn:
        return token_objective(lm)

    def batched(self, encoded: Encoded) -> Encoded:
        """See `Objective`; logits at the tokens in the loss are enough."""
        return encoded.sparse() if isinstance(encoded, EncodedRows) else super().batched(encoded)

    def chance(self, lm: LanguageModel, encoded: Encoded) -> float | None:
        """Return the log of the vocabulary size for rows of tokens; None for a task."""
        return None if isinstance(encoded, EncodedTask) else math.log(lm.config.vocab_size)


@dataclass(frozen=True, kw_only=True)
class TokenClassification(Objective):
    """Cross-entropy of the tags of words, at the first token of each."""

    name: str = "token_classification"

    forms: ClassVar[tuple[str, ...]] = ("tokens",)

    def loss_fn(
        self, lm: LanguageModel, data: Data | None, encoded: Encoded, scoring: Scoring
    ) -> LossFn:
        return tagging_objective(lm.apply)

    @staticmethod
    def share(batch: Batch) -> Any:
        """See `Objective`; the first token of a row may be in the loss, too."""
        return jnp.sum(jnp.asarray(batch["weights"]))

    def metric(
        self,
        lm: LanguageModel,
        data: Data | None,
        encoded: Encoded,
        *,
        batch_size: int,
        reduction: Reduction = "mean",
    ) -> Metric:
        assert isinstance(encoded, EncodedRows)
        return TaggingMetric(lm, encoded, batch_size=batch_size)

    def chance(self, lm: LanguageModel, encoded: Encoded) -> float | None:
        """Return the log of the number of classes; None if there is only one."""
        return math.log(lm.config.num_labels) if lm.config.num_labels > 1 else None
