"""The objective of unlearning: a loss of rows to forget, and one of rows to keep."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlm.artifacts.arrays import check_finite
from jaxlm.artifacts.processes import to_host
from jaxlm.core.errors import UserError
from jaxlm.core.terms import terms
from jaxlm.data import DataConfig
from jaxlm.data.forget import ForgetConfig, ForgetRows
from jaxlm.data.rows import SplitName
from jaxlm.evaluation.classification import Reduction
from jaxlm.models import LanguageModel
from jaxlm.models.scoring import log_probs_of, reduce_log_probs
from jaxlm.train.losses import num_examples, target_log_probs
from jaxlm.train.measure import Metric, TokenLossMetric
from jaxlm.train.objectives.base import Columns, Data, Encoded, Objective, Scoring
from jaxlm.train.settings import Optimizer
from jaxlm.train.state import Program
from jaxlm.typing import Batch, LossFn, Params
from jaxlm.unlearning import FORGET, RETAIN, TokenLoss, TokenScores

REFERENCE = "reference_log_probs"


@dataclass(frozen=True, kw_only=True)
class Unlearn(Objective):
    r"""Forget rows and keep others: $\gamma$ times one loss plus $\alpha$ times another.

    The reference of both is the model that training begins with. Its log-probabilities are computed
    once; a loss of its logits or states needs a copy of its parameters.

    Attributes:
        loss: one of `jaxlm.unlearning.FORGET` by its name, with its options and its `weight` γ; or
            a list of them.
        retain: one of `jaxlm.unlearning.RETAIN`, with its options and its `weight` α, or a list;
            null for none.
    """

    name: str = "unlearn"
    loss: tuple[TokenLoss, ...] = field(default=(FORGET["npo"](),), metadata={"registry": FORGET})
    retain: tuple[TokenLoss, ...] | None = field(
        default=(RETAIN["nll"](),), metadata={"registry": RETAIN}
    )

    forms: ClassVar[tuple[str, ...]] = ("forget",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", terms(self.loss, FORGET))
        if self.retain is not None:
            object.__setattr__(self, "retain", terms(self.retain, RETAIN))
        for term in (*self.loss, *self.kept):
            if getattr(term, "variant", "paper") == "released":
                raise UserError(
                    f"{term.section}.variant: {term.name} as released reads whole rows, with what "
                    "is not in the loss (got released). Call the function with these, or choose "
                    "paper."
                )

    @property
    def kept(self) -> tuple[TokenLoss, ...]:
        """The losses of rows to keep."""
        return self.retain or ()

    def check(
        self, form: str, data: DataConfig, optimizer: Optimizer, *, accumulate: int = 1
    ) -> None:
        """See `Objective`; a loss of rows to keep needs these."""
        super().check(form, data, optimizer, accumulate=accumulate)
        if self.retain and isinstance(data, ForgetConfig) and data.retain is None:
            raise UserError(
                f"objective.retain: {self.retain[0].name} needs rows to keep (got no "
                "forget.retain). Give these, or set objective.retain to null."
            )
        if accumulate > 1 and any(term.name == "ceu" for term in self.loss):
            raise UserError(
                f"accumulate: ceu needs the whole batch at once (got {accumulate}). Set it to 1."
            )

    @staticmethod
    def share(batch: Batch) -> Any:
        """See `Objective`; every row counts the same, however many targets it has."""
        return num_examples(batch)

    def batched(self, encoded: Encoded) -> Encoded:
        """Return rows with batches of targets, and refusals only if a loss needs them.

        The reference is NaN until `columns` fills it, so that a missing one shows.
        """
        assert isinstance(encoded, ForgetRows)
        refusal = any("alternative" in term.fields for term in self.loss)
        if refusal and encoded.alternative is None:
            needing = next(x.name for x in self.loss if "alternative" in x.fields)
            raise UserError(
                f"objective.loss: {needing} puts refusals in place of answers (got documents). "
                "Give questions with answers, or choose another loss."
            )

        def sparse(rows: Any) -> Any:
            return rows and dataclasses.replace(rows, form="targets")

        found = dataclasses.replace(
            encoded,
            train=sparse(encoded.train),
            validation=encoded.validation if len(encoded.validation) else encoded.spare,
            retain=sparse(encoded.retain) if self.kept else encoded.retain,
            alternative=sparse(encoded.alternative) if refusal else None,
        )
        if not self._needs_sums:
            return found
        empty = np.full((len(found.train), 1 + refusal), np.nan, np.float32)
        return dataclasses.replace(found, columns={"train": {REFERENCE: empty}})

    @property
    def _needs_sums(self) -> bool:
        return any("log_probs" in term.reference_fields for term in self.loss)

    @property
    def _needs_copy(self) -> bool:
        terms = (*self.loss, *self.kept)
        return any({"logits", "states"} & {*term.reference_fields} for term in terms)

    def columns(
        self, lm: LanguageModel, reference: LanguageModel, encoded: Encoded, *, batch_size: int
    ) -> Columns:
        """Return the reference's log-probabilities of the rows to forget, and of refusals."""
        assert isinstance(encoded, ForgetRows)
        if not self._needs_sums:
            return {}
        program = Program(
            lambda params, batch: reduce_log_probs(
                target_log_probs(lm, params, batch), batch["target_mask"]
            )
        )
        sources = [x for x in (encoded.train, encoded.alternative) if x is not None]
        found = np.zeros((len(encoded.train), len(sources)), np.float32)
        for column, rows in zip(found.T, sources, strict=True):
            for batch in rows.eval_batches(batch_size):
                index = batch.pop("index")
                column[index[index >= 0]] = to_host(program(lm.params, batch))[index >= 0]
        check_finite(found, REFERENCE, "train")
        return {"train": {REFERENCE: found}, "validation": {}, "test": {}}

    def loss_fn(
        self, lm: LanguageModel, data: Data | None, encoded: Encoded, scoring: Scoring
    ) -> LossFn:
        forget, retain = (Reader(lm, group) for group in (self.loss, self.kept))
        # Training overwrites the parameters. A dry run has their shapes alone; there the model
        # itself stands for the copy, since it takes as long.
        shapes = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(lm.params))
        copied = self._needs_copy and not shapes
        frozen = jax.tree.map(jnp.copy, lm.params) if copied else None

        def loss_fn(params: Params, batch: Batch, *, key: Any = None, view: Any = None) -> Any:
            del key
            start = jax.lax.stop_gradient(params) if frozen is None else frozen
            total, aux = jnp.zeros(()), {}
            for reader, prefix in ((forget, ""), (retain, "retain_")):
                if not reader.terms:
                    continue
                policy = reader.scores(params, batch, prefix, view=view)
                reference = reader.reference(start, batch, prefix)
                values = sum(term.weight * term(policy, reference) for term in reader.terms)
                loss = jnp.mean(values)
                aux["forget" if reader is forget else "retain"] = loss
                total += loss
            return total, aux

        return loss_fn

    def metric(
        self,
        lm: LanguageModel,
        data: Data | None,
        encoded: Encoded,
        *,
        batch_size: int,
        reduction: Reduction = "mean",
    ) -> Metric:
        """See `Objective`."""
        assert isinstance(encoded, ForgetRows)
        return UnlearningMetric(lm, encoded, batch_size=batch_size)


