"""The forward pass: free functions over a nested dict and one scan over stacked layers.

The parameter tree, with a leading axis L on every leaf under `layers`:

    embed.tokens.embedding [V, E]       embed.positions.embedding [P, D]
    embed.token_types.embedding [S, D]  embed.norm.{scale, bias} [D]
    embed.project_in.kernel [E, D]      embed.project_out.kernel [D, E]
    layers.attention.{q,k,v,o}_proj.{kernel, bias}    layers.attention_norm.{scale, bias}
    layers.mlp.{gate,up,down}_proj.{kernel, bias}     layers.mlp_norm.{scale, bias}
    final_norm.{scale, bias}            lm_head.{embedding [V, E], bias [V]}
    mlm.dense.{kernel, bias}            mlm.norm.{scale, bias}
    pooler.{kernel, bias}               classifier.{kernel, bias}
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxlm.models import attention
from jaxlm.models.config import ModelConfig
from jaxlm.models.layers import ACTIVATIONS, Context, dense, embed, head, norm


def positions_from_mask(attention_mask: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token among the real tokens, 0-based; padding gets a valid one too."""
    return jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)


def _embed(params, ctx: Context, input_ids, position_ids, token_type_ids):
    config = ctx.config
    x = embed(params, "embed.tokens", input_ids, ctx)
    if config.embedding_size != config.hidden_size:
        x = dense(params, "embed.project_in", x, ctx)
    if config.positions == "learned":
        x = x + embed(params, "embed.positions", position_ids + config.position_offset, ctx)
    if config.token_types:
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = x + embed(params, "embed.token_types", jnp.asarray(types), ctx)
    return norm(params, "embed.norm", x, ctx) if config.embedding_norm else x


def _attention(params, x_BxTxD, ctx: Context, position_ids, mask):
    config = ctx.config
    batch, length, _ = x_BxTxD.shape
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    q, k, v = (
        dense(params, f"layers.attention.{name}_proj", x_BxTxD, ctx).reshape(
            batch, length, count, config.head_size
        )
        for name, count in heads.items()
    )
    if config.positions == "rotary":
        q = attention.rotate(q, position_ids, config.rope_theta)
        k = attention.rotate(k, position_ids, config.rope_theta)
    out = attention.attend(q, k, v, mask).reshape(batch, length, -1)
    return dense(params, "layers.attention.o_proj", out, ctx)


def _mlp(params, x_BxTxD, ctx: Context):
    activation = ACTIVATIONS[ctx.config.activation]
    up = dense(params, "layers.mlp.up_proj", x_BxTxD, ctx)
    if ctx.config.gated_mlp:
        up = activation(dense(params, "layers.mlp.gate_proj", x_BxTxD, ctx)) * up
    else:
        up = activation(up)
    return dense(params, "layers.mlp.down_proj", up, ctx)


def _block(params, x_BxTxD, ctx: Context, position_ids, mask):
    def sublayer(x, name, function):
        if ctx.config.norm_position == "pre":
            return x + function(norm(params, name, x, ctx))
        return norm(params, name, x + function(x), ctx)

    x_BxTxD = sublayer(
        x_BxTxD, "layers.attention_norm", lambda x: _attention(params, x, ctx, position_ids, mask)
    )
    return sublayer(x_BxTxD, "layers.mlp_norm", lambda x: _mlp(params, x, ctx))


