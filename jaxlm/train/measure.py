"""What a run is measured by: the accuracy of its choices, or the F1 of the answers it writes.

Both are `measure(split, params) -> {name: value}`; `measure.main` is the name of the value by which
a checkpoint is chosen.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxlm.core.errors import UserError
from jaxlm.data import EncodedTask, Task, prepare_for, prompted, without_examples
from jaxlm.data.batching import Split
from jaxlm.evaluation import (
    accuracy,
    evaluate_generation,
    majority_accuracy,
    option_scores,
    score_split,
)
from jaxlm.evaluation.classification import Reduction
from jaxlm.train.state import Program
from jaxlm.typing import Params


class Choices:
    """Accuracy of the options with the highest scores.

    Attributes:
        main: "accuracy".
        offsets: [C], taken from the scores; None takes nothing.
        scorer: compiled `(params, batch) -> [B, C]`, without offsets.
        majority: of a split that was measured, the accuracy of its most frequent class; None where
            examples have their own options.
        tell: is given a line on what is measured, several times.
    """

    main = "accuracy"
    tell: Callable[[str], None] | None = None

    def __init__(
        self, lm: Any, encoded: EncodedTask, *, batch_size: int, reduction: Reduction = "mean"
    ):
        if lm.config.head == "classifier" and lm.config.num_labels != encoded.num_options:
            raise UserError(
                f"model: its classifier is not for {encoded.num_options} classes (got "
                f"{lm.config.num_labels}). Fine-tune it on the task first."
            )
        self.offsets: Float[np.ndarray, " C"] | None = None
        self.scorer = Program(
            functools.partial(
                option_scores,
                lm.apply,
                encoded.token_ids,
                log_probs=lm.continuation_log_probs,
                reduction=reduction,
            )
        )
        self.majority: dict[str, float | None] = {}
        self._encoded, self._batch_size = encoded, batch_size

    def __call__(self, split: Split, params: Params) -> dict[str, float]:
        return {"accuracy": accuracy(*self.scores(split, params))}

    def scores(self, split: Split, params: Params) -> tuple[np.ndarray, np.ndarray]:
        """Scores less the offsets [N, C], and labels; see `jaxlm.evaluation.score_split`."""
        done, total = 0, len(getattr(self._encoded, split))

        def scorer(params: Params, batch: Any) -> Any:
            nonlocal done
            if self.tell is not None:
                self.tell(f"evaluating {split} {done}/{total}")
            done += int(batch["weights"].sum())
            return self.scorer(params, batch)

        scores, labels = score_split(
            scorer, params, self._encoded, split, batch_size=self._batch_size
        )
        self.majority[split] = majority_accuracy(labels) if self._encoded.labels else None
        return (scores if self.offsets is None else scores - self.offsets[None]), labels

    @property
    def peak_bytes(self) -> int:
        """Memory of the largest compiled program."""
        return self.scorer.peak_bytes


class Answers:
    """F1 and exact match of greedily written answers.

    Attributes:
        main: "f1".
        offsets: None; there are no scores.
        peak_bytes: 0; generation is not measured.
        tell: is given a line on what is measured.
    """

    main = "f1"
    tell: Callable[[str], None] | None = None
    offsets = None
    peak_bytes = 0

    def __init__(self, lm: Any, task: Task, *, batch_size: int):
        self._lm, self._task, self._batch_size = lm, task, batch_size

    def __call__(self, split: Split, params: Params) -> dict[str, float]:
        texts = [prompted(self._task, example) for example in getattr(self._task, split)]
        config, longest = self._task.config, self._lm.config.max_positions
        if self.tell is not None:
            self.tell(f"writing answers to {len(texts)} questions of {split}")
        found = evaluate_generation(
            self._lm,
            params,
            [each.prompt for each in texts],
            [each.answers for each in texts],
            max_new_tokens=config.answer_length,
            batch_size=self._batch_size,
            max_length=min(longest, config.max_length or longest),
        )
        return {"f1": found.f1, "exact_match": found.exact_match}


def domain_scores(
    lm: Any, params: Params, task: Task, split: Split, *, batch_size: int
) -> Float[np.ndarray, "N C"]:
    r"""Scores of a split's options after the prompts without the examples.

    $\sum_k \log p(o_k \mid \text{domain}, o_{<k})$, up to a number for each example. Scores with
    the reduction "sum" less these are those of domain-conditional mutual information, by which
    Holtzman et al. (arXiv:2104.08315) undo the competition of surface forms.

    Args:
        lm: the model.
        params: its parameters.
        task: the task.
        split: which examples.
        batch_size: examples in a forward pass.

    Returns:
        One row for all examples, [1, C], where they have the same options and demonstrations.

    Raises:
        UserError: see `jaxlm.data.without_examples` and `jaxlm.data.prepare`.
    """
    examples = getattr(task, split)
    if not task.config.own_options and len({each.context for each in examples}) == 1:
        examples = examples[:1]
    bare = dataclasses.replace(task, train=(), validation=(), test=examples)
    encoded = prepare_for(lm, without_examples(bare))
    size = min(batch_size, len(examples))
    scorer = Choices(lm, encoded, batch_size=size, reduction="sum").scorer
    return score_split(scorer, params, encoded, "test", batch_size=size)[0]


def less_domain(
    scores: Float[np.ndarray, "N C"], domain: Float[np.ndarray, "M D"]
) -> Float[np.ndarray, "N E"]:
    """Scores less `domain_scores`; an option that an example does not have stays at minus infinity.

    >>> less_domain(np.array([[1.0, 2.0, -np.inf]]), np.array([[0.5, 2.0]]))
    array([[0.5, 0. ]])
    """
    width = min(scores.shape[1], domain.shape[1])
    scores, domain = scores[:, :width], domain[:, :width]
    there = np.isfinite(scores)
    return np.subtract(scores, domain, out=np.full_like(scores, -np.inf), where=there)


def domain_offsets(lm: Any, task: Task) -> Float[np.ndarray, " C"]:
    """`domain_scores` of `lm` for label words, centred over them."""
    scores = domain_scores(lm, lm.params, task, "train", batch_size=1)[0]
    return scores - scores.mean()
