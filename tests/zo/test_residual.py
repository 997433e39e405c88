"""Steps that add up in float32 factors beside parameters in few bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import zo
from tests.zo.problems import flat, network_batch, network_loss, network_params

pytestmark = pytest.mark.optimized

KEY = jax.random.key(1)


def run(opt, params, loss_fn, steps):
    state, batch = opt.init(params, KEY), network_batch()
    step = jax.jit(lambda params, state, batch: opt.step(loss_fn, params, state, batch))
    for _ in range(steps):
        params, state, info = step(params, state, batch)
    return opt.finalize(params, state), info


def test_a_view_sees_the_residual_that_is_added_in_the_end():
    params = network_params()
    plain = lambda params, batch: network_loss(params, batch)  # noqa: E731
    opt = zo.lozo_residual(0.1, interval=4, num_directions=2, eps=2.0**-3)
    seen, info = run(opt, params, network_loss, 7)
    copied, expected = run(opt, params, plain, 7)
    np.testing.assert_allclose(info.loss_plus, expected.loss_plus, rtol=2e-5)
    np.testing.assert_allclose(flat(seen), flat(copied), atol=2e-4)
    assert np.abs(flat(seen) - flat(params)).max() > 1e-2


def test_steps_too_small_for_bfloat16_are_kept():
    params = network_params(jnp.bfloat16)
    small = {"eps": 2.0**-6, "select": "layers.*kernel"}

    def drift(opt):
        moved, _ = run(opt, params, network_loss, 30)
        change = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b, moved, params)
        return np.asarray(flat(change["layers"]))

    exact = drift(zo.lozo_residual(1e-4, interval=100, **small))
    lost = drift(zo.lozo(1e-4, interval=100, **small))
    assert np.mean(lost != 0) < np.mean(exact != 0)
