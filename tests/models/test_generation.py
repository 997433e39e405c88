"""Generation against transformers, against the whole forward pass, and against the softmax."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxlm
from jaxlm import peft, zo
from jaxlm.core.errors import UserError
from jaxlm.models import LanguageModel, generation
from jaxlm.models.config import RopeScaling
from jaxlm.models.generation import Generator, Sampling, decoding_params, filter_logits
from jaxlm.models.transformer import unstack
from jaxlm.zo import Perturbation
from tests.helpers import reference
from tests.helpers.models import CONFIG, GOLDEN, MASK, PROMPTS, small_model


@pytest.fixture(scope="module")
def lm():
    return small_model()


def by_whole_passes(lm, prompt, count):
    """Greedy tokens and their log-probabilities without any cache."""
    apply = jax.jit(lm.apply)
    # What stands behind a token is not seen: so all prompts are one program.
    ids, scored = np.zeros((1, PROMPTS.shape[1] + count), np.int32), []
    ids[0, : len(prompt)] = prompt
    for place in range(len(prompt), len(prompt) + count):
        logits = apply(lm.params, ids)[0, place - 1]
        ids[0, place] = int(jnp.argmax(logits))
        scored.append(float(jax.nn.log_softmax(logits)[ids[0, place]]))
    return ids[0, len(prompt) : len(prompt) + count].tolist(), scored


@pytest.mark.parametrize("attention", ["xla", pytest.param("blockwise", marks=pytest.mark.slow)])
def test_greedy_tokens_are_those_of_whole_forward_passes(lm, attention):
    lm = lm.replace(config=lm.config.replace(attention=attention))
    found = lm.generate(lm.params, PROMPTS, MASK, max_new_tokens=7, eos_id=())
    for row, (prompt, mask) in enumerate(zip(PROMPTS, MASK, strict=True)):
        tokens, scored = by_whole_passes(lm, prompt[mask > 0], 7)
        assert found.tokens[row].tolist() == tokens
        np.testing.assert_allclose(found.log_probs[row], scored, rtol=1e-4, atol=1e-5)
    assert found.lengths.tolist() == [7, 7, 7]


@pytest.mark.torch
@pytest.mark.parametrize(
    "case",
    ["gpt2", "llama", "llama-rope-llama3", "mistral", "qwen2-window", "qwen3", "olmo-clipped",
     "olmo2", "gemma", "gemma2", "gpt_neox", "opt", "opt-projected",
     "gemma3_text", "olmo3-yarn", "granite", "phi3", "smollm3", "smollm3-window"],
)  # fmt: skip
def test_greedy_tokens_of_transformers(case, tmp_path):
    import torch

    model = reference.make_model(case)
    model.save_pretrained(tmp_path)
    lm = jaxlm.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 32)
    mask = (np.arange(8)[None] >= 8 - lengths[:, None]).astype(np.int32)
    ids = np.where(mask, rng.integers(4, 37, (32, 8)), model.config.pad_token_id)

    def theirs(stop):
        return model.generate(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=8,
            do_sample=False, eos_token_id=stop, pad_token_id=1,
        )[:, 8:].numpy()  # fmt: skip

    stop = int(theirs(None)[0, 4])
    wanted, ours = theirs(stop), lm.generate(lm.params, ids, mask, max_new_tokens=8, eos_id=stop)
    for row, length in enumerate(ours.lengths):
        assert ours.tokens[row, :length].tolist() == wanted[row, :length].tolist()
        assert length == 8 or ours.tokens[row, length - 1] == stop


def test_a_stop_token_ends_its_row_and_leaves_the_others(lm):
    free = lm.generate(lm.params, PROMPTS, MASK, max_new_tokens=7, eos_id=())
    stop = int(free.tokens[0, 2])
    found = lm.generate(lm.params, PROMPTS, MASK, max_new_tokens=7, eos_id=[stop, 28])
    for row in range(3):
        hits = np.flatnonzero(np.isin(free.tokens[row], [stop, 28]))
        length = hits[0] + 1 if len(hits) else 7
        assert found.lengths[row] == length
        assert found.tokens[row, :length].tolist() == free.tokens[row, :length].tolist()
        assert (found.log_probs[row, length:] == 0).all()


@pytest.mark.parametrize(
    ("own", "generation", "wanted"),
    [
        (3, None, (3,)),
        ([3, 9], None, (3, 9)),
        (3, 3, (3,)),
        (3, [28, 3], (28, 3)),
        ([3, 9], 3, (3,)),
        (None, [28], (28,)),
        (None, None, ()),
    ],
)
def test_end_tokens_come_from_the_folder(own, generation, wanted, tmp_path: Path):
    """generation_config.json goes before config.json, and what is saved says the same."""
    shutil.copytree(GOLDEN / "llama", tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps(config | {"eos_token_id": own}))
    if generation is not None:
        text = json.dumps({"temperature": 0.6, "eos_token_id": generation})
        (tmp_path / "a/generation_config.json").write_text(text)
    lm = jaxlm.from_pretrained(tmp_path / "a")
    assert lm.config.stops == wanted
    assert lm.config.eos_id in (None, 3)
    jaxlm.save_pretrained(lm, tmp_path / "b")
    assert jaxlm.from_pretrained(tmp_path / "b").config.stops == wanted


def test_steps_of_a_generator_make_the_same_tokens(lm):
    options = {"temperature": 1.0, "key": jax.random.key(3)}
    whole = lm.generate(lm.params, PROMPTS, MASK, max_new_tokens=7, eos_id=(), **options)
    generator = Generator(lm.config, Sampling(temperature=1.0))
    state = generator.start(lm.params, PROMPTS, MASK, max_new_tokens=7, key=jax.random.key(3))
    for count in (1, 3, 100):
        state = generator.advance(lm.params, state, count)
    assert int(state.step) == 7
    np.testing.assert_array_equal(state.found.tokens, whole.tokens)


def test_a_generation_within_a_program_makes_the_same_tokens(lm):
    """Over a vmap of parameters, of which some rows end before others."""
    options = {"max_new_tokens": 7, "key": jax.random.key(3)}
    free = lm.generate(lm.params, PROMPTS, MASK, eos_id=(), temperature=1.0, **options)
    stop = int(free.tokens[0, 2])
    generator = Generator(lm.config, Sampling(temperature=1.0), (stop,))
    several = [jax.tree.map(lambda x, scale=s: scale * x, lm.params) for s in (1.0, 1.1, -1.0)]
    found = jax.jit(jax.vmap(lambda params: generator.sample(params, PROMPTS, MASK, **options)))(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    )
    for i, params in enumerate(several):
        wanted = lm.generate(params, PROMPTS, MASK, eos_id=stop, temperature=1.0, **options)
        np.testing.assert_array_equal(found.tokens[i], wanted.tokens)
        np.testing.assert_array_equal(found.lengths[i], wanted.lengths)
        np.testing.assert_allclose(found.log_probs[i], wanted.log_probs, rtol=1e-4, atol=1e-5)
    assert len(np.unique(found.lengths)) > 1


def test_generate_within_jit(lm):
    """Of traced prompts and parameters; options stay Python values."""
    options = {"max_new_tokens": 7, "eos_id": ()}
    wanted = lm.generate(lm.params, PROMPTS, MASK, **options)

    @jax.jit
    def tokens(params, ids, mask):
        return lm.generate(params, ids, mask, **options).tokens + 1

    np.testing.assert_array_equal(tokens(lm.params, PROMPTS, MASK) - 1, wanted.tokens)
    with pytest.raises(UserError, match=r"^max_new_tokens: .* 33 positions"):
        jax.jit(lambda ids: lm.generate(lm.params, ids, max_new_tokens=30))(PROMPTS)


def test_layers_apart_are_the_same_model():
    """A list of layers in place of the stack: with a view, in generation, in gradients."""
    lm = jaxlm.from_pretrained(GOLDEN / "gemma2")
    config = lm.config.replace(num_layers=2, windowed=lm.config.windowed[:2])
    assert config.windowed == (True, False)
    layers = jax.tree.map(lambda x: x[:2], lm.params["layers"])
    lm = LanguageModel(config, {**lm.params, "layers": layers})
    apart = {**lm.params, "layers": unstack(lm.params["layers"])}
    view = Perturbation(jax.random.key(0), jnp.float32(0.1), zo.rademacher())
    apply = jax.jit(lm.apply)
    wanted = apply(lm.params, PROMPTS, MASK, view=view)
    decoding = decoding_params(lm.params)  # has the table twice; a view must meet the original
    assert decoding is lm.params or decoding["output_kernel"].shape[1] == config.vocab_size
    np.testing.assert_allclose(apply(decoding, PROMPTS, MASK, view=view), wanted, atol=1e-5)
    np.testing.assert_allclose(
        apply(decoding, PROMPTS, MASK), apply(lm.params, PROMPTS, MASK), atol=1e-5
    )

    def loss(params):
        return lm.log_probs(params, PROMPTS, MASK).mean()

    wanted = unstack(jax.jit(jax.grad(loss))(lm.params)["layers"])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5),
        jax.jit(jax.grad(loss))(apart)["layers"],
        wanted,
    )
    options = {"max_new_tokens": 5, "num_samples": 2, "key": jax.random.key(1)}
    generator = Generator(lm.config, Sampling(temperature=1.0))
    results = []
    for first, then in ((lm.params, lm.params), (lm.params, apart), (apart, apart)):
        state = generator.start(first, PROMPTS, MASK, **options)
        for count in (1, 4):
            state = generator.advance(then, state, count)
        results.append(np.asarray(state.found.tokens))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_sampled_tokens_follow_the_softmax(lm):
    draws = 4096
    found = lm.generate(
        lm.params, PROMPTS[:1], max_new_tokens=1, temperature=2.0, num_samples=draws, eos_id=(),
        key=jax.random.key(0),
    )  # fmt: skip
    logits = np.asarray(jax.jit(lm.apply)(lm.params, PROMPTS[:1])[0, -1], np.float64)
    expected = np.exp(logits / 2) / np.exp(logits / 2).sum() * draws
    counts = np.bincount(found.tokens[:, 0], minlength=CONFIG.vocab_size)
    large = expected > 5
    seen, wanted = counts[large], expected[large]
    if not large.all():
        seen, wanted = (np.append(x[large], x[~large].sum()) for x in (counts, expected))
    assert large.sum() > 5
    assert stats.chisquare(seen, wanted).pvalue > 1e-4
    scored = jax.nn.log_softmax(jnp.asarray(logits))[found.tokens[:, 0]]
    np.testing.assert_allclose(found.log_probs[:, 0], scored, rtol=1e-4)


def test_filters_keep_what_they_name():
    probabilities = np.array([[0.4, 0.3, 0.2, 0.1]])

    def kept(**options):
        scores = filter_logits(jnp.log(probabilities), Sampling(temperature=1.0, **options))
        return np.flatnonzero(np.isfinite(scores[0])).tolist()

    assert kept(top_k=2) == [0, 1]
    assert kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_p=0.39) == [0]
    assert kept(top_p=0.41) == [0, 1]
    assert kept(top_p=0.71) == [0, 1, 2]
    assert kept(min_p=0.45) == [0, 1, 2]
    assert kept(min_p=1.0) == [0]
    assert kept(top_k=3, top_p=0.75) == [0, 1]
    assert kept(top_p=1.0) == [0, 1, 2, 3]


def test_bad_input_is_refused(lm):
    call = lm.generate
    with pytest.raises(UserError, match=r"^prompts: .*an empty one"):
        call(lm.params, PROMPTS, MASK * np.array([[1], [1], [0]]), max_new_tokens=2)
    with pytest.raises(UserError, match=r"^prompts: .*an empty one"):
        call(lm.params, PROMPTS[:0], MASK[:0], max_new_tokens=2)
    with pytest.raises(UserError, match=r"input_ids: must be from 0 to 28 \(got 37\)"):
        call(lm.params, PROMPTS + 28, MASK, max_new_tokens=2)
    with pytest.raises(UserError, match=r"^key: sampling needs one"):
        call(lm.params, PROMPTS, MASK, max_new_tokens=2, temperature=1.0)
    with pytest.raises(UserError, match=r"^max_new_tokens: must be from 1"):
        call(lm.params, PROMPTS, MASK, max_new_tokens=0)
    for positions in ("learned", "rotary"):
        config = lm.config.replace(positions=positions)
        with pytest.raises(UserError, match=r"^max_new_tokens: .* 33 positions"):
            lm.replace(config=config).generate(lm.params, PROMPTS, MASK, max_new_tokens=30)
        with pytest.raises(UserError, match=r"^max_new_tokens: .* 33 positions"):
            Generator(config).sample(lm.params, PROMPTS, max_new_tokens=30)
    encoder = lm.replace(config=dataclasses.replace(lm.config, kind="encoder"))
    with pytest.raises(UserError, match="does not generate"):
        encoder.generate(lm.params, PROMPTS, MASK, max_new_tokens=2)
    for options in (
        {"temperature": -1.0},
        {"temperature": np.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": np.nan},
        {"min_p": 2.0},
    ):
        with pytest.raises(UserError, match=f"^{next(iter(options))}: must be"):
            generation.Sampling(**options)


@pytest.mark.parametrize(
    ("scaling", "most"),
    [
        (RopeScaling("linear", 4.0), 128),
        (RopeScaling("yarn", 4.0, original_positions=32), 128),
        (RopeScaling("llama3", 4.0, original_positions=4), 32),
        (RopeScaling("linear", 0.5), 32),
    ],
)
def test_stretched_positions_allow_longer_texts(scaling: RopeScaling, most: int):
    assert CONFIG.replace(rope_scaling=scaling).longest_text == most


def kept_by_brute_force(probabilities: np.ndarray, p: float) -> int:
    """Size of the smallest set of tokens whose mass reaches p."""
    ordered = np.sort(probabilities)[::-1]
    return next(k for k in range(1, len(ordered) + 1) if ordered[:k].sum() >= p)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.375, 0.5, 0.75, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_of_tokens_that_tie(p: float):
    """Probabilities in sixteenths, of which sums are exact."""
    rows = np.array(
        [[2] * 8, [4] * 4 + [0] * 4, [8, 1, 1, 1, 1, 1, 1, 2], [1, 3, 3, 3, 3, 1, 1, 1]]
    )
    scores = jnp.log(jnp.asarray(rows / 16, jnp.float32))
    found = np.isfinite(filter_logits(scores, Sampling(temperature=1.0, top_p=p)))
    assert found.sum(axis=1).tolist() == [kept_by_brute_force(row / 16, p) for row in rows]
    for kept, row in zip(found, rows, strict=True):
        assert row[kept].min() >= row[~kept].max(initial=0)


@pytest.mark.torch
@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.8, 0.95])
def test_top_p_keeps_what_transformers_keeps(p: float):
    import torch
    from transformers import TopPLogitsWarper

    rng = np.random.default_rng(0)
    scores = rng.integers(-3, 4, (64, 17)).astype(np.float32)
    scores[0] = 0
    wanted = TopPLogitsWarper(p)(None, torch.from_numpy(scores)).isfinite().sum(1).tolist()
    found = filter_logits(jnp.asarray(scores), Sampling(temperature=1.0, top_p=p))
    assert np.isfinite(found).sum(axis=1).tolist() == wanted


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-45, 1e-300])
def test_a_tiny_temperature_draws_the_most_likely_token(temperature: float):
    scores = jnp.array([[1.0, 3.0, 2.0], [-5.0, -7.0, -6.0], [0.0, 1e-2, 5.0]])
    filtered = filter_logits(scores, Sampling(temperature=temperature))
    assert not np.isnan(filtered).any()
    for seed in range(5):
        drawn = generation.draw(scores, Sampling(temperature=temperature), jax.random.key(seed))
        assert drawn.tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "gpt2", "gemma2")]
)
def test_tokens_and_scores_are_the_same_in_64_bit_mode(name: str):
    """In it, numbers without a type are wider; those of the model keep their width."""
    lm = jaxlm.from_pretrained(GOLDEN / name)
    options = {"max_new_tokens": 5, "eos_id": ()}
    sampled = options | {"temperature": 1.0, "key": jax.random.key(0)}
    answers = np.arange(6).reshape(3, 1, 2) + np.zeros((3, 2, 1), np.int64)

    def results():
        own = lm
        if name == "llama":
            own = peft.prefix(lm, jax.random.key(1), length=2)
        drawn = jax.eval_shape(lambda: own.generate(own.params, PROMPTS, MASK, **sampled))
        assert drawn.tokens.dtype == jnp.int32
        return {
            "greedy": own.generate(own.params, PROMPTS, MASK, **options).tokens,
            "scores": jax.jit(own.continuation_log_probs)(own.params, PROMPTS, MASK, answers),
            "keys": own.params["layers"]["attention"].get("prefix_keys", jnp.zeros(1, jnp.float32)),
        }

    wanted = results()
    with jax.enable_x64(True):
        found = results()
    for part in wanted:
        assert found[part].dtype == wanted[part].dtype
        np.testing.assert_allclose(found[part], wanted[part], atol=1e-5)
