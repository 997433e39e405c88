"""Models as users hold them: restricted heads, padding, positions, classifiers, random weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core.errors import UserError
from jaxlm.core.paths import flatten
from jaxlm.models import add_classifier, init_params, layers, param_shapes
from tests.helpers.models import GOLDEN

IDS = jnp.array([[5, 6, 7, 8], [8, 9, 10, 11]])


def load(name: str):
    return jaxlm.from_pretrained(GOLDEN / name)


@pytest.mark.parametrize("name", ["llama", "opt-projected", "bert-untied"])
def test_positions_and_token_ids_restrict_the_head(name: str):
    lm = load(name)
    tokens = np.array([30, 4, 5])
    places = (np.array([2, 0]), np.array([[2, 1], [3, 3]]))

    @jax.jit
    def logits(params):
        return lm.apply(params, IDS), [
            [lm.apply(params, IDS, positions=p, token_ids=ids) for ids in (None, tokens)]
            for p in places
        ]

    whole, restricted = logits(lm.params)
    for positions, (at_places, of_tokens) in zip(places, restricted, strict=True):
        rows = np.arange(2).reshape(2, *(1,) * (positions.ndim - 1))
        wanted = whole[rows, positions]
        np.testing.assert_allclose(at_places, wanted, atol=1e-5)
        np.testing.assert_allclose(of_tokens, wanted[..., tokens], atol=1e-5)


# The golden inputs of every family have rows with padding on either side too.
@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "modernbert"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "opt", "bert", "roberta")),
    ],
)
def test_padding_on_either_side_changes_nothing(name: str):
    lm = load(name)
    apply = jax.jit(lm.apply)
    wanted = apply(lm.params, IDS)
    pad = jnp.full((2, 3), 33)
    mask = jnp.ones_like(IDS)
    right = apply(lm.params, jnp.hstack([IDS, pad]), jnp.hstack([mask, 0 * pad]))[:, :4]
    left = apply(lm.params, jnp.hstack([pad, IDS]), jnp.hstack([0 * pad, mask]))[:, 3:]
    np.testing.assert_allclose(right, wanted, atol=2e-5)
    np.testing.assert_allclose(left, wanted, atol=2e-5)


def test_positions_given_by_hand():
    lm = load("gpt2")
    positions = jnp.array([[0, 1, 2, 3], [4, 5, 6, 7]])
    apply = jax.jit(lm.apply)
    shifted = apply(lm.params, IDS, position_ids=positions)
    plain = apply(lm.params, IDS)
    np.testing.assert_allclose(shifted[0], plain[0], atol=1e-5)
    assert jnp.abs(shifted[1] - plain[1]).max() > 0.1


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "roberta"])
def test_a_batch_longer_than_the_position_table_is_refused(name: str):
    lm = load(name)
    jax.eval_shape(lm.apply, lm.params, jnp.ones((1, 16), int))
    with pytest.raises(UserError, match=r"^input_ids: must have at most 16 .*\(got 17\)"):
        jax.eval_shape(lm.apply, lm.params, jnp.ones((1, 17), int))


def test_rotary_positions_have_no_table_to_outgrow():
    lm = load("llama")
    assert jax.eval_shape(lm.apply, lm.params, jnp.ones((1, 17), int)).shape == (1, 17, 37)


@pytest.mark.parametrize("name", ["bert", "bert-base", "bert-classifier", "roberta",
                                  "distilbert", "modernbert"])  # fmt: skip
def test_a_new_classifier_keeps_the_encoder(name: str, tmp_path: Path):
    old = load(name)
    lm = add_classifier(old, 2, jax.random.key(0))
    assert (lm.config.head, lm.config.num_labels) == ("classifier", 2)
    assert jax.eval_shape(lm.apply, lm.params, IDS).shape == (2, 2)
    shapes = {leaf.path: leaf.value.shape for leaf in flatten(lm.params)[0]}
    assert shapes == param_shapes(lm.config)
    before = {leaf.path: leaf.value for leaf in flatten(old.params)[0]}
    for leaf in flatten(lm.params)[0]:
        if leaf.path.startswith("classifier") or leaf.path not in before:
            assert leaf.path.startswith(("classifier", "pooler"))
        else:
            assert leaf.value is before[leaf.path]
    jaxlm.save_pretrained(lm, tmp_path)
    assert jaxlm.from_pretrained(tmp_path).config == lm.config


@pytest.mark.parametrize("name", ["bert", "bert-classifier", "roberta", "modernbert", "llama"])
def test_a_new_classifier_of_tokens_reads_every_state(name: str):
    """In closed form; ModernBERT's has the dense layer and norm of its masked-token head."""
    old = load(name)
    lm = add_classifier(old, 2, jax.random.key(0), head="token_classifier")
    shapes = {leaf.path: leaf.value.shape for leaf in flatten(lm.params)[0]}
    assert shapes == param_shapes(lm.config)
    assert not any(path.startswith("pooler") for path in shapes)
    logits = jax.jit(lm.apply)(lm.params, IDS)
    x = jax.jit(old.hidden)(old.params, IDS)
    if name == "modernbert":
        ctx = layers.Context(lm.config)
        x = layers.norm(lm.params, "mlm.norm", jax.nn.gelu(
            layers.dense(lm.params, "mlm.dense", x, ctx), approximate=False), ctx)  # fmt: skip
    head = lm.params["classifier"]
    wanted = np.asarray(x) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    some = lm.apply(lm.params, IDS, positions=np.array([[2], [0]]), token_ids=np.array([1]))
    np.testing.assert_allclose(some[:, 0, 0], logits[[0, 1], [2, 0], 1], atol=1e-5)
    with pytest.raises(UserError, match=r"^head: a classifier has no logits of tokens"):
        lm.log_probs(lm.params, IDS)


