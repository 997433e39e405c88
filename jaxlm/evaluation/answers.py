"""Answers in words: token F1 and exact match, as in the scripts of SQuAD and DROP."""

import collections
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxlm.core.errors import UserError
from jaxlm.evaluation.generation import generate_text
from jaxlm.models import LanguageModel
from jaxlm.typing import Params

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_ANSWER = ("CANNOTANSWER", "no answer")


def normalise_answer(text: str) -> str:
    """Return a text in lower case, without punctuation, articles and extra spaces.

    >>> normalise_answer("The  Eiffel-Tower, a tower.")
    'eiffeltower tower'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(text: str, answers: Sequence[str]) -> float:
    """Return 1 if a text is one of the answers after normalisation, else 0."""
    return float(normalise_answer(text) in map(normalise_answer, answers))


def token_f1(text: str, answers: Sequence[str]) -> float:
    r"""Return $\max_a 2pr/(p+r)$ over answers, for precision $p$ and recall $r$ of words.

    If the first answer says that there is none ("no answer"), return the exact match with it.

    >>> round(token_f1("in the Paris of 1900", ["Paris", "Paris, France"]), 3)
    0.4
    """
    if answers[0] in _NO_ANSWER:
        return exact_match(text, answers[:1])
    return max(_f1(normalise_answer(text).split(), normalise_answer(a).split()) for a in answers)


def _f1(words: Sequence[str], gold: Sequence[str]) -> float:
    common = (collections.Counter(words) & collections.Counter(gold)).total()
    return 2 * common / (len(words) + len(gold)) if common else 0.0


@dataclass(frozen=True)
class GenerationResult:
    """The answers of a model, and their scores.

    Attributes:
        texts: the answers, stripped.
        f1: mean of `token_f1`.
        exact_match: mean of `exact_match`.
        f1s: `token_f1` of each answer.
        log_probs: log-probability of each answer.
    """

    texts: tuple[str, ...]
    f1: float
    exact_match: float
    f1s: Float[np.ndarray, " N"]
    log_probs: tuple[float, ...]


def evaluate_generation(
    lm: LanguageModel,
    params: Params,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    max_new_tokens: int = 50,
    batch_size: int = 16,
    max_length: int | None = None,
    view: Any = None,
) -> GenerationResult:
    """Generate answers greedily, up to the end of the line, and score them.

    Args:
        lm: a decoder with its tokenizer.
        params: parameters in place of `lm.params`.
        prompts: texts that end where the answer starts.
        answers: the right answers to each prompt.
        max_new_tokens: most tokens of an answer.
        batch_size: prompts in a batch; prompts of similar length are batched together.
        max_length: most tokens of a prompt with its answer; a longer prompt is cut on the left, but
            keeps its special tokens. None means the model's maximum.
        view: see `jaxlm.core.views`.

    Raises:
        UserError: if there is no prompt, or `max_new_tokens` leaves no room for one; see also
            `generate_text`.
    """
    if not prompts:
        raise UserError("prompts: is empty (got nothing). Give at least one.")
    longest = lm.config.max_positions if max_length is None else max_length
    if longest <= max_new_tokens:
        raise UserError(
            f"max_new_tokens: leaves no room for a prompt in {longest} tokens (got "
            f"{max_new_tokens}). Lower it."
        )
    # Prompts of similar length share a batch, to reduce padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    texts, log_probs = [""] * len(prompts), [0.0] * len(prompts)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        completions = generate_text(
            lm.replace(params=params),
            [prompts[i] for i in places],
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=longest - max_new_tokens,
            stop=("\n",),
            view=view,
        )
        for i, (completion,) in zip(places, completions, strict=True):
            texts[i] = completion.text.strip()
            log_probs[i] = completion.log_probability
    scored = list(zip(texts, answers, strict=True))
    f1s = np.array([token_f1(*pair) for pair in scored])
    return GenerationResult(
        tuple(texts),
        float(np.mean(f1s)),
        float(np.mean([exact_match(*pair) for pair in scored])),
        f1s,
        tuple(log_probs),
    )
