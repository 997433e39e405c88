"""Unlearning of documents from a topic model, without the other documents."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxlm.core.checks import integer, one_of, real, show
from jaxlm.core.errors import UserError
from jaxlm.topics import learning, simplex
from jaxlm.topics.learning import TopicModel
from jaxlm.typing import PRNGKey


class Privacy(NamedTuple):
    """What a release promises: (ε, δ)-unlearning by Gaussian noise.

    Attributes:
        epsilon: ε, above 0 and at most 1.
        delta: δ, above 0 and below 1.
        sensitivity: Δ, the distance from retraining that the noise covers. Fix it before deletions
            are known: noise that is scaled to what a deletion measures is not private.
    """

    epsilon: float
    delta: float
    sensitivity: float


class Unlearned(NamedTuple):
    """The result of unlearning.

    Attributes:
        model: the model without the documents. Its sums are exact and not for release.
        anchors_stable: whether `fit` on the other documents would choose the same anchor words. If
            not, the result is not what retraining gives.
        distance_bound: bound on the Frobenius norm of the difference to retraining's topics, up to
            rounding of Q; infinite if anchors are not stable, or for the loss "kl".
        released: topics with noise, if `privacy` is given.
        private: whether `released` keeps the promise: anchors are stable and the bound is at most
            the sensitivity. If not, it is not private, whatever the noise.
    """

    model: TopicModel
    anchors_stable: bool
    distance_bound: float
    released: Float[np.ndarray, "n r"] | None = None
    private: bool = False


def unlearn(
    model: TopicModel,
    forget_counts: Any,
    *,
    projection: Literal["gram", "euclidean"] = "gram",
    privacy: Privacy | None = None,
    key: PRNGKey | None = None,
) -> Unlearned:
    r"""Remove documents from a topic model; the cost depends on these documents and not on m.

    $$Q_F = \frac{m Q - \sum_{d \in F} q_d}{m - m_F}, \qquad
    C_i = \operatorname{argmin}_{c \ge 0,\ \sum_k c_k = 1} c^\top G_F c - 2 c^\top b_{F,i}$$

    The co-occurrence is exact. The weights with the old anchors are minimized from where they were,
    so they are those of retraining while anchors are stable. The paper takes a Newton step, to
    $G_F^{-1} b_{F,i}$, and projects it to the simplex: in the norm of G that is this minimum, in
    the Euclidean norm it is not.

    Args:
        model: from `fit`, or from an earlier call.
        forget_counts: [m_F, n], documents that the model was fitted to.
        projection: "gram" for the minimum, "euclidean" for the step as published.
        privacy: release topics with noise, see `noise_scale`. Retraining must add the same noise.
        key: of the noise; keep it secret.

    Raises:
        UserError: counts as for `cooccurrence`; documents that cannot be of the model's corpus, or
            all documents with an anchor word; a bad number in `privacy`, or no `key` for it.

    References: Wei et al. 2025, arXiv:2411.12600.
    """
    one_of("projection", projection, ("gram", "euclidean"))
    if projection == "euclidean" and model.loss != "l2":
        raise UserError(f"projection: needs the loss l2 (got {projection}). Use gram.")
    found = _downdated(model, forget_counts)
    Q, anchors = found.Q, found.anchors
    if projection == "gram":
        A, R, weights = learning.recover(Q, anchors, loss=model.loss, start=model.weights)
    else:
        _, G, b = learning.quadratic(Q, anchors)
        occurs = found.document_counts > 0
        weights = simplex.project(np.linalg.solve(G, b.T).T) * occurs[:, None]
        A, R, _ = learning.assemble(Q, weights)
    found = found._replace(topics=A, R=R, weights=weights)
    try:
        candidates = found.document_counts >= found.min_documents
        best = learning.find_anchors(Q, len(anchors), candidates=candidates)
        stable = set(best.tolist()) == set(anchors.tolist())
    except UserError:  # retraining would raise it: too few words are frequent enough
        stable = False
    bound = _distance_bound(found) if stable and model.loss == "l2" else math.inf
    if privacy is None:
        return Unlearned(found, stable, bound)
    if key is None:
        raise UserError("key: is needed for the noise (got None). Give a secret one.")
    noise = learning.generator(key).normal(scale=noise_scale(*privacy), size=found.topics.shape)
    return Unlearned(found, stable, bound, found.topics + noise, bound <= privacy.sensitivity)


def _downdated(model: TopicModel, forget_counts: Any) -> TopicModel:
    """Return the model with the sums of the other documents, and topics as before."""
    rows = learning.bags(forget_counts, "forget_counts", words=len(model.Q))
    num_documents = model.num_documents - rows.shape[0]
    document_counts = model.document_counts - learning.words_in(rows)
    sums = model.num_documents * model.Q - learning.pair_sums(rows)
    if document_counts.min() < 0 or sums.min() < -learning.ROUNDING:
        raise UserError(
            "forget_counts: hold documents that the model was not fitted to (got "
            f"{rows.shape[0]} of {model.num_documents}). Give each of its documents at most once."
        )
    gone = model.anchors[document_counts[model.anchors] == 0]
    if gone.size:
        raise UserError(
            f"forget_counts: have all documents with an anchor word (got {show(gone)}). Fit a new "
            "model to the others."
        )
    Q = np.maximum(sums, 0) / num_documents
    gone = np.flatnonzero(document_counts == 0)  # exact, where the sums of these are rounding
    Q[gone], Q[:, gone] = 0, 0
    return model._replace(Q=Q, num_documents=num_documents, document_counts=document_counts)


def _distance_bound(model: TopicModel) -> float:
    r"""Bound the distance to the topics with the best weights for the model's Q and anchors.

    With e the bound of `simplex.violation` on the distance of a word's weights, and s the sum of
    $p_i C_{ik}$ over words, column k is off by at most $2 \sum_i p_i e_i / s_k$: one half for its
    numerators, one for s.
    """
    _, G, b = learning.quadratic(model.Q, model.anchors)
    errors = np.linalg.norm(simplex.violation(G, b, model.weights), axis=1)
    p = model.Q.sum(axis=1)
    return float(
        2 * p @ errors / np.linalg.eigvalsh(G)[0] * np.linalg.norm(1 / (p @ model.weights))
    )


def noise_scale(epsilon: float, delta: float, sensitivity: float) -> float:
    r"""Return the standard deviation of the Gaussian mechanism, for the arguments of `Privacy`.

    $$\sigma = \frac{\Delta}{\epsilon} \sqrt{2 \ln(1.25 / \delta)}$$

    Raises:
        UserError: ε is not in (0, 1], where the formula is proven; δ is not in (0, 1); or Δ < 0.

    References: Dwork & Roth 2014, The Algorithmic Foundations of Differential Privacy, Theorem A.1.

    >>> round(noise_scale(1.0, 1e-5, sensitivity=1.0), 8)
    4.84480526
    """
    real("epsilon", epsilon, above=0, most=1)
    real("delta", delta, above=0, below=1)
    real("sensitivity", sensitivity, least=0)
    return sensitivity / epsilon * math.sqrt(2 * math.log(1.25 / delta))


def deletion_capacity(
    num_documents: int, num_words: int, num_topics: int, *, q: float | None = None
) -> float:
    r"""Return the order of how many documents can be unlearned before the model suffers.

    $$\frac{m}{r^2 \sqrt{nr}} \quad\text{for the topics}, \qquad
    \frac{m q}{r \sqrt{nr}} \quad\text{for a linear head on them}$$

    The paper states both up to constants and logarithms, which are left out here too: use it to
    compare sizes. Whether a given deletion went too far, `Unlearned.anchors_stable` tells.

    Args:
        q: how much the head needs the topics, from 1/r to 1; None for the topics alone.

    References: Wei et al. 2025, arXiv:2411.12600.
    """
    sizes = {"num_documents": num_documents, "num_words": num_words, "num_topics": num_topics}
    for name, value in sizes.items():
        integer(name, value)
    real("q", q, least=1 / num_topics, most=1)
    per_topic = 1 / num_topics if q is None else q
    return num_documents * per_topic / (num_topics * math.sqrt(num_words * num_topics))
