"""The objective of preference pairs, and what validation says about them."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxlm import preference
from jaxlm.artifacts.arrays import check_finite
from jaxlm.artifacts.files import absolute
from jaxlm.artifacts.processes import to_host
from jaxlm.core.checks import real
from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError
from jaxlm.data import DataConfig, EncodedTask
from jaxlm.data.encoding import Encoded as Example
from jaxlm.data.pairs import as_task
from jaxlm.data.rows import SPLITS, SplitName, tokenizer_of
from jaxlm.evaluation.classification import Reduction
from jaxlm.models import LanguageModel
from jaxlm.preference import LOSSES, PairLoss, PairScores
from jaxlm.train.losses import target_log_probs
from jaxlm.train.measure import Metric
from jaxlm.train.objectives.base import Columns, Data, Encoded, Objective, Scoring
from jaxlm.train.settings import Optimizer
from jaxlm.train.state import Program
from jaxlm.typing import Batch, LossFn, Params

REFERENCE, START, NEXT = "reference_log_probs", "start_log_probs", "start_next_token"
PROBE, GAINERS = 16, 5
"""Pairs of a split whose next token is compared with that of the start; tokens that are named."""


@dataclass(frozen=True, kw_only=True)
class Preference(Objective):
    """Loss of pairs of a chosen and a rejected response.

    Attributes:
        loss: one of `jaxlm.preference.LOSSES` by its name, with its options; or a list of them,
            whose sum by `weight` is minimized.
        beta: `beta` of every loss that has one, in place of its own; null keeps these.
        reference: model of the reference log-probabilities; null for the one that training begins
            with. They are computed once, before the first step.
    """

    name: str = "preference"
    loss: tuple[PairLoss, ...] = field(default=(LOSSES["dpo"](),), metadata={"registry": LOSSES})
    beta: float | None = None
    reference: str | None = None

    forms: ClassVar[tuple[str, ...]] = ("pairs",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", preference.terms(self.loss))
        if any(term.name == "d2o" for term in self.loss):
            raise UserError(
                "loss: d2o needs responses that the model itself samples (got d2o). Call "
                "jaxlm.preference.loss with these, or choose another."
            )
        if self.reference is not None and not self.needs_reference:
            raise UserError(
                f"reference: {self.loss[0].name} has none (got {self.reference}). Leave it out."
            )
        if self.beta is not None:
            real("beta", self.beta, above=0.0)
            if not any(hasattr(term, "beta") for term in self.loss):
                raise UserError(
                    f"beta: {self.loss[0].name} has none (got {self.beta}). Leave it out."
                )

    @property
    def terms(self) -> tuple[PairLoss, ...]:
        """The losses, with `beta`."""
        return preference.terms(self.loss, beta=self.beta)

    @property
    def reference_model(self) -> str | None:
        """See `Objective`."""
        return self.reference

    def located(self) -> "Preference":
        """See `Objective`."""
        return dataclasses.replace(self, reference=absolute(self.reference, "objective.reference"))

    @property
    def needs_reference(self) -> bool:
        """Whether a loss compares with a reference model."""
        return any(term.needs_reference for term in self.loss)

    @property
    def _mismatched(self) -> bool:
        """Whether a loss needs the response to another prompt: KTO's reference point."""
        return any(term.name == "kto" for term in self.loss)

    def check(
        self, form: str, data: DataConfig, optimizer: Optimizer, *, accumulate: int = 1
    ) -> None:
        """See `Objective`; some losses need the batch in one part."""
        super().check(form, data, optimizer, accumulate=accumulate)
        whole = [term.name for term in self.loss if term.needs_whole_batch]
        if accumulate > 1 and whole:
            raise UserError(
                f"accumulate: {whole[0]} compares all pairs of a batch (got {accumulate}). Leave "
                "it out."
            )

    def batched(self, encoded: Encoded) -> Encoded:
        """Return the pairs with the third response that `kto` needs, and a reference of NaN.

        `columns` puts numbers in its place; where it was not called, the loss is NaN.
        """
        assert isinstance(encoded, EncodedTask)
        if self._mismatched:
            splits = {str(split): [*_with_others(getattr(encoded, split))] for split in SPLITS}
            encoded = as_task(splits, encoded.pad_id, encoded.dropped)
        if not self.needs_reference:
            return encoded
        empty = np.full((len(encoded.train), 2 + self._mismatched), np.nan, np.float32)
        return dataclasses.replace(encoded, columns={"train": {REFERENCE: empty}})

    def columns(
        self, lm: LanguageModel, reference: LanguageModel, encoded: Encoded, *, batch_size: int
    ) -> Columns:
        """Return the log-probabilities of all responses under both models, and the next token's."""
        assert isinstance(encoded, EncodedTask)
        columns: Columns = {split: {} for split in SPLITS}
        models = {START: lm, REFERENCE: reference}
        scorers = {name: Program(response_scorer(model)) for name, model in models.items()}
        predict = Program(predictor(lm))

        def measure(name: str, split: SplitName) -> np.ndarray:
            params = models[name].params
            found, _ = responses(scorers[name], params, encoded, split, batch_size)
            check_finite(found, name, split)
            return found

        for split in SPLITS:
            own, size = columns[split], encoded.sizes[split]
            if size and split != "train":
                own[START] = measure(START, split)
                own[NEXT] = next_token(predict, lm.params, encoded, split, batch_size)
            if size and self.needs_reference:
                same = reference is lm and START in own
                own[REFERENCE] = own[START] if same else measure(REFERENCE, split)
        return columns

    def loss_fn(
        self, lm: LanguageModel, data: Data | None, encoded: Encoded, scoring: Scoring
    ) -> LossFn:
        score, terms = response_scorer(lm), self.terms

        def loss_fn(params: Params, batch: Batch, *, key: Any = None, view: Any = None) -> Any:
            del key
            weights = jnp.asarray(batch["weights"])
            log_probs, tokens = score(params, batch, view=view)
            scores = pair_scores(log_probs, tokens, batch.get(REFERENCE), weights)
            losses = preference.loss(scores, terms)
            aux = {"ranking_accuracy": preference.ranking_accuracy(scores)}
            if scores.ref_chosen is not None:
                aux["reward_accuracy"] = preference.reward_accuracy(scores)
            return jnp.sum(losses * weights) / jnp.sum(weights), aux

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
        assert isinstance(encoded, EncodedTask)
        return PreferenceMetric(lm, encoded, self.terms, batch_size=batch_size)


