r"""Topic models from anchor words, in NumPy on the host.

The words of a document come from topics A [n, r], whose columns are distributions over n words, and
weights of the document. An anchor word occurs in one topic alone. Of the corpus, learning needs the
co-occurrence $Q = A R A^\top$, where R [r, r] holds the second moments of the weights.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int

from jaxlm.core.checks import integer, one_of, show
from jaxlm.core.errors import UserError
from jaxlm.topics import simplex
from jaxlm.typing import PRNGKey

Loss = Literal["l2", "kl"]

ROUNDING = 1e-9
"""How far below 0 rounding may bring a sum over documents."""
PROJECTED = 1000
"""Dimensions of the random projection of `find_anchors`."""


Recovered = tuple[Float[np.ndarray, "n r"], Float[np.ndarray, "r r"], Float[np.ndarray, "n r"]]


class TopicModel(NamedTuple):
    """A topic model with the sums that unlearning needs; the corpus is not needed again.

    Attributes:
        topics: A; each column sums to 1.
        R: second moments of the weights of documents.
        weights: C, the probability of each topic given the word; 0 for words that do not occur.
        anchors: the anchor word of each topic.
        Q: co-occurrence of the corpus.
        num_documents: m.
        document_counts: the number of documents that have the word.
        min_documents, loss: options of `fit`.
    """

    topics: Float[np.ndarray, "n r"]
    R: Float[np.ndarray, "r r"]
    weights: Float[np.ndarray, "n r"]
    anchors: Int[np.ndarray, " r"]
    Q: Float[np.ndarray, "n n"]
    num_documents: int
    document_counts: Int[np.ndarray, " n"]
    min_documents: int
    loss: Loss


def bags(
    counts: Any, key: str, *, words: int | None = None, least: int = 2
) -> scipy.sparse.csr_array:
    """Check counts [m, n], dense or sparse, and return them in rows of float64."""
    rows = scipy.sparse.csr_array(counts, dtype=np.float64, copy=True)
    shape = list(rows.shape)
    if len(shape) != 2 or not shape[0] or (words is not None and shape[1] != words):
        columns = "words" if words is None else words
        raise UserError(
            f"{key}: must have a row for each document, [m, {columns}] (got {shape}). Correct them."
        )
    rows.sum_duplicates()
    rows.eliminate_zeros()
    data = rows.data
    wrong = data[~np.isfinite(data) | (data < 0) | (data != np.floor(data))]
    if wrong.size:
        raise UserError(f"{key}: must be whole, 0 or more (got {wrong[0]:g}). Count the words.")
    short = (rows.sum(axis=1) < least).sum()
    if short:
        raise UserError(
            f"{key}: must have {least} words in each document (got {short} documents with fewer). "
            "Leave them out."
        )
    return rows


def pair_sums(rows: scipy.sparse.csr_array) -> Float[np.ndarray, "n n"]:
    r"""Return $\sum_d (h_d h_d^\top - \mathrm{diag}\, h_d) / (L_d (L_d - 1))$."""
    lengths = rows.sum(axis=1)
    share = 1 / (lengths * (lengths - 1))
    scaled = rows.multiply(np.sqrt(share)[:, None]).tocsr()
    sums = (scaled.T @ scaled).toarray()
    # Exactly 0 for a word that never occurs twice in a document; a difference would be rounded.
    np.fill_diagonal(sums, rows.multiply(rows - rows.sign()).T @ share)
    return sums


def words_in(rows: scipy.sparse.csr_array) -> Int[np.ndarray, " n"]:
    """Return the number of documents that have each word."""
    return np.bincount(rows.indices, minlength=rows.shape[1])


def cooccurrence(counts: Any) -> Float[np.ndarray, "n n"]:
    r"""Return the probability of each pair of words, drawn from a document without replacement.

    $$Q = \frac1m \sum_d \frac{h_d h_d^\top - \mathrm{diag}\, h_d}{L_d (L_d - 1)}$$

    Args:
        counts: [m, n], how often document d has word i, $h_{di}$; dense or of `scipy.sparse`.
            $L_d$ is the sum of a row.

    Raises:
        UserError: a document has fewer than two words, or a count is negative or not whole.

    References: Arora et al. 2013, arXiv:1212.4777.

    >>> (12 * cooccurrence([[2, 1, 0], [0, 1, 1]])).round(9).tolist()
    [[2.0, 2.0, 0.0], [2.0, 0.0, 3.0], [0.0, 3.0, 0.0]]
    """
    rows = bags(counts, "counts")
    return pair_sums(rows) / rows.shape[0]


def find_anchors(
    Q: Float[np.ndarray, "n n"],
    r: int,
    *,
    candidates: Bool[np.ndarray, " n"] | None = None,
    key: PRNGKey | None = None,
) -> Int[np.ndarray, " r"]:
    r"""Return the r words whose rows $\bar Q_i = Q_i / \sum_j Q_{ij}$ span the others.

    The first is farthest from 0. Each of the others is farthest from the span of those before. For
    $Q = A R A^\top$ with an anchor word in each topic, these are the anchor words.

    Args:
        candidates: words that may be anchors, by default all. Rows of rare words are mostly noise
            and lie far out, so leave them out.
        key: project the rows to 1000 random directions first, for more words than that.

    Raises:
        UserError: there are fewer than r candidates, or the rank of Q is lower.

    References: Arora et al. 2013, arXiv:1212.4777, Algorithm 4 without its second pass.
    """
    integer("r", r)
    p = Q.sum(axis=1)
    allowed = p > 0 if candidates is None else candidates & (p > 0)
    if allowed.sum() < r:
        raise UserError(
            f"r: must be at most the number of candidates, {allowed.sum()} (got {r}). Choose fewer "
            "topics or rarer candidates."
        )
    if key is not None:
        Q = Q @ generator(key).normal(scale=PROJECTED**-0.5, size=(len(Q), PROJECTED))
    size = np.where(allowed, p, np.inf)
    distance = np.einsum("ij,ij->i", Q, Q) / size**2
    anchors: list[int] = []
    basis = np.zeros((r, Q.shape[1]))
    for k in range(r):
        word = int(distance.argmax())
        row = Q[word] / p[word]
        direction = row
        for _ in range(2):  # once leaves rounding where the rest is small
            direction = direction - (basis @ direction) @ basis
        rest = np.linalg.norm(direction)
        if not rest > 1e-7 * np.linalg.norm(row):
            raise UserError(
                f"r: must be at most the rank of Q, {k} (got {r}). Choose fewer topics."
            )
        basis[k] = direction / rest
        distance -= (Q @ basis[k] / size) ** 2
        distance[word] = -np.inf
        anchors.append(word)
    return np.array(anchors)


def generator(key: PRNGKey) -> np.random.Generator:
    """Return NumPy's generator for a key of JAX, whose normal numbers would be float32."""
    import jax

    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def quadratic(
    Q: Float[np.ndarray, "n n"], anchors: Int[np.ndarray, " r"]
) -> tuple[Float[np.ndarray, "r n"], Float[np.ndarray, "r r"], Float[np.ndarray, "n r"]]:
    """Return the anchors' rows of Q̄, and G and b of `recover`; b is 0 for words without pairs."""
    p = Q.sum(axis=1)
    rows = Q[anchors] / p[anchors, None]
    return rows, rows @ rows.T, Q @ rows.T / np.where(p > 0, p, 1)[:, None]


