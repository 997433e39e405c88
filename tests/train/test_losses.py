"""Accuracy as a loss, and losses in micro-batches, against the whole batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import zo
from jaxlm.core import views
from jaxlm.core.errors import UserError
from jaxlm.evaluation import option_scores
from jaxlm.models.scoring import log_probs_of
from jaxlm.train.losses import (
    accumulate,
    accuracy_objective,
    classification_objective,
    lm_objective,
    num_targets,
)
from jaxlm.train.optimizers import Adam, Mezo
from jaxlm.train.state import method
from tests.zo.problems import small_decoder, token_batch

WORDS = np.array([3, 4])
SLOW = pytest.param(True, 4, marks=pytest.mark.slow)
WEIGHTS = np.array([1, 0, 1, 0.5, 1, 0, 2, 0], np.float32)
OFFSETS = np.array([0.1, -0.1], np.float32)


@dataclasses.dataclass(frozen=True)
class Words:
    """A model of single words, with the calls that objectives make."""

    params: dict

    def apply(
        self, params, ids, mask=None, *, positions, token_ids, token_type_ids=None, view=None
    ):
        read = functools.partial(views.apply, view)
        x = jnp.tanh(read("embed", params["embed"], None, rows=ids))
        x = jnp.take_along_axis(x, positions[:, None, None], axis=1)[:, 0]
        return x @ read("head", params["head"], None)[:, token_ids]

    def log_probs(self, params, ids, mask=None, *, view=None):
        scores = jnp.tanh(params["embed"][ids[:, :-1]]) @ params["head"]
        return log_probs_of(scores, ids[:, 1:])


def single_words(vocabulary):
    random = np.random.default_rng(5)
    shapes = {"embed": (vocabulary, 12), "head": (12, vocabulary)}
    return Words({name: random.normal(size=s).astype("f") for name, s in shapes.items()})


@pytest.fixture
def lm():
    return single_words(50)


@pytest.fixture
def batch():
    return token_batch(8, 6, 50) | {"weights": WEIGHTS}


def same(estimate, other):
    for name in ("loss_plus", "loss_minus", "aux"):
        pair = getattr(estimate, name), getattr(other, name)
        jax.tree.map(np.testing.assert_array_equal, *pair)


def test_accuracy_counts_the_weighted_hits(lm, batch):
    loss, aux = accuracy_objective(lm.apply, WORDS, offsets=OFFSETS)(lm.params, batch)
    scores = option_scores(lm.apply, WORDS, lm.params, batch, offsets=OFFSETS)
    hits = np.argmax(scores, axis=1) == batch["labels"]
    wanted = np.average(hits, weights=WEIGHTS)
    assert 0 < wanted < 1
    np.testing.assert_allclose([1 - loss, aux["accuracy"]], wanted, rtol=1e-6)


@pytest.mark.parametrize(("transformer", "count"), [(False, None), (False, 4), SLOW])
def test_both_signs_in_one_pass_measure_what_perturbed_parameters_do(lm, batch, transformer, count):
    lm = small_decoder() if transformer else lm
    batch["weights"] = np.ones(8, np.float32)
    loss_fn = accuracy_objective(lm.apply, WORDS)
    loss_fn = loss_fn if count is None else accumulate(loss_fn, count)
    measure = jax.jit(
        lambda params: [
            zo.spsa(
                loss_fn, params, batch, key=jax.random.key(2), eps=1.0, num_directions=3,
                materialize_params=copy,
            )
            for copy in (False, True)
        ]
    )  # fmt: skip
    lean, copied = measure(lm.params)
    same(lean, copied)
    assert (lean.loss_plus != lean.loss_minus).any()


def test_mezo_on_accuracy_lifts_accuracy(lm):
    batch = token_batch(32, 6, 50) | {"weights": np.ones(32, np.float32)}
    batch["labels"] = batch["input_ids"][:, -1] % 2
    opt = zo.mezo(1.0, eps=0.3, num_directions=8)
    loss_fn = accuracy_objective(lm.apply, WORDS)

    @jax.jit
    def train(params, state):
        def body(carry, _):
            params, state, info = opt.step(loss_fn, *carry, batch)
            return (params, state), info.loss

        return jax.lax.scan(body, (params, state), length=300)

    (params, _), losses = train(lm.params, opt.init(lm.params, jax.random.key(0)))
    before, after = (1 - loss_fn(each, batch)[0] for each in (lm.params, params))
    print(f"accuracy {before:.3f} -> {after:.3f}")
    assert after >= before + 0.25
    assert losses[-10:].mean() < losses[:10].mean()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_parts_weigh_what_they_hold(lm, batch, count):
    """With four parts, one has no example that counts."""
    whole = classification_objective(lm.apply, WORDS)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        jax.jit(accumulate(whole, count))(lm.params, batch),
        jax.jit(whole)(lm.params, batch),
    )


@pytest.mark.parametrize("optimizer", [Adam(select="head"), Mezo(learning_rate=1e-3)])
def test_steps_in_micro_batches_are_those_of_the_batch(lm, batch, optimizer):
    """Parameters that are not trained may be integers, which have no gradient."""
    params = {**lm.params, "count": jnp.arange(3)} if optimizer.name == "adamw" else lm.params
    whole = classification_objective(lm.apply, WORDS)
    ends = []
    for loss_fn in (whole, accumulate(whole, 4)):
        way = method(optimizer, loss_fn, 3)
        step, state = jax.jit(way.step), way.start(params, jax.random.key(0))
        for _ in range(3):
            *state, info = step(*state, batch)
        ends.append((state[0], info["loss"]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), *ends)
    assert not np.array_equal(ends[0][0]["head"], params["head"])


def test_gradients_of_parts_are_added_and_keep_the_activations_of_one():
    def loss_fn(params, batch):
        x = batch["x"]
        for _ in range(3):
            x = jnp.tanh(x @ params)
        return jnp.mean(x**2), {"mean": jnp.mean(x)}

    x, w = np.random.default_rng(0).normal(size=(2, 64, 64)).astype("f")
    batch = {"x": np.tile(x, (16, 1))}
    found = []
    for loss in (loss_fn, accumulate(loss_fn, 8)):
        program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(w, batch).compile()
        found.append((program(w, batch), program.memory_analysis().temp_size_in_bytes))
    (one, most), (other, least) = found
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), one, other)
    assert least < 0.6 * most


@pytest.mark.parametrize("weights", [None, "mask", "tokens"])
def test_parts_of_text_weigh_their_targets(lm, weights):
    ids = token_batch(8, 6, 50)["input_ids"]
    batch = {"input_ids": ids}
    mask = (np.arange(6)[None] < np.array([6, 2, 3, 5, 4, 6, 2, 2])[:, None]).astype(np.int32)
    if weights is not None:
        batch["attention_mask"] = mask
    if weights == "tokens":
        batch["weights"] = mask * np.linspace(0, 1, 48, dtype=np.float32).reshape(8, 6)
    whole = lm_objective(lm.log_probs)
    wanted, aux = jax.jit(whole)(lm.params, batch)
    loss, counts = jax.jit(accumulate(whole, 2, share=num_targets))(lm.params, batch)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert float(aux["tokens"]) == float(counts["tokens"]) == float(num_targets(batch))


def test_parts_have_keys_of_their_own_and_the_signature_stays():
    def plain(params, batch):
        return params * batch["x"].mean()

    def noisy(params, batch, *, key=None, view=None):
        return jax.random.normal(key, batch["x"].shape).mean(), {"n": jnp.float32(1)}

    batch = {"x": np.arange(6.0, dtype=np.float32)}
    estimate = zo.spsa(accumulate(plain, 3), jnp.float32(2), batch, key=jax.random.key(0))
    np.testing.assert_allclose(estimate.loss, 5.0, rtol=1e-5)
    key = jax.random.key(1)
    loss, aux = accumulate(noisy, 3)(None, batch, key=key)
    parts = [noisy(None, {"x": np.zeros(2)}, key=jax.random.fold_in(key, i))[0] for i in range(3)]
    np.testing.assert_allclose(loss, np.mean(parts), rtol=1e-5)
    assert aux == {"n": 1}


def test_what_cannot_be_divided_is_refused(lm, batch):
    loss_fn = classification_objective(lm.apply, WORDS)
    with pytest.raises(UserError, match=r"count: must divide the batch, of 8 examples \(got 3"):
        accumulate(loss_fn, 3)(lm.params, batch)
    with pytest.raises(UserError, match=r"count: must be 1 or more \(got 0"):
        accumulate(loss_fn, 0)
    text = {"input_ids": np.ones((4, 6), int), "weights": np.ones((4, 6))}
    with pytest.raises(UserError, match=r"one for each example \(got the shape \(2, 6\)\)"):
        accumulate(lm_objective(lm.log_probs), 2)(lm.params, text)
