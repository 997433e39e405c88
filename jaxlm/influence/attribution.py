"""Attribution: the effect of each training example on target examples, and selection by it.

Every method returns one score per training example, larger for examples that help more; with
`subtask`, one column per subtask of the targets.
"""

import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int
from scipy.linalg import lapack

from jaxlm.core.checks import integer, one_of, real
from jaxlm.core.dtypes import wide, wide_dtype
from jaxlm.core.errors import UserError
from jaxlm.influence import products
from jaxlm.influence.products import CheckpointRows, check_pair, rows_of, subtasks_of, weights_of
from jaxlm.influence.store import GradientStore
from jaxlm.typing import PRNGKey

OVER = ("max", "mean", None)
"""What may be taken over subtasks."""


def score(
    train: Any,
    targets: Any,
    weights: Any = None,
    subtask: Any = None,
    aggregate: str = "cosine_of_mean",
    *,
    over: str | None = None,
) -> Float[np.ndarray, "..."]:
    r"""Return the influence of each training example on targets, by cosines of gradient features.

    With $g_{en}$ the row of training example n at checkpoint e, $t_{em}$ that of target m, and
    $\hat x = x / \|x\|$, for the targets of a subtask s

    $$\mathrm{score}_{ns} = \sum_e w_e \cos\big(g_{en}, \mathrm{mean}_{m \in s}\, t_{em}\big)
    \quad\text{or}\quad \sum_e w_e\, \mathrm{mean}_{m \in s} \cos(g_{en}, t_{em}).$$

    The first, `cosine_of_mean`, is the equation of the paper. The second, `mean_of_cosines`, is
    what the authors' code computes, with weights divided by their sum, which does not change the
    ranking. Both are one product of [N, R] with [R, S], since the second is
    $\hat g_{en} \cdot \mathrm{mean}\, \hat t_{em}$. A block of 32 MiB of the training rows is in
    memory at a time.

    Args:
      train: rows of training examples: [E, N, R] at E checkpoints, [N, R] at one, or stores.
      targets: rows of targets, [E, M, R], [M, R] or stores.
      weights: [E], weights of the checkpoints: the mean learning rate of the epoch that ended with
        each. By default the weights in the specs of the stores.
      subtask: int [M], subtask in [0, S) of each target; every subtask needs at least one target.
        None means one subtask.
      aggregate: "cosine_of_mean" or "mean_of_cosines".
      over: take the "max" or "mean" of the scores over subtasks; LESS takes the maximum.

    Returns:
      [N] if `subtask` is None or `over` is given, else [N, S]: float32, or float64 for arrays of
      that dtype. A training row of zeros has cosine 0 with everything.

    Raises:
      UserError: if train and targets do not fit together (the message names the field in which
        their stores differ), a subtask has no targets, a target is zero, or a row is not finite.

    >>> train = np.array([[[2.0, 0.0], [0.0, 3.0]]], np.float32)
    >>> targets = np.array([[[1.0, 0.0], [0.0, 4.0]]], np.float32)
    >>> score(train, targets, subtask=np.array([0, 1]))
    array([[1., 0.],
           [0., 1.]], dtype=float32)

    References: Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning",
    arXiv:2402.04333.
    """
    one_of("aggregate", aggregate, ("cosine_of_mean", "mean_of_cosines"))
    one_of("over", over, OVER)
    left, right, groups = _pair(train, targets, subtask)
    if aggregate == "cosine_of_mean":
        direction = products.unit_sums
    else:
        direction = functools.partial(products.means, normalize=True)
    directions = [
        weight * direction(right, checkpoint, groups)
        for checkpoint, weight in enumerate(weights_of(left, weights))
    ]
    return _reduce(products.products(left, directions, products.cosines), subtask, over)