def _with_others(examples: Sequence[Example]) -> Iterator[Example]:
    """Add to each example the chosen response of the nearest one before it with another prompt.

    Both together have no more tokens than the longest row, which the model can read.
    """
    longest = max((len(x.input_ids[0]) + len(y) for x in examples for y in x.targets), default=0)
    for place, example in enumerate(examples):
        prompt = example.input_ids[0]
        before = (examples[place - n] for n in range(1, len(examples)))
        other = next((x for x in before if x.input_ids[0] != prompt), examples[place - 1])
        response = other.targets[0][: longest - len(prompt)]
        yield dataclasses.replace(example, targets=(*example.targets, response))


def response_scorer(lm: LanguageModel) -> Any:
    """Return `(params, batch, *, view=None) -> (log-probabilities [B, C], numbers of tokens)`."""

    def score(params: Params, batch: Batch, *, view: Any = None) -> tuple[Array, Array]:
        mask = jnp.asarray(batch["target_mask"])
        rows = {key: jnp.reshape(batch[key], (len(mask), -1)) for key in ("positions", "targets")}
        log_probs = target_log_probs(lm, params, {**batch, **rows}, view=view).reshape(mask.shape)
        return jnp.sum(log_probs * mask, axis=-1), jnp.sum(mask, axis=-1)

    return score


def pair_scores(log_probs: Any, tokens: Any, reference: Any, weights: Any) -> PairScores:
    """Return the scores of pairs; of a third response to another prompt, KTO's reference point.

    That is the mean log-ratio of these responses, at least 0, without a gradient.

    Args:
        log_probs, tokens: [B, C], of the chosen, the rejected and the third response.
        reference: [B, C], log-probabilities of the reference; None for none.
        weights: [B], 0 for rows that fill a batch.
    """
    tokens = tokens * (jnp.asarray(weights) > 0)[:, None]
    scores = PairScores(
        chosen=log_probs[:, 0],
        rejected=log_probs[:, 1],
        ref_chosen=None if reference is None else reference[:, 0],
        ref_rejected=None if reference is None else reference[:, 1],
        chosen_tokens=tokens[:, 0],
        rejected_tokens=tokens[:, 1],
    )
    if log_probs.shape[1] < 3:
        return scores
    ratios = scores.mean(log_probs[:, 2] - reference[:, 2])
    return scores._replace(z=lax.stop_gradient(jnp.maximum(ratios, 0)))


def responses(
    scorer: Any, params: Params, encoded: EncodedTask, split: SplitName, batch_size: int
) -> tuple[Float[np.ndarray, "N C"], Float[np.ndarray, "N C"]]:
    """Return the log-probabilities of all responses of a split, and their numbers of tokens."""
    count = max((len(each.targets) for each in getattr(encoded, split)), default=2)
    log_probs, tokens = np.zeros((2, encoded.sizes[split], count), np.float32)
    for batch in encoded.eval_batches(split, batch_size=batch_size):
        index = batch.pop("index")
        real_rows = index >= 0
        found, numbers = map(to_host, scorer(params, batch))
        log_probs[index[real_rows]] = found[real_rows]
        tokens[index[real_rows]] = numbers[real_rows]
    return log_probs, tokens


