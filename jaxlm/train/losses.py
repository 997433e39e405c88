"""Losses of a language model: choice among options and next token; gradient accumulation.

All are `loss_fn(params, batch, *, key=None, view=None) -> (loss, aux)`, so every optimizer accepts
them; `view` is passed to the model and saves a copy of the parameters.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlm.core.errors import UserError
from jaxlm.evaluation.classification import Apply, LogProbs, Reduction, option_scores
from jaxlm.models import LanguageModel
from jaxlm.models.scoring import head_log_probs, log_probs_of
from jaxlm.typing import Batch, LossFn, Params


def classification_objective(
    apply: Apply,
    token_ids: Int[Any, " C"] | None = None,
    *,
    offsets: Float[Any, " C"] | None = None,
    log_probs: LogProbs | None = None,
    reduction: Reduction = "mean",
) -> LossFn:
    r"""Cross-entropy over options, $-\log \mathrm{softmax}(s)_y$, averaged over the batch.

    Args:
        apply: the model's forward pass, `lm.apply`.
        token_ids: the label words' tokens, `encoded.token_ids`; None for options of several tokens.
        offsets: subtracted from the scores, see `jaxlm.evaluation.calibration_offsets`.
        log_probs: `lm.continuation_log_probs`, for options of several tokens after one prompt.
        reduction: how the log-probabilities of an option's tokens are reduced.

    Returns:
        `loss_fn(params, batch, *, key=None, view=None) -> (loss, {"accuracy"})`. Rows with
        weight 0 count in neither.
    """

    def loss_fn(params: Params, batch: Batch, *, key: Any = None, view: Any = None) -> Any:
        del key
        scores_BxC = option_scores(
            apply,
            token_ids,
            params,
            batch,
            offsets=offsets,
            log_probs=log_probs,
            reduction=reduction,
            view=view,
        )
        labels, weights = jnp.asarray(batch["labels"]), batch["weights"]
        losses = -log_probs_of(scores_BxC, labels)
        count = jnp.sum(weights)
        hits = (jnp.argmax(scores_BxC, axis=-1) == labels) * weights
        loss = jnp.sum(losses * weights) / count
        return loss, {"accuracy": jnp.sum(hits) / count}

    return loss_fn


def accuracy_objective(
    apply: Apply,
    token_ids: Int[Any, " C"] | None = None,
    *,
    offsets: Float[Any, " C"] | None = None,
    log_probs: LogProbs | None = None,
    reduction: Reduction = "mean",
) -> LossFn:
    """One minus the accuracy of the batch; arguments and result as in `classification_objective`.

    Its gradient is zero almost everywhere, so it is for zeroth-order optimizers alone.
    """
    scored = classification_objective(
        apply, token_ids, offsets=offsets, log_probs=log_probs, reduction=reduction
    )

    def loss_fn(params: Params, batch: Batch, *, key: Any = None, view: Any = None) -> Any:
        _, aux = scored(params, batch, key=key, view=view)
        return 1 - aux["accuracy"], aux

    return loss_fn


def tagging_objective(apply: Apply) -> LossFn:
    r"""Cross-entropy of the classes of tokens, $-\log \mathrm{softmax}(z_t)_{y_t}$, in their mean.

    Args:
        apply: the forward pass of a model with a classifier of every token, `lm.apply`.

    Returns:
        `loss_fn(params, batch, *, key=None, view=None) -> (loss, {"tokens", "accuracy"})` on a
        batch of the form "weights" with `tags`, see `jaxlm.data.rows.PaddedRows`.
    """

    def loss_fn(params: Params, batch: Batch, *, key: Any = None, view: Any = None) -> Any:
        del key
        packed = {"segment_ids": batch["segment_ids"]} if "segment_ids" in batch else {}
        logits = apply(params, batch["input_ids"], batch["attention_mask"], view=view, **packed)
        tags, weights = jnp.asarray(batch["tags"]), jnp.asarray(batch["weights"])
        tokens = jnp.sum(weights)
        hits = jnp.sum((jnp.argmax(logits, axis=-1) == tags) * weights)
        loss = jnp.sum(-log_probs_of(logits, tags) * weights) / tokens
        return loss, {"tokens": tokens, "accuracy": hits / tokens}

    return loss_fn


def lm_objective(log_probs: Callable[..., Any]) -> LossFn:
    r"""Cross-entropy of the next token, in nats a token.

    Args:
        log_probs: log-probabilities of every token but the first, `lm.log_probs`.

    Returns:
        `loss_fn(params, batch, *, key=None, view=None) -> (loss, {"tokens"})` on a batch of
        `input_ids` [B, T] and, optionally, `attention_mask` [B, T], `segment_ids` [B, T] of packed
        rows, and `weights` [B, T]: the weight of a token as a target. The first token is never a
        target.
    """

    def loss_fn(params: Params, batch: Batch, *, key: Any = None, view: Any = None) -> Any:
        del key
        ids = jnp.asarray(batch["input_ids"])
        weights = _target_weights(batch)
        packed = {"segment_ids": batch["segment_ids"]} if "segment_ids" in batch else {}
        losses = -log_probs(params, ids, batch.get("attention_mask"), view=view, **packed)
        tokens = jnp.sum(weights)
        return jnp.sum(losses * weights) / tokens, {"tokens": tokens}

    return loss_fn


def token_objective(lm: LanguageModel) -> LossFn:
    """Return `lm_objective` of a model; a batch with `targets` takes logits at these alone.

    Where few tokens are in the loss, as in conversations with short answers, the head is a large
    part of a step. See `jaxlm.data.PaddedRows` for the batches.
    """
    whole = lm_objective(lm.log_probs)

    def loss_fn(params: Params, batch: Batch, *, key: Any = None, view: Any = None) -> Any:
        if "targets" not in batch:
            return whole(params, batch, key=key, view=view)
        mask = jnp.asarray(batch["target_mask"])
        tokens = jnp.sum(mask)
        losses = -target_log_probs(lm, params, batch, view=view)
        return jnp.sum(losses * mask) / tokens, {"tokens": tokens}

    return loss_fn


def target_log_probs(lm: LanguageModel, params: Params, batch: Batch, **options: Any) -> Array:
    """Return the log-probabilities of the targets, [B, K]; the head computes no other logits."""
    packed = {key: batch[key] for key in ("segment_ids", "position_ids") if key in batch}
    x = lm.hidden(params, batch["input_ids"], batch["attention_mask"], **packed, **options)
    x = jnp.take_along_axis(x, jnp.asarray(batch["positions"])[..., None], axis=1)
    view = {"view": options["view"]} if "view" in options else {}
    return head_log_probs(lm.config, params, x, jnp.asarray(batch["targets"]), **view)


def row_losses(lm: LanguageModel) -> Callable[..., Array]:
    r"""Mean cross-entropy of the tokens in the loss of each row, $-\frac1K \sum_k \log p(y_k)$.

    The head computes logits at these tokens alone.

    Returns:
        `losses(params, batch, *, tap=None) -> [B]` on a batch of the form "targets", see
        `jaxlm.data.rows.PaddedRows`.
    """

    def losses(params: Any, batch: Batch, *, tap: Any = None) -> Array:
        scored = target_log_probs(lm, params, batch, tap=tap)
        mask = jnp.asarray(batch["target_mask"])
        return -jnp.sum(scored * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)

    return losses


def mean_row_loss(lm: LanguageModel) -> LossFn:
    """Mean of `row_losses` over a batch: each row counts the same, however long its answer."""
    losses = row_losses(lm)

    def loss_fn(params: Any, batch: Batch, *, key: Any = None) -> Any:
        del key
        return jnp.mean(losses(params, batch)), {}

    return loss_fn


def _target_weights(batch: Batch) -> Array:
    """Return the weight of every token but the first as a target, [B, T - 1]."""
    ones = jnp.ones(jnp.shape(batch["input_ids"]))
    return jnp.asarray(batch.get("weights", batch.get("attention_mask", ones)))[:, 1:]


def num_targets(batch: Batch) -> Float[Array, ""] | Int[Array, ""]:
    """Return what `token_objective` divides by, the `share` of its batches in `accumulate`."""
    if "target_mask" in batch:
        return jnp.sum(jnp.asarray(batch["target_mask"]))
    return jnp.sum(_target_weights(batch))


def example_weights(batch: Batch) -> Float[Array, " B"] | Int[Array, " B"]:
    """Return the `weights` of the batch, one for each example, or ones if it has none."""
    weights = batch.get("weights") if isinstance(batch, dict) else None
    if weights is None:
        return jnp.ones(jax.tree.leaves(batch)[0].shape[0])
    if jnp.ndim(weights) != 1:
        raise UserError(
            f"weights: must be one for each example (got the shape {jnp.shape(weights)}). Give "
            "those, or pass `share` to accumulate."
        )
    return jnp.asarray(weights)


def num_examples(batch: Batch) -> Float[Array, ""] | Int[Array, ""]:
    """Return the sum of `example_weights`."""
    return jnp.sum(example_weights(batch))


def accumulate(
    loss_fn: LossFn, count: int, *, share: Callable[[Batch], Any] = num_examples
) -> LossFn:
    r"""Return a loss over micro-batches, one after the other: $\sum_i s_i L_i / \sum_i s_i$.

    The memory of the activations is that of one part. With gradients, those of a part are added to
    a sum in at least float32 before the next part, and nothing is computed twice. Zeroth-order
    optimizers average each sign of the loss over the parts before they subtract, which is exact.
    Part i has the examples i, i + count, ... of axis 0, so that each part of a sharded batch is
    spread over all devices.

    Args:
        loss_fn: a loss that is a mean over the batch, as is its aux; only `tokens` is the number
            that `share` returns.
        count: number of parts, a divisor of the batch.
        share: what `loss_fn` divides by, a function of the part: `num_targets` for `lm_objective`.

    Returns:
        A loss like `loss_fn`, with gradients in reverse mode alone; a part's `key` is
        `fold_in(key, part)`.
    """
    if count < 1:
        raise UserError(f"count: must be 1 or more (got {count}). Correct it.")

    @functools.wraps(loss_fn)
    def accumulated(params: Params, batch: Batch, **options: Any) -> Any:
        key = options.pop("key", None)

        def one(params: Params, numbered: Any) -> Any:
            i, part = numbered
            keyed = {} if key is None else {"key": jax.random.fold_in(key, i)}
            return loss_fn(params, part, **keyed, **options)

        # A part may have no target at all; its loss is then 0 / 0.
        def weighed(weight: Array, value: Array) -> Array:
            wide = jnp.promote_types(value.dtype, jnp.float32)
            return jnp.where(weight > 0, weight.astype(wide) * value, 0)

        @jax.custom_vjp
        def mean(params: Params, parts: Any) -> Any:
            shares, results = lax.map(lambda part: (share(part[1]), one(params, part)), parts)
            total = functools.partial(jnp.sum, axis=0)
            sums = jax.tree.map(lambda x: total(jax.vmap(weighed)(shares, x)), results)
            return jax.tree.map(lambda x: x / total(shares), sums)

        def forward(params: Any, parts: Any) -> Any:
            # Gradients are taken here, part by part: reverse mode through the loop would keep the
            # activations of all parts until its end. Frozen parameters have none.
            trained = jax.tree.map(lambda leaf: leaf.value if leaf.perturbed else None, params)
            values, parts = jax.tree.map(lambda leaf: leaf.value, (params, parts))

            def loss_of(trained: Any, part: Any) -> Any:
                pick = functools.partial(jax.tree.map, is_leaf=lambda leaf: leaf is None)
                whole = pick(lambda new, old: old if new is None else new, trained, values)
                result = one(whole, part)
                return result[0] if isinstance(result, tuple) else result, result

            def step(part: Any) -> Any:
                weight = jnp.asarray(share(part[1]))
                (_, result), grads = jax.value_and_grad(loss_of, has_aux=True)(trained, part)
                new = jnp.ones(()), result, grads
                return jax.tree.map(functools.partial(weighed, weight), new)

            def add(sums: Any, part: Any) -> Any:
                return jax.tree.map(jnp.add, sums, step(part)), None

            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype),
                jax.eval_shape(step, jax.tree.map(lambda leaf: leaf[0], parts)),
            )
            (total, result, grads), _ = lax.scan(add, zeros, parts)
            result = jax.tree.map(lambda x: x / total, result)
            return result, jax.tree.map(lambda g, x: (g / total).astype(x.dtype), grads, trained)

        def backward(grads: Any, slopes: Any) -> Any:
            slope = slopes[0] if isinstance(slopes, tuple) else slopes
            return jax.tree.map(lambda g: (slope * g).astype(g.dtype), grads), None

        mean.defvjp(forward, backward, symbolic_zeros=True)
        result = mean(params, (jnp.arange(count), _parts(batch, count)))
        if isinstance(result, tuple) and "tokens" in result[1]:
            result[1]["tokens"] = share(batch)
        return result

    return accumulated


def _parts(batch: Batch, count: int) -> Batch:
    def split(value: Any) -> Array:
        value = jnp.asarray(value)
        if value.shape[0] % count:
            raise UserError(
                f"count: must divide the batch, of {value.shape[0]} examples (got {count}). Give "
                "another number of parts or batch size."
            )
        return value.reshape(-1, count, *value.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)
