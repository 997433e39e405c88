"""Models in 8 and 4 bits: the numbers of their dequantized selves, in less memory."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import zo
from jaxlm.core.paths import flatten
from jaxlm.core.precision import dequantize, quantize
from jaxlm.data.sources import read_rows
from jaxlm.models import LanguageModel, ModelConfig, init_params
from jaxlm.sharding import make_mesh, param_shardings
from tests.helpers.models import GOLDEN
from tests.zo.problems import label_word_loss, token_batch

SLOW = pytest.mark.slow
# `tests/core/test_precision.py` packs and unpacks in both.
BITS = pytest.mark.parametrize("bits", [4, pytest.param(8, marks=SLOW)])
MORE = ("gemma2", "opt-projected", "bert", "qwen3", "gpt_neox")
IDS = jnp.array([[5, 6, 7, 1], [8, 9, 10, 11]])
MASK = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=SLOW) for n in MORE)])
def test_the_model_sees_the_dequantized_weights(name: str):
    whole = jaxlm.from_pretrained(GOLDEN / name)
    apply = jax.jit(whole.apply)
    for bits in (8, 4):
        lm = jaxlm.from_pretrained(GOLDEN / name, bits=bits)
        assert lm.config == whole.config
        found = apply(lm.params, IDS, MASK)
        np.testing.assert_allclose(found, apply(dequantize(lm.params), IDS, MASK), atol=1e-5)
        assert not np.allclose(found, apply(whole.params, IDS, MASK), atol=1e-5)


@BITS
def test_loading_equals_quantizing_what_was_loaded(bits: int):
    whole = jaxlm.from_pretrained(GOLDEN / "qwen3", param_dtype="bfloat16")
    wanted = quantize(whole.params, bits=bits)
    lm = jaxlm.from_pretrained(GOLDEN / "qwen3", param_dtype="bfloat16", bits=bits)
    assert jax.tree.structure(lm.params) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, lm.params, wanted)


@pytest.mark.multidevice
@BITS
@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 2, "model": 2}, pytest.param({"fsdp": 8}, marks=SLOW)],
    ids=str,
)
def test_over_a_mesh(bits: int, sizes: dict[str, int], tmp_path: Path):
    config = small_config(width=64, vocabulary=64)
    jaxlm.save_pretrained(LanguageModel(config, init_params(config, jax.random.key(0))), tmp_path)
    mesh = make_mesh(**sizes)
    lm = jaxlm.from_pretrained(tmp_path, bits=bits, mesh=mesh)
    alone = jaxlm.from_pretrained(tmp_path, bits=bits)
    jax.tree.map(np.testing.assert_array_equal, lm.params, alone.params)
    places = jax.tree.leaves(param_shardings(alone.params, mesh))
    for leaf, place in zip(flatten(lm.params)[0], places, strict=True):
        assert leaf.value.sharding == place
    kernel = lm.params["layers"]["mlp"]["up_proj"]["kernel"].values
    assert kernel.addressable_shards[0].data.size * 4 <= kernel.size
    apply = jax.jit(lm.apply)
    np.testing.assert_allclose(
        apply(lm.params, IDS, MASK), apply(alone.params, IDS, MASK), rtol=1e-4, atol=1e-5
    )


def small_config(*, width: int, vocabulary: int, layers: int = 2) -> ModelConfig:
    return ModelConfig(
        family="gpt2",
        kind="decoder",
        head="lm",
        vocab_size=vocabulary,
        hidden_size=width,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=4,
        head_size=width // 4,
        intermediate_size=4 * width,
        max_positions=16,
        embedding_size=width,
        activation="gelu_tanh",
    )


@BITS
def test_generation(bits: int):
    lm = jaxlm.from_pretrained(GOLDEN / "qwen3", bits=bits)
    found = lm.generate(lm.params, IDS, MASK, max_new_tokens=6)
    wanted = lm.generate(dequantize(lm.params), IDS, MASK, max_new_tokens=6)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=1e-5)


@BITS
def test_saving_writes_what_the_model_sees(bits: int, tmp_path: Path):
    lm = jaxlm.from_pretrained(GOLDEN / "gpt2", bits=bits)
    jaxlm.save_pretrained(lm, tmp_path)
    again = jaxlm.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, dequantize(lm.params))


@BITS
def test_a_forward_pass_never_has_all_weights_as_floats(bits: int):
    """Beside the packed weights there is the float copy of one layer's matrices at a time."""
    config = small_config(width=256, vocabulary=64, layers=8)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    packed = jax.eval_shape(functools.partial(quantize, bits=bits), params)
    lm = LanguageModel(config, packed)

    def temporaries(params):
        return jax.jit(lm.apply).lower(params, IDS, MASK).compile().memory_analysis()

    layer = sum(4 * x.size for x in jax.tree.leaves(params["layers"])) / config.num_layers
    extra = temporaries(packed).temp_size_in_bytes - temporaries(params).temp_size_in_bytes
    assert extra < 1.1 * layer


