"""Operations counted on a jaxpr, held against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxlm.cost.flops import Flops, count_flops
from jaxlm.models import LanguageModel, ModelConfig, init_params, param_shapes
from jaxlm.sharding import make_mesh
from jaxlm.train.losses import lm_objective


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_a_chain_of_products():
    found = count_flops(
        lambda a, b, c: a @ b @ c, shaped(3, 5), shaped(5, 7), shaped(7, 11, dtype=jnp.bfloat16)
    )
    assert found == Flops(products=2 * (3 * 5 * 7 + 3 * 7 * 11))


def test_a_batch_of_products_and_a_convolution():
    found = count_flops(
        lambda a, b: jnp.einsum("bij,bkj->bik", a, b), shaped(4, 3, 5), shaped(4, 7, 5)
    )
    assert found.products == 2 * 4 * 3 * 5 * 7
    image, kernel = shaped(2, 6, 10, 10), shaped(8, 3, 3, 3)  # two groups of three channels
    found = count_flops(
        lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "VALID", feature_group_count=2),
        image,
        kernel,
    )
    assert found == Flops(products=2 * (2 * 8 * 8 * 8) * (3 * 3 * 3))


def test_loops_count_their_turns():
    def layers(x, ws):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    def steps(x, ws):
        return lax.scan(lambda x, _: (layers(x, ws), None), x, length=3)[0]

    found = count_flops(jax.jit(steps), shaped(2, 8), shaped(5, 8, 8))
    assert found == Flops(products=3 * 5 * 2 * (2 * 8 * 8), others=3 * 5 * (2 * 8))
    fixed = lambda x, w: lax.fori_loop(0, 7, lambda _, x: x @ w, x)  # noqa: E731
    assert count_flops(fixed, shaped(2, 8), shaped(8, 8)).products == 7 * 2 * 2 * 8 * 8


def test_what_is_not_a_product():
    def f(x):
        top = jnp.max(x, axis=1, keepdims=True)  # 12
        exp = jnp.exp(x - top)  # 12 + 12
        return (exp / jnp.sum(exp, axis=1, keepdims=True)).T.reshape(-1)  # 12 + 12

    assert count_flops(f, shaped(3, 4)) == Flops(others=5 * 12)


def test_the_dearest_branch_counts():
    def f(i, x):
        return lax.switch(i, [lambda x: x + 1, lambda x: x @ x, lambda x: x], x)

    assert count_flops(f, shaped(dtype=jnp.int32), shaped(4, 4)).products == 2 * 4**3


@pytest.mark.multidevice
def test_all_devices_count_together():
    mesh = make_mesh(data=4, model=2)
    f = jax.shard_map(
        lambda x, w: x @ w,
        mesh=mesh,
        in_specs=(P("data"), P(None, "model")),
        out_specs=P("data", "model"),
    )
    assert count_flops(f, shaped(8, 4), shaped(4, 6)).products == 2 * 8 * 4 * 6


def config(**changes):
    made = ModelConfig(
        family="llama", kind="decoder", head="lm", vocab_size=40, hidden_size=16, num_layers=3,
        num_heads=4, num_kv_heads=2, head_size=4, intermediate_size=24, max_positions=8,
        embedding_size=16, activation="silu", gated_mlp=True, tie_embeddings=False,
        positions="rotary", remat="none",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("tie", [True, False])
def test_a_decoder_takes_2_flops_a_weight_and_token_forward_and_6_with_its_gradient(tie):
    made, (rows, length) = config(tie_embeddings=tie), (2, 8)
    params = jax.eval_shape(lambda key: init_params(made, key), jax.random.key(0))
    loss_fn = lm_objective(LanguageModel(made, params).log_probs)
    batch = {"input_ids": shaped(rows, length, dtype=jnp.int32)}
    sizes = {path: shape for path, shape in param_shapes(made).items() if path.endswith(".kernel")}
    weights = sum(layers * rest[0] * rest[1] for layers, *rest in sizes.values())
    weights += made.vocab_size * made.hidden_size
    tokens = rows * length
    attention = 2 * 2 * rows * made.num_layers * made.num_heads * made.head_size * length**2
    wanted = 2 * weights * tokens + attention
    assert count_flops(loss_fn, params, batch).products == wanted
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    # The gradient with respect to the embedded tokens needs no product, all others two.
    assert count_flops(gradient, params, batch).products == 3 * wanted
