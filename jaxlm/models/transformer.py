"""The forward pass: free functions over a nested dict and one scan over stacked layers.

The parameter tree, with a leading axis L on every leaf under `layers`:

    embed.tokens.embedding [V, E]       embed.positions.embedding [P, D]
    embed.token_types.embedding [S, D]  embed.norm.{scale, bias} [D]
    embed.project_in.kernel [E, D]      embed.project_out.kernel [D, E]
    layers.attention.{q,k,v,o}_proj.{kernel, bias}    layers.attention_norm.{scale, bias}
    layers.attention.{q,k}_norm.scale                 layers.{attention,mlp}_out_norm.scale
    layers.attention.prefix_{keys,values} [m, G, K]   {any}.{lora_a [in, r], lora_b [r, out]}
    layers.mlp.{gate,up,down}_proj.{kernel, bias}     layers.mlp_norm.{scale, bias}
    final_norm.{scale, bias}            lm_head.{embedding [V, E], bias [V]}
    mlm.dense.{kernel, bias}            mlm.norm.{scale, bias}
    pooler.{kernel, bias}               classifier.{kernel, bias}
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxlm.core import checks
from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError
from jaxlm.core.paths import lookup
from jaxlm.models import rotary
from jaxlm.models.attention import IMPLEMENTATIONS, Mask
from jaxlm.models.config import ModelConfig
from jaxlm.models.layers import ACTIVATIONS, Context, dense, embed, head, norm

NO_WINDOW = 2**30
"""Window of a layer without one, in a scan over layers with and without windows."""
PREFIX = "attention.prefix_keys"
ATTENDED = "attended"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens read so far, at most S in a row.

    Attributes:
      keys, values: [L, B, G, S, K]; or lists of L arrays, for parameters with a list of layers.
      mask: int32 [B, S], 1 at tokens.
      positions: int32 [B, S], positions of the tokens.
      length: int32, number of places in use.
    """

    keys: Any
    values: Any
    mask: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    length: Int[Array, ""]


def empty_cache(config: ModelConfig, batch: int, size: int, dtype: Any) -> Cache:
    """Return a cache for `size` tokens in each of `batch` rows."""
    shape = (config.num_layers, batch, config.num_kv_heads, size, config.head_size)
    row = jnp.zeros((batch, size), jnp.int32)
    values = jnp.zeros(shape, dtype)
    return Cache(values, values, row, row, jnp.zeros((), jnp.int32))


def check_ids(name: str, ids: Any, size: int) -> None:
    """Raise UserError for ids outside [0, size), which JAX would clip to this range.

    Tracers have no values, so under `jit`, `vmap` and `grad` nothing is checked.
    """
    if ids is None or isinstance(ids, jax.core.Tracer):
        return
    shards = ids.addressable_shards if isinstance(ids, jax.Array) else ()
    for part in [np.asarray(shard.data) for shard in shards] or [np.asarray(ids)]:
        if part.size and not (part.min() >= 0 and part.max() < size):
            wrong = part.min() if part.min() < 0 else part.max()
            raise UserError(
                f"{name}: must be from 0 to {size - 1} (got {wrong}). Use the model's own "
                "tokenizer."
            )


