"""Classification as choice among options: scores, accuracy, and the majority baseline."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError
from jaxlm.data import EncodedTask
from jaxlm.data.rows import SplitName
from jaxlm.models.scoring import log_probs_of, reduce_log_probs
from jaxlm.typing import Batch, Params

Apply = Callable[..., Any]
"""The forward pass of a `LanguageModel`: `lm.apply`."""
LogProbs = Callable[..., Any]
"""Log-probabilities of options after a prompt: `lm.continuation_log_probs`."""
Reduction = Literal["mean", "sum"]
"""How the log-probabilities of an option's tokens are reduced to a score."""


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
    r"""Score the options of each example; the option with the highest score is the prediction.

    For label words of one token the score is the word's logit at the position that predicts it.
    Otherwise it is the mean log-probability of the option's tokens, $\frac1{|o|}\sum_k \log p(o_k
    \mid x, o_{<k})$. The softmax over options is the same for both where every option is one token.
    An option without tokens pads an example that has fewer options; its score is $-\infty$.

    Args:
        apply: the model's forward pass.
        token_ids: the tokens of the label words; None for options of several tokens.
        params: the model's parameters.
        batch: as collated by `jaxlm.data`.
        offsets: subtracted from the scores, see `calibration_offsets`.
        log_probs: `lm.continuation_log_probs`, required for batches of the form "continuations".
        reduction: how the log-probabilities of an option's tokens are reduced.
        view: see `jaxlm.core.views`.

    Returns:
        Scores in at least float32.

    Raises:
        TypeError: if a batch of the form "continuations" comes without `log_probs`.
    """
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    if token_ids is not None:
        scores = wide(
            apply(
                params,
                batch["input_ids"],
                batch["attention_mask"],
                token_type_ids=batch.get("token_type_ids"),
                positions=batch["positions"],
                token_ids=jnp.asarray(token_ids),
                view=view,
            )
        )
    else:
        token_scores, mask = _token_scores(apply, log_probs, params, batch, view)
        scores = reduce_log_probs(token_scores, mask, reduction)
        scores = jnp.where(mask.any(axis=-1), scores, -jnp.inf)
    return scores if offsets is None else scores - jnp.asarray(offsets)[None]


def _token_scores(
    apply: Apply, log_probs: LogProbs | None, params: Params, batch: Batch, view: Any
) -> tuple[Float[Array, "B C K"], Float[Array, "B C K"]]:
    """Return the log-probabilities of the options' tokens, and the mask of these tokens."""
    if "prompt_ids" in batch:
        if log_probs is None:
            raise TypeError("options after a prompt need log_probs: lm.continuation_log_probs")
        ids, mask = batch["option_ids"], batch["option_mask"]
        return log_probs(params, batch["prompt_ids"], batch["prompt_mask"], ids, view=view), mask
    mask = batch["target_mask"]
    names = ("input_ids", "attention_mask", "positions", "targets")
    rows = (batch[name].reshape(mask.shape[0] * mask.shape[1], -1) for name in names)
    ids, attention, positions, targets = rows
    logits = apply(params, ids, attention, positions=positions, view=view)
    return log_probs_of(logits, targets).reshape(mask.shape), mask


def score_split(
    scorer: Callable[[Params, Batch], Any],
    params: Params,
    encoded: EncodedTask,
    split: SplitName,
    *,
    batch_size: int,
) -> tuple[Float[np.ndarray, "N C"], Int[np.ndarray, " N"] | Bool[np.ndarray, "N C"]]:
    """Score every example of a split, in the order of the split.

    Args:
        scorer: compiled `(params, batch) -> [B, C]`.
        params: the model's parameters.
        encoded: the task.
        split: the split to score.
        batch_size: examples in a forward pass.

    Returns:
        (scores, labels). If any example lists several right options, labels are a mask [N, C].

    Raises:
        UserError: if a score is not finite, see `accuracy`.
    """
    examples = getattr(encoded, split)
    parts = []
    for batch in encoded.eval_batches(split, batch_size=batch_size):
        index = batch.pop("index")
        parts.append((index, np.asarray(scorer(params, batch))))
    most = max((part.shape[1] for _, part in parts), default=0)
    scores = np.full((len(examples), most), -np.inf, np.float32)
    for index, part in parts:
        # Filling rows have the index -1.
        scores[index[index >= 0], : part.shape[1]] = part[index >= 0]
    check_finite(scores, f"scores of {split}")
    return scores, right_options(examples, most)


def right_options(
    examples: Sequence[Any], num_options: int
) -> Int[np.ndarray, " N"] | Bool[np.ndarray, "N C"]:
    """Return the label of each example; if any example has several, a mask of right options."""
    if not any(example.gold for example in examples):
        return np.array([example.label for example in examples], np.int32)
    right = np.zeros((len(examples), num_options), bool)
    for i, example in enumerate(examples):
        right[i, list(example.gold) or example.label] = True
    return right


def accuracy(scores: Float[Any, "N C"], labels: Int[Any, " N"] | Bool[Any, "N C"]) -> float:
    """Return the share of examples whose highest score belongs to a right option.

    Among equal scores the first option counts.

    Args:
        scores: scores of the options.
        labels: the right option of each example, or a mask of the right ones.

    Raises:
        UserError: if a score is not finite, since a NaN would count as the highest score. Minus
            infinity is allowed for an option that an example does not have, but not for all.

    >>> accuracy(np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([1, 1]))
    0.5
    """
    return float(np.mean(is_right(scores, labels)))


def is_right(
    scores: Float[Any, "N C"], labels: Int[Any, " N"] | Bool[Any, "N C"]
) -> Bool[np.ndarray, " N"]:
    """Return whether the highest score of each example is that of a right option."""
    check_finite(scores)
    labels, chosen = np.asarray(labels), np.argmax(scores, axis=1)
    if labels.ndim == 1:
        return chosen == labels
    return np.take_along_axis(labels, chosen[:, None], axis=1)[:, 0]


def majority_accuracy(labels: Int[Any, " N"] | Bool[Any, "N C"]) -> float:
    """Return the accuracy of always giving the most frequent right answer; at least 1/C.

    Args:
        labels: the right option of each test example, or a mask of the right ones.

    >>> majority_accuracy(np.array([0, 1, 1, 1]))
    0.75
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels) if labels.ndim == 1 else labels.sum(axis=0)
    return float(counts.max() / len(labels))


def check_finite(scores: Float[Any, "N C"], key: str = "scores") -> None:
    """Raise UserError for NaN, plus infinity, or an example with minus infinity for all options."""
    # A NaN is the argmax of its row, and would count as that option.
    highest = np.max(scores, axis=1, initial=-np.inf)  # NaN where one of the scores is
    bad = np.flatnonzero(~np.isfinite(highest))
    if len(bad):
        raise UserError(
            f"{key}: not finite for {len(bad)} of {len(highest)} examples (got "
            f"{highest[bad[0]]} for example {bad[0] + 1}). Check that the model's weights are "
            "finite, and lower the learning rate of the run that made them."
        )