def select(
    scores: Any, fraction: float | int = 0.05, *, count: int | None = None
) -> Int[np.ndarray, " K"]:
    """Return the indices of the examples with the highest scores, the highest first.

    Of equal scores the lower index comes first, so a selection is the same on every machine.

    Args:
      scores: [N], higher is better.
      fraction: above 0, at most 1; `floor(fraction * N)` of N examples are selected.
      count: how many examples are selected; replaces `fraction`.

    Returns:
      int64 indices [K].

    Raises:
      UserError: if scores have the wrong shape or are not finite, or the selection is empty or
        larger than N.

    >>> select([0.1, 0.7, 0.3, 0.7], fraction=0.5)
    array([1, 3])

    References: Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning",
    arXiv:2402.04333.
    """
    values = np.asarray(scores)
    if values.ndim != 1:
        raise UserError(
            f"scores: must have shape [N] (got {values.shape}). Give the maximum over subtasks."
        )
    finite = np.isfinite(values)
    if not finite.all():
        at = int(finite.argmin())
        raise UserError(f"scores: example {at} is not finite (got {values[at]}). Leave it out.")
    if count is None:
        real("fraction", fraction, above=0, most=1)
        # 0.29 * 100 is 28.999999999999996
        count = int(np.floor(fraction * len(values) * (1 + 1e-12)))
        if not count:
            raise UserError(
                f"fraction: takes no example of {len(values)} (got {fraction}). Give a larger one."
            )
    integer("count", count, most=len(values))
    order = np.argsort(-values.astype(np.promote_types(values.dtype, np.float32)), kind="stable")
    return order[:count]


def _pair(
    train: Any, targets: Any, subtask: Any
) -> tuple[CheckpointRows, CheckpointRows, Int[np.ndarray, " M"]]:
    """Return the rows of both sides, which fit together, and the subtask of each target."""
    left, right = rows_of(train, "train"), rows_of(targets, "targets")
    check_pair(left, right)
    return left, right, subtasks_of(right.examples, subtask)


def _reduce(
    scores: Float[np.ndarray, "N S"], subtask: Any, over: str | None = None
) -> Float[np.ndarray, "..."]:
    """Return all columns of the scores, their maximum or mean, or the only column."""
    if over is not None:
        return scores.max(axis=1) if over == "max" else scores.mean(axis=1)
    return scores[:, 0] if subtask is None else scores


# Inner products.


def grad_dot(train: Any, targets: Any, subtask: Any = None) -> Float[np.ndarray, "..."]:
    r"""Return inner products, $\frac1E \sum_e g_{en} \cdot \mathrm{mean}_{m \in s} t_{em}$.

    A small step of gradient descent on example n lowers the loss of the target by this product
    times the learning rate.

    Args:
      train, targets, subtask: see `jaxlm.influence.score`. `np.arange(M)` as subtasks gives [N, M],
        one column per target.

    Returns:
      [N], or [N, S] with subtasks.

    Raises:
      UserError: as `score`.

    >>> grad_dot(np.array([[[1.0, 2.0], [0.0, 3.0]]]), np.array([[[1.0, 1.0]]])).tolist()
    [3.0, 3.0]

    References: Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent",
    arXiv:2002.08484.
    """
    left = rows_of(train, "train")
    return tracin(left, targets, np.full(len(left.rows), 1 / len(left.rows)), subtask)


def tracin(
    train: Any, targets: Any, weights: Any = None, subtask: Any = None
) -> Float[np.ndarray, "..."]:
    r"""Return TracIn, $\sum_e w_e\, g_{en} \cdot \mathrm{mean}_{m \in s} t_{em}$.

    This is `score` with inner products in place of cosines, so that large gradients count more.

    Args:
      train, targets, weights, subtask: see `jaxlm.influence.score`.

    Returns:
      [N], or [N, S] with subtasks.

    Raises:
      UserError: as `score`.

    >>> rows = np.array([[[1.0, 2.0]], [[0.0, 1.0]]])
    >>> tracin(rows, rows, weights=[0.5, 0.25]).tolist()
    [2.75]

    References: Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent",
    arXiv:2002.08484.
    """
    left, right, groups = _pair(train, targets, subtask)
    directions = [
        weight * products.means(right, checkpoint, groups)
        for checkpoint, weight in enumerate(weights_of(left, weights))
    ]
    return _reduce(products.products(left, directions, products.dots), subtask)


