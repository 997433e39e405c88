"""The gradients of each example are those that the whole batch's Jacobian has; PyTorch agrees."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import kernels
from jaxlm.core import paths
from jaxlm.kernels import gram
from jaxlm.kernels.jacobian import gradients
from tests.kernels import oracle

GOLDEN = Path(__file__).parents[1] / "models" / "golden"


def test_gradients_have_layers_apart():
    f, params = oracle.toy(3)
    x = oracle.toy_examples(4)
    wanted = oracle.jacobian(f, params, x)
    params = oracle.of_dtype(params, jnp.float32)
    found = gradients(f, params, x)
    for leaf, rows in zip(paths.flatten(params)[0], found, strict=True):
        assert rows.shape[:3] == (4, 3, 2 if leaf.stacked else 1)
        for layer in range(rows.shape[2]):
            value = wanted[leaf.path, layer if leaf.stacked else None]
            np.testing.assert_allclose(rows[:, :, layer], value, atol=1e-5)


def test_signs_by_hand():
    # Two leaves of two slices: entries below 0.1 of their slice, and a slice below 0.1 of all.
    a = jnp.array([[[[10.0, -2.0, 0.5], [0.0, -1.5, 1.4]]]])
    b = jnp.array([[[[1.0, 0.2], [0.9, -0.9]]]])
    found_a, found_b = gram.signs([a, b], 0.1)
    np.testing.assert_array_equal(found_a[0, 0], [[1, -1, 0], [0, -1, 1]])
    np.testing.assert_array_equal(found_b[0, 0], [[0, 0], [0, 0]])
    # 0.5 of a, and the four of b: five of nine that are not zero
    assert gram.dropped([a, b], 0.1).shape == (1,)
    np.testing.assert_allclose(gram.dropped([a, b], 0.1), 5 / 9, rtol=1e-6)
    np.testing.assert_array_equal(gram.signs([b], 0.0)[0], jnp.sign(b))


def test_a_sign_does_not_hide_nan():
    bad = jnp.array([[[[1.0, jnp.nan]]], [[[1.0, -2.0]]], [[[jnp.inf, 1.0]]]])
    (found,) = gram.signs([bad])
    assert np.isnan(found[0]).all()
    assert np.isnan(found[2]).all()
    np.testing.assert_array_equal(found[1], [[[1.0, -1.0]]])


def test_half_precision_is_summed_in_float32():
    # 4096 ones and a half: bfloat16 has 8 bits and would end at 256 in a running sum
    params = jnp.ones((4096, 1), jnp.bfloat16)
    x = jnp.ones((2, 4096), jnp.bfloat16).at[0, 0].set(1.5)
    found = kernels.ntk(lambda params, x: x @ params, params, x, check=False)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[:, 0, :, 0], [[4097.25, 4096.5], [4096.5, 4096.0]])


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
        "sgd": (first, second),
        "signgd": (first.sign(), second.sign()),
        "asymmetric_signgd": (first, second.sign()),
    }
    params, x1, x2 = oracle.of_dtype((weights, x1, x2), jnp.float32)
    for kind, (left, right) in pairs.items():
        wanted = torch.einsum("ncp,mdp->ncmd", left, right).numpy()
        for method in ("jacobian", "ntk_vector_products"):
            found = kernels.ntk(f, params, x1, x2, kind=kind, method=method, sign_threshold=0)
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