def assemble(Q: Float[np.ndarray, "n n"], weights: Float[np.ndarray, "n r"]) -> Recovered:
    """Return topics, R and weights: the first two by Bayes' rule and least squares."""
    topics = Q.sum(axis=1)[:, None] * weights
    topics = topics / topics.sum(axis=0)
    inverse = np.linalg.pinv(topics)
    return topics, inverse @ Q @ inverse.T, weights


def recover(
    Q: Float[np.ndarray, "n n"],
    anchors: Int[np.ndarray, " r"],
    *,
    loss: Loss = "l2",
    start: Float[np.ndarray, "n r"] | None = None,
) -> Recovered:
    r"""Return the topics of given anchor words: the row of a word is a mixture of theirs.

    $$C_i = \operatorname{argmin}_{c \ge 0,\ \sum_k c_k = 1} \|\bar Q_i - c^\top \bar Q_S\|^2
    = c^\top G c - 2 c^\top b_i + \mathrm{const}, \qquad
    A_{ik} \propto p_i C_{ik}, \qquad R = A^+ Q A^{+\top}$$

    Here $p_i = \sum_j Q_{ij}$, $G = \bar Q_S \bar Q_S^\top$ and $b_i = \bar Q_S \bar Q_i$. The
    conditions of optimality hold to 1e-10.

    Args:
        Q: co-occurrence.
        anchors: words, from `find_anchors`.
        loss: "l2", or "kl" for $\mathrm{KL}(\bar Q_i \,\|\, c^\top \bar Q_S)$, to a gap of 1e-7.
        start: weights to start from; they change the time and not the result.

    Returns:
        The fields `topics`, `R` and `weights` of a `TopicModel`.

    Raises:
        UserError: anchors do not occur, are given twice or have dependent rows.

    References: Arora et al. 2012, arXiv:1204.1956; Arora et al. 2013, arXiv:1212.4777.
    """
    one_of("loss", loss, ("l2", "kl"))
    p = Q.sum(axis=1)
    occurs, r = p > 0, len(anchors)
    known = (anchors >= 0) & (anchors < len(Q))
    if not known.all() or not occurs[anchors].all() or not 0 < r == len(np.unique(anchors)):
        raise UserError(
            f"anchors: must be different words that occur (got {show(anchors)}). Use find_anchors."
        )
    rows, G, b = quadratic(Q, anchors)
    smallest, largest = np.linalg.eigvalsh(G)[[0, -1]]
    if not smallest > 1e-12 * largest:
        raise UserError(f"anchors: have dependent rows (got {show(anchors)}). Choose fewer topics.")
    first = None if start is None else start[occurs]
    weights = np.zeros((len(Q), r))
    if loss == "l2":
        weights[occurs] = simplex.minimize(G, b[occurs], first)
    else:
        weights[occurs] = simplex.divergence(Q[occurs] / p[occurs, None], rows, first)
    return assemble(Q, weights)