# Influence functions of a linear model.


def trak(
    train: Any,
    targets: Any,
    residuals: Any,
    subtask: Any = None,
    *,
    ridge: float | int = 0.0,
) -> Float[np.ndarray, "..."]:
    r"""Return TRAK: influence functions of a linear model on projected gradients, over an ensemble.

    Rows are gradients of the margin $f = \log\frac{p}{1 - p}$, with p the probability of the right
    answer. With $\Phi_e$ the training rows of model e

    $$\tau_{ns} = \Big[\frac1E \sum_e \phi_{es}^\top (\Phi_e^\top \Phi_e + \lambda I)^{-1}
    \phi_{en}\Big] \Big[\frac1E \sum_e (1 - p_{en})\Big].$$

    The training rows are read twice, and an [R, R] matrix is held in float64.

    Args:
      train, targets, subtask: see `jaxlm.influence.score`, with models in place of checkpoints.
      residuals: 1 - p of the training examples, [E, N].
      ridge: λ, needed if R is not far below N.

    Returns:
      [N], or [N, S] with subtasks; φ_s is the mean of the rows of a subtask.

    Raises:
      UserError: as `score`; if residuals are not [E, N] in [0, 1]; or if the matrix is singular.

    >>> rows = np.array([[[2.0, 0.0], [0.0, 1.0]]])
    >>> trak(rows, rows, residuals=np.array([[0.5, 1.0]]), subtask=np.arange(2))
    array([[0.5, 0. ],
           [0. , 1. ]])

    References: Park et al., "TRAK: Attributing Model Behavior at Scale", arXiv:2303.14186.
    """
    left, right, groups = _pair(train, targets, subtask)
    models = len(left.rows)
    residual = np.asarray(residuals)
    if residual.shape != (models, left.examples):
        raise UserError(
            f"residuals: must have shape [models, training examples], ({models}, {left.examples}) "
            f"(got {residual.shape}). Correct it."
        )
    wrong = np.argwhere(~((residual >= 0) & (residual <= 1)))
    if len(wrong):
        model, example = wrong[0].tolist()
        raise UserError(
            f"residuals: must be in [0, 1] (got {residual[model, example]:g} for example {example} "
            f"in model {model}). Give 1 - p, with p the probability of the answer."
        )
    real("ridge", ridge, least=0)
    directions = []
    for model in range(models):
        gram = products.second_moment(left, model) + ridge * np.eye(left.dim)
        wanted = products.means(right, model, groups).T
        directions.append(_solve(gram, wanted, float(np.finfo(left.dtype).eps)).T / models)
    scores = products.products(left, directions, products.dots)
    mean = residual.mean(axis=0).astype(scores.dtype)
    return _reduce(scores * mean[:, None], subtask)


def _solve(gram: np.ndarray, right: np.ndarray, eps: float) -> np.ndarray:
    """Return gram^-1 right, for the second moment of rows with a rounding error of `eps`."""
    try:
        factor = np.linalg.cholesky(gram)
        diagonal = np.diag(factor)
        inverse_condition, _ = lapack.dpocon(factor, np.linalg.norm(gram, 1), uplo="L")
        regular = diagonal.min() > np.sqrt(len(gram) * eps) * diagonal.max()
        # The last pivot of a singular matrix is rounding error, of any size: check the condition.
        regular &= inverse_condition > 10 * len(gram) * np.finfo(np.float64).eps
    except np.linalg.LinAlgError:
        regular = False
    if not regular:
        raise UserError(
            f"ridge: the second moment of the training rows, {gram.shape}, is singular. Give a "
            "larger ridge, or rows of fewer numbers than there are examples."
        )
    return np.linalg.solve(gram, right)


# Scores without a target.


