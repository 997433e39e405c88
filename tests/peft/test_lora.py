"""Low-rank adapters against dense weights in float64, and as leaves for everything else."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import peft
from jaxlm.core import taps
from jaxlm.core.errors import UserError
from jaxlm.core.paths import flatten, map_with_path
from jaxlm.core.precision import dequantize
from jaxlm.models import LanguageModel, save_pretrained
from jaxlm.models.linen import Transformer
from jaxlm.sharding import make_mesh, param_shardings
from tests.helpers.models import GOLDEN

IDS = jnp.array([[20, 3, 30, 7, 1], [5, 6, 9, 9, 11]])
KEY = jax.random.key(3)


def by_path(params) -> dict:
    return {leaf.path: leaf.value for leaf in flatten(params)[0]}


def logits(lm: LanguageModel, params=None):
    return jax.jit(lm.apply)(lm.params if params is None else params, IDS)


def random_b(lm: LanguageModel) -> LanguageModel:
    def drawn(leaf):
        is_b = leaf.path.endswith("lora_b")
        return 0.3 * jax.random.normal(KEY, leaf.value.shape) if is_b else leaf.value

    return lm.replace(params=map_with_path(drawn, lm.params))


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", r"_proj"),
        ("roberta-classifier", "kernel"),
        pytest.param("opt", "q_proj", marks=pytest.mark.slow),
    ],
)
def test_against_weights_summed_in_float64(name: str, targets: str):
    base = jaxlm.from_pretrained(GOLDEN / name)
    start = peft.lora(base, KEY, rank=3, alpha=6.0, targets=targets)
    np.testing.assert_allclose(logits(start), logits(base), atol=1e-5, err_msg="B is not 0")
    lm = random_b(start)
    flat = by_path(lm.params)
    dense = by_path(base.params)
    for path in [path for path in flat if path.endswith("lora_a")]:
        a, b = (np.asarray(flat[path[:-1] + x], np.float64) for x in "ab")
        kernel = path.replace("lora_a", "kernel")
        assert (a.shape[-1], b.shape[-1]) == (3, dense[kernel].shape[-1])
        dense[kernel] = jnp.asarray(dense[kernel] + 2.0 * a @ b, jnp.float32)
    assert len(flat) > len(dense)
    leaves, structure = flatten(base.params)
    wanted = structure.unflatten([dense[leaf.path] for leaf in leaves])
    expected = logits(base, wanted)
    assert np.abs(expected - logits(base)).max() > 0.1
    np.testing.assert_allclose(logits(lm), expected, atol=2e-5)
    merged = peft.merge(lm)
    assert merged.config == base.config
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged.params, wanted)


def test_a_is_uniform_within_the_root_of_the_width_and_differs_by_layer():
    config = jaxlm.from_pretrained(GOLDEN / "llama").config
    lm = jaxlm.from_pretrained(GOLDEN / "llama")
    a = peft.lora(lm, KEY, rank=40).params["layers"]["attention"]["q_proj"]["lora_a"]
    bound = config.hidden_size**-0.5
    assert np.abs(a).max() <= bound
    assert np.abs(a).max() > 0.99 * bound
    np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.05)
    assert not np.array_equal(a[0], a[1])


def test_taps_see_both_factors_and_the_kernel():
    lm = random_b(peft.lora(jaxlm.from_pretrained(GOLDEN / "llama"), KEY, rank=3))

    def f(params, x, *, tap=None):
        out = lm.apply(params, x, tap=tap).reshape(x.shape[0], -1)
        return out @ jnp.cos(jnp.arange(out.shape[1]))

    def one(params, row):
        return f(params, row[None])[0]

    @jax.jit
    def both(params):
        wanted = jax.vmap(jax.grad(one), in_axes=(None, 0))(params, IDS)
        return taps.factors(f, params, IDS), by_path(wanted)

    factors, wanted = both(lm.params)
    for name in ("kernel", "lora_a", "lora_b"):
        path = f"layers.attention.v_proj.{name}"
        found = jnp.einsum("lnti,lnto->nlio", *factors[path, "dense"][:2])
        scale = np.abs(wanted[path]).max()
        assert scale > 0
        np.testing.assert_allclose(found, wanted[path], atol=1e-5 * scale)


def test_over_packed_weights():
    base = jaxlm.from_pretrained(GOLDEN / "llama", param_dtype="bfloat16", bits=4)
    lm = random_b(peft.lora(base, KEY))
    assert lm.params["layers"]["attention"]["q_proj"]["lora_a"].dtype == jnp.float32
    whole = dequantize(lm.params)
    found = logits(lm)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, logits(lm, whole))
    with pytest.raises(UserError, match=r"q_proj.kernel: cannot be merged .*dequantize"):
        peft.merge(lm)


def test_a_saved_model_is_merged(tmp_path: Path):
    lm = random_b(peft.lora(jaxlm.from_pretrained(GOLDEN / "llama"), KEY))
    save_pretrained(lm, tmp_path)
    again = jaxlm.from_pretrained(tmp_path)
    found = logits(again)
    np.testing.assert_allclose(found, logits(lm), atol=2e-5)


def test_linen_and_a_mesh_take_the_same_tree():
    lm = random_b(peft.lora(jaxlm.from_pretrained(GOLDEN / "llama"), KEY))
    lm = peft.prefix(lm, KEY, init="normal")
    wanted = jax.jit(lm.apply)(lm.params, IDS)
    found = jax.jit(Transformer(lm.config).apply)({"params": lm.params}, IDS)
    np.testing.assert_array_equal(found, wanted)
    mesh = make_mesh(fsdp=2)
    placed = jax.device_put(lm.params, param_shardings(lm.params, mesh))
    np.testing.assert_allclose(jax.jit(lm.apply)(placed, IDS), wanted, atol=1e-5)


def test_mistakes():
    lm = jaxlm.from_pretrained(GOLDEN / "llama")
    with pytest.raises(
        UserError, match=r"targets: selects no kernel \(got 'query'\). Name some of layers\."
    ):
        peft.lora(lm, KEY, targets="query")
    with pytest.raises(UserError, match=r"rank: must be from 1 .*\(got 0\)"):
        peft.lora(lm, KEY, rank=0)
    with pytest.raises(UserError, match=r"lm: has a LoRA adapter already"):
        peft.lora(peft.lora(lm, KEY), KEY)
