"""Gradient features against one gradient after another, an explicit matrix and optax."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlm
from jaxlm import influence, peft
from jaxlm.core import paths, taps
from jaxlm.influence import Adam
from jaxlm.influence import features as module
from jaxlm.models import transformer
from jaxlm.models.scoring import log_probs_of
from jaxlm.sharding import make_mesh
from tests.helpers.sentences import refused
from tests.helpers.slow import slow

pytestmark = pytest.mark.optimized

LLAMA = Path(__file__).parents[1] / "models" / "golden" / "llama"
DIM = 64


def network(params, x, *, tap=None):
    """Losses [N] of two layers outside a scan, every parameter tapped."""
    y = taps.apply(tap, "a", "dense", x, x @ params["a"], None)
    z = taps.apply(tap, "c", "bias", y, y + params["c"][None], None)
    h = jnp.tanh(z)
    return jnp.square(taps.apply(tap, "b", "dense", h, h @ params["b"], None)).sum(-1)


def alone(params, x):
    """The loss of one example."""
    return network(params, x[None])[0]


def problem(count=11, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 9), "b": (9, 2), "c": (9,)}
    params = {k: jnp.asarray(0.2 * rng.standard_normal(s), dtype) for k, s in shapes.items()}
    return params, rng.standard_normal((count, 6)).astype(dtype)


def trained(params, transformation, count=3):
    """The state after some steps on random gradients."""
    state, rng = transformation.init(params), np.random.default_rng(5)
    update = jax.jit(lambda g, state: transformation.update(g, state, params)[1])
    for _ in range(count):
        g = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
        state = update(g, state)
    return state


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def brute(loss, params, examples, update=lambda tree: tree):
    """Gradients [N, P] of one example after another, or what `update` makes of each."""
    grad = jax.jit(jax.grad(loss))
    count = len(jax.tree.leaves(examples)[0])
    trees = (grad(params, jax.tree.map(lambda a, i=i: a[i], examples)) for i in range(count))
    return np.stack([flat(update(tree)) for tree in trees])


def explicit_matrix(drawn, tree):
    """S [P, R] of a projector, the projection of every unit vector of one layer after another."""
    project, parts = jax.jit(drawn.leaf, static_argnums=0), []
    for leaf in paths.flatten(tree)[0]:
        for layer in range(leaf.value.shape[0]) if leaf.stacked else (leaf.layer,):
            size = leaf.value[0].size if leaf.stacked else leaf.value.size
            parts.append(np.asarray(project(leaf.path, layer, jnp.eye(size)), np.float64))
    return np.concatenate(parts)


def close(found, expected, tolerance):
    scale = np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.all(np.abs(found - expected) <= tolerance * scale)


@functools.cache
def lora_llama():
    lm = peft.lora(jaxlm.from_pretrained(LLAMA), jax.random.key(0), rank=2)

    def drawn(leaf):
        is_b = leaf.path.endswith("lora_b")
        return jax.random.normal(jax.random.key(1), leaf.value.shape) if is_b else leaf.value

    return lm.replace(params=paths.map_with_path(drawn, lm.params))


def completion_loss(lm):
    """Mean negative log-probability [N] of the tokens of a mask."""

    def loss(params, batch, *, tap=None):
        x = lm.hidden(params, batch["ids"], tap=tap)
        logits = transformer.logits(lm.config, params, x, tap=tap)
        scored = log_probs_of(logits[:, :-1], batch["ids"][:, 1:])
        counted = batch["mask"][:, 1:]
        return -(scored * counted).sum(1) / counted.sum(1)

    return loss


def texts(count=5):
    rng = np.random.default_rng(2)
    mask = np.ones((count, 7), np.int32)
    mask[:, :3] = 0
    return {"ids": rng.integers(3, 24, (count, 7)), "mask": mask}


def test_a_language_model_with_adapters_against_an_explicit_matrix(monkeypatch):
    lm, examples = lora_llama(), texts()
    loss = completion_loss(lm)
    chosen, rest = paths.split(lm.params, peft.LORA)
    state = trained(lm.params, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)))
    one = lambda chosen, row: loss(  # noqa: E731
        paths.merge(chosen, rest), jax.tree.map(lambda a: a[None], row)
    )[0]
    drawn = influence.projector("rademacher", DIM, seed=3)
    matrix = explicit_matrix(drawn, chosen)
    adam = optax.scale_by_adam()
    inner = state[1][0]
    inner = inner._replace(
        mu=paths.split(inner.mu, peft.LORA)[0], nu=paths.split(inner.nu, peft.LORA)[0]
    )
    steps = brute(one, chosen, examples, jax.jit(lambda g: adam.update(g, inner)[0]))
    assert matrix.shape == (steps.shape[1], DIM)
    monkeypatch.setattr(module, "HELD_BYTES", 0)  # streamed through the backward pass
    found = influence.gradient_features(
        loss,
        lm.params,
        examples,
        adam_state=state,
        select=peft.LORA,
        projector=drawn,
        block_size=4,
    )
    close(found, steps @ matrix, 1e-5)


@pytest.mark.parametrize(
    "family", ["countsketch", slow("gaussian"), "kronecker", slow("rademacher"), slow("srht")]
)
def test_every_projection_with_a_tap_and_without(family: str):
    params, x = problem()
    drawn = influence.projector(family, DIM, seed=1)
    expected = brute(alone, params, x) @ explicit_matrix(drawn, params)
    if family == "kronecker":  # of matrices, not of their numbers in a row
        gradients = jax.vmap(jax.grad(alone), (None, 0))(params, x)
        expected = np.asarray(drawn.project(gradients), np.float64)
    for loss in (network,) if family == "kronecker" else (network, alone):
        found = influence.gradient_features(loss, params, x, projector=drawn, block_size=4)
        assert found.shape == (11, DIM)
        assert found.dtype == np.float32
        close(found, expected, 1e-5)


@pytest.mark.parametrize(
    ("steps", "dtype", "tolerance"),
    [
        (1, np.float32, 5e-6),
        (0, np.float64, 1e-12),
        *(slow(steps, np.float32, 5e-6) for steps in (0, 40)),
        *(slow(steps, np.float64, 1e-12) for steps in (1, 40)),
    ],
)
def test_the_step_of_adam_is_that_of_optax(steps: int, dtype, tolerance: float):
    with jax.enable_x64(dtype == np.float64):
        params, x = problem(dtype=dtype)
        # In float32 the rounding of gradients is felt, the more so where they are about eps.
        b1, b2, eps = 0.8, 0.99, 1e-8 if dtype == np.float32 else 0.05
        chain = optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.adam)(0.1, b1, b2, eps))
        state = trained(params, chain, steps)
        plain = optax.scale_by_adam(b1, b2, eps)
        own = state[1].inner_state[0]
        update = jax.jit(lambda g: plain.update(g, own)[0])
        options = {"adam_state": Adam(state, b1, b2, eps), "block_size": 4}
        expected = brute(alone, params, x, update)
        for loss in (network, alone):
            found = influence.gradient_features(loss, params, x, **options)
            assert found.dtype == dtype
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_the_authors_variant_and_the_share_of_eps():
    params, x = problem()
    state = trained(params, optax.adam(1e-3))
    m, v = (flat(moments) for moments in state[0][1:])
    g = brute(alone, params, x).astype(np.float64)
    b1, b2, eps = 0.9, 0.999, 2e-3
    below = b2 * v + (1 - b2) * g**2
    expected = (b1 * m + (1 - b1) * g) / np.sqrt(below + eps)
    reference = Adam(state, eps=eps, variant="reference")
    found, info = influence.features_with_info(alone, params, x, adam_state=reference, block_size=4)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    share = (below < eps).mean(1)
    assert 0.1 < share.mean() < 0.9
    np.testing.assert_allclose(info.eps_share, share, atol=1e-6)
    paper = Adam(state, eps=0.03)
    info = influence.features_with_info(network, params, x, adam_state=paper, block_size=4)[1]
    root = np.sqrt(below / (1 - b2**4))
    np.testing.assert_allclose(info.eps_share, (root < 0.03).mean(1), atol=1e-6)
    np.testing.assert_allclose(info.norm, np.linalg.norm(g, axis=1), rtol=1e-5)
    np.testing.assert_allclose(info.loss, network(params, jnp.asarray(x)), rtol=1e-5)
    assert not info.skipped.any()
    assert not influence.features_with_info(alone, params, x)[1].eps_share.any()


@pytest.mark.parametrize(
    ("family", "loss"),
    [
        ("countsketch", network),
        ("rademacher", alone),
        slow("countsketch", alone),
        slow("rademacher", network),
    ],
)
def test_batches_and_order_change_no_bit(family: str, loss):
    params, x = problem(70)
    options = {"projector": influence.projector(family, DIM)}
    options["adam_state"] = trained(params, optax.adam(1e-3))
    whole = np.asarray(influence.gradient_features(loss, params, x, **options))
    order = np.random.default_rng(0).permutation(70)
    mixed = influence.gradient_features(loss, params, x[order], **options)
    np.testing.assert_array_equal(mixed, whole[order])
    for part in (slice(0, 1), slice(5, 30), slice(69, None)):
        some = influence.gradient_features(loss, params, x[part], **options)
        np.testing.assert_array_equal(some, whole[part])


@pytest.mark.multidevice
@pytest.mark.parametrize("streamed", [False, True])
def test_devices_change_no_bit(streamed: bool, monkeypatch):
    if streamed:
        monkeypatch.setattr(module, "HELD_BYTES", 0)
    params, x = problem(9)
    state = trained(params, optax.adam(1e-3))
    drawn = influence.projector("rademacher", DIM)
    options = {"projector": drawn, "adam_state": state, "block_size": 2}
    whole = np.asarray(influence.gradient_features(network, params, x, **options))
    assert np.all(np.linalg.norm(whole, axis=1) > 0)
    mesh = make_mesh(data=3, fsdp=1, devices=jax.devices()[:3])  # a program for each
    found = influence.gradient_features(network, params, x, **options, mesh=mesh)
    np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("adam", [False, True])
def test_what_has_no_gradient_is_skipped_and_counted(adam: bool):
    """Truncated answers, as 0 / 0 tokens or as a loss of 0, and numbers out of range."""

    def loss(params, row, *, tap=None):
        values = network(params, row["x"], tap=tap)
        return jnp.where(row["guarded"], 0 * values, values * row["tokens"] / row["tokens"])

    params, x = problem(6)
    x[4] = np.inf
    rows = {"x": x, "tokens": np.float32([1, 0, 1, 2, 1, 1]), "guarded": np.arange(6) == 3}
    options = {"projector": influence.projector("srht", DIM), "block_size": 4}
    if adam:
        options["adam_state"] = trained(params, optax.adam(1e-3))
    lean = loss
    one = lambda params, row: loss(params, jax.tree.map(lambda a: a[None], row))[0]  # noqa: E731
    for function in (lean, one):
        found, info = influence.features_with_info(function, params, rows, **options)
        assert info.skipped.tolist() == [False, True, False, True, True, False]
        assert info.zero.tolist() == [False, False, False, True, False, False]
        assert np.isfinite(found).all()
        assert np.array_equal(np.any(found != 0, axis=1), ~info.skipped)
        kept = {k: v[[0, 2, 5]] for k, v in rows.items()}
        alone = influence.gradient_features(function, params, kept, **options)
        np.testing.assert_array_equal(found[jnp.array([0, 2, 5])], alone)


def test_mistakes_are_named():
    params, x = problem(3)
    state = trained(params, optax.adam(1e-3))
    short = state[0]._replace(mu={k: v for k, v in state[0].mu.items() if k != "b"})
    wide = state[0]._replace(mu={**state[0].mu, "c": jnp.zeros(3)})
    for key, part, options in (
        ("adam_state", "has 0 moments of b", {"adam_state": short}),
        ("adam_state", "has 2 moments of a", {"adam_state": (state, state)}),
        ("adam_state", "ScaleByAdamState", {"adam_state": optax.sgd(1.0).init(params)}),
        ("adam_state", "of c must have shape (9,) (got (3,))", {"adam_state": wide}),
        ("block_size", "(got 0)", {"block_size": 0}),
    ):
        with refused(key, part):
            influence.gradient_features(network, params, x, **options)
    for key, constants in (("b2", {"b2": 1.0}), ("eps", {"eps": -1}), ("b1", {"b1": -0.1})):
        with refused(key):
            Adam(state, **constants)
    for examples in (x[:0], {"x": x, "y": x[:2]}):
        with refused("examples"):
            influence.gradient_features(network, params, examples)
    with pytest.raises(ValueError, match="takes no parameter"):
        influence.gradient_features(network, params, x, select="nothing")


def test_texts_packed_in_rows_have_the_features_of_each_alone():
    lm = lora_llama()

    def loss(params, batch, *, tap=None):
        ids, segments = batch["ids"], batch["segments"]
        x = lm.hidden(params, ids, segment_ids=segments, tap=tap)
        logits = transformer.logits(lm.config, params, x)
        scored = log_probs_of(logits[:, :-1], ids[:, 1:])[:, None]
        own = segments[:, None] == jnp.arange(1, 4)[None, :, None]
        counted = own[:, :, 1:] & own[:, :, :-1]
        return -jnp.where(counted, scored, 0).sum(-1) / jnp.maximum(counted.sum(-1), 1)

    rng = np.random.default_rng(4)
    written = [rng.integers(3, 24, length) for length in (5, 3, 4, 6, 2)]
    packed = {name: np.zeros((2, 12), np.int32) for name in ("ids", "segments")}
    alone = {name: np.zeros((5, 12), np.int32) for name in ("ids", "segments")}  # one program
    for row, members in enumerate(([0, 1, 2], [3, 4])):
        start = 0
        for number, i in enumerate(members, 1):
            stop = start + len(written[i])
            packed["ids"][row, start:stop], packed["segments"][row, start:stop] = written[i], number
            alone["ids"][i, : stop - start], alone["segments"][i, : stop - start] = written[i], 1
            start = stop

    def features(batch):
        return influence.features_with_info(
            loss,
            lm.params,
            batch,
            projector=influence.projector("countsketch", DIM),
            select=peft.LORA,
            segments=batch["segments"],
            block_size=1,
        )

    found, info = features(packed)
    expected, one = features(alone)
    assert info.skipped.tolist() == [False] * 5 + [True]
    close(found[:5], expected[::3], 1e-4)
    np.testing.assert_allclose(info.loss[:5], one.loss[::3], rtol=1e-5)


class Scaled:
    """An object whose method is a loss."""

    scale = jnp.float32(2)

    def loss(self, params, x):
        return self.scale * params["w"] @ x


def test_features_are_of_what_the_loss_closes_over_now():
    scale, model = jnp.float32(2), Scaled()
    params, x = {"w": jnp.ones(3)}, np.arange(6, dtype=np.float32).reshape(2, 3)

    def loss(params, x):
        return scale * params["w"] @ x

    def batched(params, x, *, tap=None):
        x = scale * x
        return taps.apply(tap, "w", "dense", x, x @ params["w"][:, None], None)[:, 0]

    for function in (loss, model.loss, batched):
        found = influence.gradient_features(function, params, x)
        np.testing.assert_allclose(found, 2 * x, rtol=1e-6)
    scale = model.scale = jnp.float32(3)
    for function in (loss, model.loss, batched):
        found = influence.gradient_features(function, params, x)
        np.testing.assert_allclose(found, 3 * x, rtol=1e-6)


def test_features_of_a_whole_module_of_equinox():
    import equinox as eqx

    module = eqx.nn.MLP(3, 1, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    arrays, static = eqx.partition(module, eqx.is_inexact_array)

    def loss(module, x):
        return jnp.square(module(x)).sum()

    expected = brute(lambda arrays, row: loss(eqx.combine(arrays, static), row), arrays, x)
    found = influence.gradient_features(loss, module, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_ids_that_are_no_rows_of_a_table_are_refused():
    def loss(params, ids, *, tap=None):
        rows = taps.apply(tap, "table", "embed", ids, params["table"][ids], None)
        return jnp.square(rows).sum((1, 2))

    params, ids = {"table": jnp.ones((4, 2))}, np.array([[0, 1], [3, 2]])
    assert influence.gradient_features(loss, params, ids).shape == (2, 8)
    for wrong in (-1, 4):
        ids[1, 0] = wrong
        with refused("examples", "ids of table", f"(got {wrong} in example 1)"):
            influence.gradient_features(loss, params, ids)
