r"""Calibration: remove the preference among options that a model has for every text.

Offsets $[C]$ are subtracted from the scores of C options. They come from the model's own scores of
unlabelled texts of the task (`calibration_offsets`), or from its scores of the prompt without the
example (`domain_scores`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxlm.data import EncodedTask, Task, prepare_for, without_examples
from jaxlm.data.rows import SplitName
from jaxlm.evaluation.classification import check_finite, option_scores, score_split
from jaxlm.models import LanguageModel
from jaxlm.sharding import mesh_of, place_batch, replicated
from jaxlm.typing import Batch, Params

CALIBRATION_TEXTS = 1000
"""Most training texts that are scored to calibrate a run."""


def calibration_offsets(unlabelled: Float[Any, "M C"]) -> Float[np.ndarray, " C"]:
    r"""Return the model's preference for each option, $\mathrm{med}_m\,\tilde u_{mc}$.

    $\tilde u$ are the scores of a text, centred over the options. A model trained on scores minus
    these offsets starts from calibrated predictions and need not unlearn the preference.

    Args:
        unlabelled: scores of M texts of the task; their labels are not needed.

    Raises:
        UserError: if a score is not finite.

    >>> calibration_offsets(np.array([[0.0, 4.0], [0.0, 6.0], [0.0, 7.0]]))
    array([-3.,  3.])
    """
    unlabelled = np.asarray(unlabelled)
    check_finite(unlabelled)
    # A median, since a few texts with extreme scores would move a mean.
    return np.median(unlabelled - unlabelled.mean(axis=1, keepdims=True), axis=0)


def calibrate(scores: Float[Any, "N C"], unlabelled: Float[Any, "M C"]) -> Float[np.ndarray, "N C"]:
    """Centre scores over the options and subtract `calibration_offsets(unlabelled)`.

    With two options this thresholds their difference at its median over the unlabelled texts.

    Args:
        scores: scores of the examples to predict.
        unlabelled: scores of other texts of the task, whose labels are not needed.

    Raises:
        UserError: if a score is not finite.

    >>> calibrate(np.array([[0.0, 5.0]]), np.array([[0.0, 4.0], [0.0, 6.0], [0.0, 7.0]]))
    array([[ 0.5, -0.5]])
    """
    scores = np.asarray(scores)
    check_finite(scores)
    return scores - scores.mean(axis=1, keepdims=True) - calibration_offsets(unlabelled)


def option_offsets(
    scorer: Callable[[Params, Batch], Any],
    params: Params,
    encoded: EncodedTask,
    *,
    batch_size: int,
    texts: int = CALIBRATION_TEXTS,
) -> Float[np.ndarray, " C"]:
    """Return `calibration_offsets` on the first training texts of a task.

    Args:
        scorer: compiled `(params, batch) -> [B, C]`, without offsets.
        params: the model's parameters.
        encoded: the task.
        batch_size: examples in a forward pass.
        texts: how many training texts to score.
    """
    few = dataclasses.replace(encoded, train=encoded.train[:texts])
    return calibration_offsets(score_split(scorer, params, few, "train", batch_size=batch_size)[0])


def domain_scores(
    lm: LanguageModel, params: Params, task: Task, split: SplitName, *, batch_size: int
) -> Float[np.ndarray, "N C"]:
    r"""Score the options of a split after the prompts without the examples.

    $\sum_k \log p(o_k \mid \text{domain}, o_{<k})$, up to a constant for each example. Scores with
    the reduction "sum" minus these are the domain-conditional mutual information, with which
    Holtzman et al. (arXiv:2104.08315) remove the competition of surface forms.

    Args:
        lm: the model.
        params: parameters in place of `lm.params`.
        task: the task.
        split: the split to score.
        batch_size: examples in a forward pass.

    Returns:
        Scores [N, C], or a single row [1, C] if all examples share options and demonstrations.

    Raises:
        UserError: see `jaxlm.data.without_examples` and `jaxlm.data.prepare`.
    """
    examples = getattr(task, split)
    # Without the example the prompts are the same: one row is enough.
    if (
        not task.config.has_per_example_options
        and len({example.context for example in examples}) == 1
    ):
        examples = examples[:1]
    bare = dataclasses.replace(task, train=(), validation=(), test=examples)
    encoded = prepare_for(lm, without_examples(bare))
    mesh = mesh_of(params)
    score = jax.jit(
        functools.partial(
            option_scores,
            lm.apply,
            encoded.token_ids,
            log_probs=lm.continuation_log_probs,
            reduction="sum",
        ),
        # Replicated, because every process reads the scores.
        out_shardings=None if mesh is None else replicated(mesh),
    )

    def scorer(params: Params, batch: Batch) -> Any:
        return score(params, batch if mesh is None else place_batch(batch, mesh))

    size = min(batch_size, len(examples))
    return score_split(scorer, params, encoded, "test", batch_size=size)[0]


def subtract_domain_scores(
    scores: Float[np.ndarray, "N C"], domain: Float[np.ndarray, "M D"]
) -> Float[np.ndarray, "N E"]:
    """Subtract `domain_scores`; a missing option keeps its score of minus infinity.

    >>> subtract_domain_scores(np.array([[1.0, 2.0, -np.inf]]), np.array([[0.5, 2.0]]))
    array([[0.5, 0. ]])
    """
    width = min(scores.shape[1], domain.shape[1])
    scores, domain = scores[:, :width], domain[:, :width]
    # Minus infinity minus itself is NaN.
    there = np.isfinite(scores)
    return np.subtract(scores, domain, out=np.full_like(scores, -np.inf), where=there)


def domain_offsets(lm: LanguageModel, task: Task) -> Float[np.ndarray, " C"]:
    """Return the `domain_scores` of `lm` for the options of a task, centred over them."""
    scores = domain_scores(lm, lm.params, task, "train", batch_size=1)[0]
    return scores - scores.mean()
