"""Other ways to say what a training example does to a target, on the rows that `score` reads."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int
from scipy.linalg import lapack

from jaxlm.core.errors import UserError
from jaxlm.influence import products
from jaxlm.influence._score import reduced, score
from jaxlm.influence.sides import Side, check_sides, side, subtasks_of, weights_of
from jaxlm.influence.store import GradientStore
from jaxlm.typing import PRNGKey

Pooling = Literal["last", "mean", "position"]


def grad_dot(train: Any, targets: Any, subtask: Any = None) -> Float[np.ndarray, "..."]:
    r"""Inner products of gradients, $\frac1E \sum_e g_{en} \cdot \mathrm{mean}_{m \in s} t_{em}$.

    A small step of gradient descent on example n lowers the loss of the target by this times the
    learning rate.

    Args:
      train, targets, subtask: of `jaxlm.influence.score`. `np.arange(M)` as subtasks gives [N, M],
        one column a target.

    Returns:
      [N], or [N, S] with subtasks.

    Raises:
      UserError: as `score`.

    >>> grad_dot(np.array([[[1.0, 2.0], [0.0, 3.0]]]), np.array([[[1.0, 1.0]]])).tolist()
    [3.0, 3.0]

    References: Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent",
    arXiv:2002.08484.
    """
    left = side(train, "train")
    return _dots(left, targets, np.full(len(left.rows), 1 / len(left.rows)), subtask)


def tracin(
    train: Any, targets: Any, weights: Any = None, subtask: Any = None
) -> Float[np.ndarray, "..."]:
    r"""TracIn: $\sum_e w_e\, g_{en} \cdot \mathrm{mean}_{m \in s} t_{em}$, w the learning rates.

    It is `score` with inner products in place of cosines, so that long gradients count more.

    Args:
      train, targets, weights, subtask: of `jaxlm.influence.score`.

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
    left = side(train, "train")
    return _dots(left, targets, weights_of(left, weights), subtask)


def _dots(left: Side, targets: Any, weights: np.ndarray, subtask: Any) -> np.ndarray:
    right = side(targets, "targets")
    check_sides(left, right)
    groups = subtasks_of(right.examples, subtask)
    directions = [
        weight * products.means(right, checkpoint, groups)
        for checkpoint, weight in enumerate(weights)
    ]
    return reduced(products.products(left, directions, products.dots), subtask, None)


def trak(
    train: Any,
    targets: Any,
    residuals: Any,
    subtask: Any = None,
    *,
    ridge: float | int = 0.0,
) -> Float[np.ndarray, "..."]:
    r"""TRAK: influence functions of a linear model on projected gradients, over an ensemble.

    Rows are gradients of the margin $f = \log\frac{p}{1 - p}$, p the probability of the right
    answer. With $\Phi_e$ the training rows of model e

    $$\tau_{ns} = \Big[\frac1E \sum_e \phi_{es}^\top (\Phi_e^\top \Phi_e + \lambda I)^{-1}
    \phi_{en}\Big] \Big[\frac1E \sum_e (1 - p_{en})\Big].$$

    It takes the training rows twice, and holds an [R, R] matrix in float64.

    Args:
      train, targets, subtask: of `jaxlm.influence.score`, with a model in place of a checkpoint.
      residuals: 1 - p of the training examples, [E, N].
      ridge: λ, for R that is not well below N.

    Returns:
      [N], or [N, S] with subtasks; φ_s is the mean of the rows of a subtask.

    Raises:
      UserError: as `score`; if residuals are not [E, N] in [0, 1]; if the matrix is singular.

    >>> rows = np.array([[[2.0, 0.0], [0.0, 1.0]]])
    >>> trak(rows, rows, residuals=np.array([[0.5, 1.0]]), subtask=np.arange(2))
    array([[0.5, 0. ],
           [0. , 1. ]])

    References: Park et al., "TRAK: Attributing Model Behavior at Scale", arXiv:2303.14186.
    """
    left, right = side(train, "train"), side(targets, "targets")
    check_sides(left, right)
    groups = subtasks_of(right.examples, subtask)
    models = len(left.rows)
    residual = np.asarray(residuals)
    if residual.shape != (models, left.examples):
        raise UserError(
            f"residuals have shape {residual.shape}; give [models, training examples], "
            f"({models}, {left.examples})"
        )
    wrong = np.argwhere(~((residual >= 0) & (residual <= 1)))
    if len(wrong):
        model, example = wrong[0].tolist()
        raise UserError(
            "residuals are not in [0, 1]; give 1 - p, p the probability of the answer (got "
            f"{residual[model, example]:g} of example {example} in model {model})"
        )
    if not 0 <= ridge < np.inf:
        raise UserError(f"ridge is {ridge}; give 0 or more")
    directions = []
    for model in range(models):
        gram = products.second_moment(left, model) + ridge * np.eye(left.dim)
        wanted = products.means(right, model, groups).T
        directions.append(_solve(gram, wanted, float(np.finfo(left.dtype).eps)).T / models)
    found = products.products(left, directions, products.dots)
    mean = residual.mean(axis=0).astype(found.dtype)
    return reduced(found * mean[:, None], subtask, None)