def hidden(
    config: ModelConfig,
    params,
    input_ids: Int[ArrayLike, "B T"],
    attention_mask: Int[ArrayLike, "B T"] | None = None,
    *,
    position_ids: Int[ArrayLike, "B T"] | None = None,
    token_type_ids: Int[ArrayLike, "B T"] | None = None,
    view=None,
    tap=None,
) -> Float[Array, "B T D"]:
    """Hidden states after the last layer and the final norm; arguments as in `apply`.

    Raises:
      ValueError: if the batch is longer than a table of learned positions.
    """
    input_ids = jnp.asarray(input_ids)
    length = input_ids.shape[1]
    if config.positions == "learned" and length > config.max_positions:
        raise ValueError(
            f"the batch has {length} tokens a row, the model {config.max_positions} positions; "
            "truncate it"
        )
    mask_BxT = jnp.ones_like(input_ids) if attention_mask is None else jnp.asarray(attention_mask)
    derived = positions_from_mask(mask_BxT) if position_ids is None else position_ids
    positions_BxT = jnp.asarray(derived)
    ctx = Context(config, view, tap)
    x = _embed(params, ctx, input_ids, positions_BxT, token_type_ids)
    mask_BxTxT = attention.mask(mask_BxT, causal=config.kind == "decoder")

    def body(x, scanned):
        layer_params, layer, tap_slice = scanned
        layer_tap = tap if tap_slice is None else dataclasses.replace(tap, layers=tap_slice)
        layer_ctx = Context(config, view, layer_tap, layer)
        return _block({"layers": layer_params}, x, layer_ctx, positions_BxT, mask_BxTxT), None

    layers = jnp.arange(config.num_layers, dtype=jnp.int32)
    x, _ = lax.scan(body, x, (params["layers"], layers, tap.layers if tap is not None else None))
    return norm(params, "final_norm", x, ctx) if config.final_norm else x


def apply(
    config: ModelConfig,
    params,
    input_ids: Int[ArrayLike, "B T"],
    attention_mask: Int[ArrayLike, "B T"] | None = None,
    *,
    position_ids: Int[ArrayLike, "B T"] | None = None,
    token_type_ids: Int[ArrayLike, "B T"] | None = None,
    positions: Int[ArrayLike, "B"] | Int[ArrayLike, "B K"] | None = None,
    token_ids: Int[ArrayLike, "C"] | None = None,
    view=None,
    tap=None,
) -> Float[Array, "..."]:
    """Logits of the head.

    Args:
      config: the model.
      params: its parameters.
      input_ids: token ids.
      attention_mask: 1 for tokens, 0 for padding on either side; None means no padding.
      position_ids: positions of the tokens; derived from the mask if None.
      token_type_ids: segment ids (BERT); zeros if None.
      positions: where logits are wanted; everywhere if None.
      token_ids: tokens of which logits are wanted; the whole vocabulary if None.
      view, tap: see `jaxlm.core.views` and `jaxlm.core.taps`.

    Returns:
      [B, T, V]; [B, V] or [B, K, V] with `positions`; C in the place of V with `token_ids`. A
      classifier returns [B, num_labels].
    """
    x = hidden(
        config,
        params,
        input_ids,
        attention_mask,
        position_ids=position_ids,
        token_type_ids=token_type_ids,
        view=view,
        tap=tap,
    )
    ctx = Context(config, view, tap)
    if config.head == "classifier":
        pooled = jnp.tanh(dense(params, "pooler", x[:, 0], ctx))
        return dense(params, "classifier", pooled, ctx)
    if config.head == "none":
        raise ValueError("this model has no head; use hidden() or jaxlm.models.add_classifier")
    if positions is not None:
        positions = jnp.asarray(positions)
        index = positions.reshape(positions.shape[0], -1, 1)
        x = jnp.take_along_axis(x, index, axis=1).reshape(*positions.shape, x.shape[-1])
    if config.head == "mlm":
        x = ACTIVATIONS[config.activation](dense(params, "mlm.dense", x, ctx))
        x = norm(params, "mlm.norm", x, ctx)
    if config.embedding_size != config.hidden_size:
        x = dense(params, "embed.project_out", x, ctx)
    token_ids = None if token_ids is None else jnp.asarray(token_ids)
    table = "embed.tokens" if config.tie_embeddings else "lm_head"
    logits = head(params, table, x, ctx, token_ids)
    bias = ctx.read(params, "lm_head.bias", rows=token_ids)
    if bias is None:
        return logits
    bias = bias.reshape((1,) * (logits.ndim - 1) + bias.shape)
    return ctx.out("lm_head.bias", "bias", logits, logits + bias)
