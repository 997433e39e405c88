"""Classification as choice among options: scores, accuracy, and the majority baseline."""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core.errors import UserError
from jaxlm.models.scoring import log_probs_of, reduce_log_probs
from jaxlm.typing import Batch, Params

Apply = Callable[..., Any]
"""The forward pass of a `LanguageModel`: `lm.apply`."""
LogProbs = Callable[..., Any]
"""Log-probabilities of options after a prompt: `lm.continuation_log_probs`."""
Reduction = Literal["mean", "sum"]
"""Of the log-probabilities of an option's tokens."""


def option_scores(
    apply: Apply,
    token_ids: Int[Any, " C"] | None,
    params: Params,
    batch: Batch,
    *,
    offsets: Float[Any, " C"] | None = None,
    log_probs: LogProbs | None = None,
    reduction: Reduction = "mean",
    view: Any = None,
) -> Float[Array, "B C"]:
    r"""Scores the options of each example; the highest is the prediction.

    With label words of one token the score is the word's logit at the position that predicts it.
    Else it is the mean log-probability of the option's tokens, $\frac1{|o|}\sum_k \log p(o_k \mid
    x, o_{<k})$. Their softmax over options is the same where every option is one token. An option
    without a token, which fills up examples that have fewer, has the score $-\infty$.

    Args:
        apply: the model's forward pass.
        token_ids: the label words' tokens; None for options of several tokens.
        params: the model's parameters.
        batch: as collated by `jaxlm.data`.
        offsets: taken from the scores, `calibration_offsets(...)`.
        log_probs: `lm.continuation_log_probs`, which batches of the form "continuations" need.
        reduction: of the log-probabilities of an option's tokens.
        view: see `jaxlm.core.views`.

    Returns:
        Scores in at least float32.

    Raises:
        TypeError: a batch of the form "continuations" without `log_probs`.
    """
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    if token_ids is not None:
        logits_BxC = apply(
            params,
            batch["input_ids"],
            batch["attention_mask"],
            token_type_ids=batch.get("token_type_ids"),
            positions=batch["positions"],
            token_ids=jnp.asarray(token_ids),
            view=view,
        )
        scores = logits_BxC.astype(jnp.promote_types(logits_BxC.dtype, jnp.float32))
        return scores if offsets is None else scores - jnp.asarray(offsets)[None]
    if "prompt_ids" in batch:
        if log_probs is None:
            raise TypeError("options after a prompt need log_probs: lm.continuation_log_probs")
        ids, mask = batch["option_ids"], batch["option_mask"]
        scored = log_probs(params, batch["prompt_ids"], batch["prompt_mask"], ids, view=view)
    else:
        mask = batch["target_mask"]
        names = ("input_ids", "attention_mask", "positions", "targets")
        rows = (batch[name].reshape(mask.shape[0] * mask.shape[1], -1) for name in names)
        ids, attention, positions, targets = rows
        logits = apply(params, ids, attention, positions=positions, view=view)
        scored = log_probs_of(logits, targets).reshape(mask.shape)
    scores = reduce_log_probs(scored, mask, reduction)
    scores = jnp.where(mask.any(axis=-1), scores, -jnp.inf)
    return scores if offsets is None else scores - jnp.asarray(offsets)[None]


def score_split(
    scorer: Callable[[Params, Batch], Any],
    params: Params,
    encoded: Any,
    split: Literal["train", "validation", "test"],
    *,
    batch_size: int,
) -> tuple[Float[np.ndarray, "N C"], Int[np.ndarray, " N"] | Bool[np.ndarray, "N C"]]:
    """Scores every example of a split, in the order of the split.

    Args:
        scorer: compiled `(params, batch) -> [B, C]`.
        params: the model's parameters.
        encoded: a `jaxlm.data.EncodedTask`.
        split: which examples.
        batch_size: examples in a forward pass.

    Returns:
        (scores, labels). Where an example has several right options, labels are a mask of them.

    Raises:
        UserError: a score is not finite, see `accuracy`.
    """
    examples = getattr(encoded, split)
    labels = np.array([example.label for example in examples], np.int32)
    found = []
    for batch in encoded.eval_batches(split, batch_size=batch_size):
        index = batch.pop("index")
        found.append((index, np.asarray(scorer(params, batch))))
    most = max((part.shape[1] for _, part in found), default=0)
    scores = np.full((len(labels), most), -np.inf, np.float32)
    for index, part in found:
        scores[index[index >= 0], : part.shape[1]] = part[index >= 0]
    check_finite(scores, f"scores of {split}")
    if not any(example.gold for example in examples):
        return scores, labels
    right = np.zeros(scores.shape, bool)
    for i, example in enumerate(examples):
        right[i, list(example.gold) or example.label] = True
    return scores, right


def accuracy(scores: Float[Any, "N C"], labels: Int[Any, " N"] | Bool[Any, "N C"]) -> float:
    """Share of examples whose highest score has a right option; the first of equals is taken.

    Args:
        scores: of the options.
        labels: the right option of each example, or a mask of the right ones.

    Raises:
        UserError: a score is not finite, since a NaN would count as the first option. Minus
            infinity is the score of an option that an example does not have; one must be there.

    >>> accuracy(np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([1, 1]))
    0.5
    """
    check_finite(scores)
    labels, chosen = np.asarray(labels), np.argmax(scores, axis=1)
    if labels.ndim == 1:
        return float(np.mean(chosen == labels))
    return float(np.mean(np.take_along_axis(labels, chosen[:, None], axis=1)))


def majority_accuracy(labels: Int[Any, " N"] | Bool[Any, "N C"]) -> float:
    """Accuracy of always giving the answer that is right most often; at least 1/C.

    Args:
        labels: the right option of each tested example, or a mask of the right ones.

    >>> majority_accuracy(np.array([0, 1, 1, 1]))
    0.75
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels) if labels.ndim == 1 else labels.sum(axis=0)
    return float(counts.max() / len(labels))


def check_finite(scores: Float[Any, "N C"], key: str = "scores") -> None:
    """Raise for NaN, plus infinity, and examples whose every option has minus infinity."""
    highest = np.max(scores, axis=1, initial=-np.inf)  # NaN where one of the scores is
    bad = np.flatnonzero(~np.isfinite(highest))
    if len(bad):
        raise UserError(
            f"{key}: {len(bad)} of {len(highest)} examples have scores that are not finite (got "
            f"{highest[bad[0]]} for example {bad[0] + 1}). Check that the model's weights are "
            "finite, and lower the learning rate of the run that made them."
        )
