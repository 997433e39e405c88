"""Rewards of Python functions against what they give outside of the step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import zo
from jaxlm.core.errors import UserError
from jaxlm.evaluation import option_scores
from jaxlm.models import LanguageModel, ModelConfig, init_params
from jaxlm.train.losses import accuracy_objective
from jaxlm.train.rewards import callback_objective, generation_objective
from tests.train.test_losses import single_words
from tests.zo.problems import token_batch

WORDS = np.array([3, 4])
CONFIG = ModelConfig(
    family="llama", kind="decoder", head="lm", vocab_size=30, hidden_size=16, num_layers=1,
    num_heads=2, num_kv_heads=2, head_size=8, intermediate_size=24, max_positions=32,
    embedding_size=16, activation="silu", norm="rmsnorm", positions="rotary",
    attention_bias=False, output_bias=False, mlp_bias=False,
)  # fmt: skip
GOLD = [f"w{i} w{i + 9} w{29 - i}" for i in range(8)]


class Tokenizer:
    """Token 1 is the end, 2 a newline, i the word wi."""

    def decode(self, tokens, *, clean_up_tokenization_spaces):
        return " " + " ".join("\n" if token == 2 else f"w{token}" for token in tokens)


@pytest.fixture(scope="module")
def lm():
    params = init_params(CONFIG, jax.random.key(1))
    params = jax.tree.map(lambda x: 15 * x if x.ndim > 1 else x, params)
    return LanguageModel(CONFIG, params, Tokenizer())


@pytest.fixture
def batch():
    weights = np.array([1, 1, 0, 1, 1, 1, 0, 1], np.float32)
    index = np.array([3, 1, -1, 0, 7, 2, -1, 5], np.int32)
    return token_batch(8, 5, 30) | {"weights": weights, "index": index}


def f1(texts, golds):
    def one(text, gold):
        common = sum(min(text.split().count(w), gold.split().count(w)) for w in set(text.split()))
        return 2 * common / (len(text.split()) + len(gold.split()))

    return [one(*pair) for pair in zip(texts, golds, strict=True)]


def measure(loss_fn, params, batch, copies=(False, True)):
    """With both signs in one pass, and on perturbed copies."""
    options = {"key": jax.random.key(2), "eps": 0.3, "num_directions": 2}

    def both(params):
        spsa = functools.partial(zo.spsa, loss_fn, params, batch, **options)
        return [spsa(materialize_params=copy) for copy in copies]

    return jax.jit(both)(params)


def same(estimate, other):
    for name in ("loss_plus", "loss_minus", "aux"):
        pair = getattr(estimate, name), getattr(other, name)
        jax.tree.map(np.testing.assert_array_equal, *pair)


def test_accuracy_by_callback_is_accuracy(batch):
    lm = single_words(30)
    calls = []

    def hits(scores, batch):
        calls.append((type(scores), scores.shape, type(batch["labels"])))
        return np.argmax(scores, axis=1) == batch["labels"]

    scores = functools.partial(option_scores, lm.apply, WORDS)
    lean, copied = measure(callback_objective(scores, hits), lm.params, batch)
    assert calls == [(np.ndarray, (8, 2), np.ndarray)] * 8
    same(lean, copied)
    (direct,) = measure(accuracy_objective(lm.apply, WORDS), lm.params, batch, copies=(False,))
    np.testing.assert_allclose(1 + lean.loss_plus, direct.loss_plus, atol=1e-6)
    np.testing.assert_allclose(1 + lean.loss_minus, direct.loss_minus, atol=1e-6)
    np.testing.assert_allclose(lean.aux["reward"], direct.aux["accuracy"], atol=1e-6)


def by_hand(lm, params, batch, count):
    """Reward of a batch from the tokens of `lm.generate`."""
    tokens = lm.generate(
        params, batch["input_ids"], batch["attention_mask"], max_new_tokens=count, eos_id=()
    ).tokens
    texts = []
    for row in np.asarray(tokens).tolist():
        stops = [i for i, token in enumerate(row) if token in (1, 2)]
        texts.append(" ".join(f"w{t}" for t in row[: min(stops, default=count)]))
    values = f1(texts, [GOLD[i] for i in batch["index"]])
    return np.average(values, weights=batch["weights"]), texts


def test_generation_is_rewarded_as_outside_of_the_step(lm, batch):
    """The end token stops a row early, the newline cuts its text."""
    loss_fn = generation_objective(lm, f1, examples=GOLD, max_new_tokens=6, stop_ids=(1,))
    lean, copied = measure(loss_fn, lm.params, batch)
    same(lean, copied)
    assert (lean.loss_plus != lean.loss_minus).any()
    wanted, texts = by_hand(lm, lm.params, batch, 6)
    loss, aux = jax.jit(loss_fn)(lm.params, batch)
    np.testing.assert_allclose([-loss, aux["reward"]], wanted, rtol=1e-6)
    assert len({len(text.split()) for text in texts}) > 1


def test_samples_are_those_of_the_key(lm, batch):
    loss_fn = generation_objective(lm, f1, examples=GOLD, max_new_tokens=3, temperature=1.0)
    loss = jax.jit(lambda key: loss_fn(lm.params, batch, key=key)[0])
    keys = jax.random.split(jax.random.key(0), 3)
    losses = [float(loss(key)) for key in keys]
    assert len(set(losses)) > 1
    assert float(loss(keys[0])) == losses[0]
    with pytest.raises(ValueError, match=r"^key: sampling needs one"):
        loss_fn(lm.params, batch)


class Raises:
    def __call__(self, arrays, batch):
        raise KeyError("gold")


def short(arrays, batch):
    return [1.0]


def unknown(arrays, batch):
    return [0.5, np.nan, 0.5, np.nan]


def words(arrays, batch):
    return ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            short,
            r"reward: short must give a number for each of 4 examples \(got the shape",
        ),
        (unknown, "reward: unknown must give finite numbers .got nan for example 3 of the batch"),
        (Raises(), r"reward: Raises raised KeyError \(got 'gold'\). Correct it"),
        (words, r"reward: words raised ValueError \(got could not convert string"),
    ],
)
def test_a_mistake_of_the_reward_is_named(reward, message):
    loss_fn = callback_objective(lambda params, batch, *, view: params, reward)
    batch = {"x": np.ones(4), "weights": np.array([1, 0, 1, 1], np.float32)}
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(jax.jit(loss_fn)(jnp.ones(2), batch))
    if reward is unknown:
        batch["weights"][3] = 0
        assert jax.jit(loss_fn)(jnp.ones(2), batch)[0] == -0.5


def extraction(rows):
    """Five words; the answer is the one after word 3."""
    random = np.random.default_rng(0)
    ids = random.integers(10, 30, (rows, 5), dtype=np.int32)
    place, answers = random.integers(0, 4, rows), random.integers(4, 10, rows)
    ids[np.arange(rows), place] = 3
    ids[np.arange(rows), place + 1] = answers
    index = np.arange(rows, dtype=np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "index": index}
    return batch, [f"w{answer}" for answer in answers]


@pytest.mark.slow
def test_mezo_on_f1_of_generated_text_lifts_f1(lm):
    batch, golds = extraction(32)
    start = jax.tree.map(lambda x: x / 4 if x.ndim > 1 else x, lm.params)
    loss_fn = generation_objective(lm, f1, examples=golds, max_new_tokens=2, stop_ids=(1,))
    opt = zo.mezo(0.3, eps=0.1, num_directions=8)

    @jax.jit
    def train(params, state):
        def body(carry, _):
            params, state, _ = opt.step(loss_fn, *carry, batch)
            return (params, state), None

        return jax.lax.scan(body, (params, state), length=100)[0]

    params, _ = train(start, opt.init(start, jax.random.key(0)))
    before, after = (-float(loss_fn(each, batch)[0]) for each in (start, params))
    print(f"F1 {before:.3f} -> {after:.3f}")
    assert after >= before + 0.2


def test_texts_need_a_tokenizer(lm):
    with pytest.raises(UserError, match="lm: has no tokenizer"):
        generation_objective(lm.replace(tokenizer=None), f1, examples=GOLD, max_new_tokens=2)
