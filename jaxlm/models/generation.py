"""Generation with a decoder: read the prompt once, then draw tokens in one compiled loop.

Shapes: B prompts, N new tokens, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core import checks
from jaxlm.core.errors import UserError
from jaxlm.core.paths import lookup
from jaxlm.core.precision import Packed
from jaxlm.core.programs import has_values
from jaxlm.models.config import ModelConfig
from jaxlm.models.scoring import last_token, log_probs_of, repeat
from jaxlm.models.transformer import Cache, check_ids, empty_cache, extend, logits, unstack

MOST_SAMPLES = 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. The filters apply in the order of the attributes.

    Attributes:
      temperature: divisor of the logits; 0 takes the most likely token.
      top_k: keep the k most likely tokens, and those as likely as the k-th; None keeps all.
      top_p: keep the smallest set of most likely tokens whose probability reaches p, at least one
        token; of equally likely tokens, only as many as needed are kept (arXiv:1904.09751).
      min_p: keep tokens at least p times as likely as the most likely one (arXiv:2407.01082).
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
    """Return the logits divided by the temperature, with -inf at tokens that the filters remove."""
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    # Shift the best score to 0 and keep the divisor a normal number, so that a tiny temperature
    # gives 0 and -inf, the most likely token, and never inf - inf.
    scores = scores - jnp.max(scores, axis=-1, keepdims=True)
    scores = scores / max(sampling.temperature, float(jnp.finfo(scores.dtype).tiny))
    if sampling.top_k is not None:
        least = lax.top_k(scores, min(sampling.top_k, scores.shape[-1]))[0][:, -1:]
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    if sampling.top_p < 1:
        # Sum from the least likely token up, as transformers does: adding small numbers first also
        # loses the least.
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
    """Return one token for each row; temperature 0 needs no key."""
    if sampling.temperature == 0:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    assert key is not None
    return jax.random.categorical(key, filter_logits(scores, sampling)).astype(jnp.int32)


class Generated(NamedTuple):
    """Generated tokens.

    Attributes:
      tokens: int32 [B, N]. The stop token is the last one of its row; padding follows it.
      log_probs: [B, N] in at least float32, log-probabilities of the tokens at temperature 1 and
        without filters; 0 at padding.
      lengths: int32 [B], number of tokens in each row, the stop token included.
    """

    tokens: Int[Array, "B N"]
    log_probs: Float[Array, "B N"]
    lengths: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The state of a generation.

    Attributes:
      cache: keys and values of the tokens read.
      token: last token of each row, not yet read.
      done: whether each row has drawn a stop token.
      step: number of tokens drawn.
      found: the tokens so far.
      key: PRNG key; token n is drawn with `fold_in(key, n)`.
    """

    cache: Cache
    token: Int[Array, " B"]
    done: Bool[Array, " B"]
    step: Int[Array, ""]
    found: Generated
    key: Array | None


def _record(state: State, scores: Float[Array, "B V"], generator: "Generator") -> State:
    key = None if state.key is None else jax.random.fold_in(state.key, state.step)
    token = jnp.where(state.done, generator.pad_id, draw(scores, generator.sampling, key))
    log_probs = jnp.where(state.done, 0, log_probs_of(scores, token))
    tokens, scored, lengths = state.found

    def write(store, new):
        return lax.dynamic_update_slice_in_dim(
            store, new[:, None].astype(store.dtype), state.step, axis=1
        )

    found = Generated(write(tokens, token), write(scored, log_probs), lengths + ~state.done)
    stops = jnp.asarray(generator.stop_ids, jnp.int32)
    done = state.done | jnp.any(token[:, None] == stops[None], axis=1)
    return dataclasses.replace(state, token=token, done=done, step=state.step + 1, found=found)


@functools.partial(jax.jit, static_argnames=("generator", "max_new_tokens", "num_samples"))
def _start(generator, params, input_ids, mask, key, view, *, max_new_tokens, num_samples):
    config = generator.config
    batch, length = input_ids.shape
    dtype = config.compute_dtype or params["embed"]["tokens"]["embedding"].dtype
    cache = empty_cache(config, batch, length + max_new_tokens - 1, dtype)
    x, cache = extend(config, params, input_ids, mask, cache, view=view)
    scores = logits(config, params, last_token(x, mask), view=view)
    rows = batch * num_samples
    found = Generated(
        jnp.full((rows, max_new_tokens), generator.pad_id, jnp.int32),
        jnp.zeros((rows, max_new_tokens), jnp.promote_types(scores.dtype, jnp.float32)),
        jnp.zeros(rows, jnp.int32),
    )
    zeros = jnp.zeros(rows, jnp.int32)
    state = State(
        repeat(cache, num_samples), zeros, zeros > 0, jnp.zeros((), jnp.int32), found, key
    )
    return _record(state, jnp.repeat(scores, num_samples, axis=0), generator)


@jax.custom_batching.custom_vmap
def _all_done(done):
    return jnp.all(done)


@_all_done.def_vmap
def _(size, batched, done):
    """Return one answer for all entries of a `vmap`, or each entry would have its own `step`."""
    del size, batched
    return _all_done(done), False


@functools.partial(jax.jit, static_argnames="generator", donate_argnames="state")  # reuse the cache
def _advance(generator, params, state, until, view):
    def more(state):
        return (state.step < until) & ~_all_done(state.done)

    def one(state):
        alive = (~state.done).astype(jnp.int32)[:, None]
        token = state.token[:, None]
        x, cache = extend(generator.config, params, token, alive, state.cache, view=view)
        scores = logits(generator.config, params, x[:, 0], view=view)
        return _record(dataclasses.replace(state, cache=cache), scores, generator)

    return lax.while_loop(more, one, state)


