r"""Losses that no gradient passes: rewards of Python functions, called on the host within a step.

Each is `loss_fn(params, batch, *, key=None, view=None) -> (loss, {"reward"})` with the loss
$-\sum_i w_i r_i / \sum_i w_i$, over the `weights` of the batch where it has some. Zeroth-order
optimizers take them, compiled and with both signs in one pass: the reward is then called once for
each sign and direction. It must be a function of what it is given.

A mistake of the reward ends the step with `jax.errors.JaxRuntimeError`, whose text holds the
message of a `UserError` that names it.
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
from jaxlm.train.objective import example_weights
from jaxlm.typing import Batch, LossFn, Params


def callback_objective(function: Callable[..., Any], reward: Callable[..., Any]) -> LossFn:
    """Minus the mean reward of what a function of the parameters gives.

    Args:
        function: `(params, batch, *, view) -> arrays`, traced.
        reward: `(arrays, batch) -> [B]`, any function of NumPy arrays. On a CPU with one core JAX
            waits for ever to hand over 100 kB and more: give predictions rather than logits.
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
    """Minus the mean reward of the texts that the model writes after the prompts of a batch.

    With a view nothing is held beside the cache, but every token draws the noise again. An
    objective without `view` is called on perturbed parameters: a copy of them, drawn once, which is
    faster for long texts. `lambda params, batch: loss_fn(params, batch)` is that objective.

    Args:
        lm: a decoder with its tokenizer.
        reward: `(texts, examples) -> values`, a number for each text. Those of rows of weight 0
            do not count.
        examples: anything that the reward needs, such as gold answers; `index` of the batch says
            which are in it.
        max_new_tokens: tokens of a text.
        stop_ids: tokens that end a text; None for those of the configuration.
        stop: a text is cut before the first of these, then stripped of white space.
        temperature: 0 takes the most likely token; else the draws are those of `key`, the same for
            both signs.

    Returns:
        A loss of batches with `input_ids`, `attention_mask` [B, T] and `index` [B].

    Raises:
        UserError: the model has no tokenizer.

    References: Malladi et al., arXiv:2305.17333, section 3.3, with F1 as the reward.
    """
    if lm.tokenizer is None:
        raise UserError("lm: has no tokenizer, which a reward of texts needs (got None). Give one.")
    stop_ids = lm.config.stops if stop_ids is None else stop_ids
    generator = Generator(lm.config, Sampling(temperature=temperature), tuple(stop_ids))

    def text(tokens: list[int]) -> str:
        end = next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
        decoded = lm.tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)
        for each in stop:
            decoded = decoded.split(each, 1)[0]
        return decoded.strip()

    @functools.wraps(reward)
    def scored(found: Generated, batch: Any) -> Sequence[float]:
        rows = zip(found.tokens.tolist(), found.lengths.tolist(), strict=True)
        texts = [text(tokens[:length]) for tokens, length in rows]
        return reward(texts, [examples[i] for i in batch["index"]])

    def loss_fn(params: Params, batch: Batch, *, key: Any = None, view: Any = None) -> Any:
        found = generator.sample(
            params,
            batch["input_ids"],
            batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            key=key if temperature else None,
            view=view,
        )
        needed = {name: batch[name] for name in ("index", "weights") if name in batch}
        return _loss(scored, found, needed)

    return loss_fn


def f1_objective(
    lm: LanguageModel, answers: Sequence[Sequence[str]], *, max_new_tokens: int = 50
) -> LossFn:
    """Minus the mean F1 of greedily written answers, as `evaluate_generation` scores them.

    An answer ends with the line. Arguments and result are as of `generation_objective`.

    Args:
        lm: a decoder with its tokenizer.
        answers: right answers to each prompt.
        max_new_tokens: most tokens of an answer.

    Raises:
        UserError: the model has no tokenizer.
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
    """Minus the mean of `reward(arrays, batch)`, which is called on the host."""
    weights = example_weights(batch)

    def on_host(*given: Any) -> np.ndarray:
        arrays, batch, weights = jax.tree.map(np.asarray, given)
        return _checked(reward, arrays, batch, weights)

    shape = jax.ShapeDtypeStruct(weights.shape, jnp.float32)
    # "sequential" calls once for each sign and direction, so that a reward sees one batch.
    values = jax.pure_callback(on_host, shape, arrays, batch, weights, vmap_method="sequential")
    mean = jnp.sum(values * weights) / jnp.sum(weights)
    return -mean, {"reward": mean}


def _checked(
    reward: Callable[..., Any], arrays: Any, batch: Any, weights: np.ndarray
) -> Float[np.ndarray, " B"]:
    """The values of a reward, 0 where the weight is, or an error that names it."""
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
