r"""Losses without gradients: rewards computed by Python functions, called on the host in a step.

Each is `loss_fn(params, batch, *, key=None, view=None) -> (loss, {"reward"})` with the loss
$-\sum_i w_i r_i / \sum_i w_i$, where w are the `weights` of the batch if it has them. Zeroth-order
optimizers accept these losses, compiled and with both signs in one pass; the reward is then called
once for each sign and direction. It must depend on its arguments alone.

An error in the reward ends the step with `jax.errors.JaxRuntimeError`, whose text contains the
message of a `UserError` that names the reward.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm.core.errors import UserError
from jaxlm.evaluation.answers import token_f1
from jaxlm.models import LanguageModel
from jaxlm.models.generation import Generated, Generator, Sampling
from jaxlm.train.losses import example_weights
from jaxlm.typing import Batch, LossFn, Params


def callback_objective(function: Callable[..., Any], reward: Callable[..., Any]) -> LossFn:
    """Return the loss that is minus the mean reward of a function of the parameters.

    Args:
        function: `(params, batch, *, view) -> arrays`, traced.
        reward: `(arrays, batch) -> [B]`, any function of NumPy arrays. On a CPU with one core JAX
            deadlocks when it passes 100 kB or more to the host: pass predictions and not logits.
    """

    def loss_fn(params: Params, batch: Batch, *, key: Any = None, view: Any = None) -> Any:
        del key
        return _loss(reward, function(params, batch, view=view), batch)

    return loss_fn


def generation_objective(
    lm: LanguageModel,
    reward: Callable[[list[str], list[Any]], Sequence[float]],
    *,
    examples: Sequence[Any],
    max_new_tokens: int,
    stop_ids: Sequence[int] | None = None,
    stop: Sequence[str] = ("\n",),
    temperature: float = 0.0,
) -> LossFn:
    """Return the loss that is minus the mean reward of texts generated after a batch's prompts.

    With a view, memory holds only the cache, but every token draws the noise again. A loss without
    the argument `view` is called on a perturbed copy of the parameters, drawn once, which is faster
    for long texts; `lambda params, batch: loss_fn(params, batch)` is such a loss.

    Args:
        lm: a decoder with its tokenizer.
        reward: `(texts, examples) -> values`, a number for each text. Rows of weight 0 do not
            count.
        examples: whatever the reward needs, such as gold answers; `index` of the batch selects
            those in it.
        max_new_tokens: most tokens of a text.
        stop_ids: tokens that end a text; None means those of the configuration.
        stop: a text is cut before the first of these, then stripped of white space.
        temperature: 0 takes the most likely token; otherwise `key` draws, the same for both signs.

    Returns:
        A loss of batches with `input_ids`, `attention_mask` [B, T] and `index` [B].

    Raises:
        UserError: if the model has no tokenizer.

    References: Malladi et al., arXiv:2305.17333, section 3.3, with F1 as the reward.
    """
    if lm.tokenizer is None:
        raise UserError("lm: has no tokenizer, which a reward of texts needs (got None). Give one.")
    stop_ids = lm.config.stops if stop_ids is None else stop_ids
    generator = Generator(lm.config, Sampling(temperature=temperature), tuple(stop_ids))

    def text(tokens: list[int]) -> str:
        end = next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
        decoded = lm.tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)
        for string in stop:
            decoded = decoded.split(string, 1)[0]
        return decoded.strip()

    @functools.wraps(reward)  # errors name the reward
    def scored(generated: Generated, batch: Any) -> Sequence[float]:
        rows = zip(generated.tokens.tolist(), generated.lengths.tolist(), strict=True)
        texts = [text(tokens[:length]) for tokens, length in rows]
        return reward(texts, [examples[i] for i in batch["index"]])

    def loss_fn(params: Params, batch: Batch, *, key: Any = None, view: Any = None) -> Any:
        generated = generator.sample(
            params,
            batch["input_ids"],
            batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            key=key if temperature else None,
            view=view,
        )
        needed = {name: batch[name] for name in ("index", "weights") if name in batch}
        return _loss(scored, generated, needed)

    return loss_fn


def f1_objective(
    lm: LanguageModel, answers: Sequence[Sequence[str]], *, max_new_tokens: int = 50
) -> LossFn:
    """Return the loss that is minus the mean F1 of greedy answers; see `evaluate_generation`.

    An answer ends at the first line break. `answers` are the right ones to each prompt. The result
    is as in `generation_objective`.
    """

    def f1(texts: list[str], golds: list[Sequence[str]]) -> list[float]:
        return [token_f1(*pair) for pair in zip(texts, golds, strict=True)]

    stop_ids = lm.config.stops
    if lm.tokenizer is not None:
        line = lm.tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
        stop_ids = (*stop_ids, *(i for i in line if "\n" in lm.tokenizer.decode([i])))
    return generation_objective(
        lm, f1, examples=answers, max_new_tokens=max_new_tokens, stop_ids=stop_ids
    )


def _loss(reward: Callable[..., Any], arrays: Any, batch: Batch) -> tuple[Array, dict[str, Array]]:
    """Return minus the mean of `reward(arrays, batch)`, called on the host, and the mean."""
    weights = example_weights(batch)

    def on_host(*given: Any) -> np.ndarray:
        arrays, batch, weights = jax.tree.map(np.asarray, given)
        return _checked(reward, arrays, batch, weights)

    shape = jax.ShapeDtypeStruct(weights.shape, jnp.float32)
    # "sequential" calls it once for each sign and direction, so that a reward sees one batch.
    values = jax.pure_callback(on_host, shape, arrays, batch, weights, vmap_method="sequential")
    mean = jnp.sum(values * weights) / jnp.sum(weights)
    return -mean, {"reward": mean}


def _checked(
    reward: Callable[..., Any], arrays: Any, batch: Any, weights: np.ndarray
) -> Float[np.ndarray, " B"]:
    """Return the values of a reward, 0 where the weight is 0, or raise an error that names it."""
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        values = np.asarray(reward(arrays, batch), np.float32)
    except Exception as error:
        raise UserError(
            f"reward: {name} raised {type(error).__name__} (got {error}). Correct it."
        ) from error
    if values.shape != weights.shape:
        raise UserError(
            f"reward: {name} must give a number for each of {len(weights)} examples (got the "
            f"shape {values.shape}). Correct it."
        )
    bad = np.flatnonzero((weights > 0) & ~np.isfinite(values))
    if len(bad):
        raise UserError(
            f"reward: {name} must give finite numbers (got {values[bad[0]]} for example {bad[0]} "
            "of the batch). Correct it."
        )
    return np.where(weights > 0, values, 0).astype(np.float32)