@dataclasses.dataclass(frozen=True)
class Generator:
    """`generate` in two steps, for callers that want the tokens as they are drawn.

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
        """Read the prompts and draw the first token; arguments as in `generate`."""
        mask = np.ones(np.shape(input_ids), np.int32) if attention_mask is None else attention_mask
        if has_values(input_ids, mask):
            lengths = np.asarray(mask).sum(axis=-1)
            if np.size(lengths) == 0 or (lengths == 0).any():
                raise UserError(
                    "prompts: each must have a token (got an empty one). Give it one, such as "
                    "bos_id."
                )
            check_ids("input_ids", input_ids, self.config.vocab_size)
            longest = int(lengths.max())
        else:
            longest = np.shape(input_ids)[1]
        checks.integer("max_new_tokens", max_new_tokens)
        checks.integer("num_samples", num_samples, most=MOST_SAMPLES)
        self._check_model(longest + max_new_tokens - 1, max_new_tokens)
        if self.sampling.temperature > 0 and key is None:
            raise UserError(
                "key: sampling needs one (got None). Give key=jax.random.key(0), or temperature 0."
            )
        return _start(
            self,
            params,
            jnp.asarray(input_ids),
            jnp.asarray(mask),
            key,
            view,
            max_new_tokens=max_new_tokens,
            num_samples=num_samples,
        )

    def advance(self, params: Any, state: State, count: int, *, view: Any = None) -> State:
        """Draw up to `count` more tokens, fewer if every row is done; `state` is donated.

        It is faster with the parameters of `decoding_params(params)`.
        """
        if isinstance(params["layers"], list) and not isinstance(state.cache.keys, list):
            keys, values = unstack(state.cache.keys), unstack(state.cache.values)
            cache = dataclasses.replace(state.cache, keys=keys, values=values)
            state = dataclasses.replace(state, cache=cache)
        until = jnp.minimum(state.step + count, state.found.tokens.shape[1])
        return _advance(self, params, state, until, view)

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
        """Return all tokens; takes the arguments of `generate` and works within any program."""
        sizes = {"max_new_tokens": max_new_tokens, "num_samples": num_samples}
        state = self.start(params, input_ids, attention_mask, key=key, view=view, **sizes)
        return self.advance(params, state, max_new_tokens, view=view).found

    @property
    def pad_id(self) -> int:
        """Token id that fills a row after its end."""
        stop = self.stop_ids[0] if self.stop_ids else 0
        return stop if self.config.pad_id is None else self.config.pad_id

    def _check_model(self, needed: int, max_new_tokens: int) -> None:
        config = self.config
        if config.kind != "decoder" or config.head != "lm":
            raise UserError(
                f"model: does not generate (got a {config.family} model with head "
                f"'{config.head}'). Give a decoder."
            )
        if needed > config.longest_text:
            raise UserError(
                f"max_new_tokens: with the prompt needs {needed} positions, and the model has "
                f"{config.longest_text} (got {max_new_tokens}). Lower it, or shorten the prompt."
            )


def decoding_params(params: Any, view: Any = None) -> Any:
    """Return the parameters in the form that `Generator.advance` reads fastest.

    On a CPU it is a copy with a list of layers and, without a view, a transposed output table;
    elsewhere `params` itself.
    """
    if jax.default_backend() != "cpu" or isinstance(params["layers"], list):
        return params
    # XLA's CPU compiler copies the weights of a layer out of a stack for every token, which takes
    # longer than their product with a few rows. Multiplying a few rows with the transpose of a
    # [V, D] table takes five times as long as with a [D, V] table.
    params = {**params, "layers": unstack(params["layers"])}
    table = lookup(params, "lm_head.embedding")
    table = lookup(params, "embed.tokens.embedding") if table is None else table
    if view is not None or isinstance(table, Packed):  # the transpose would not be read
        return params
    return {**params, "output_kernel": table.T}


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
    """Continue prompts; compiled once for each shape and choice of options.

    It may be part of a larger program, under `jit`, `scan` and `vmap`. The values of traced prompts
    cannot be checked: each must have a token, all within the vocabulary, and the model must have
    positions for T + N - 1 tokens, padding included.

    Memory holds the parameters, the keys and values of all tokens, and `decoding_params`.

    Args:
      config: a decoder.
      params: its parameters.
      input_ids: token ids of the prompts.
      attention_mask: 1 for tokens, 0 for padding on either side; None for no padding.
      max_new_tokens: N.
      temperature, top_k, top_p, min_p: see `Sampling`.
      num_samples: number of continuations of each prompt, in adjacent rows; the prompt is read
        once for all.
      key: typed PRNG key; not needed at temperature 0.
      eos_id: token or tokens that end a row; None for those of the configuration.
      view: see `jaxlm.core.views`.

    Raises:
      UserError: a prompt is empty, a token is outside the vocabulary, there are more tokens than
        `config.longest_text` (rotary positions too were not trained beyond it), the key is missing,
        or a setting is impossible.
    """
    stop = config.stops if eos_id is None else eos_id
    stop_ids = (stop,) if isinstance(stop, int) else tuple(stop)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    generator = Generator(config, sampling, stop_ids)
    sizes = {"max_new_tokens": max_new_tokens, "num_samples": num_samples}
    state = generator.start(params, input_ids, attention_mask, key=key, view=view, **sizes)
    return generator.advance(decoding_params(params, view), state, max_new_tokens, view=view).found
