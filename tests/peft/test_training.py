"""Every kind of fine-tuning, by backprop and by MeZO: the loss falls, the rest stays as it was."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import peft, zo
from jaxlm.core import paths
from tests.zo.problems import label_word_loss, small_decoder, token_batch

KEY = jax.random.key(0)
BATCH = token_batch(4, 6, 50)


@functools.cache
def model(name: str):
    """A small model with what is to be trained, and its selection."""
    lm = small_decoder()
    if name == "lora":  # with a B that lets the first step see A
        lm = peft.lora(lm, KEY, rank=2, targets="up_proj")
        params = paths.map_with_path(
            lambda leaf: leaf.value + 0.1 if leaf.path.endswith("lora_b") else leaf.value, lm.params
        )
        return lm.replace(params=params), peft.LORA
    if name == "prefix":
        return peft.prefix(lm, KEY, length=3), peft.PREFIX
    if name == "bitfit":
        return lm, peft.bitfit_selection(lm)
    lm = peft.untie(lm)
    return lm, peft.head_selection(lm)


def loss_of(lm):
    return label_word_loss(lm, [3, 30])


def assert_only(select: str, before, after) -> None:
    """All that is selected moved, and nothing else by a bit."""
    moved = paths.map_with_path(
        lambda leaf, new: not np.array_equal(leaf.value, new), before, after
    )
    for leaf in paths.flatten(moved)[0]:
        assert leaf.value == paths.path_predicate(select)(leaf.path), leaf.path


def slow(*row):
    """BitFit and the head are selections of leaves that every model has; the full run has them."""
    return pytest.param(*row, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["lora", "prefix", slow("bitfit"), slow("head")])
def test_backprop(name: str):
    lm, select = model(name)
    loss_fn = loss_of(lm)
    trained, frozen = paths.split(lm.params, select)
    tx = optax.adam(1e-2)

    @jax.jit
    def run(trained, frozen):
        def step(carry, _):
            trained, state = carry
            value, grads = jax.value_and_grad(lambda p: loss_fn(paths.merge(p, frozen), BATCH))(
                trained
            )
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(trained, updates), state), value

        (trained, _), losses = jax.lax.scan(step, (trained, tx.init(trained)), length=20)
        return trained, losses

    after, losses = run(trained, frozen)
    assert losses[-1] < losses[0] - 1e-3
    assert_only(select, lm.params, paths.merge(after, frozen))


@pytest.mark.parametrize(
    ("name", "rate", "eps"),
    [
        ("lora", 0.05, 1e-2),
        ("prefix", 0.5, 1e-1),
        slow("bitfit", 0.05, 1e-2),
        slow("head", 0.1, 1e-2),
    ],
)
def test_mezo(name: str, rate: float, eps: float):
    """Through a view and on materialised parameters it is the same estimate."""
    lm, select = model(name)
    loss_fn = loss_of(lm)
    opt = zo.mezo(rate, eps=eps, select=select)

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state, info = opt.step(loss_fn, *carry, BATCH)
            return (params, state), info

        (params, _), infos = jax.lax.scan(step, (params, state), length=60)
        return params, infos

    @jax.jit
    def materialized(params, key):
        return zo.spsa(
            loss_fn, params, BATCH, key=key, eps=eps, select=select, materialize_params=True
        ).projected_grad

    params, infos = run(lm.params, opt.init(lm.params, KEY))
    seen, made = infos.projected_grad[0], materialized(lm.params, jax.random.fold_in(KEY, 0))
    assert infos.loss[-10:].mean() < infos.loss[:10].mean()
    assert_only(select, lm.params, params)
    np.testing.assert_allclose(seen, made, atol=1e-5 / eps)
    assert jnp.abs(seen).max() > 0