def _solve(gram: np.ndarray, right: np.ndarray, eps: float) -> np.ndarray:
    """gram^-1 right, for a matrix that is regular up to rounding.

    Args:
      gram: float64, of rows with the rounding `eps`.
      right: any columns.
      eps: relative.
    """
    try:
        factor = np.linalg.cholesky(gram)
        diagonal = np.diag(factor)
        inverse_condition, _ = lapack.dpocon(factor, np.linalg.norm(gram, 1), uplo="L")
        regular = diagonal.min() > np.sqrt(len(gram) * eps) * diagonal.max()
        # Of a singular matrix the last pivot is what rounding left: anything.
        regular &= inverse_condition > 10 * len(gram) * np.finfo(np.float64).eps
    except np.linalg.LinAlgError:
        regular = False
    if not regular:
        raise UserError(
            "the second moment of the training rows is singular; give a ridge, or rows of fewer "
            "numbers than there are examples"
        )
    return np.linalg.solve(gram, right)


def grand(train: Any) -> Float[np.ndarray, " N"]:
    r"""GraNd: lengths of gradients, $\frac1E \sum_e \|g_{en}\|$.

    Args:
      train: of `jaxlm.influence.score`, of several runs at an early step.

    Returns:
      [N], large for examples that are hard.

    Raises:
      UserError: as `score`.

    >>> grand(np.array([[[3.0, 4.0]], [[0.0, 1.0]]])).tolist()
    [3.0]

    References: Paul et al., "Deep Learning on a Data Diet: Finding Important Examples Early in
    Training", arXiv:2107.07075.
    """
    left = side(train, "train")
    weight = np.full((1, 1), 1 / len(left.rows))
    return products.products(left, [weight] * len(left.rows), products.norms)[:, 0]


def el2n(logits: Float[ArrayLike, "*E N C"], labels: Int[ArrayLike, " N"]) -> Float[Array, " N"]:
    r"""EL2N: lengths of errors, $\frac1E \sum_e \|\mathrm{softmax}(f_e(x_n)) - y_n\|$.

    Args:
      logits: [N, C], or [E, N, C] of several runs at an early step.
      labels: the right class of every example, 0 to C - 1.

    Returns:
      [N], large for examples that are hard; at most the square root of 2.

    Raises:
      UserError: for a label that is no class.

    >>> el2n(np.array([[0.0, 200.0]], np.float32), np.array([1])).tolist()
    [0.0]

    References: Paul et al., "Deep Learning on a Data Diet: Finding Important Examples Early in
    Training", arXiv:2107.07075.
    """
    values, right = jnp.asarray(logits), np.asarray(labels)
    if values.ndim not in (2, 3) or right.shape != values.shape[-2:-1]:
        raise UserError(
            f"logits of shape {values.shape} and labels of shape {right.shape} do not fit; give "
            "[N, C] or [E, N, C], and [N]"
        )
    classes = values.shape[-1]
    if right.size and not (right.min() >= 0 and right.max() < classes):
        raise UserError(
            f"labels are {right.min()} to {right.max()}, with {classes} logits; count from 0"
        )
    wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    answers = jnp.expand_dims(
        jax.nn.one_hot(right, classes, dtype=wide.dtype), tuple(range(values.ndim - 2))
    )
    errors = jnp.linalg.norm(jax.nn.softmax(wide) - answers, axis=-1)
    return errors.reshape(-1, len(right)).mean(axis=0)


def representation_similarity(
    train: Any,
    targets: Any,
    subtask: Any = None,
    aggregate: str = "cosine_of_mean",
    *,
    over: str | None = None,
) -> Float[np.ndarray, "..."]:
    """`jaxlm.influence.score` of representations, such as those of `pool`, of one model.

    Args:
      train: [N, D], or a store.
      targets: [M, D], or a store.
      subtask, aggregate, over: of `score`.

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
    """One representation for each example, from those of its tokens.

    Args:
      hidden: hidden states of the last layer.
      mask: 1 at tokens that count, at least one in each example.
      how: "last" token; "mean"; or "position", the mean with weights 1, 2, 3, ... that RDS+ takes.

    Returns:
      In at least float32.

    Raises:
      UserError: for another `how`.
    """
    if how not in ("last", "mean", "position"):
        raise UserError(f"how={how!r} is not known; give last, mean or position")
    states, here = jnp.asarray(hidden), jnp.asarray(mask).astype(bool)
    wide = jnp.promote_types(states.dtype, jnp.float32)
    place = jnp.cumsum(here, axis=1) * here
    if how == "last":
        weights = place == place.max(axis=1, keepdims=True)
    else:
        weights = here if how == "mean" else place
    share = weights.astype(wide) / weights.sum(axis=1, keepdims=True).astype(wide)
    return jnp.einsum("ntd,nt->nd", states.astype(wide), share, precision="highest")


def random_scores(key: PRNGKey, count: int) -> Float[Array, " N"]:
    """Scores that know nothing: uniform on [0, 1)."""
    return jax.random.uniform(key, (count,))
