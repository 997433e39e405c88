r"""A linear head on topics, and its unlearning.

With shares of words $x_d = h_d / L_d$ and targets $y_d$, the head is the ridge regression of y on
$x_d^\top A$. It is kept as sums over words, so that it follows new topics as well as new documents.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num

from jaxlm.core.checks import real
from jaxlm.core.errors import UserError
from jaxlm.topics.learning import ROUNDING, bags


class Head(NamedTuple):
    r"""A linear head with the sums that unlearning needs.

    Attributes:
        weights: w, for each topic and target.
        word_weights: $B = A w$; $x_d^\top B$ predicts the targets, so B is all that users need.
        gram: $\sum_d x_d x_d^\top$.
        cross: $\sum_d x_d y_d^\top$.
        ridge: option of `head_fit`.
    """

    weights: Float[np.ndarray, "r c"]
    word_weights: Float[np.ndarray, "n c"]
    gram: Float[np.ndarray, "n n"]
    cross: Float[np.ndarray, "n c"]
    ridge: float


def head_fit(
    topics: Float[np.ndarray, "n r"],
    counts: Any,
    targets: Num[np.ndarray, "m c"],
    *,
    ridge: float = 1e-6,
) -> Head:
    r"""Fit a linear head by least squares.

    $$w = (A^\top K A + \lambda I)^{-1} A^\top T, \qquad
    K = \sum_d x_d x_d^\top, \quad T = \sum_d x_d y_d^\top$$

    Args:
        topics: A, such as `model.topics`, or `model.weights`, whose features sum to 1.
        counts: [m, n], of labelled documents of at least one word.
        targets: numbers, or a column of 0 and 1 for each class.
        ridge: λ as a share of the mean of the diagonal of $A^\top K A$.

    Raises:
        UserError: counts, targets and topics do not fit together, or `ridge` is not above 0.
    """
    real("ridge", ridge, above=0)
    gram, cross = _sums(len(topics), counts, targets, "counts")
    return _solved(topics, gram, cross, ridge)


def head_unlearn(
    head: Head,
    topics: Float[np.ndarray, "n r"],
    forget_counts: Any = None,
    forget_targets: Num[np.ndarray, "m c"] | None = None,
) -> Head:
    """Remove labelled documents from a head, exactly: their part of both sums is subtracted.

    The result is that of `head_fit` on the other documents. The method is this library's; the
    paper's steps for the head are other ones.

    Args:
        head: from `head_fit`, or from an earlier call.
        topics: A, as before or of a model after unlearning.
        forget_counts, forget_targets: [m_F, n] and [m_F, c]; none to follow new topics alone.

    Raises:
        UserError: as `head_fit`, or the documents cannot be among those of the head.

    References: Wei et al. 2025, arXiv:2411.12600 (the setting).
    """
    if forget_counts is None or forget_targets is None:
        return _solved(topics, head.gram, head.cross, head.ridge)
    gram, cross = _sums(len(head.gram), forget_counts, forget_targets, "forget_counts")
    gram = head.gram - gram
    if (gram < -ROUNDING).any():
        raise UserError(
            "forget_counts: hold documents that the head was not fitted to (got "
            f"{len(forget_targets)}). Give each of its documents at most once."
        )
    return _solved(topics, gram, head.cross - cross, head.ridge)


def _sums(
    num_words: int, counts: Any, targets: Num[np.ndarray, "m c"], key: str
) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, "n c"]]:
    rows = bags(counts, key, words=num_words, least=1)
    if len(targets) != rows.shape[0] or not np.isfinite(targets).all():
        raise UserError(
            f"targets: must be finite, for each of {rows.shape[0]} documents (got "
            f"{list(targets.shape)}). Correct them."
        )
    shares = rows.multiply(1 / rows.sum(axis=1)[:, None]).tocsr()
    return (shares.T @ shares).toarray(), shares.T @ targets.astype(np.float64)


def _solved(
    topics: Float[np.ndarray, "n r"],
    gram: Float[np.ndarray, "n n"],
    cross: Float[np.ndarray, "n c"],
    ridge: float,
) -> Head:
    normal = topics.T @ gram @ topics
    normal += ridge * np.diag(normal).mean() * np.eye(len(normal))
    weights = np.linalg.solve(normal, topics.T @ cross)
    return Head(weights, topics @ weights, gram, cross, ridge)