def fit(counts: Any, r: int, *, min_documents: int = 50, loss: Loss = "l2") -> TopicModel:
    """Learn r topics: `cooccurrence`, then `find_anchors`, then `recover`.

    Args:
        counts: [m, n], see `cooccurrence`.
        min_documents: the number of documents that a word must be in to be an anchor.
        loss: see `recover`.

    Raises:
        UserError: as those functions.

    References: Arora et al. 2013, arXiv:1212.4777.
    """
    integer("min_documents", min_documents)
    rows = bags(counts, "counts")
    m = rows.shape[0]
    Q, document_counts = pair_sums(rows) / m, words_in(rows)
    anchors = find_anchors(Q, r, candidates=document_counts >= min_documents)
    recovered = recover(Q, anchors, loss=loss)
    return TopicModel(*recovered, anchors, Q, m, document_counts, min_documents, loss)


def match(
    topics: Float[np.ndarray, "n r"], reference: Float[np.ndarray, "n r"]
) -> Int[np.ndarray, " r"]:
    """Return the order in which topics are nearest to a reference: compare `topics[:, order]`.

    It minimizes the sum of L1 distances, by the Hungarian method.

    >>> match(np.eye(3)[:, [2, 0, 1]], np.eye(3)).tolist()
    [1, 2, 0]
    """
    distance = scipy.spatial.distance.cdist(reference.T, topics.T, "cityblock")
    return scipy.optimize.linear_sum_assignment(distance)[1]
