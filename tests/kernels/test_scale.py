"""What a kernel costs: half of a symmetric one, one block of gradients, or no gradients at all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels import KernelOptions, blocks, contraction, empirical, jacobian, vector_products
from jaxlm.sharding import WHOLE, batch_sharding, make_mesh, place_params

N, P = 16, 4096


def f(params, x):
    return jnp.tanh(x @ params["w"])[:, None] * params["s"]


PARAMS = {"w": jnp.ones(P), "s": jnp.ones(())}
X = np.random.default_rng(0).standard_normal((N, P)).astype(np.float32) / P


def temporaries(function, count):
    x = jax.ShapeDtypeStruct((count, P), jnp.float32)
    memory = jax.jit(function).lower(PARAMS, x).compile().memory_analysis()
    return memory.temp_size_in_bytes / (4 * P)


def test_vector_products_hold_no_matrix_of_gradients():
    def of_gradients(params, x):
        rows = jacobian.gradients(f, params, x)
        return contraction.contract(rows, rows, "full")

    def of_products(params, x):
        return vector_products.block(f, params, x, None, contraction.kernel_spec(PARAMS))

    gradients = temporaries(of_gradients, 64)
    few, many = (temporaries(of_products, count) for count in (8, 64))
    assert gradients >= 64
    # the examples of x once more, and a few copies of the parameters
    assert many - few < 64
    assert many < 64 + 8


def test_a_symmetric_kernel_multiplies_little_more_than_half():
    features = [jax.ShapeDtypeStruct((64, 1, 1, P), jnp.float32)]
    at = [
        jax.jit(functools.partial(function, over="full")).lower(*arguments).compile()
        for function, arguments in (
            (contraction.contract, (features, features)),
            (contraction.contract_self, (features,)),
        )
    ]
    whole, half = (each.cost_analysis()["flops"] for each in at)
    assert whole == pytest.approx(2 * 64 * 64 * P, rel=0.01)
    assert half == pytest.approx(0.625 * whole, rel=0.01)  # tiles: (1 + 1/4) / 2


def prepared(method="jacobian", kind="sgd", select=None, x2=None, **options):
    spec = contraction.kernel_spec(PARAMS, kind, select=select)
    return empirical.prepare(f, PARAMS, X, x2, spec, method, KernelOptions(check=False, **options))


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({"block_size": 4}, 10),
        ({"block_size": 5}, 10),  # four equal blocks
        ({"block_size": 6}, 6),
        ({"block_size": 4, "kind": "asymmetric_signgd"}, 16),
        ({"block_size": 4, "x2": X[:6]}, 8),
        ({}, 1),
    ],
)
def test_how_many_blocks_are_computed(options, pairs):
    work = prepared(**options)
    assert len(work.pairs()) == len(set(work.pairs())) == pairs


def test_blocks_are_as_large_as_the_budget(monkeypatch):
    size = 4 * (P + 1)
    for budget, wanted in ((16 * size, 16), (16 * size - 1, 8), (5 * size, 4), (1, 1)):
        monkeypatch.setattr(blocks, "GRADIENT_BYTES", budget)
        assert prepared().sizes == (wanted, wanted)
    assert prepared(method="ntk_vector_products").sizes == (16, 16)
    assert prepared(select="s").sizes == (1, 1)  # a budget of one byte
    monkeypatch.setattr(blocks, "GRADIENT_BYTES", 16)
    assert prepared(select="s").sizes == (4, 4)


def test_each_row_of_blocks_forms_its_gradients_once():
    formed, work = [], prepared(block_size=4)
    gradients = work._gradients

    def counted(params, x):
        formed.append(len(x))
        return gradients(params, x)

    work._gradients = counted
    for pair in work.pairs():
        work.compute(*pair)
    # four rows, and for those the 3, 2, 1, 0 blocks to their right
    assert formed == [4] * (4 + 6)


@pytest.mark.multidevice
def test_every_device_forms_the_gradients_of_its_examples():
    mesh = make_mesh(data=8)
    params = place_params(PARAMS, mesh, WHOLE)
    x = jax.device_put(X, batch_sharding(mesh))
    for rows in prepared(mesh=mesh)._gradients(params, x):
        assert {shard.data.shape[0] for shard in rows.addressable_shards} == {N // 8}
    assert prepared(block_size=5, mesh=mesh).sizes == (8, 8)
