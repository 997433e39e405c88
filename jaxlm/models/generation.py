"""Sampling from a decoder: a prompt is read once, then one compiled loop draws token after token.

Shapes: B prompts, N new tokens, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core import checks
from jaxlm.core.errors import UserError
from jaxlm.models.config import ModelConfig
from jaxlm.models.scoring import last_token, log_probs_of, repeat
from jaxlm.models.transformer import Cache, check_ids, empty_cache, extend, logits, unstack

MOST_SAMPLES = 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; the filters apply in the order of the attributes.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens, and those as likely as the k-th; None for all.
      top_p: only the fewest most likely tokens whose mass reaches p; the first is always in, and of
        equal ones no more than that takes (arXiv:1904.09751).
      min_p: only tokens at least p times as likely as the first (arXiv:2407.01082).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        checks.number(self, "temperature", least=0.0, most=1e30)
        checks.whole(self, "top_k")
        checks.number(self, "top_p", above=0.0, most=1.0)
        checks.number(self, "min_p", least=0.0, most=1.0)


def filter_logits(scores: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits at the temperature, -inf where the filters leave a token out."""
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    # The best score is 0 before it is divided, and the divisor a normal number: so a tiny
    # temperature gives 0 and -inf, the most likely token, and never inf - inf.
    scores = scores - jnp.max(scores, axis=-1, keepdims=True)
    scores = scores / max(sampling.temperature, float(jnp.finfo(scores.dtype).tiny))
    if sampling.top_k is not None:
        least = lax.top_k(scores, min(sampling.top_k, scores.shape[-1]))[0][:, -1:]
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    if sampling.top_p < 1:
        # From the least likely on, as transformers does it, which also sums small numbers first.
        order = jnp.argsort(scores, axis=-1)
        ordered = jnp.take_along_axis(scores, order, axis=-1)
        mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        kept = (mass > 1 - sampling.top_p).at[:, -1].set(True)
        kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
        scores = jnp.where(kept, scores, -jnp.inf)
    if sampling.min_p > 0:
        least = jnp.max(scores, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    return scores


def draw(scores: Float[Array, "B V"], sampling: Sampling, key: Array | None) -> Int[Array, " B"]:
    """One token a row; `key` is not used at temperature 0."""
    if sampling.temperature == 0:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    assert key is not None
    return jax.random.categorical(key, filter_logits(scores, sampling)).astype(jnp.int32)


class Generated(NamedTuple):
    """New tokens.

    Attributes:
      tokens: int32 [B, N]; the stop token is the last one of a row, padding follows it.
      log_probs: [B, N] in at least float32, of the tokens under the model itself, at temperature 1
        and without filters; 0 at padding.
      lengths: int32 [B], tokens of a row, its stop token counted.
    """

    tokens: Int[Array, "B N"]
    log_probs: Float[Array, "B N"]
    lengths: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A generation on its way.

    Attributes:
      cache: what was read.
      token: the last token of each row, not read yet.
      done: rows that drew a stop token.
      step: tokens drawn.
      found: the tokens so far.
      key: of the draws; that of token n is `fold_in(key, n)`.
    """

    cache: Cache
    token: Int[Array, " B"]
    done: Bool[Array, " B"]
    step: Int[Array, ""]
    found: Generated
    key: Array | None


@dataclasses.dataclass(frozen=True)
class _Static:
    config: ModelConfig
    sampling: Sampling
    stop_ids: tuple[int, ...]
    pad_id: int


def _record(state: State, scores: Float[Array, "B V"], static: _Static) -> State:
    key = None if state.key is None else jax.random.fold_in(state.key, state.step)
    token = jnp.where(state.done, static.pad_id, draw(scores, static.sampling, key))
    log_probs = jnp.where(state.done, 0, log_probs_of(scores, token))
    tokens, scored, lengths = state.found

    def write(store, new):
        return lax.dynamic_update_slice_in_dim(
            store, new[:, None].astype(store.dtype), state.step, axis=1
        )

    found = Generated(write(tokens, token), write(scored, log_probs), lengths + ~state.done)
    stops = jnp.asarray(static.stop_ids, jnp.int32)
    done = state.done | jnp.any(token[:, None] == stops[None], axis=1)
    return dataclasses.replace(state, token=token, done=done, step=state.step + 1, found=found)


@functools.partial(jax.jit, static_argnames=("static", "max_new_tokens", "num_samples"))
def _start(static, params, input_ids, mask, key, view, *, max_new_tokens, num_samples):
    config = static.config
    batch, length = input_ids.shape
    dtype = config.compute_dtype or params["embed"]["tokens"]["embedding"].dtype
    cache = empty_cache(config, batch, length + max_new_tokens - 1, dtype)
    x, cache = extend(config, params, input_ids, mask, cache, view=view)
    scores = logits(config, params, last_token(x, mask), view=view)
    rows = batch * num_samples
    found = Generated(
        jnp.full((rows, max_new_tokens), static.pad_id, jnp.int32),
        jnp.zeros((rows, max_new_tokens), jnp.promote_types(scores.dtype, jnp.float32)),
        jnp.zeros(rows, jnp.int32),
    )
    zeros = jnp.zeros(rows, jnp.int32)
    state = State(
        repeat(cache, num_samples), zeros, zeros > 0, jnp.zeros((), jnp.int32), found, key
    )
    return _record(state, jnp.repeat(scores, num_samples, axis=0), static)


@jax.custom_batching.custom_vmap
def _all_done(done):
    return jnp.all(done)


@_all_done.def_vmap
def _(size, batched, done):
    """Rows wait for each other over a vmap too, else it would give each entry a step of its own."""
    del size, batched
    return _all_done(done), False


@functools.partial(jax.jit, static_argnames="static", donate_argnames="state")
def _advance(static, params, state, until, view):
    def more(state):
        return (state.step < until) & ~_all_done(state.done)

    def one(state):
        alive = (~state.done).astype(jnp.int32)[:, None]
        token = state.token[:, None]
        x, cache = extend(static.config, params, token, alive, state.cache, view=view)
        scores = logits(static.config, params, x[:, 0], view=view)
        return _record(dataclasses.replace(state, cache=cache), scores, static)

    return lax.while_loop(more, one, state)


@dataclasses.dataclass(frozen=True)
class Generator:
    """`generate` in two steps, for those who want the tokens as they come.

    >>> generator = Generator(lm.config, stop_ids=(0,))                        # doctest: +SKIP
    >>> state = generator.start(params, ids, mask, max_new_tokens=64)          # doctest: +SKIP
    >>> state = generator.advance(params, state, 8)  # state.found has 9 tokens  # doctest: +SKIP

    Attributes:
      config: a decoder.
      sampling: how tokens are drawn.
      stop_ids: tokens that end a row.
    """

    config: ModelConfig
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()

    def start(
        self,
        params: Any,
        input_ids: Int[ArrayLike, "B T"],
        attention_mask: Int[ArrayLike, "B T"] | None = None,
        *,
        max_new_tokens: int,
        num_samples: int = 1,
        key: Array | None = None,
        view: Any = None,
    ) -> State:
        """Reads the prompts and draws the first token; arguments as in `generate`."""
        mask = np.ones(np.shape(input_ids), np.int32) if attention_mask is None else attention_mask
        needed = self._check_prompts(np.asarray(input_ids), np.asarray(mask)) + max_new_tokens - 1
        self._check_choices(needed, max_new_tokens, num_samples, key)
        return _start(
            self._static(),
            params,
            jnp.asarray(input_ids),
            jnp.asarray(mask),
            key,
            view,
            max_new_tokens=max_new_tokens,
            num_samples=num_samples,
        )

    def advance(self, params: Any, state: State, count: int, *, view: Any = None) -> State:
        """Draws up to `count` more tokens, fewer where every row is done; `state` is donated.

        Faster with `decoding_params(params)`, made once.
        """
        if isinstance(params["layers"], list) and not isinstance(state.cache.keys, list):
            keys, values = unstack(state.cache.keys), unstack(state.cache.values)
            cache = dataclasses.replace(state.cache, keys=keys, values=values)
            state = dataclasses.replace(state, cache=cache)
        until = jnp.minimum(state.step + count, state.found.tokens.shape[1])
        return _advance(self._static(), params, state, until, view)

    def sample(
        self,
        params: Any,
        input_ids: Int[ArrayLike, "B T"],
        attention_mask: Int[ArrayLike, "B T"] | None = None,
        *,
        max_new_tokens: int,
        num_samples: int = 1,
        key: Array | None = None,
        view: Any = None,
    ) -> Generated:
        """The whole generation as a part of a larger program: under jit, scan and vmap.

        The values of the prompts are not looked at: each needs a token, all within the vocabulary.
        Positions must suffice for T + N - 1 tokens, padding counted.
        """
        ids = jnp.asarray(input_ids)
        mask = jnp.ones_like(ids) if attention_mask is None else jnp.asarray(attention_mask)
        needed = ids.shape[1] + max_new_tokens - 1
        self._check_choices(needed, max_new_tokens, num_samples, key)
        sizes = {"max_new_tokens": max_new_tokens, "num_samples": num_samples}
        state = _start(self._static(), params, ids, mask, key, view, **sizes)
        return _advance(self._static(), params, state, max_new_tokens, view).found

    def _static(self) -> _Static:
        pad_id = self.config.pad_id
        stop = self.stop_ids[0] if self.stop_ids else 0
        return _Static(
            self.config, self.sampling, self.stop_ids, stop if pad_id is None else pad_id
        )

    def _check_prompts(self, ids, mask) -> int:
        """Looks at the values; returns the tokens of the longest prompt."""
        if ids.shape[0] == 0 or (mask.sum(axis=1) == 0).any():
            raise UserError("prompts: one is empty. Give each a token, such as the bos_id.")
        check_ids("input_ids", ids, self.config.vocab_size)
        return int(mask.sum(axis=1).max())

    def _check_choices(self, needed, max_new_tokens, num_samples, key):
        config = self.config
        if config.kind != "decoder" or config.head != "lm":
            raise UserError(
                f"model: does not generate (got a {config.family} model with head "
                f"'{config.head}'). Give a decoder."
            )
        sizes = SimpleNamespace(max_new_tokens=max_new_tokens, num_samples=num_samples)
        checks.whole(sizes, "max_new_tokens")
        checks.whole(sizes, "num_samples", most=MOST_SAMPLES)
        if needed > config.longest_text:
            raise UserError(
                f"max_new_tokens: with the prompt needs {needed} positions, and the model has "
                f"{config.longest_text} (got {max_new_tokens}). Lower it, or shorten the prompt."
            )
        if self.sampling.temperature > 0 and key is None:
            raise UserError(
                "key: sampling needs one (got None). Give key=jax.random.key(0), or temperature 0."
            )


def decoding_params(params: Any) -> Any:
    """The parameters as `Generator.advance` reads them fastest.

    On a CPU a second copy with the layers apart: of a stack, XLA copies the weights of each layer
    for every token, which takes longer than the products of a few rows. Elsewhere `params` itself.
    """
    if jax.default_backend() != "cpu" or isinstance(params["layers"], list):
        return params
    return {**params, "layers": unstack(params["layers"])}


def generate(
    config: ModelConfig,
    params: Any,
    input_ids: Int[ArrayLike, "B T"],
    attention_mask: Int[ArrayLike, "B T"] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    num_samples: int = 1,
    key: Array | None = None,
    eos_id: int | Sequence[int] | None = None,
    view: Any = None,
) -> Generated:
    """Continues prompts; compiled once for each shape and choice.

    Memory: the parameters, keys and values of all tokens, and `decoding_params`.

    Args:
      config: a decoder.
      params: its parameters.
      input_ids: token ids of the prompts.
      attention_mask: 1 for tokens, 0 for padding on either side; None means no padding.
      max_new_tokens: N.
      temperature, top_k, top_p, min_p: see `Sampling`.
      num_samples: draws for each prompt, in adjacent rows; the prompt is read once for all.
      key: of the draws, unless the temperature is 0.
      eos_id: token or tokens that end a row; None for those of the configuration.
      view: see `jaxlm.core.views`.

    Raises:
      UserError: empty prompt, token outside the vocabulary, more positions than the model was
        made for (rotary ones too: it was not trained beyond `config.longest_text`), no key,
        impossible settings.
    """
    stop = config.stops if eos_id is None else eos_id
    stop_ids = (stop,) if isinstance(stop, int) else tuple(stop)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    generator = Generator(config, sampling, stop_ids)
    state = generator.start(
        params,
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        key=key,
        view=view,
    )
    return generator.advance(decoding_params(params), state, max_new_tokens, view=view).found
