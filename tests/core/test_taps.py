"""The factors of a tap are those of the per-example gradients that vmap(grad) gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import paths, taps
from tests.helpers.models import GOLDEN

slow = pytest.mark.slow
FAMILIES = ("gpt2", "llama-biases", "roberta-classifier")
OTHERS = ("opt-projected", "bert-untied")
HEAD = ("lm_head.embedding", "head")
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


@functools.cache
def of_gpt2():
    """`per_example` of the scores of BATCH."""
    lm = jaxlm.from_pretrained(GOLDEN / "gpt2")
    return jax.jit(lambda params: per_example(score(lm), params, BATCH))(lm.params)


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


def from_factors(lm, factors):
    """Path -> [N, *shape of the leaf], from the factors."""
    leaves, found = by_path(lm.params), {}
    for (path, op), (a, b, rows) in factors.items():
        shape = leaves[path].shape
        if path.startswith("layers."):
            layers = [gradient(op, *pair, shape[1:]) for pair in zip(a, b, strict=True)]
            value = jnp.stack(layers, axis=1)
        else:
            value = gradient(op, a, b, shape)
        if rows is not None:
            value = jnp.zeros((len(value), *shape)).at[:, rows.astype(int)].add(value)
        found[path] = found.get(path, 0) + value
    return found


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        atol = 1e-5 * (1 + np.abs(value).max())
        np.testing.assert_allclose(found[path], value, atol=atol, err_msg=path)


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(x, marks=slow) for x in OTHERS)])
def test_factors_of_every_leaf_of_every_family(name: str):
    lm = jaxlm.from_pretrained(GOLDEN / name)
    f = score(lm)

    @jax.jit
    def both(params):
        factors = taps.factors(f, params, BATCH)
        return from_factors(lm, factors), per_example(f, params, BATCH)

    assert_equal(*both(lm.params))


def test_a_head_restricted_to_positions_and_tokens():
    lm = jaxlm.from_pretrained(GOLDEN / "bert-untied")
    f = score(lm, token_ids=TOKENS)
    batch = {**BATCH, "positions": jnp.array([2, 3, 0])}

    @jax.jit
    def both(params):
        factors = taps.factors(f, params, batch)
        assert [part.shape for part in factors[HEAD]] == [(3, 24), (3, 3), (3,)]
        return factors, from_factors(lm, factors), per_example(f, params, batch)

    factors, *gradients = both(lm.params)
    assert_equal(*gradients)
    np.testing.assert_array_equal(factors[HEAD].rows, TOKENS)
    np.testing.assert_array_equal(factors["lm_head.bias", "bias"].rows, TOKENS)


def test_a_tied_table_has_the_factors_of_both_uses():
    lm = jaxlm.from_pretrained(GOLDEN / "gpt2")
    found = taps.uses(score(lm), lm.params, BATCH)
    path = "embed.tokens.embedding"
    assert {key[1] for key in found if key[0] == path} == {"embed", "head"}


def test_several_cotangents_and_rematerialisation():
    lm = jaxlm.from_pretrained(GOLDEN / "gpt2")
    f = score(lm)
    cotangents = jnp.array([[1.0, 0.0, 0.0], [1.0, -2.0, 0.5]])

    def remat(params, x, *, tap):
        return jax.checkpoint(lambda params: f(params, x, tap=tap))(params)

    @jax.jit
    def both(params):
        def grads(function):
            factors = taps.factors(function, params, BATCH, cotangents=cotangents)
            wide = {key: part.b.shape[0] for key, part in factors.items()}
            assert set(wide.values()) == {2}
            axes = {key: taps.Factors(None, 0, None) for key in factors}
            return jax.vmap(lambda factors: from_factors(lm, factors), (axes,))(factors)

        return grads(f), grads(remat)

    found, rematerialised = both(lm.params)
    wanted = {path: np.einsum("kn,n...->kn...", cotangents, g) for path, g in of_gpt2().items()}
    assert_equal(found, wanted)
    assert_equal(rematerialised, wanted)


def square_norms(key, a, b, layer, scale):
    """A rule: |gradient|^2 of every cotangent and example; and the same times (1 + layer) scale."""
    found = jax.vmap(lambda b: gradient(key[1], a, b, None))(b)
    norms = jnp.square(found).reshape(*found.shape[:2], -1).sum(-1)
    return norms, (1 + layer) * (1.0 if scale is None else scale) * norms


@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=slow), "layer"])
def test_a_rule_sees_every_use_in_a_layer_with_all_cotangents(remat: str):
    lm = jaxlm.from_pretrained(GOLDEN / "gpt2")
    lm = lm.replace(config=lm.config.replace(remat=remat))
    f = score(lm)
    cotangents = jnp.array([[1.0, 0.0, 0.0], [1.0, -2.0, 0.5]])
    scaled = ("layers.mlp.up_proj.kernel", "dense")
    extras = {scaled: jnp.array([3.0, 5.0])}

    @jax.jit
    def both(params):
        found = taps.reduce(f, params, BATCH, square_norms, cotangents=cotangents, extras=extras)
        return found, taps.factors(f, params, BATCH, cotangents=cotangents)

    (total, own, rest), factors = both(lm.params)
    layers = {
        path: np.square(g).reshape(*g.shape[:2], -1).sum(-1).T
        for path, g in of_gpt2().items()
        if path.startswith("layers.")
    }
    weights = np.square(cotangents)
    assert {path for path, _ in own} == set(layers)
    np.testing.assert_allclose(total, weights * sum(l.sum(0) for l in layers.values()), rtol=1e-4)
    for (path, op), value in own.items():
        scale = np.array([3.0, 5.0]) if (path, op) == scaled else np.ones(2)
        wanted = (scale * [1, 2])[:, None, None] * weights * layers[path][:, None]
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-6 * total.max())
    assert {key for key in factors if not key[0].startswith("layers.")} == set(rest)
    for key, part in rest.items():
        jax.tree.map(np.testing.assert_array_equal, part, factors[key])


def test_uses_are_counted():
    lm = jaxlm.from_pretrained(GOLDEN / "gpt2")
    f = score(lm)

    def twice(params, x, *, tap=None):
        return f(params, x, tap=tap) - f(params, x, tap=tap)

    for function, times in ((f, 1), (twice, 2)):
        for (path, _), use in taps.uses(function, lm.params, BATCH).items():
            assert use.stacked == path.startswith("layers.")
            assert use.times == times * (2 if use.stacked else 1)


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
        op = "head" if leaf.path == HEAD[0] else OPS[leaf.path.rsplit(".", 1)[1]]
        wanted.append((leaf.path, op, leaf.stacked))
    assert sorted(seen) == sorted(wanted)


def test_the_factors_of_a_dense_layer_in_closed_form():
    # y = x W + b, f = sum y^2: the gradient of W for one example is x^T 2y, that of b is 2y.
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    params = {"w": {"kernel": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "bias": jnp.array([1.0, -1.0])}}

    def f(params, x, *, tap):
        y = taps.apply(tap, "w.kernel", "dense", x, x @ params["w"]["kernel"], None)
        y = taps.apply(tap, "w.bias", "bias", y, y + params["w"]["bias"][None], None)
        return (y**2).sum(-1)

    factors = taps.factors(f, params, x)
    y = np.array([[2.0, 3.0], [4.0, 7.0]])
    np.testing.assert_array_equal(factors["w.kernel", "dense"].a, x)
    np.testing.assert_array_equal(factors["w.kernel", "dense"].b, 2 * y)
    np.testing.assert_array_equal(factors["w.bias", "bias"].b, 2 * y)