def positions_from_mask(attention_mask: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return the 0-based position of each token among the tokens that are not padding."""
    return jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)


def positions_from_segments(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return the 0-based position of each token in its segment, a run of equal ids.

    >>> positions_from_segments(jnp.array([[1, 1, 1, 2, 2, 0]])).tolist()
    [[0, 1, 2, 0, 1, 0]]
    """
    place = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return place - lax.cummax(jnp.where(begins, place, 0), axis=1)


def _embed(params, ctx: Context, input_ids, position_ids, token_type_ids):
    config = ctx.config
    x = embed(params, "embed.tokens", input_ids, ctx)
    if config.embedding_scale is not None:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    if config.embedding_size != config.hidden_size:
        x = dense(params, "embed.project_in", x, ctx)
    if config.positions == "learned":
        x = x + embed(params, "embed.positions", position_ids + config.position_offset, ctx)
    if config.token_types:
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = x + embed(params, "embed.token_types", jnp.asarray(types), ctx)
    return norm(params, "embed.norm", x, ctx) if config.embedding_norm else x


def _queries_keys_values(params, x_BxTxD, ctx: Context, turns):
    config = ctx.config
    batch, length, _ = x_BxTxD.shape

    def project(name, heads):
        y = dense(params, f"layers.attention.{name}_proj", x_BxTxD, ctx)
        if config.clip_qkv is not None:
            y = jnp.clip(y, -config.clip_qkv, config.clip_qkv)
        if config.query_key_norm == "all" and name != "v":
            y = norm(params, f"layers.attention.{name}_norm", y, ctx)
        y = y.reshape(batch, length, heads, config.head_size)
        if config.query_key_norm == "head" and name != "v":
            y = norm(params, f"layers.attention.{name}_norm", y, ctx)
        return y if turns is None or name == "v" else rotary.rotate(y, *turns)

    groups = config.num_kv_heads
    return project("q", config.num_heads), project("k", groups), project("v", groups)


def _attention(params, x_BxTxD, ctx: Context, turns, mask, cached):
    config = ctx.config
    q, k, v = _queries_keys_values(params, x_BxTxD, ctx, turns)
    if cached is not None:
        cached, k, v = _extend(cached, ctx.layer, k, v)
    k, v = (_after_prefix(params, name, x, ctx) for name, x in (("keys", k), ("values", v)))
    if not config.score_gradient:  # the weights depend on nothing but queries and keys
        q, k = lax.stop_gradient((q, k))
    scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
    attend = IMPLEMENTATIONS[config.attention]
    out = attend(q, k, v, mask, scale=scale, cap=config.attention_cap)
    out = checkpoint_name(out, ATTENDED)
    out = out.reshape(*x_BxTxD.shape[:2], -1)
    return dense(params, "layers.attention.o_proj", out, ctx), cached


def _after_prefix(params, name, x_BxSxGxK, ctx: Context):
    """Return keys or values with those of the prefix in front, if there is one."""
    prefix = ctx.read(params, f"layers.attention.prefix_{name}")
    if prefix is None:
        return x_BxSxGxK
    shape = (x_BxSxGxK.shape[0], *prefix.shape)
    rows = jnp.broadcast_to(prefix[None], shape).astype(x_BxSxGxK.dtype)
    return jnp.concatenate([rows, x_BxSxGxK], axis=1)


def _extend(cached, layer, k, v):
    """Write new keys and values of a layer into the cache; return it and all those of the layer."""
    keys, values, length = cached
    zero = jnp.zeros((), jnp.int32)

    def write(store, new):
        new = jnp.swapaxes(new, 1, 2).astype(store.dtype)
        if store.ndim == new.ndim:  # a cache with a list of layers
            store = lax.dynamic_update_slice(store, new, (zero, zero, length, zero))
            return store, jnp.swapaxes(store, 1, 2)
        store = lax.dynamic_update_slice(store, new[None], (layer, zero, zero, length, zero))
        one = lax.dynamic_index_in_dim(store, layer, keepdims=False)
        return store, jnp.swapaxes(one, 1, 2)

    keys, k = write(keys, k)
    values, v = write(values, v)
    return (keys, values, length), k, v


def _mlp(params, x_BxTxD, ctx: Context):
    activation = ACTIVATIONS[ctx.config.activation]
    up = dense(params, "layers.mlp.up_proj", x_BxTxD, ctx)
    if ctx.config.gated_mlp:
        up = activation(dense(params, "layers.mlp.gate_proj", x_BxTxD, ctx)) * up
    else:
        up = activation(up)
    return dense(params, "layers.mlp.down_proj", up, ctx)


def _block(params, x_BxTxD, ctx: Context, turns, mask, cached):
    where = ctx.config.norm_position

    def before(name, x):
        if where not in ("pre", "both"):
            return x
        y = norm(params, f"layers.{name}_norm", x, ctx)
        if name == "attention" and not ctx.config.first_norm:
            return jnp.where(ctx.layer == 0, x, y)
        return y

    def after(name, x, y):
        if where == "post":
            return norm(params, f"layers.{name}_norm", x + y, ctx)
        if where != "pre":
            suffix = "out_norm" if where == "both" else "norm"
            y = norm(params, f"layers.{name}_{suffix}", y, ctx)
        if ctx.config.residual_scale is not None:
            y = (ctx.config.residual_scale * wide(y)).astype(y.dtype)
        return x + y

    attended, cached = _attention(params, before("attention", x_BxTxD), ctx, turns, mask, cached)
    if ctx.config.parallel:
        return x_BxTxD + attended + _mlp(params, before("mlp", x_BxTxD), ctx), cached
    x = after("attention", x_BxTxD, attended)
    return after("mlp", x, _mlp(params, before("mlp", x), ctx)), cached


def _remat(config: ModelConfig, body, *, scanned: bool):
    """Return the body of a layer with the checkpointing of the configuration."""
    if config.remat == "none":
        return body
    kept = jax.checkpoint_policies
    policy = kept.save_from_both_policies(
        kept.dots_with_no_batch_dims_saveable, kept.save_only_these_names(ATTENDED)
    )
    policy = policy if config.remat == "dots" else None
    # In a scan, XLA cannot merge the recomputation with the forward pass, so no barrier is needed.
    return jax.checkpoint(body, prevent_cse=not scanned, policy=policy)


def _layers(params, x, ctx: Context, position_ids, mask: Mask, cached, count=None):
    """Apply all layers and the final norm, or `count` layers; `cached` is keys, values, length."""
    config, view, tap = ctx.config, ctx.view, ctx.tap
    stack = params["layers"]
    unstacked = isinstance(stack, list)
    prefix = lookup(stack[0] if unstacked else stack, PREFIX)
    if prefix is not None:
        mask = mask.prefixed(prefix.shape[-3])
    turns, kinds = None, None
    if config.positions == "rotary":
        turns, kinds = rotary.tables(config, position_ids, x.dtype)
    windows = None
    if any(config.windowed):
        sizes = [config.window if local else NO_WINDOW for local in config.windowed]
        windows = jnp.asarray(sizes, jnp.int32)
    shared = mask.dense() if windows is None and config.attention != "blockwise" else mask

    def body(carry, scanned):
        layer_params, layer, window, kind, tap_slice = scanned
        layer_tap = tap if tap_slice is None else dataclasses.replace(tap, layers=tap_slice)
        layer_ctx = Context(config, view, layer_tap, layer)
        seen = shared if window is None else dataclasses.replace(mask, window=window)
        own = turns if kind is None else jax.tree.map(lambda both: both[kind], turns)
        x, cached = carry
        return _block({"layers": layer_params}, x, layer_ctx, own, seen, cached), None

    layers = jnp.arange(config.num_layers, dtype=jnp.int32)
    rest = (layers, windows, kinds, tap.layers if tap is not None else None)
    if count is not None:  # a scan is as long as its arrays, so slice them (XLA copies the slice)
        rest = jax.tree.map(lambda leaf: leaf[:count], rest)
        stack = stack[:count] if unstacked else jax.tree.map(lambda leaf: leaf[:count], stack)
    body = _remat(config, body, scanned=not unstacked)
    if unstacked:
        x, cached = _one_by_one(body, x, cached, stack, rest)
    else:
        (x, cached), _ = lax.scan(body, (x, cached), (stack, *rest))
    if count is None and config.final_norm:
        x = norm(params, "final_norm", x, ctx)
    return x, cached


def _one_by_one(body, x, cached, layers, rest):
    """Scan `body` over a list of layers, each of which has its own cache."""
    keys, values = [], []
    for i, layer_params in enumerate(layers):
        own = None if cached is None else (cached[0][i], cached[1][i], cached[2])
        scanned = (layer_params, *jax.tree.map(lambda stack: stack[i], rest))  # noqa: B023
        (x, own), _ = body((x, own), scanned)
        if own is not None:
            keys.append(own[0])
            values.append(own[1])
    return x, None if cached is None else (keys, values, cached[2])


def unstack(tree):
    """Return a tree of stacked layers as a list of trees.

    Every function here accepts either under `layers`; with a list, keys and values of a cache are
    lists too, and a program has a copy of the code for each layer.
    """
    leaves, structure = jax.tree.flatten(tree)
    rows = zip(*map(jnp.unstack, leaves), strict=True)
    return [jax.tree.unflatten(structure, row) for row in rows]


def hidden(
    config: ModelConfig,
    params,
    input_ids: Int[ArrayLike, "B T"],
    attention_mask: Int[ArrayLike, "B T"] | None = None,
    *,
    position_ids: Int[ArrayLike, "B T"] | None = None,
    token_type_ids: Int[ArrayLike, "B T"] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    layer: int | None = None,
    view=None,
    tap=None,
) -> Float[Array, "B T D"]:
    """Return hidden states after the final norm, or after one of the layers.

    Args:
      config, params, input_ids, attention_mask, position_ids, token_type_ids, segment_ids, view,
        tap: see `apply`.
      layer: number of layers to run, 0 to L; the result has no final norm, and with 0 it is the
        embedding. None runs all layers and the final norm. Later layers are not computed and get
        no gradient. The result is entry `layer` of transformers' `hidden_states`, except that the
        last entry there has the final norm.

    Raises:
      UserError: the batch is longer than a table of learned positions and has no `position_ids`, or
        `layer` or concrete ids are out of range, see `check_ids`.
    """
    checks.integer("layer", layer, least=0, most=config.num_layers)
    check_ids("input_ids", input_ids, config.vocab_size)
    check_ids("token_type_ids", token_type_ids, max(config.token_types, 1))
    if config.positions == "learned":
        check_ids("position_ids", position_ids, config.max_positions)
    input_ids = jnp.asarray(input_ids)
    length = input_ids.shape[1]
    if config.positions == "learned" and position_ids is None and length > config.max_positions:
        raise UserError(
            f"input_ids: must have at most {config.max_positions} tokens a row, the positions of "
            f"the model (got {length}). Truncate them."
        )
    segments_BxT = None if segment_ids is None else jnp.asarray(segment_ids)
    if attention_mask is not None:
        mask_BxT = jnp.asarray(attention_mask)
    elif segments_BxT is not None:
        mask_BxT = (segments_BxT > 0).astype(jnp.int32)
    else:
        mask_BxT = jnp.ones_like(input_ids)
    if position_ids is not None:
        positions_BxT = jnp.asarray(position_ids)
    elif segments_BxT is not None:
        positions_BxT = positions_from_segments(segments_BxT)
    else:
        positions_BxT = positions_from_mask(mask_BxT)
    ctx = Context(config, view, tap)
    x = _embed(params, ctx, input_ids, positions_BxT, token_type_ids)
    causal = config.kind == "decoder"
    mask = Mask(mask_BxT, positions_BxT, positions_BxT, causal=causal, segments=segments_BxT)
    return _layers(params, x, ctx, positions_BxT, mask, None, layer)[0]


def extend(
    config: ModelConfig,
    params,
    input_ids: Int[ArrayLike, "B T"],
    attention_mask: Int[ArrayLike, "B T"] | None,
    cache: Cache,
    *,
    view=None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Read T more tokens in every row; the cache must have T free places after those in use.

    Args:
      config: a decoder; or an encoder, whose tokens then see only tokens read before or with them.
      params: its parameters.
      input_ids: token ids.
      attention_mask: 1 for tokens, 0 for padding on either side; None for no padding.
      cache: result of `empty_cache` or of an earlier call.
      view: see `jaxlm.core.views`.

    Returns:
      The hidden states of the new tokens, and the cache that includes them.

    Raises:
      UserError: concrete ids are out of range, see `check_ids`.
    """
    check_ids("input_ids", input_ids, config.vocab_size)
    input_ids = jnp.asarray(input_ids)
    mask_BxT = jnp.ones_like(input_ids) if attention_mask is None else jnp.asarray(attention_mask)
    mask_BxT = mask_BxT.astype(jnp.int32)
    before = cache.mask.sum(axis=1, keepdims=True, dtype=jnp.int32)
    positions_BxT = jnp.maximum(before + jnp.cumsum(mask_BxT, axis=1) - 1, 0)

    def write(store, new):
        return lax.dynamic_update_slice_in_dim(store, new, cache.length, axis=1)

    keys, positions = write(cache.mask, mask_BxT), write(cache.positions, positions_BxT)
    causal = config.kind == "decoder"
    mask = Mask(keys, positions_BxT, positions, first=cache.length, causal=causal)
    ctx = Context(config, view)
    x = _embed(params, ctx, input_ids, positions_BxT, None)
    cached = (cache.keys, cache.values, cache.length)
    x, (k, v, _) = _layers(params, x, ctx, positions_BxT, mask, cached)
    return x, Cache(k, v, keys, positions, cache.length + input_ids.shape[1])


def apply(
    config: ModelConfig,
    params,
    input_ids: Int[ArrayLike, "B T"],
    attention_mask: Int[ArrayLike, "B T"] | None = None,
    *,
    position_ids: Int[ArrayLike, "B T"] | None = None,
    token_type_ids: Int[ArrayLike, "B T"] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    positions: Int[ArrayLike, "B"] | Int[ArrayLike, "B K"] | None = None,
    token_ids: Int[ArrayLike, "C"] | None = None,
    view=None,
    tap=None,
) -> Float[Array, "..."]:
    """Return the logits of the head.

    Args:
      config: the model.
      params: its parameters.
      input_ids: token ids.
      attention_mask: 1 for tokens, 0 for padding on either side; None for no padding.
      position_ids: positions of the tokens; None derives them from the mask or the segments.
      token_type_ids: BERT's segment ids; None for zeros.
      segment_ids: for rows packed with several texts, 1, 2, ... at the tokens of each text and 0 at
        padding. A token attends within its text, and positions restart at 0 in each.
      positions: places to compute logits at; None for all.
      token_ids: tokens, or classes of a classifier, to compute logits for; None for all.
      view, tap: see `jaxlm.core.views` and `jaxlm.core.taps`.

    Returns:
      [B, T, V]; [B, V] or [B, K, V] with `positions`; C in place of V with `token_ids`. A
      classifier returns [B, num_labels] or [B, C]. With a classifier of every token, V is the
      number of its classes.

    Raises:
      UserError: the batch is longer than a table of learned positions, the model has no head, or
        concrete ids are out of range, see `check_ids`.
    """
    classes = config.num_labels if config.head in ("classifier", "token_classifier") else None
    check_ids("token_ids", token_ids, classes or config.vocab_size)
    x = hidden(
        config,
        params,
        input_ids,
        attention_mask,
        position_ids=position_ids,
        token_type_ids=token_type_ids,
        segment_ids=segment_ids,
        view=view,
        tap=tap,
    )
    ctx = Context(config, view, tap)
    if config.head == "classifier":
        x = _pooled(params, x, attention_mask, ctx)
        return _class_logits(params, x, ctx, token_ids)
    if config.head == "none":
        raise UserError(
            "head: the model has none (got 'none'). Call hidden(), or add one with add_classifier."
        )
    if positions is not None:
        positions = jnp.asarray(positions)
        index = positions.reshape(positions.shape[0], -1, 1)
        x = jnp.take_along_axis(x, index, axis=1).reshape(*positions.shape, x.shape[-1])
    if config.head == "token_classifier":
        x = _transform(params, x, ctx) if config.transforms else x
        return _class_logits(params, x, ctx, token_ids)
    return logits(config, params, x, token_ids=token_ids, view=view, tap=tap)


def _class_logits(params, x, ctx: Context, token_ids):
    classes = dense(params, "classifier", x, ctx)
    return classes if token_ids is None else classes[..., jnp.asarray(token_ids)]


def _pooled(params, x_BxTxD, attention_mask, ctx: Context):
    """Return what the classifier reads, [B, D]."""
    shape = x_BxTxD.shape[:2]
    real = jnp.ones(shape, bool) if attention_mask is None else jnp.asarray(attention_mask) > 0
    if ctx.config.pooling == "last":
        last = jnp.max(jnp.where(real, jnp.arange(shape[1])[None], 0), axis=1)
        return jnp.take_along_axis(x_BxTxD, last[:, None, None], axis=1)[:, 0]
    if ctx.config.pooling == "first":
        x = x_BxTxD[:, 0]
    else:
        # A row of padding alone, which fills a batch, must not become NaN.
        share = real / jnp.maximum(real.sum(1, keepdims=True), 1)
        x = (x_BxTxD * share[..., None]).sum(1).astype(x_BxTxD.dtype)
    if ctx.config.pooler == "mlm":
        return _transform(params, x, ctx)
    activation = jnp.tanh if ctx.config.pooler == "tanh" else jax.nn.relu
    return activation(dense(params, "pooler", x, ctx))


def _transform(params, x, ctx: Context):
    """Apply dense layer and norm of the masked-token head."""
    x = ACTIVATIONS[ctx.config.activation](dense(params, "mlm.dense", x, ctx))
    return norm(params, "mlm.norm", x, ctx)


def logits(
    config: ModelConfig,
    params,
    x: Float[Array, "*B D"],
    *,
    token_ids: Int[ArrayLike, "C"] | None = None,
    view=None,
    tap=None,
) -> Float[Array, "*B V"]:
    """Return the logits of the head for hidden states; C in place of V with `token_ids`."""
    if config.head in ("classifier", "token_classifier"):
        raise UserError(
            "head: a classifier has no logits of tokens (got none). Give another model."
        )
    ctx = Context(config, view, tap)
    if config.transforms:
        x = _transform(params, x, ctx)
    if config.embedding_size != config.hidden_size:
        x = dense(params, "embed.project_out", x, ctx)
    token_ids = None if token_ids is None else jnp.asarray(token_ids)
    table = "embed.tokens" if config.tie_embeddings else "lm_head"
    y = head(params, table, x, ctx, token_ids)
    bias = ctx.read(params, "lm_head.bias", rows=token_ids)
    if bias is not None:
        bias = bias.reshape((1,) * (y.ndim - 1) + bias.shape)
        y = ctx.out("lm_head.bias", "bias", y, y + bias, rows=token_ids)
    if config.logit_divisor is not None:
        y = y / config.logit_divisor
    if config.logit_cap is not None:
        y = (config.logit_cap * jnp.tanh(wide(y) / config.logit_cap)).astype(y.dtype)
    return y
