"""What a model that was trained on chosen rows does for the target."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data import load_task, prepare_for
from jaxlm.data.messages import MessageTemplate
from jaxlm.data.rows import PaddedRows, digest
from jaxlm.studies.selection_batches import row_losses
from jaxlm.studies.selection_rows import Rows, Source, Target, read_source
from jaxlm.train.measure import MultipleChoiceMetric
from jaxlm.train.state import Program
from jaxlm.typing import Params


class Measure:
    """Accuracy on a task's test examples, or the mean loss of conversations, in nats a token.

    Attributes:
        metric: "accuracy" or "loss".
        data: hash of what is measured on.
    """

    def __init__(
        self,
        lm: Any,
        target: Target,
        *,
        batch_size: int,
        template: MessageTemplate,
        max_length: int,
        seed: int,
        base_dir: Path | None,
    ):
        self._measure: MultipleChoiceMetric | _Loss
        if target.task is not None:
            task = load_task(target.task, seed=seed, base_dir=base_dir)
            if not task.test:
                raise UserError(
                    "target.task.test: there are no such examples (got none). Name a file of them."
                )
            task = dataclasses.replace(task, train=(), validation=())
            encoded = prepare_for(lm, task, max_length=max_length)
            self.metric = "accuracy"
            self._measure = MultipleChoiceMetric(lm, encoded, batch_size=batch_size)
            self.data = repr((encoded.test, encoded.token_ids))
            return
        source = Source(messages=target.test or target.messages)
        rows = read_source(
            "test",
            source,
            lm,
            template=template,
            max_length=max_length,
            seed=seed,
            base_dir=base_dir,
        )
        self.metric, self._measure = "loss", _Loss(lm, rows, batch_size)
        self.data = digest(rows.rows)

    def __call__(self, params: Params) -> float:
        return float(self._measure("test", params)[self.metric])


class _Loss:
    """The mean over rows of the mean over the tokens that are learnt."""

    def __init__(self, lm: Any, rows: Rows, batch_size: int):
        self._padded = PaddedRows(rows.rows, lm.config.pad_id or 0, "targets")
        self._losses, self._batch_size = Program(row_losses(lm)), batch_size

    def __call__(self, split: str, params: Params) -> dict[str, float]:
        del split
        total = 0.0
        for places in self._padded.blocks(self._batch_size):
            filled = places + places[:1] * (self._batch_size - len(places))
            losses = np.asarray(self._losses(params, self._padded.batch(filled)), np.float64)
            total += losses[: len(places)].sum()
        return {"loss": total / len(self._padded)}
