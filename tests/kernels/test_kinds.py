"""What the kinds make of gradients, against closed forms, optax and PyTorch."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlm
from jaxlm import kernels
from jaxlm.kernels import kinds
from tests.kernels import oracle
from tests.kernels.test_common import UNCHECKED, assert_close, toy_problem

B2, EPS = 0.99, 1e-4
GOLDEN = Path(__file__).parents[1] / "models" / "golden"


def test_signs_by_hand():
    # Two leaves of two slices: entries below 0.1 of their slice, and a slice below 0.1 of all.
    a = jnp.array([[[[10.0, -2.0, 0.5], [0.0, -1.5, 1.4]]]])
    b = jnp.array([[[[1.0, 0.2], [0.9, -0.9]]]])
    found_a, found_b = kinds.signs([a, b], 0.1)
    np.testing.assert_array_equal(found_a[0, 0], [[1, -1, 0], [0, -1, 1]])
    np.testing.assert_array_equal(found_b[0, 0], [[0, 0], [0, 0]])
    # 0.5 of a, and the four of b: five of nine that are not zero
    assert kinds.dropped([a, b], 0.1).shape == (1,)
    np.testing.assert_allclose(kinds.dropped([a, b], 0.1), 5 / 9, rtol=1e-6)
    np.testing.assert_array_equal(kinds.signs([b], 0.0)[0], jnp.sign(b))


def test_a_sign_does_not_hide_nan():
    bad = jnp.array([[[[1.0, jnp.nan]]], [[[1.0, -2.0]]], [[[jnp.inf, 1.0]]]])
    (found,) = kinds.signs([bad], 1e-6)
    assert np.isnan(found[0]).all()
    assert np.isnan(found[2]).all()
    np.testing.assert_array_equal(found[1], [[[1.0, -1.0]]])


def test_half_precision_is_summed_in_float32():
    # 4096 ones and a half: bfloat16 has 8 bits and would end at 256 in a running sum
    params = jnp.ones((4096, 1), jnp.bfloat16)
    x = jnp.ones((2, 4096), jnp.bfloat16).at[0, 0].set(1.5)
    found = kernels.ntk(lambda params, x: x @ params, params, x, options=UNCHECKED)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[:, 0, :, 0], [[4097.25, 4096.5], [4096.5, 4096.0]])


def test_the_adam_kernel_is_one_step_of_optax():
    f, params, x1, x2, first, _ = toy_problem(1)
    with jax.enable_x64(True):
        params = oracle.of_dtype(params, jnp.float64)
        tx = optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(1e-3, b2=B2, eps=EPS))
        state = tx.init(params)
        rng = np.random.default_rng(1)
        update = jax.jit(lambda noise, state: tx.update(noise, state, params)[1])
        for _ in range(3):
            noise = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), params)
            state = update(noise, state)
        found = kernels.ntk(f, params, x1, x2, kind=kernels.Adam(state, b2=B2, eps=EPS))
        adam = optax.scale_by_adam(b2=B2, eps=EPS)

        @jax.jit
        def step_on(row):
            gradient = jax.grad(lambda params: f(params, row)[0, 0])(params)
            return adam.update(gradient, state[1][0])[0]

        for m in range(2):
            step = step_on(jax.tree.map(lambda a, m=m: a[m : m + 1], x2))
            moved = oracle.by_place(step, step)
            wanted = sum(first[place][:, 0] @ np.ravel(moved[place][0]) for place in first)
            assert_close(found[:, 0, m, 0], wanted, 1e-10)


def test_a_fresh_adam_is_signgd():
    f, params, x1, x2, *_ = toy_problem(1)
    with jax.enable_x64(True):
        params = oracle.of_dtype(params, jnp.float64)
        fresh = optax.adam(1.0).init(params)
        options = {"options": UNCHECKED, "select": "up|head|embed"}
        adam = kernels.ntk(f, params, x1, x2, kind=kernels.Adam(fresh, eps=0), **options)
        signs = kernels.ntk(f, params, x1, x2, kind=kernels.AsymmetricSignGD(0), **options)
        assert_close(adam, np.asarray(signs), 1e-12)


def test_the_useless_bias_has_no_sign():
    f, params, x1, *_ = toy_problem(1)
    params = oracle.of_dtype(params, jnp.float32)
    options = {"select": "key.bias|up.bias", "options": UNCHECKED}
    found, info = kernels.ntk_with_info(f, params, x1, kind="signgd", **options)
    # Two layers of four entries in up.bias; key.bias is noise.
    np.testing.assert_array_equal(np.diagonal(found[:, 0, :, 0]), 8)
    noisy = kernels.ntk(f, params, x1, kind=kernels.SignGD(0), **options)
    assert (np.diagonal(noisy[:, 0, :, 0]) > 8).any()
    np.testing.assert_array_equal(info.dropped1, info.dropped2)
    # at most those of key.bias, half of all; in an example of one token even that is exactly 0
    assert info.dropped1.max() > 0.2
    assert np.all(info.dropped1 <= 0.5)


def test_the_dropped_fraction_in_closed_form():
    x1, x2 = np.array([[1.0, 1e-3, 0, 0]], np.float32), np.array([[1.0, 1, 1e-3, 1e-4]], np.float32)
    f = lambda params, x: x @ params  # noqa: E731
    at = functools.partial(kernels.ntk_with_info, f, jnp.ones((4, 1)), x1, x2, options=UNCHECKED)
    signed = kernels.AsymmetricSignGD(0.01), kernels.SignGD(0.01)
    for kind, lost in zip((kernels.SGD(), *signed), ((0, 0), (0, 0.5), (0.5, 0.5)), strict=True):
        found, info = at(kind=kind)
        assert (info.dropped1[0], info.dropped2[0]) == lost
        assert info.method == "jacobian"
        wanted = 1 if kind == signed[1] else 1 + 1e-3
        np.testing.assert_allclose(found[0, 0, 0, 0], wanted, rtol=1e-6)


@pytest.mark.torch
def test_kernels_of_torch_func():
    import torch
    from torch.func import functional_call, jacrev, vmap

    rng = np.random.default_rng(0)
    shapes = {"0.weight": (9, 5), "0.bias": (9,), "2.weight": (3, 9), "2.bias": (3,)}
    weights = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    x1, x2 = rng.standard_normal((4, 5)), rng.standard_normal((6, 5))
    network = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
    theirs = {name: torch.tensor(value) for name, value in weights.items()}

    def rows(x):
        one = lambda params, row: functional_call(network, params, (row[None],))[0]  # noqa: E731
        found = vmap(jacrev(one), (None, 0))(theirs, torch.tensor(x))
        return torch.cat([found[name].flatten(2) for name in shapes], 2)

    def f(params, x):
        h = jnp.tanh(x @ params["0.weight"].T + params["0.bias"][None])
        return h @ params["2.weight"].T + params["2.bias"][None]

    first, second = rows(x1), rows(x2)
    pairs = {
        kernels.SGD(): (first, second),
        kernels.SignGD(0): (first.sign(), second.sign()),
        kernels.AsymmetricSignGD(0): (first, second.sign()),
    }
    params, x1, x2 = oracle.of_dtype((weights, x1, x2), jnp.float32)
    for kind, (left, right) in pairs.items():
        wanted = torch.einsum("ncp,mdp->ncmd", left, right).numpy()
        for method in ("jacobian", "ntk_vector_products"):
            found = kernels.ntk(f, params, x1, x2, kind=kind, method=method)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.torch
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_kernels_of_transformers_on_the_same_weights(name):
    import torch
    from torch.func import functional_call, grad
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    ids = np.array([[5, 6, 7, 0], [8, 9, 10, 11], [8, 8, 9, 8]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    last = mask.sum(1) - 1
    reader = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    model = reader.from_pretrained(GOLDEN / name, dtype=torch.float64).eval()
    weights = {key: value.detach() for key, value in model.named_parameters()}

    def theirs(weights, n):
        arguments = {"input_ids": torch.tensor(ids[n : n + 1, : last[n] + 1])}
        logits = functional_call(model, weights, (), arguments).logits[0, int(last[n])]
        return logits[4] - logits[3]

    rows = [grad(theirs)(weights, n) for n in range(3)]
    wanted = np.array(
        [[sum(float((a[k] * b[k]).sum()) for k in weights) for b in rows] for a in rows]
    )
    lm = jaxlm.from_pretrained(GOLDEN / name)

    def f(params, x):
        words = np.array([3, 4], np.int32)
        logits = lm.apply(params, x["ids"], x["mask"], positions=x["last"], token_ids=words)
        return logits[:, 1:] - logits[:, :1]

    x = {"ids": ids, "mask": mask, "last": last}
    with jax.default_matmul_precision("highest"):
        found = kernels.ntk(f, lm.params, x, trace_axes=(-1,))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
