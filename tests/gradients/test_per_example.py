"""Per-example gradients by factors against those of one example after another."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import paths, taps
from jaxlm.gradients import per_example
from tests.helpers.sentences import refused

GOLDEN = Path(__file__).parents[1] / "models" / "golden"
IDS = np.array([[5, 6, 7, 1, 4], [8, 9, 10, 11, 3], [8, 8, 8, 8, 8]])


def losses_of(lm):
    """[N], of logits weighed unevenly."""

    def f(params, ids, *, tap=None):
        out = lm.apply(params, ids, tap=tap).reshape(len(ids), -1)
        return jnp.sin(out) @ jnp.cos(jnp.arange(out.shape[1]))

    return f


def forms(gradient, extra, shared):
    """The gradients themselves, with what came with them."""
    g = gradient.formed()
    if extra is not None:
        g = g + extra[None]
    return {"count": jnp.ones(len(g))}, g + (0 if shared is None else shared)


def one_by_one(f, params, ids, select):
    """Gradients of a batch of one after another."""
    taken, rest = paths.split(params, select)
    grad = jax.jit(jax.grad(lambda taken, row: f(paths.merge(taken, rest), row[None])[0]))
    rows = [jax.tree.leaves(grad(taken, row)) for row in ids]
    return [np.stack(leaf) for leaf in zip(*rows, strict=True)]


@pytest.mark.parametrize(
    ("name", "select"),
    [
        ("gpt2", None),
        ("llama", "q_proj|norm|lm_head"),
        ("modernbert", "norm|mlm"),
        pytest.param("opt-projected", "pro", marks=pytest.mark.slow),
        pytest.param("gemma3_text", "norm|k_proj", marks=pytest.mark.slow),
        pytest.param("granite", "embed|up_proj", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_use(name: str, select):
    lm = jaxlm.from_pretrained(GOLDEN / name)
    f = losses_of(lm)
    assert per_example.untapped(f, lm.params, IDS, select) is None
    run = jax.jit(lambda params: per_example.reduce(f, params, IDS, forms, select=select))
    found = run(lm.params)
    wanted = one_by_one(f, lm.params, IDS, select)
    np.testing.assert_allclose(found.losses, jax.jit(f)(lm.params, IDS), rtol=1e-6)
    assert len(found.own) == len(wanted)
    for g, expected in zip(found.own, wanted, strict=True):
        np.testing.assert_allclose(g, expected, atol=2e-5 * (1 + np.abs(expected).max()))
    # Once for each leaf outside layers and for each layer of a stack.
    leaves = paths.flatten(paths.split(lm.params, select)[0])[0]
    calls = sum(leaf.value.shape[0] if leaf.stacked else 1 for leaf in leaves)
    assert found.total["count"].tolist() == [calls] * 3


paths.declare_stacked({"layers.kernel": 2, "layers.bias": 1})


def two_layers(params, batch, *, tap=None):
    """Losses [rows, 3] of examples in segments: each token sees those before it in its own."""
    ids, segments = batch["ids"], batch["segments"]
    x = params["table"][ids]
    here = (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, None]
    here = jnp.tril(here | jnp.eye(ids.shape[1], dtype=bool)[None])
    weights = here / here.sum(-1, keepdims=True)

    def body(x, scanned):
        p, layer, slices = scanned
        seen = tap if slices is None else dataclasses.replace(tap, layers=slices)
        mixed = weights @ x
        y = mixed @ p["kernel"]
        y = taps.apply(seen, "layers.kernel", "dense", mixed, y, layer)
        z = y + p["bias"][None, None]
        return x + jnp.tanh(taps.apply(seen, "layers.bias", "bias", y, z, layer)), None

    rest = (jnp.arange(2), None if tap is None else tap.layers)
    x, _ = jax.lax.scan(body, x, (params["layers"], *rest))
    out = taps.apply(tap, "head", "dense", x, x @ params["head"], None)
    scored = jax.nn.log_softmax(out)[:, :-1]
    scored = jnp.take_along_axis(scored, ids[:, 1:, None], -1)[..., 0]
    own = segments[:, None] == jnp.arange(1, 4)[None, :, None]
    counted = own[:, :, 1:] & own[:, :, :-1]
    total = jnp.where(counted, -scored[:, None], 0).sum(-1)
    return total / jnp.maximum(counted.sum(-1), 1)


def two_layer_params():
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    layers = {"kernel": drawn(2, 4, 4), "bias": drawn(2, 4)}
    return {"table": drawn(9, 4), "layers": layers, "head": drawn(4, 9)}


def test_packed_rows_have_the_gradients_of_their_examples():
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 9, length) for length in (4, 3, 2, 6, 3)]
    rows = [[0, 1, 2], [3, 4]]
    packed = {name: np.zeros((2, 10), np.int32) for name in ("ids", "segments")}
    for at, members in enumerate(rows):
        joined = np.concatenate([texts[i] for i in members])
        marks = np.concatenate([[k + 1] * len(texts[i]) for k, i in enumerate(members)])
        packed["ids"][at, : len(joined)], packed["segments"][at, : len(joined)] = joined, marks
    alone = {name: np.zeros((5, 6), np.int32) for name in ("ids", "segments")}
    for i, text in enumerate(texts):
        alone["ids"][i, : len(text)], alone["segments"][i, : len(text)] = text, 1

    params = two_layer_params()
    extras = [jnp.full(leaf.shape, 0.5) for leaf in jax.tree.leaves(params)[:3]]

    @jax.jit
    def by_segments(params, batch):
        return per_example.reduce(
            two_layers,
            params,
            batch,
            forms,
            select="layers|head",
            segments=jnp.asarray(batch["segments"]),
            extras=extras,
            shared=jnp.float32(0.25),
        )

    found, wanted = by_segments(params, packed), by_segments(params, alone)
    places = [0, 1, 2, 3, 4]  # of [2, 3], the last of which is empty
    first = 3 * np.arange(5)  # of [5, 3], of which one is taken
    np.testing.assert_allclose(found.losses[jnp.array(places)], wanted.losses[first], rtol=1e-5)
    for g, expected in zip(found.own, wanted.own, strict=True):
        assert g.shape[0] == 6
        np.testing.assert_allclose(g[:5], expected[first], atol=1e-5)
        np.testing.assert_array_equal(g[5], jnp.full(g.shape[1:], 0.75))
    # and those are the gradients that automatic differentiation gives, with what was added to them
    gradient = jax.jit(jax.grad(lambda params, row: two_layers(params, row)[0, 0]))
    for i in range(5):
        grad = gradient(params, {name: value[i : i + 1] for name, value in alone.items()})
        expected = [grad["head"], grad["layers"]["bias"], grad["layers"]["kernel"]]
        for g, one in zip(found.own, expected, strict=True):
            np.testing.assert_allclose(g[i] - 0.75, one, atol=1e-5)


def test_a_layer_list_and_a_parameter_that_is_not_used():
    lm = jaxlm.from_pretrained(GOLDEN / "llama")
    f = losses_of(lm)
    layers = [jax.tree.map(lambda a, i=i: a[i], lm.params["layers"]) for i in range(2)]
    params = {**lm.params, "layers": layers, "more": jnp.ones(3)}
    select = "up_proj|more"
    found = jax.jit(lambda p: per_example.reduce(f, p, IDS, forms, select=select))(params)
    wanted = one_by_one(f, params, IDS, select)
    assert [g.shape for g in found.own] == [g.shape for g in wanted]
    for g, expected in zip(found.own, wanted, strict=True):
        np.testing.assert_allclose(g, expected, atol=2e-5 * (1 + np.abs(expected).max()))


def test_what_no_tap_sees_has_its_gradients_all_the_same():
    """A parameter used twice, one that no tap sees, and a function of one example."""

    def f(params, x, *, tap=None):
        y = taps.apply(tap, "w", "dense", x, x @ params["w"], None)
        z = taps.apply(tap, "w", "dense", y, y @ params["w"], None)
        return (z * params["v"]).sum(-1)

    params = {"w": jnp.array([[1.0, 2.0], [0.5, -1.0]]), "v": jnp.array([[1.0, 3.0]])}
    x = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])
    assert per_example.untapped(f, params, x, "w") == "w is used more than once"
    assert per_example.untapped(f, params, x, "v") == "v passes no tap"
    alone = lambda params, row: f(params, row[None])[0]  # noqa: E731
    assert per_example.untapped(alone, params, x) == "it has no keyword tap"
    wanted = jax.vmap(jax.grad(alone), (None, 0))(params, x)
    for loss in (f, alone):
        found = per_example.reduce(loss, params, x, forms)
        for g, expected in zip(found.own, jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(g, expected, rtol=1e-6)


def test_mistakes_are_named():
    params, x = {"w": jnp.ones((2, 2))}, jnp.ones((3, 2))

    def alone(params, row):
        return (row @ params["w"]).sum()

    def summed(params, x, *, tap=None):
        return taps.apply(tap, "w", "dense", x, x @ params["w"], None).sum()

    segments = jnp.ones((3, 2), int)
    with refused("segments", "but it has no keyword tap"):
        per_example.reduce(alone, params, x, forms, segments=segments)
    with refused("loss_fn", "must return [3] (got ())"):
        per_example.reduce(summed, params, x, forms)
    batch = {"ids": np.ones((1, 5), int), "segments": np.ones((1, 5), int)}
    with refused("segments", "(5,) positions", "(got (4,))"):
        per_example.reduce(
            two_layers,
            two_layer_params(),
            batch,
            forms,
            select="head",
            segments=segments[:1, :1] * jnp.ones((1, 4), int),
        )


def test_what_a_function_reads_is_seen_through_loops_and_calls():
    def f(params, x):
        def layer(x, w):
            return jnp.tanh(x * w["used"]), None

        x, _ = jax.lax.scan(layer, x, params["layers"])
        x = jax.jit(lambda a, unused: a * params["b"])(x, params["passed"])
        return jax.lax.cond(True, lambda: x * params["either"], lambda: x)

    params = {
        "layers": {"used": jnp.ones(2), "idle": jnp.ones(2)},
        **{name: jnp.ones(()) for name in ("b", "passed", "either", "alone")},
    }
    expected = {"layers.used", "b", "either"}
    assert taps.read(f, params, jnp.ones(3)) == expected
    gradients = jax.grad(lambda params: f(params, jnp.ones(3)).sum())(params)
    moving = {leaf.path for leaf in paths.flatten(gradients)[0] if jnp.abs(leaf.value).max() > 0}
    assert moving == expected
