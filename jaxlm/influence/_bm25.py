"""Which training examples share rare words with a target: no model, no gradient."""

from collections.abc import Hashable
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxlm.core.errors import UserError
from jaxlm.influence._score import check_over, reduced
from jaxlm.influence.sides import subtasks_of


def bm25(
    train: Any,
    targets: Any,
    subtask: Any = None,
    *,
    k1: float | int = 1.2,
    b: float | int = 0.75,
    over: str | None = None,
) -> Float[np.ndarray, "..."]:
    r"""Okapi BM25 of the training examples as documents and the targets as queries.

    $$\mathrm{score}_{ns} = \mathrm{mean}_{q \in s} \sum_{t \in q} \log\Big(1 + \frac{N - N_t +
    \frac12}{N_t + \frac12}\Big) \frac{(k_1 + 1)\,c_{tn}}{c_{tn} + k_1 (1 - b + b\,\ell_n /
    \bar\ell)}$$

    with $c_{tn}$ how often token t is in example n of length $\ell_n$, and $N_t$ in how many it is.
    A token counts as often as it is in the query.

    Args:
      train: N lists of tokens, words or integers.
      targets: M lists of tokens.
      subtask, over: of `jaxlm.influence.score`.
      k1: how far a token that is repeated counts more, 0 or more.
      b: how far long examples are held back, 0 to 1.

    Returns:
      float64 [N], or [N, S] with subtasks.

    Raises:
      UserError: for no examples or targets, subtasks without targets, and other k1 or b.

    >>> train = [["a", "cat"], ["a", "dog"], ["a", "red", "dog"]]
    >>> bm25(train, [["the", "red", "dog"]]).argsort().tolist()
    [0, 1, 2]

    References: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond",
    2009; the logarithm is that of Lucene, which is never negative.
    """
    if k1 < 0 or not 0 <= b <= 1:
        raise UserError(f"k1={k1} and b={b} are impossible; give k1 >= 0 and 0 <= b <= 1")
    if not len(train) or not len(targets):
        raise UserError("there are no training examples or no targets; give at least one of each")
    check_over(over)
    groups = subtasks_of(len(targets), subtask)
    vocabulary: dict[Hashable, int] = {}
    document, token = _postings(train, vocabulary)
    words = len(vocabulary)
    lengths = np.bincount(document, minlength=len(train))
    pairs, counts = np.unique(document * words + token, return_counts=True)
    document, token = np.divmod(pairs, max(words, 1))
    having = np.bincount(token, minlength=words)
    rarity = np.log1p((len(train) - having + 0.5) / (having + 0.5))
    relative = lengths / max(lengths.mean(), 1e-300)
    saturated = (k1 + 1) * counts / (counts + k1 * (1 - b + b * relative[document]))
    weights = rarity[token] * saturated
    asked = np.zeros((int(groups.max()) + 1, words))
    for group, query in zip(groups, targets, strict=True):
        for each in query:
            if each in vocabulary:
                asked[group, vocabulary[each]] += 1
    asked /= np.bincount(groups)[:, None]
    columns = [
        np.bincount(document, weights * query[token], minlength=len(train)) for query in asked
    ]
    return reduced(np.stack(columns, axis=1).astype(np.float64), subtask, over)


def _postings(lists: Any, vocabulary: dict[Hashable, int]) -> tuple[np.ndarray, np.ndarray]:
    """The example and the number of every token, numbers in order of first use."""
    sizes = [len(tokens) for tokens in lists]
    numbers = [vocabulary.setdefault(each, len(vocabulary)) for tokens in lists for each in tokens]
    return np.repeat(np.arange(len(lists)), sizes), np.asarray(numbers, np.int64)