def grand(train: Any) -> Float[np.ndarray, " N"]:
    r"""Return GraNd, the mean norm of gradients, $\frac1E \sum_e \|g_{en}\|$.

    Args:
      train: see `jaxlm.influence.score`, with several runs at an early step as checkpoints.

    Returns:
      [N], large for hard examples.

    Raises:
      UserError: as `score`.

    >>> grand(np.array([[[3.0, 4.0]], [[0.0, 1.0]]])).tolist()
    [3.0]

    References: Paul et al., "Deep Learning on a Data Diet: Finding Important Examples Early in
    Training", arXiv:2107.07075.
    """
    left = rows_of(train, "train")
    weight = np.full((1, 1), 1 / len(left.rows))
    return products.products(left, [weight] * len(left.rows), products.norms)[:, 0]


def el2n(logits: Float[ArrayLike, "*E N C"], labels: Int[ArrayLike, " N"]) -> Float[Array, " N"]:
    r"""Return EL2N, the mean norm of errors, $\frac1E \sum_e \|\mathrm{softmax}(f_e(x_n)) - y_n\|$.

    Args:
      logits: [N, C], or [E, N, C] of several runs at an early step.
      labels: the right class of every example, in [0, C).

    Returns:
      [N], large for hard examples; at most the square root of 2.

    Raises:
      UserError: if shapes do not fit, or a label is not a class.

    >>> el2n(np.array([[0.0, 200.0]], np.float32), np.array([1])).tolist()
    [0.0]

    References: Paul et al., "Deep Learning on a Data Diet: Finding Important Examples Early in
    Training", arXiv:2107.07075.
    """
    values, right = jnp.asarray(logits), np.asarray(labels)
    if values.ndim not in (2, 3) or right.shape != values.shape[-2:-1]:
        raise UserError(
            f"labels: must have shape [N] for logits [N, C] or [E, N, C] (got {right.shape} for "
            f"{values.shape}). Correct it."
        )
    classes = values.shape[-1]
    if right.size and not (right.min() >= 0 and right.max() < classes):
        raise UserError(
            f"labels: must be from 0 to {classes - 1} (got {right.min()} to {right.max()}). "
            "Correct them."
        )
    values = wide(values)
    answers = jnp.expand_dims(
        jax.nn.one_hot(right, classes, dtype=values.dtype), tuple(range(values.ndim - 2))
    )
    errors = jnp.linalg.norm(jax.nn.softmax(values) - answers, axis=-1)
    return errors.reshape(-1, len(right)).mean(axis=0)


# Scores without gradients.


def representation_similarity(
    train: Any,
    targets: Any,
    subtask: Any = None,
    aggregate: str = "cosine_of_mean",
    *,
    over: str | None = None,
) -> Float[np.ndarray, "..."]:
    """Return `jaxlm.influence.score` of representations of one model, such as those of `pool`.

    Args:
      train: [N, D], or a store.
      targets: [M, D], or a store.
      subtask, aggregate, over: see `score`.

    Returns:
      [N], or [N, S] with subtasks.

    Raises:
      UserError: as `score`.

    >>> representation_similarity(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[2.0, 0.0]]))
    array([1., 0.])

    References: Xia et al., arXiv:2402.04333 (the baseline RDS); Ivison et al., "Large-Scale Data
    Selection for Instruction Tuning", arXiv:2503.01807.
    """
    left, right = (x if isinstance(x, GradientStore) else [x] for x in (train, targets))
    return score(left, right, [1.0], subtask, aggregate, over=over)


@functools.partial(jax.jit, static_argnames="how")
def pool(
    hidden: Float[ArrayLike, "N T D"],
    mask: Int[ArrayLike, "N T"] | Bool[ArrayLike, "N T"],
    how: str = "position",
) -> Float[Array, "N D"]:
    """Return one representation for each example, pooled over its tokens.

    Args:
      hidden: hidden states of the last layer.
      mask: 1 at tokens that count, at least one in each example.
      how: "last" token; "mean"; or "position", the mean with weights 1, 2, 3, ..., as in RDS+.

    Returns:
      [N, D] in at least float32.

    Raises:
      UserError: if `how` is unknown.
    """
    one_of("how", how, ("last", "mean", "position"))
    states, here = jnp.asarray(hidden), jnp.asarray(mask).astype(bool)
    dtype = wide_dtype(states)
    position = jnp.cumsum(here, axis=1) * here
    if how == "last":
        weights = position == position.max(axis=1, keepdims=True)
    else:
        weights = here if how == "mean" else position
    share = weights.astype(dtype) / weights.sum(axis=1, keepdims=True).astype(dtype)
    return jnp.einsum("ntd,nt->nd", states.astype(dtype), share, precision="highest")


