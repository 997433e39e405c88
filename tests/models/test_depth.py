"""Hidden states after some of the layers, and attention weights without a gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import taps
from jaxlm.core.errors import UserError
from jaxlm.core.paths import flatten
from jaxlm.core.precision import quantize
from jaxlm.models import LanguageModel, attention
from jaxlm.models.transformer import unstack
from tests.helpers import reference
from tests.helpers.models import CONFIG, GOLDEN, MASK, PROMPTS, small_model


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return small_model()


@pytest.mark.torch
@pytest.mark.parametrize(
    "case",
    ["gpt2", "llama", "gemma2", "opt-projected", "opt-post-norm", "bert", "gpt_neox",
     "gemma3_text", "olmo3", "smollm3", "modernbert"],
)  # fmt: skip
def test_states_after_every_layer_are_those_of_transformers(case: str, tmp_path):
    import torch

    theirs = reference.make_model(case)
    theirs.save_pretrained(tmp_path)
    lm = jaxlm.from_pretrained(tmp_path)
    inputs = reference.make_inputs(theirs)
    tensors = {key: torch.from_numpy(value).long() for key, value in inputs.items()}
    if theirs.config.model_type != "opt":
        tensors["position_ids"] = (tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        states = theirs(**tensors, output_hidden_states=True).hidden_states
    real = inputs["attention_mask"].astype(bool)
    for layer in range(lm.config.num_layers):  # the last entry of theirs has the final norm
        found = jax.jit(functools.partial(lm.hidden, layer=layer))(lm.params, **inputs)
        assert np.abs(found - states[layer].numpy())[real].max() <= 1e-4


def first_layers(lm: LanguageModel, count: int) -> LanguageModel:
    """The model whose layers are the first ones of `lm`, without a final norm."""
    layers = jax.tree.map(lambda leaf: leaf[:count], lm.params["layers"])
    config = lm.config.replace(
        num_layers=count, final_norm=False, windowed=lm.config.windowed[:count]
    )
    return LanguageModel(config, {**lm.params, "layers": layers})


@pytest.mark.parametrize(  # the last one has windows and two rotations
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "gemma2")), "gemma3_text"]
)
@pytest.mark.parametrize("layout", ["stack", "list", "packed"])
def test_the_layers_after_it_do_not_exist(name: str, layout: str):
    lm = jaxlm.from_pretrained(GOLDEN / name)
    params = lm.params
    if layout == "list":
        params = {**params, "layers": unstack(params["layers"])}
    if layout == "packed":
        params = quantize(params, bits=8)
    shallow = first_layers(lm.replace(params=params) if layout == "packed" else lm, 1)
    found = jax.jit(functools.partial(lm.hidden, layer=1))(params, PROMPTS, MASK)
    wanted = jax.jit(shallow.hidden)(shallow.params, PROMPTS, MASK)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_gradients_and_factors_are_those_of_the_first_layers(lm):
    def loss(params, tap=None):
        return jnp.square(lm.hidden(params, PROMPTS, MASK, layer=1, tap=tap)).sum((1, 2))

    grad = jax.jit(jax.grad(lambda params: loss(params).sum()))(lm.params)
    for leaf in flatten(grad)[0]:
        if leaf.stacked:
            assert not leaf.value[1].any()
    kernel = ("layers.mlp.up_proj.kernel", "dense")
    found = taps.factors(lambda params, x, tap: loss(params, tap), lm.params, PROMPTS)[kernel]
    assert found.a.shape[0] == 1
    by_factors = jnp.einsum("lntd,lntf->ldf", found.a, found.b)
    wanted = grad["layers"]["mlp"]["up_proj"]["kernel"][:1]
    np.testing.assert_allclose(by_factors, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_layers_out_of_range(lm):
    for layer in (-1, 3):
        with pytest.raises(UserError, match=r"^layer: must be"):
            lm.hidden(lm.params, PROMPTS, layer=layer)


def constant_weights(q, k, v, mask, *, scale, cap=None):
    """Attention whose softmax is a constant of the backward pass."""
    q, k = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (q, k))
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    seen = mask.dense() if isinstance(mask, attention.Mask) else mask
    scores = jnp.where(seen[:, None], scale * jnp.einsum("bthk,bshk->bhts", q, k), -1e30)
    return jnp.einsum("bhts,bshk->bthk", jax.lax.stop_gradient(jax.nn.softmax(scores)), v)


def test_weights_without_a_gradient(lm, monkeypatch):
    """The same values, and the gradient of a softmax that is held constant."""

    def both(**changes):
        config = CONFIG.replace(**changes)
        model = LanguageModel(config, lm.params)
        loss = lambda params: model.log_probs(params, PROMPTS, MASK).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(lm.params)

    monkeypatch.setitem(attention.IMPLEMENTATIONS, "constant", constant_weights)
    wanted_value, wanted = both(attention="constant")
    for implementation in ("xla", "blockwise"):
        value, grad = both(attention=implementation, score_gradient=False)
        np.testing.assert_allclose(value, wanted_value, rtol=1e-6)
        assert not grad["layers"]["attention"]["q_proj"]["kernel"].any()
        for one, other in zip(jax.tree.leaves(grad), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * max(1.0, np.abs(other).max()))


@pytest.mark.torch
def test_weights_without_a_gradient_in_transformers(tmp_path, monkeypatch):
    """PyTorch's softmax, which eager attention alone calls here, is cut off from its gradient."""
    import torch

    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda *args, **kw: softmax(*args, **kw).detach()
    )
    theirs = reference.make_model("llama")
    theirs.save_pretrained(tmp_path / "model")
    lm = jaxlm.from_pretrained(tmp_path / "model")
    lm = lm.replace(config=lm.config.replace(score_gradient=False))
    ids = reference.make_inputs(theirs)["input_ids"][:1]
    logits = theirs(torch.from_numpy(ids).long()).logits[0, :-1]
    targets = torch.from_numpy(ids).long()[0, 1:]
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.new_zeros(()) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(tmp_path / "grads")
    wanted = jaxlm.from_pretrained(tmp_path / "grads").params
    found = jax.jit(jax.grad(lambda params: -lm.log_probs(params, ids).sum()))(lm.params)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * max(1.0, np.abs(other).max()))