def test_the_mean_of_a_row_of_padding_alone_is_a_number():
    lm = add_classifier(load("modernbert"), 2, jax.random.key(0))
    lm = lm.replace(config=lm.config.replace(pooling="mean"))
    assert np.isfinite(jax.jit(lm.apply)(lm.params, IDS, jnp.zeros_like(IDS))).all()


def test_a_decoder_has_no_classifier_and_an_encoder_without_head_no_logits():
    with pytest.raises(UserError, match=r"^model: a classifier needs an encoder"):
        add_classifier(load("gpt2"), 2, jax.random.key(0))
    with pytest.raises(UserError, match=r"^model: a classifier of tokens needs .*got gpt2"):
        add_classifier(load("gpt2"), 2, jax.random.key(0), head="token_classifier")
    lm = load("bert-base")
    with pytest.raises(UserError, match=r"^head: "):
        jax.eval_shape(lm.apply, lm.params, IDS)


def test_random_parameters():
    config = load("llama-biases").config
    params = {leaf.path: leaf.value for leaf in flatten(init_params(config, jax.random.key(0)))[0]}
    assert {path: leaf.shape for path, leaf in params.items()} == param_shapes(config)
    for path, leaf in params.items():
        if path.endswith("scale"):
            assert (leaf == 1).all()
        elif path.endswith("bias"):
            assert (leaf == 0).all()
        else:
            output = path.endswith(("o_proj.kernel", "down_proj.kernel"))
            wanted = 0.01 if output else 0.02
            # 4.5 standard errors of a standard deviation, and of a mean.
            assert abs(leaf.std() / wanted - 1) < 4.5 / np.sqrt(2 * leaf.size)
            assert abs(leaf.mean() / wanted) < 4.5 / np.sqrt(leaf.size)
    half = init_params(config, jax.random.key(0), "bfloat16")
    for leaf in flatten(half)[0]:
        np.testing.assert_array_equal(leaf.value, params[leaf.path].astype("bfloat16"))


def test_replace_keeps_the_rest():
    lm = load("gpt2")
    other = lm.replace(params={})
    assert (other.config, other.params) == (lm.config, {})


def test_backward_of_a_norm_for_several_cotangents_of_many_rows():
    """As large as a kernel needs it: jaxlib 0.10.2 made all but the first wrong by 20 %."""
    config = load("bert").config
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 16, 256)).astype(np.float32)
    cotangents = rng.normal(size=(3, 96, 16, 256)).astype(np.float32)

    @jax.jit
    def backward(x, cotangents):
        _, pull = jax.vjp(lambda x: layers.norm({"n": {}}, "n", x, layers.Context(config)), x)
        return jax.vmap(pull)(cotangents)[0]

    wide = np.float64(x)
    centred = wide - wide.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_eps)
    y = centred * inverse
    along = (cotangents * y).mean(-1, keepdims=True)
    expected = inverse * (cotangents - cotangents.mean(-1, keepdims=True) - y * along)
    np.testing.assert_allclose(backward(x, cotangents), expected, rtol=0, atol=1e-5)


def test_concrete_ids_beyond_a_table_are_refused():
    """Indexing would take the row of another; under `jit` there are no values to look at."""
    lm = jaxlm.from_pretrained(GOLDEN / "llama")
    ids, mask, size = np.array([[3, 4, 5]]), np.ones((1, 3), np.int32), lm.config.vocab_size
    answers = np.array([[[3], [4]]])
    for wrong in (-1, -100, size, 10**6):
        bad, worse = ids.copy(), answers.copy()
        bad[0, 2] = worse[0, 1, 0] = wrong
        for given in (bad, jnp.asarray(bad)):
            for function in (lm.apply, lm.hidden, lm.log_probs):
                with pytest.raises(UserError, match=rf"^input_ids: .*\(got {wrong}\)"):
                    function(lm.params, given)
        with pytest.raises(UserError, match=r"^input_ids: "):
            lm.continuation_log_probs(lm.params, bad, mask, answers)
        with pytest.raises(UserError, match=r"^continuation_ids: "):
            lm.continuation_log_probs(lm.params, ids, mask, worse)
        with pytest.raises(UserError, match=r"^token_ids: "):
            lm.apply(lm.params, ids, token_ids=np.array([wrong]))
        assert jax.jit(lm.apply)(lm.params, bad).shape == (1, 3, size)
    learned = jaxlm.from_pretrained(GOLDEN / "bert")
    with pytest.raises(UserError, match=r"^position_ids: "):
        learned.apply(learned.params, ids, position_ids=ids + 16)
    with pytest.raises(UserError, match=r"^token_type_ids: "):
        learned.apply(learned.params, ids, token_type_ids=ids)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_in_bfloat16_is_rounded_once(kind: str, offset: float):
    """The error against float64 is that of one rounding, of 8 bits."""
    config = jaxlm.from_pretrained(GOLDEN / "gemma").config
    config = config.replace(norm=kind, norm_offset=offset, norm_eps=1e-6)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 256)).astype(jnp.bfloat16)
    scale = (rng.normal(size=256) * 0.05 + 1 - offset).astype(jnp.bfloat16)
    params = {"n": {"scale": jnp.asarray(scale)}}
    found = layers.norm(params, "n", jnp.asarray(x), layers.Context(config))
    assert found.dtype == jnp.bfloat16
    wide = x.astype(np.float64)
    wide = wide - wide.mean(-1, keepdims=True) if kind == "layernorm" else wide
    wide = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + 1e-6)
    wanted = wide * (offset + scale.astype(np.float64))
    error = np.abs(np.asarray(found, np.float64) - wanted) / np.abs(wanted)
    assert error.max() <= 2**-8 * (1 + 1e-2)
