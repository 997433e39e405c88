r"""A discrete key-value bottleneck, which forgets a class without gradients.

A frozen encoder gives features x [D]. Each of C codebooks projects them to d numbers by a fixed
random matrix, and selects the nearest of its M keys. Each key has a value, a vector of K logits;
the logits of x are the mean of the C values that it selects. Only the values are trained, so
disabling the pairs of keys and values that a class selects removes what was learned of it.

The encoder is not changed: whoever reads the features still finds the class there.

Shapes: N examples, D features, C codebooks, M pairs in each, d numbers in a key, K classes.

References: Träuble et al., "Discrete Key-Value Bottleneck", arXiv:2207.11240; Shah et al.,
"Unlearning via Sparse Representations", arXiv:2311.15268, of which we know no public code. The
batches that the keys are fitted to, the threshold for dead keys, the optimizer and the erasing of
values are choices of this module.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Num

from jaxlm.core.checks import integer, one_of
from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError

PASSES = 10
"""Passes over the features that `init` makes by default."""
_DEAD = 0.1  # of the selections of the mean key; a key with less is dead


class Bottleneck(NamedTuple):
    """The state of a bottleneck.

    Attributes:
        projections: fixed random matrices.
        keys: fixed after `init`.
        values: logits of the pairs, 0 for disabled ones; K is 0 before `train`.
        disabled: pairs that are no longer selected.
    """

    projections: Float[Array, "C D d"]
    keys: Float[Array, "C M d"]
    values: Float[Array, "C M K"]
    disabled: Bool[Array, "C M"]


@functools.partial(jax.jit, static_argnames=("books", "pairs", "size", "passes", "batch_size"))
def init(
    key: Array,
    features: Float[Array, "N D"],
    *,
    books: int,
    pairs: int,
    size: int,
    passes: int = PASSES,
    batch_size: int = 256,
    decay: float = 0.95,
) -> Bottleneck:
    """Draw the projections, and fit the keys to the projected features without labels.

    Keys are moving averages of the points that select them, over batches. A key that is hardly
    selected any more begins again at a random point.

    Args:
        key: PRNG key.
        features: of the training examples; at least one for each pair of a codebook.
        books, pairs, size: C, M and d.
        passes: number of points that are drawn, in units of N.
        batch_size: points of a batch, drawn with replacement.
        decay: of the moving averages, for each batch.
    """
    integer("books", books)
    integer("size", size)
    integer("pairs", pairs, most=len(features))
    features, batch_size = wide(features), min(batch_size, len(features))
    keys = jax.random.split(key, 4)
    shape = (books, features.shape[1], size)
    projections = jax.random.normal(keys[0], shape, features.dtype) / features.shape[1] ** 0.5
    first = jax.random.permutation(keys[1], len(features))[:pairs]
    steps = passes * len(features) // batch_size
    batches = jax.random.randint(keys[2], (steps, batch_size), 0, len(features))

    def fit_keys(book: Any) -> Float[Array, "M d"]:
        key, projection = book
        points = jnp.matmul(features, projection, precision="highest")
        return _cluster(key, points, first, batches, decay)

    fitted = jax.lax.map(fit_keys, (jax.random.split(keys[3], books), projections))
    values = jnp.zeros((books, pairs, 0), features.dtype)
    return Bottleneck(projections, fitted, values, jnp.zeros((books, pairs), bool))


@jax.jit
def lookup(
    state: Bottleneck, features: Float[Array, "N D"], disabled: Bool[Array, "C M"] | None = None
) -> Int[Array, "N C"]:
    """Return the index of the nearest key in each codebook.

    Args:
        state: the bottleneck.
        features: of the examples.
        disabled: pairs to pass over, usually `state.disabled`. The nearest of the others is
            selected, or pair 0 in a codebook without others.
    """

    def select(book: Any) -> Int[Array, " N"]:
        projection, keys, disabled = book
        points = jnp.matmul(wide(features), projection, precision="highest")
        return _nearest(points, keys, disabled)

    # One codebook at a time, since the distances of all may not fit into the memory.
    return jax.lax.map(select, (state.projections, state.keys, disabled)).T


def read(values: Float[Array, "C M K"], indices: Int[Array, "N C"]) -> Float[Array, "N K"]:
    """Return the mean over codebooks of the values at the indices."""
    return values[jnp.arange(len(values))[None], indices].mean(axis=1)


def logits(
    state: Bottleneck, features: Float[Array, "N D"], *, on_disabled: str = "reroute"
) -> Float[Array, "N K"]:
    """Return the logits of the classes.

    Args:
        state: the bottleneck.
        features: of the examples.
        on_disabled: "reroute" reads the next nearest pair where the nearest is disabled; with
            "zero", that codebook contributes 0.
    """
    one_of("on_disabled", on_disabled, ("reroute", "zero"))
    disabled = state.disabled if on_disabled == "reroute" else None
    return read(state.values, lookup(state, features, disabled))


class Fit(NamedTuple):
    """Trained parameters, the loss before each step, and the accuracy after it, if watched."""

    params: Any
    losses: Float[Array, " steps"]
    accuracy: Float[Array, " steps"] | None


@functools.partial(jax.jit, static_argnames=("apply", "optimizer", "steps", "batch_size"))
def fit(
    apply: Callable[[Any, Any], Float[Array, "B K"]],
    params: Any,
    inputs: Num[Array, "N *rest"],
    labels: Int[Array, " N"],
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    batch_size: int = 256,
    key: Array,
    watched: tuple[Any, Any] | None = None,
) -> Fit:
    """Minimize the softmax cross-entropy of `apply(params, inputs)`.

    Batches are drawn with replacement. `watched` are inputs and labels whose accuracy is returned.
    """

    def loss_fn(params: Any, rows: Any) -> Any:
        scores = apply(params, inputs[rows])
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels[rows]).mean()

    def step(carry: Any, number: Array) -> Any:
        params, state = carry
        rows = jax.random.randint(jax.random.fold_in(key, number), (batch_size,), 0, len(labels))
        loss, grads = jax.value_and_grad(loss_fn)(params, rows)
        updates, state = optimizer.update(grads, state, params)
        params, right = optax.apply_updates(params, updates), None
        if watched is not None:
            right = (apply(params, watched[0]).argmax(axis=1) == watched[1]).mean()
        return (params, state), (loss, right)

    carry = params, optimizer.init(params)
    (params, _), (losses, accuracy) = jax.lax.scan(step, carry, jnp.arange(steps))
    return Fit(params, losses, accuracy)


def train(
    state: Bottleneck,
    features: Float[Array, "N D"],
    labels: Int[Array, " N"],
    optimizer: optax.GradientTransformation,
    *,
    classes: int,
    steps: int,
    batch_size: int = 256,
    key: Array,
) -> tuple[Bottleneck, Float[Array, " steps"]]:
    """Train the values, from 0 or from those of an earlier training.

    Args:
        state: the bottleneck.
        features, labels: of the training examples; labels are from 0 to K - 1.
        optimizer: for example `optax.sgd(100.0)`. The gradient of a value has a factor 1 / C and
            the share of examples that select it. Adam takes this share out, so rare pairs weigh as
            much as frequent ones, and more must be disabled to forget a class.
        classes: K.
        steps, batch_size: of the training.
        key: PRNG key that draws the batches.

    Returns:
        The new state, and the loss before each step.
    """
    values = state.values
    if values.shape[2] not in (0, classes):
        raise UserError(
            f"classes: the values have {values.shape[2]} (got {classes}). Train a new state."
        )
    if not values.shape[2]:
        values = jnp.zeros((*values.shape[:2], classes), values.dtype)
    indices = lookup(state, features, state.disabled)
    options = {"steps": steps, "batch_size": batch_size, "key": key}
    trained = fit(read, values, indices, labels, optimizer, **options)
    # Pair 0 of a codebook without enabled ones is read, and may have learned.
    values = jnp.where(state.disabled[..., None], 0, trained.params)
    return state._replace(values=values), trained.losses


@jax.jit
def forget_by_activations(
    state: Bottleneck, features: Float[Array, "N D"], count: int | Int[ArrayLike, ""]
) -> Bottleneck:
    """Disable the pairs that the features select most often, and erase their values.

    Args:
        state: the bottleneck.
        features: of the training examples to forget.
        count: N_a, the number of pairs to disable. Pairs that no feature selects are kept.
    """
    hits = _hits(state, features, jnp.ones(len(features), bool))
    order = jnp.argsort(-hits.ravel())
    # A rank, not `order[:count]`: the count need not be known when this is compiled.
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
    return _disable(state, (rank < count).reshape(hits.shape) & (hits > 0))


@jax.jit
def forget_by_examples(
    state: Bottleneck, features: Float[Array, "N D"], count: int | Int[ArrayLike, ""], key: Array
) -> Bottleneck:
    """Disable every pair that one of a few examples selects, and erase their values.

    Args:
        state: the bottleneck.
        features: of the examples to forget.
        count: N_e, the number of examples to draw from these, without replacement.
        key: PRNG key of the draw.
    """
    drawn = jax.random.permutation(key, len(features)) < count
    return _disable(state, _hits(state, features, drawn) > 0)


def _hits(
    state: Bottleneck, features: Float[Array, "N D"], drawn: Bool[Array, " N"]
) -> Int[Array, "C M"]:
    """Return how often the drawn examples select each enabled pair."""
    indices = lookup(state, features, state.disabled)
    hits = jnp.zeros(state.disabled.shape, jnp.int32)
    hits = hits.at[jnp.arange(len(hits))[None], indices].add(drawn[:, None].astype(jnp.int32))
    return jnp.where(state.disabled, 0, hits)


def _disable(state: Bottleneck, pairs: Bool[Array, "C M"]) -> Bottleneck:
    # Values are erased, since those of a pair that is only disabled could be enabled again.
    values = jnp.where(pairs[..., None], 0, state.values)
    return state._replace(values=values, disabled=state.disabled | pairs)


def _nearest(
    points: Float[Array, "N d"],
    keys: Float[Array, "M d"],
    disabled: Bool[Array, " M"] | None = None,
) -> Int[Array, " N"]:
    # Squared distances, less the squared norm of the point, which all keys have in common.
    products = jnp.matmul(points, keys.T, precision="highest")
    distances = jnp.sum(keys**2, axis=1)[None] - 2 * products
    if disabled is not None:
        distances = jnp.where(disabled[None], jnp.inf, distances)
    return distances.argmin(axis=1)


def _cluster(
    key: Array,
    points: Float[Array, "N d"],
    first: Int[Array, " M"],
    batches: Int[Array, "steps B"],
    decay: float,
) -> Float[Array, "M d"]:
    """Return moving averages of the points that select each key; `first` are those to begin at."""
    share = batches.shape[1] / len(first)  # points of a batch that select the mean key

    def step(carry: Any, batch: Any) -> Any:
        sums, counts = carry
        key, rows = batch
        chosen = points[rows]
        nearest = _nearest(chosen, sums / counts[:, None])
        counts = decay * counts + (1 - decay) * jnp.zeros_like(counts).at[nearest].add(1)
        sums = decay * sums + (1 - decay) * jnp.zeros_like(sums).at[nearest].add(chosen)
        dead = counts < _DEAD * share
        begun = chosen[jax.random.randint(key, counts.shape, 0, len(chosen))]
        sums = jnp.where(dead[:, None], share * begun, sums)
        return (sums, jnp.where(dead, share, counts)), None

    carry = share * points[first], jnp.full(len(first), share, points.dtype)
    (sums, counts), _ = jax.lax.scan(step, carry, (jax.random.split(key, len(batches)), batches))
    return sums / counts[:, None]
