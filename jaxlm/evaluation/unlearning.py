r"""What a model still knows of rows that it was to forget, and what else it lost.

MUSE's criteria (arXiv:2407.06460): VerbMem, ROUGE-L of continuations of the forgotten texts;
KnowMem, ROUGE-L of answers to questions about them; PrivLeak, whether they are told from texts that
the model has never seen; and utility, KnowMem on what it was to keep. Scalability and
sustainability are the same numbers for other forget sets, see the study `muse`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxlm.artifacts.processes import to_host
from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError
from jaxlm.data.rows import PaddedRows
from jaxlm.evaluation.generation import Prompt, generate_text
from jaxlm.evaluation.rouge import rouge_l
from jaxlm.models import LanguageModel, ModelConfig
from jaxlm.models.scoring import log_probs_of
from jaxlm.models.transformer import apply
from jaxlm.typing import Params
from jaxlm.unlearning import (
    auc,
    exact_memorization,
    extraction_strength,
    min_k,
    relative_auc,
)

STOPS = ("\n\n", "\nQuestion", "Question:")
"""Where MUSE cuts an answer."""


class TextScores(NamedTuple):
    r"""What a model says about the targets of rows, in the places of their tokens but the first.

    Attributes:
        log_probs: of the targets.
        mask: 1 for targets.
        mean, std: of $\log p(v)$ over $v \sim p$.
        right: whether the target has the highest probability.
    """

    log_probs: Float[np.ndarray, "N T"]
    mask: Float[np.ndarray, "N T"]
    mean: Float[np.ndarray, "N T"]
    std: Float[np.ndarray, "N T"]
    right: Bool[np.ndarray, "N T"]

    @property
    def losses(self) -> Float[np.ndarray, " N"]:
        """Mean loss of each row's targets."""
        return min_k(self.log_probs, self.mask, 1.0)


@functools.cache
def _reader(config: ModelConfig) -> Any:
    """Return the compiled program of a model; a report of each checkpoint does not compile anew."""

    @jax.jit
    def read(params: Params, batch: Any) -> Any:
        logits = wide(apply(config, params, batch["input_ids"], batch["attention_mask"]))[:, :-1]
        targets = jnp.asarray(batch["input_ids"])[:, 1:]
        log_p = jax.nn.log_softmax(logits)
        p = jnp.exp(log_p)
        mean = jnp.sum(p * log_p, axis=-1)
        variance = jnp.sum(p * log_p**2, axis=-1) - mean**2
        right = jnp.argmax(logits, axis=-1) == targets
        std = jnp.sqrt(jnp.maximum(variance, 1e-12))  # 0 where one token has all the mass
        return log_probs_of(logits, targets), batch["weights"][:, 1:], mean, std, right

    return read


def text_scores(
    lm: LanguageModel, rows: PaddedRows, *, params: Params | None = None, batch_size: int = 16
) -> TextScores:
    """Read rows and return what the model says about their targets.

    Args:
        lm: a decoder.
        rows: the rows, in the form "weights".
        params: parameters in place of `lm.params`.
        batch_size: rows in a forward pass, which holds their logits.
    """
    shape = (len(rows), max(rows.lengths) - 1)
    found = [np.zeros(shape) for _ in range(4)] + [np.zeros(shape, bool)]
    params, read = lm.params if params is None else params, _reader(lm.config)
    for batch in rows.eval_batches(batch_size):
        index = batch.pop("index")
        for whole, part in zip(found, read(params, batch), strict=True):
            length = min(shape[1], part.shape[1])  # a bucket may be longer than the longest row
            whole[index[index >= 0], :length] = to_host(part)[index >= 0, :length]
    return TextScores(*found)


def gradient_norms(
    losses: Any, params: Params, batches: Sequence[Mapping[str, Any]]
) -> Float[np.ndarray, " N"]:
    """Return the norm of each row's gradient: an attack, since known rows have small ones.

    Args:
        losses: `(params, batch) -> [B]`, such as `jaxlm.train.losses.row_losses`.
        params: the parameters.
        batches: of one row each.
    """

    @jax.jit
    def norm(params: Params, batch: Any) -> Any:
        grads = jax.grad(lambda params: jnp.sum(losses(params, batch)))(params)
        return jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(jax.tree.map(wide, grads))))

    return np.array([float(norm(params, batch)) for batch in batches])


def attacks(
    forget: TextScores, holdout: TextScores, *, k: float = 0.4, reference: Any = None
) -> dict[str, float]:
    """Return `auc` of forgotten against held-out texts for several statistics.

    Args:
        forget, holdout: scores of both.
        k: share of Min-K % and Min-K %++.
        reference: losses of both under another model, a pair; None for none.
    """

    def statistics(scores: TextScores) -> dict[str, Any]:
        spread = (scores.mean, scores.std)
        return {
            "loss": scores.losses,
            "min_k": min_k(scores.log_probs, scores.mask, k),
            "min_k_plus_plus": min_k(scores.log_probs, scores.mask, k, plus_plus=spread),
        }

    sides = [statistics(scores) for scores in (forget, holdout)]
    if reference is not None:
        for side, losses in zip(sides, reference, strict=True):
            side["reference"] = side["loss"] - losses
    return {name: auc(*(side[name] for side in sides)) for name in sides[0]}