def predictor(lm: LanguageModel) -> Any:
    """Return `(params, batch) -> [B, V]`, the probabilities of the token after the prompt."""

    def predict(params: Params, batch: Batch) -> Array:
        last = jnp.asarray(batch["positions"])[:, 0, 0]
        packed = {key: batch[key] for key in ("segment_ids", "position_ids")}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return jax.nn.softmax(wide(lm.apply(params, ids, mask, positions=last, **packed)))

    return predict


def next_token(
    predict: Any, params: Params, encoded: EncodedTask, split: SplitName, batch_size: int
) -> Float[np.ndarray, " V"]:
    """Return the probabilities of the token after the prompt, in their mean over `PROBE` pairs."""
    probe = dataclasses.replace(encoded, **{split: getattr(encoded, split)[:PROBE]})
    total: Any = 0.0
    for batch in probe.eval_batches(split, batch_size=batch_size):
        index = batch.pop("index")
        total += to_host(predict(params, batch))[index >= 0].sum(axis=0, dtype=np.float64)
    return (total / probe.sizes[split]).astype(np.float32)


class PreferenceMetric(Metric):
    """The loss of pairs, how they are ranked, and what training did to them since it began.

    ranking_accuracy: share of pairs with c >= l, `..._per_token` by means over tokens.
    reward_accuracy, margin: share of pairs with a positive margin of log-ratios, and its mean.
    chosen_change, rejected_change: mean changes of c and l in nats; displaced: share of pairs whose
    c fell. corrected: of the pairs with c < l at the start, the share with c >= l now; spoiled: of
    the others, the share with c < l now. gained: the tokens whose probability after the prompt
    rose most, and by how much, in the mean over the first `PROBE` pairs.
    """

    main = "loss"
    mode = "min"
    others = MappingProxyType(
        {
            **dict.fromkeys(("ranking_accuracy", "ranking_accuracy_per_token"), "max"),
            **dict.fromkeys(("reward_accuracy", "margin", "chosen_change", "corrected"), "max"),
            **dict.fromkeys(("rejected_change", "displaced", "spoiled"), "min"),
        }
    )

    def __init__(
        self,
        lm: LanguageModel,
        encoded: EncodedTask,
        terms: tuple[PairLoss, ...],
        *,
        batch_size: int,
    ):
        super().__init__()
        if not any(term.needs_reference for term in terms):
            own = {k: v for k, v in self.others.items() if k not in ("reward_accuracy", "margin")}
            self.others = MappingProxyType(own)
        self.scorer, self._predict = Program(response_scorer(lm)), Program(predictor(lm))
        self._decode = tokenizer_of(lm).decode
        self._encoded, self._terms, self._batch_size = encoded, terms, batch_size

    def __call__(self, split: SplitName, params: Params) -> dict[str, Any]:
        self.tell(f"evaluating {split}")
        found = responses(self.scorer, params, self._encoded, split, self._batch_size)
        if not np.isfinite(found[0]).all():
            raise UserError(
                f"{split}: log-probabilities are not finite (got nan). Check that the model's "
                "weights are finite, and lower optimizer.learning_rate."
            )
        columns = self._encoded.columns[split]
        reference, ones = columns.get(REFERENCE), np.ones(len(found[0]))
        after = pair_scores(*found, reference, ones)
        before = pair_scores(columns[START], found[1], reference, ones)
        values = {key: float(value) for key, value in self._values(before, after).items()}
        end = next_token(self._predict, params, self._encoded, split, self._batch_size)
        return {**values, "gained": self._gained(end - columns[NEXT])}

    def _gained(self, change: Float[np.ndarray, " V"]) -> list[tuple[str, float]]:
        places = np.argsort(-change, kind="stable")[:GAINERS]
        return [(self._decode([int(i)]), float(change[i])) for i in places if change[i] > 0]

    def _values(self, before: PairScores, after: PairScores) -> dict[str, Any]:
        moved = preference.displacement(before, after, self._terms)
        table = preference.flip_table(before, after)
        wrong, right = np.maximum(np.asarray(table.pairs), 1)
        values = {
            # In float64, so that the mean of equal losses is exactly log 2 at the start.
            "loss": np.mean(np.asarray(preference.loss(after, self._terms)), dtype=np.float64),
            "ranking_accuracy": preference.ranking_accuracy(after),
            "ranking_accuracy_per_token": preference.ranking_accuracy(after, length_normalize=True),
            "chosen_change": moved.chosen,
            "rejected_change": moved.rejected,
            "displaced": moved.fraction,
            "corrected": table.right[0] / wrong,
            "spoiled": (table.pairs[1] - table.right[1]) / right,
        }
        if after.ref_chosen is not None:
            values["reward_accuracy"] = preference.reward_accuracy(after)
            values["margin"] = jnp.mean(after.margin)
        return values