def bm25(
    train: Any,
    targets: Any,
    subtask: Any = None,
    *,
    k1: float | int = 1.2,
    b: float | int = 0.75,
    over: str | None = None,
) -> Float[np.ndarray, "..."]:
    r"""Return Okapi BM25 with the training examples as documents and the targets as queries.

    $$\mathrm{score}_{ns} = \mathrm{mean}_{q \in s} \sum_{t \in q} \log\Big(1 + \frac{N - N_t +
    \frac12}{N_t + \frac12}\Big) \frac{(k_1 + 1)\,c_{tn}}{c_{tn} + k_1 (1 - b + b\,\ell_n /
    \bar\ell)}$$

    with $c_{tn}$ the count of token t in example n of length $\ell_n$, and $N_t$ the number of
    examples that contain it. A token that occurs k times in the query counts k times.

    Args:
      train: N lists of tokens, words or integers.
      targets: M lists of tokens.
      subtask, over: see `jaxlm.influence.score`.
      k1: how much a token gains by being repeated, 0 or more.
      b: how much long examples are penalised, 0 to 1.

    Returns:
      float64 [N], or [N, S] with subtasks.

    Raises:
      UserError: if there are no examples or targets, a subtask has no targets, or k1 or b is out of
        range.

    >>> train = [["a", "cat"], ["a", "dog"], ["a", "red", "dog"]]
    >>> bm25(train, [["the", "red", "dog"]]).argsort().tolist()
    [0, 1, 2]

    References: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond",
    2009; the logarithm is that of Lucene, which is never negative.
    """
    real("k1", k1, least=0)
    real("b", b, least=0, most=1)
    for name, examples in (("train", train), ("targets", targets)):
        if not len(examples):
            raise UserError(f"{name}: has no examples. Give at least one.")
    one_of("over", over, OVER)
    groups = subtasks_of(len(targets), subtask)
    vocabulary: dict[Hashable, int] = {}
    document, token = _postings(train, vocabulary)
    size = len(vocabulary)
    lengths = np.bincount(document, minlength=len(train))
    pairs, counts = np.unique(document * size + token, return_counts=True)
    document, token = np.divmod(pairs, max(size, 1))
    having = np.bincount(token, minlength=size)
    rarity = np.log1p((len(train) - having + 0.5) / (having + 0.5))
    relative = lengths / max(lengths.mean(), 1e-300)
    saturated = (k1 + 1) * counts / (counts + k1 * (1 - b + b * relative[document]))
    weights = rarity[token] * saturated
    queries = np.zeros((int(groups.max()) + 1, size))
    for group, query in zip(groups, targets, strict=True):
        for word in query:
            if word in vocabulary:
                queries[group, vocabulary[word]] += 1
    queries /= np.bincount(groups)[:, None]
    columns = [
        np.bincount(document, weights * query[token], minlength=len(train)) for query in queries
    ]
    return _reduce(np.stack(columns, axis=1).astype(np.float64), subtask, over)


def _postings(lists: Any, vocabulary: dict[Hashable, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the example and the id of every token; ids are given in order of first use."""
    sizes = [len(tokens) for tokens in lists]
    numbers = [vocabulary.setdefault(word, len(vocabulary)) for tokens in lists for word in tokens]
    return np.repeat(np.arange(len(lists)), sizes), np.asarray(numbers, np.int64)


def random_scores(key: PRNGKey, count: int) -> Float[Array, " N"]:
    """Return uniform random scores in [0, 1), the baseline for every method."""
    return jax.random.uniform(key, (count,))
