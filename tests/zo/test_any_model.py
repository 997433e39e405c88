"""MeZO trains any JAX model: one regression for Linen, NNX, Equinox and a plain dict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import zo
from jaxlm.core import paths
from jaxlm.core.errors import UserError
from tests.helpers.frameworks import MODELS, equinox, linen, nnx, plain_dict, regression


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, marks=pytest.mark.slow if make in (equinox, plain_dict) else ())
        for make in MODELS
    ],
)
def test_mezo_lowers_the_loss(make):
    model = make()
    loss_fn, batch = regression(model)
    opt = zo.mezo(0.02, num_directions=4, weight_decay=1e-4)
    start = loss_fn(model.params, batch)
    step = zo.jit_step(opt, loss_fn)
    params = jax.tree.map(lambda x: jnp.copy(x) if hasattr(x, "dtype") else x, model.params)
    state = opt.init(params, jax.random.key(2))
    for _ in range(300):
        params, state, info = step(params, state, batch)
    assert jax.tree.structure(params) == jax.tree.structure(model.params)
    assert loss_fn(params, batch) < 0.2 * start
    assert np.isfinite(info.loss)


@pytest.mark.parametrize(
    ("make", "kernel", "bias"),
    [
        (linen, "params.Dense_0.kernel", "params.LayerNorm_0.scale"),
        (nnx, "inner.kernel.value", "norm.bias.value"),
        (equinox, "layers.0.weight", "layers.1.bias"),
        (plain_dict, "inner.kernel", "outer.bias"),
    ],
)
def test_parameters_have_the_paths_that_selections_speak_of(make, kernel, bias, monkeypatch):
    # What other modules of the tests have declared is not, as in a process of its own.
    own = {path: {count} for path, count in paths._own_models().items()}
    monkeypatch.setattr(paths, "_AXES", own)
    found = {leaf.path for leaf in paths.flatten(make().params)[0]}
    assert {kernel, bias} <= found


def test_complex_parameters_are_refused_by_path():
    params = {"real": jnp.ones(2), "inner": {"phase": jnp.ones(2, jnp.complex64)}}

    def loss(params, batch=None):
        return params["real"].sum() + jnp.abs(params["inner"]["phase"]).sum()

    for call in (
        lambda **o: zo.spsa(loss, params, key=jax.random.key(0), **o),
        lambda **o: zo.mezo(0.1, **o).init(params, jax.random.key(0)),
        lambda **o: zo.scale_by_spsa(**o).init(params),
    ):
        with pytest.raises(UserError, match=r"^inner\.phase: "):
            call()
        call(select="real")
