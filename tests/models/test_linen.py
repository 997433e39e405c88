"""The Linen module and the free functions are one model."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.models import init_params, transformer
from jaxlm.models.linen import Transformer
from tests.helpers.models import GOLDEN

SLOW = pytest.mark.slow
# The first row has a tree of each kind; those of the others are like Llama's.
NAMES = (
    *("gpt2", "opt-projected", "bert", "roberta-classifier", "gemma2", "qwen3", "modernbert"),
    *("llama", "bert-base", "mistral", "qwen2", "olmo-clipped", "olmo2", "gemma", "gpt_neox"),
    *("gemma3_text", "olmo3", "granite", "phi3", "smollm3", "distilbert"),
)
IDS = jnp.array([[5, 6, 7, 1], [8, 9, 10, 11]])
MASK = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("name", [*NAMES[:7], *(pytest.param(n, marks=SLOW) for n in NAMES[7:])])
def test_same_tree_and_same_numbers(name: str):
    lm = jaxlm.from_pretrained(GOLDEN / name)
    module = Transformer(lm.config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, lm.params)
    free = lm.hidden if lm.config.head == "none" else lm.apply
    found = jax.make_jaxpr(module.apply)({"params": lm.params}, IDS, MASK)
    wanted = jax.make_jaxpr(free)(lm.params, IDS, MASK)
    assert str(found) == str(wanted)  # one program, so it need not run
    jax.tree.map(np.testing.assert_array_equal, found.consts, wanted.consts)


@pytest.mark.parametrize("name", [n if n == "bert" else pytest.param(n, marks=SLOW) for n in NAMES])
def test_derivatives_pass_through_remat(name: str):
    """One directional derivative: forward, reverse, and reverse with recomputation."""
    lm = jaxlm.from_pretrained(GOLDEN / name)
    direction = init_params(lm.config, jax.random.key(0))

    def loss(config, params):
        forward = transformer.hidden if config.head == "none" else transformer.apply
        return jnp.sum(forward(config, params, IDS, MASK)[0] ** 2)

    def along(grads):
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, direction)))

    plain = functools.partial(loss, lm.config)

    @jax.jit
    def slopes(params):
        ways = [
            functools.partial(loss, lm.config.replace(remat=how))
            for how in ("dots", "none", "layer")
        ]
        found = [along(jax.grad(f)(params)) for f in ways]
        return jax.jvp(plain, (params,), (direction,))[1], found

    wanted, found = slopes(lm.params)
    np.testing.assert_allclose(found, 3 * [wanted], rtol=2e-4)
    several = jax.tree.map(lambda a, b: jnp.stack([a, a + b]), lm.params, direction)
    found = jax.jit(jax.vmap(plain))(several)
    one, alone = jax.tree.map(lambda x: x[1], several), jax.jit(plain)
    np.testing.assert_allclose(found, [alone(lm.params), alone(one)], rtol=1e-4)


def test_initial_values_have_the_same_distribution():
    config = jaxlm.from_pretrained(GOLDEN / "bert").config
    made = jax.jit(Transformer(config, "bfloat16").init)(jax.random.key(0), IDS)["params"]
    ours = jax.jit(functools.partial(init_params, config))(jax.random.key(1))
    for a, b in zip(*map(jax.tree.leaves, (made, ours)), strict=True):
        assert a.dtype == jnp.bfloat16
        assert jnp.isclose(a.mean(dtype="float32"), b.mean(), atol=0.01)
        assert jnp.isclose(a.std(dtype="float32"), b.std(), rtol=0.2, atol=1e-3)


def test_tabulate_and_options():
    lm = jaxlm.from_pretrained(GOLDEN / "gpt2")
    module = Transformer(lm.config)
    table = module.tabulate(jax.random.key(0), IDS, console_kwargs={"width": 200})
    assert "q_proj" in table
    assert f"{sum(x.size for x in jax.tree.leaves(lm.params)):,}" in table
    options = {"positions": jnp.array([2, 3]), "token_ids": jnp.array([4, 5, 6])}
    found = module.apply({"params": lm.params}, IDS, MASK, **options)
    np.testing.assert_array_equal(found, lm.apply(lm.params, IDS, MASK, **options))


def test_models_do_not_import_flax():
    code = "import sys, jaxlm.models; assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
