"""The base class of objectives."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data import DataConfig, EncodedTask, Pairs, Task, Texts
from jaxlm.data.batching import Objective as Batches
from jaxlm.data.rows import EncodedRows, SplitName
from jaxlm.evaluation.classification import Reduction
from jaxlm.models import LanguageModel
from jaxlm.train.losses import num_examples, num_targets
from jaxlm.train.measure import GenerationMetric, Metric, MultipleChoiceMetric, TokenLossMetric
from jaxlm.train.settings import Optimizer
from jaxlm.train.zeroth_order import ZerothOrder
from jaxlm.typing import Batch, LossFn

Data = Task | Texts | Pairs
Encoded = EncodedTask | EncodedRows
Columns = dict[SplitName, dict[str, np.ndarray]]
"""By split, arrays with one row for each example, see `jaxlm.data.rows.EncodedSplits`."""
Scoring = Mapping[str, Any]
"""`offsets` and `reduction` of the scores of options, see `option_scores`."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a run minimizes.

    Attributes:
        name: key in `OBJECTIVES`.
    """

    name: str

    forms: ClassVar[tuple[str, ...]] = ("task",)
    """Data forms that it reads, by their keys in a run's configuration."""
    batches: ClassVar[Batches] = "classification"
    """Training batches of a task, see `jaxlm.data.EncodedTask`."""
    differentiable: ClassVar[bool] = True

    def check(
        self, form: str, data: DataConfig, optimizer: Optimizer, *, accumulate: int = 1
    ) -> None:
        """Refuse a run whose data it does not read, or whose optimizer needs a gradient."""
        if form not in self.forms:
            raise UserError(
                f"objective: {self.name} reads {' or '.join(self.forms)} (got {form}). Choose "
                "another objective."
            )
        if not self.differentiable and not isinstance(optimizer, ZerothOrder):
            raise UserError(
                f"objective: {self.name} has no gradient for {optimizer.name} to follow (got "
                f"{self.name}). Use mezo or another zeroth-order optimizer."
            )

    def loss_fn(
        self, lm: LanguageModel, data: Data | None, encoded: Encoded, scoring: Scoring
    ) -> LossFn:
        """Build the loss of a batch, `(params, batch, *, key=None, view=None) -> (loss, aux)`.

        A loss must not hold the parameters of `lm`: training replaces them, and deletes their
        arrays. There are no `data` in a dry run without a tokenizer.
        """
        raise NotImplementedError

    @staticmethod
    def share(batch: Batch) -> Any:
        """Return what the loss of a batch divides by; see `jaxlm.train.losses.accumulate`.

        By default that is the number of targets if the batch has weights of tokens, or of examples.
        """
        tokens = jnp.ndim(batch.get("weights", batch.get("target_mask", ()))) == 2
        return num_targets(batch) if tokens else num_examples(batch)

    def batched(self, encoded: Encoded) -> Encoded:
        """Return the data with training batches as the loss reads them."""
        if isinstance(encoded, EncodedTask):
            return dataclasses.replace(encoded, objective=self.batches)
        return encoded

    @property
    def reference_model(self) -> str | None:
        """Name of the `reference` of `columns`; None for the model before its first step."""
        return None

    def located(self) -> "Objective":
        """Return the same objective with the absolute path of `reference_model`, if it is here."""
        return self

    def columns(
        self, lm: LanguageModel, reference: LanguageModel, encoded: Encoded, *, batch_size: int
    ) -> Columns:
        """Compute what the loss needs of each example, once, before the first step.

        Args:
            lm: the model before its first step.
            reference: the model that `reference_model` names, or `lm`.
            encoded: the data, of all splits.
            batch_size: examples in a forward pass.
        """
        return {}

    def metric(
        self,
        lm: LanguageModel,
        data: Data | None,
        encoded: Encoded,
        *,
        batch_size: int,
        reduction: Reduction = "mean",
    ) -> Metric:
        """Return what validation and the table measure; by default it follows from the data form.

        `reduction` is that of the scores of options.
        """
        if not isinstance(encoded, EncodedTask):
            return TokenLossMetric(lm, encoded, batch_size=batch_size)
        if isinstance(data, Task) and data.config.is_generative:
            return GenerationMetric(lm, data, batch_size=batch_size)
        return MultipleChoiceMetric(lm, encoded, batch_size=batch_size, reduction=reduction)

    def chance(self, lm: LanguageModel, encoded: Encoded) -> float | None:
        """Return the loss of guessing, from which divergence is told; None if there is none."""
        return None