def halves(rows: PaddedRows, tokenizer: Any, share: float = 0.5) -> tuple[list[Prompt], list[str]]:
    """Return prompts of token ids and the texts that follow them, without special tokens.

    Args:
        rows: the rows.
        tokenizer: decodes what follows.
        share: share of a row's targets that belong to the prompt. With 0, a prompt ends where the
            answer begins.
    """
    special = set(tokenizer.all_special_ids)
    prompts: list[Prompt] = []
    rests = []
    for row in rows.rows:
        places = row.loss_positions
        cut = places[min(int(share * len(places)), len(places) - 1)]
        prompts.append(list(row.ids[:cut]))
        rests.append(tokenizer.decode([x for x in row.ids[cut:] if x not in special]))
    return prompts, rests


def verbatim(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    references: Sequence[str],
    *,
    params: Params | None = None,
    max_new_tokens: int = 128,
    stop: Sequence[str] = (),
    batch_size: int = 32,
) -> Float[np.ndarray, " N"]:
    """Return ROUGE-L F1 of greedy continuations, MUSE's VerbMem; the mean is the measure.

    Args:
        lm: a decoder with its tokenizer.
        prompts: texts or token ids, of which the special tokens are a part.
        references: how they go on.
        params: parameters in place of `lm.params`.
        max_new_tokens: most tokens of a continuation.
        stop: texts that end one.
        batch_size: prompts in a batch.
    """
    lm = lm if params is None else lm.replace(params=params)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # to reduce padding
    scores = np.zeros(len(prompts))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        samples = generate_text(
            lm, [prompts[i] for i in places], max_new_tokens=max_new_tokens, stop=stop
        )
        for i, (sample,) in zip(places, samples, strict=True):
            scores[i] = rouge_l(references[i], sample.text).f1
    return scores


def knowledge(
    lm: LanguageModel,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    shots: Sequence[tuple[str, str]] = (),
    params: Params | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
) -> Float[np.ndarray, " N"]:
    """Return ROUGE-L F1 of answers to questions, MUSE's KnowMem; arguments as in `verbatim`.

    `shots` are solved questions that come first, each as "Question: ...", "Answer: ...".
    """
    before = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in shots)
    return verbatim(
        lm,
        [f"{before}Question: {question}\nAnswer:" for question in questions],
        answers,
        params=params,
        max_new_tokens=max_new_tokens,
        stop=STOPS,
        batch_size=batch_size,
    )


class UnlearningData(NamedTuple):
    """The rows of a report, encoded for its model.

    Attributes:
        forget: texts to forget.
        holdout: texts of the same kind that were never trained on.
        forget_questions: questions about the former; None for none.
        retain_questions: questions about what is to be kept; None for none.
        retain: texts to keep.
    """

    forget: PaddedRows
    holdout: PaddedRows
    retain: PaddedRows
    forget_questions: PaddedRows | None = None
    retain_questions: PaddedRows | None = None


def unlearning_report(
    lm: LanguageModel,
    data: UnlearningData,
    *,
    params: Params | None = None,
    retrain_auc: float | None = None,
    k: float = 0.4,
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> dict[str, float]:
    r"""Return MUSE's criteria, and measures of memorisation, of one model.

    verbmem, knowmem_forget, utility: in per cent, see `verbatim`; the first of the second halves of
    texts, the others of answers, utility of those about what is to be kept. auc_...: see `attacks`;
    privleak: of Min-K %, see `jaxlm.unlearning`, if `retrain_auc` is given; both forgotten and
    held-out texts should be 100 or more. extraction_strength, exact_memorization: of
    the texts to forget, in per cent. forget_loss, holdout_loss, retain_loss: means over the texts
    of their mean loss.

    Args:
        lm: a decoder with its tokenizer.
        data: the rows.
        params: parameters in place of `lm.params`.
        retrain_auc: `auc_min_k` of a model that was never trained on the texts to forget.
        k: share of Min-K %.
        max_new_tokens: most tokens of a continuation or an answer.
        batch_size: rows in a batch.

    Raises:
        UserError: there are no held-out texts, or `retrain_auc` is below 0.05.
    """
    if not len(data.holdout):
        raise UserError("holdout: is empty (got no text). Give texts like those to forget.")
    options: dict[str, Any] = {"params": params, "batch_size": batch_size}

    def generated(rows: PaddedRows, share: float) -> float:
        prompts, rests = halves(rows, lm.tokenizer, share)
        scores = verbatim(lm, prompts, rests, max_new_tokens=max_new_tokens, **options)
        return 100 * float(scores.mean())

    report = {"verbmem": generated(data.forget, 0.5)}
    questions = {"knowmem_forget": data.forget_questions, "utility": data.retain_questions}
    report |= {name: generated(rows, 0.0) for name, rows in questions.items() if rows is not None}
    forget, holdout, retain = (
        text_scores(lm, rows, **options) for rows in (data.forget, data.holdout, data.retain)
    )
    areas = attacks(forget, holdout, k=k)
    report |= {f"auc_{name}": value for name, value in areas.items()}
    if retrain_auc is not None:
        report["privleak"] = relative_auc(areas["min_k"], retrain_auc)
    measures = {
        "extraction_strength": extraction_strength(forget.right, forget.mask),
        "exact_memorization": exact_memorization(forget.right, forget.mask),
    }
    report |= {name: 100 * float(values.mean()) for name, values in measures.items()}
    for name, scores in (("forget", forget), ("holdout", holdout), ("retain", retain)):
        report[f"{name}_loss"] = float(scores.losses.mean())
    return report