@functools.cache
def small_model(bits: int) -> LanguageModel:
    config = small_config(width=16, vocabulary=50)
    return LanguageModel(config, quantize(init_params(config, jax.random.key(0)), bits=bits))


@pytest.mark.parametrize(("bits", "limit"), [(4, 1.08), pytest.param(8, 1.01, marks=SLOW)])
def test_perplexity_of_the_shipped_model(bits: int, limit: float):
    """On reviews that it was not trained on."""
    lm = jaxlm.from_pretrained()
    reviews = [row.values["text"] for row in read_rows("jaxlm:mr/test.jsonl.gz", key="test")]
    batch = lm.tokenizer(reviews[:40], padding=True, padding_side="right", return_tensors="np")
    ids, mask = batch["input_ids"], batch["attention_mask"]

    @jax.jit
    def loss(params):
        log_probs = lm.log_probs(params, ids, mask)
        return -(log_probs * mask[:, 1:]).sum() / mask[:, 1:].sum()

    ratio = float(jnp.exp(loss(quantize(lm.params, bits=bits)) - loss(lm.params)))
    print(f"{bits} bits: perplexity {ratio:.4f} of that in float32")
    assert ratio < limit


@pytest.mark.parametrize(
    ("bits", "select"),
    [
        (4, r"kernel\.scale$"),
        pytest.param(8, r"norm|bias", marks=SLOW),
        pytest.param(4, None, marks=SLOW),
    ],
)
def test_mezo_sees_and_moves_the_same_scales(bits: int, select: str | None):
    """The lean path equals the materialized one, and integers stay."""
    lm = small_model(bits)
    loss_fn, batch = label_word_loss(lm, [3, 7]), token_batch(4, 6, 50)
    key, options = jax.random.key(2), {"eps": 1e-2, "select": select}
    opt = zo.mezo(1e-2, **options)
    step = jax.jit(functools.partial(opt.step, loss_fn))
    moved, _, lean = step(lm.params, opt.init(lm.params, key), batch)
    options |= {"key": jax.random.fold_in(key, 0), "materialize_params": True}
    whole = jax.jit(lambda params: zo.spsa(loss_fn, params, batch, **options))(lm.params)
    np.testing.assert_allclose(lean.loss_plus, whole.loss_plus, rtol=1e-6)
    np.testing.assert_allclose(lean.loss_minus, whole.loss_minus, rtol=1e-6)
    changed = {
        new.path
        for new, old in zip(flatten(moved)[0], flatten(lm.params)[0], strict=True)
        if not np.array_equal(new.value, old.value)
    }
    floats = {leaf.path for leaf in flatten(lm.params)[0] if leaf.value.dtype == jnp.float32}
    takes = {None: lambda p: True, r"norm|bias": lambda p: "norm" in p or "bias" in p}
    wanted = takes.get(select, lambda p: p.endswith("kernel.scale"))
    assert changed <= {path for path in floats if wanted(path)}
    assert len(changed) > 5
    assert jax.tree.structure(moved) == jax.tree.structure(lm.params)


@SLOW  # that a step sees and moves the scales is tested above
@pytest.mark.parametrize("bits", [8, 4])
def test_mezo_fine_tunes(bits: int):
    lm = small_model(bits)
    loss_fn, batch = label_word_loss(lm, [3, 7]), token_batch(8, 6, 50)
    opt = zo.mezo(1e-3, eps=1e-3, sampler=zo.rademacher())

    @jax.jit
    def train(params, state):
        def step(carry, _):
            params, state, info = opt.step(loss_fn, *carry, batch)
            return (params, state), info.loss

        return jax.lax.scan(step, (params, state), length=500)[1]

    losses = train(lm.params, opt.init(lm.params, jax.random.key(2)))
    print(f"{bits} bits: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    assert losses[-1] < 0.8 * losses[0]
