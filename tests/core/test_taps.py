"""The factors of a tap are those of the per-example gradients that vmap(grad) gives."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import paths, taps

GOLDEN = Path(__file__).parents[1] / "models" / "golden"
FAMILIES = ("gpt2", "llama-biases", "opt-projected", "bert-untied", "roberta-classifier")
BATCH = {
    "input_ids": jnp.array([[5, 6, 7, 1], [8, 9, 10, 11], [8, 8, 8, 8]]),
    "attention_mask": jnp.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),
}


TOKENS = jnp.array([20, 3, 30])
OPS = {"kernel": "dense", "bias": "bias", "scale": "scale", "embedding": "embed"}


def score(lm, **options):
    """A function of each example that weighs its logits unevenly."""

    def f(params, x, *, tap=None):
        out = lm.apply(params, **x, **options, tap=tap)
        out = out.reshape(out.shape[0], -1)
        return out @ jnp.cos(jnp.arange(out.shape[1]))

    return f


def by_path(tree):
    return {leaf.path: leaf.value for leaf in paths.flatten(tree)[0]}


def per_example(f, params, x):
    """Path -> [N, *shape of the leaf], by vmap(grad)."""
    one = lambda params, row: f(params, jax.tree.map(lambda a: a[None], row))[0]  # noqa: E731
    return by_path(jax.vmap(jax.grad(one), in_axes=(None, 0))(params, x))


def gradient(op, a, b, shape):
    """Per-example gradients of one leaf from its factors, by the table of the module."""
    b = b.reshape(len(b), -1, b.shape[-1])
    if op == "embed":
        add = lambda rows, values: jnp.zeros(shape).at[rows].add(values)  # noqa: E731
        return jax.vmap(add)(a.reshape(len(a), -1).astype(int), b)
    a = a.reshape(len(a), -1, a.shape[-1])
    if op == "dense":
        return jnp.einsum("nti,nto->nio", a, b)
    if op == "head":
        return jnp.einsum("ntv,ntd->nvd", b, a)
    if op == "bias":
        return b.sum(1)
    assert op == "scale"
    return (a * b).sum(1)


def from_factors(lm, factors, token_ids=None):
    """Path -> [N, *shape of the leaf], from the factors."""
    leaves, found = by_path(lm.params), {}
    for path, (a, b) in factors.items():
        op = "head" if path == "lm_head" else OPS[path.rsplit(".", 1)[1]]
        if op == "head":
            path = "embed.tokens.embedding" if lm.config.tie_embeddings else "lm_head.embedding"
        shape = leaves[path].shape
        if path.startswith("layers."):
            layers = [gradient(op, *pair, shape[1:]) for pair in zip(a, b, strict=True)]
            value = jnp.stack(layers, axis=1)
        else:
            value = gradient(op, a, b, shape)
        if token_ids is not None and (op == "head" or path == "lm_head.bias"):
            value = jnp.zeros((len(value), *shape)).at[:, token_ids].set(value)
        found[path] = found.get(path, 0) + value
    return found


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        atol = 1e-5 * (1 + np.abs(value).max())
        np.testing.assert_allclose(found[path], value, atol=atol, err_msg=path)


@pytest.mark.parametrize("name", FAMILIES)
def test_factors_of_every_leaf_of_every_family(name: str):
    lm = jaxlm.from_pretrained(GOLDEN / name)
    f = score(lm)

    @jax.jit
    def both(params):
        factors = taps.factors(f, params, BATCH, num_layers=lm.config.num_layers)
        return from_factors(lm, factors), per_example(f, params, BATCH)

    assert_equal(*both(lm.params))


def test_a_head_restricted_to_positions_and_tokens():
    lm = jaxlm.from_pretrained(GOLDEN / "bert-untied")
    f = score(lm, token_ids=TOKENS)
    batch = {**BATCH, "positions": jnp.array([2, 3, 0])}

    @jax.jit
    def both(params):
        factors = taps.factors(f, params, batch, num_layers=2)
        assert factors["lm_head"][0].shape == (3, 24)
        assert factors["lm_head"][1].shape == (3, 3)
        return from_factors(lm, factors, TOKENS), per_example(f, params, batch)

    assert_equal(*both(lm.params))


def test_several_cotangents_and_rematerialisation():
    lm = jaxlm.from_pretrained(GOLDEN / "gpt2")
    f = score(lm)
    cotangents = jnp.array([[1.0, 0.0, 0.0], [1.0, -2.0, 0.5]])

    def remat(params, x, *, tap):
        return jax.checkpoint(lambda params: f(params, x, tap=tap))(params)

    @jax.jit
    def both(params):
        def grads(function):
            return jax.vmap(
                lambda cotangent: from_factors(
                    lm,
                    taps.factors(function, params, BATCH, num_layers=2, cotangent=cotangent),
                )
            )(cotangents)

        return grads(f), grads(remat), per_example(f, params, BATCH)

    found, rematerialised, single = both(lm.params)
    wanted = jax.tree.map(lambda value: jnp.einsum("kn,n...->kn...", cotangents, value), single)
    assert_equal(found, wanted)
    assert_equal(rematerialised, wanted)


def test_every_parameter_passes_one_tap_and_says_how():
    lm = jaxlm.from_pretrained(GOLDEN / "bert-untied")
    seen = []

    class Record:
        layers = None

        def __call__(self, path, op, x, y, layer):
            seen.append((path, op, layer is not None))
            return y

    jax.eval_shape(lambda: lm.apply(lm.params, **BATCH, tap=Record()))
    wanted = []
    for leaf in paths.flatten(lm.params)[0]:
        path, op = leaf.path, OPS[leaf.path.rsplit(".", 1)[1]]
        head = path == "lm_head.embedding"
        wanted.append(("lm_head", "head", False) if head else (path, op, leaf.stacked))
    assert sorted(seen) == sorted(wanted)


def test_the_factors_of_a_dense_layer_in_closed_form():
    # y = x W + b, f = sum y^2: the gradient of W for one example is x^T 2y, that of b is 2y.
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    params = {"w": {"kernel": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "bias": jnp.array([1.0, -1.0])}}

    def f(params, x, *, tap):
        y = taps.apply(tap, "w.kernel", "dense", x, x @ params["w"]["kernel"], None)
        y = taps.apply(tap, "w.bias", "bias", y, y + params["w"]["bias"][None], None)
        return (y**2).sum(-1)

    factors = taps.factors(f, params, x, num_layers=0)
    y = np.array([[2.0, 3.0], [4.0, 7.0]])
    np.testing.assert_array_equal(factors["w.kernel"][0], x)
    np.testing.assert_array_equal(factors["w.kernel"][1], 2 * y)
    np.testing.assert_array_equal(factors["w.bias"][1], 2 * y)