class Reader:
    """Reads from a model what a group of losses needs of a batch."""

    def __init__(self, lm: LanguageModel, group: Sequence[TokenLoss]):
        self.terms = tuple(group)
        self._lm = lm
        self._fields = {name for term in group for name in term.fields}
        self._reference_fields = {name for term in group for name in term.reference_fields}
        layers = {term.layer_of_states for term in group} - {None}
        if len(layers) > 1:
            raise UserError(
                f"objective.{group[0].section}.layer: must be the same in all losses (got "
                f"{layers}). Correct it."
            )
        self._layer = next(iter(layers), None)
        if self._layer is not None and self._layer > lm.config.num_layers:
            raise UserError(
                f"objective.{group[0].section}.layer: must be at most {lm.config.num_layers}, the "
                f"layers of the model (got {self._layer}). Lower it."
            )

    def scores(self, params: Params, batch: Batch, prefix: str, *, view: Any = None) -> TokenScores:
        """Return the scores of the rows whose keys begin with a prefix."""
        found = self._read(self._fields, params, batch, prefix, view)
        if "alternative" not in self._fields:
            return found
        other = self._read({"log_probs"}, params, batch, "alternative_", view)
        return found._replace(alternative=other)

    def reference(self, frozen: Params, batch: Batch, prefix: str) -> TokenScores | None:
        """Return the scores of the reference: sums that are stored, others by its parameters."""
        fields, found = self._reference_fields, TokenScores()
        if fields & {"logits", "states"}:
            found = self._read(fields & {"logits", "states"}, frozen, batch, prefix, None)
        if "log_probs" in fields:
            stored = jnp.asarray(batch[REFERENCE])
            one = jnp.ones((len(stored), 1))
            sums = [TokenScores(x[:, None], one) for x in stored.T]
            found = found._replace(
                log_probs=sums[0].log_probs,
                mask=one,
                alternative=sums[1] if len(sums) > 1 else None,
            )
        return found if fields else None

    def _read(
        self, fields: set[str], params: Any, batch: Batch, prefix: str, view: Any
    ) -> TokenScores:
        keys = ("input_ids", "attention_mask", "positions", "targets", "target_mask", "per_target")
        part = {key: jnp.asarray(batch[prefix + key]) for key in keys}
        given = part["input_ids"], part["attention_mask"]
        scores = TokenScores(
            mask=part["target_mask"], targets=part["targets"], per_target=part["per_target"]
        )
        if "logits" in fields:
            logits = self._lm.apply(params, *given, positions=part["positions"], view=view)
            log_probs = log_probs_of(logits, part["targets"])
            scores = scores._replace(logits=logits, log_probs=log_probs)
        elif "log_probs" in fields:
            scores = scores._replace(log_probs=target_log_probs(self._lm, params, part, view=view))
        if "states" in fields:
            states: Array = self._lm.hidden(params, *given, layer=self._layer, view=view)
            places = part["positions"][..., None]
            scores = scores._replace(states=jnp.take_along_axis(states, places, axis=1))
        return scores


class UnlearningMetric(TokenLossMetric):
    """Mean losses a token: of the rows to forget, of those to keep, and of the split's rows.

    No checkpoint is the best by these, since a model may forget too little or too much.
    """

    main = "forget_loss"
    mode = "max"
    keeps_best = False

    def __init__(self, lm: LanguageModel, encoded: ForgetRows, *, batch_size: int):
        super().__init__(lm, encoded, batch_size=batch_size)
        rows = {"forget_loss": encoded.train, "retain_loss": encoded.retain}
        self._rows = {
            name: dataclasses.replace(each, form="weights")
            for name, each in rows.items()
            if each is not None
        }
        others = [name for name in ("loss", "retain_loss") if name in ("loss", *self._rows)]
        self.others = MappingProxyType(dict.fromkeys(others, "min"))

    def __call__(self, split: SplitName, params: Params) -> dict[str, Any]:
        losses = {name: self.mean(name, rows, params) for name, rows in self._rows.items()}
        given = getattr(self._encoded, split).rows
        known = (losses[name] for name, rows in self._rows.items() if rows.rows is given)
        measured = next(known, None)  # where no other rows are given, see `ForgetRows.spare`
        return losses | (
            super().__call__(split, params) if measured is None else {"loss": measured}
        )
