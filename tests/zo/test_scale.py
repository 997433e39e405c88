"""Over many devices: what they compute is what one computes, and they exchange scalars."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import zo
from jaxlm.sharding import batch_sharding, make_mesh, param_shardings
from jaxlm.zo import sites
from tests.zo.hlo import collectives, largest_array
from tests.zo.problems import network_batch, network_loss, network_params

pytestmark = pytest.mark.optimized

KEY = jax.random.key(3)
RATE = 0.1
slow = pytest.mark.slow


def assert_close(found, wanted, **tolerance):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), **tolerance)


def stepped(opt):
    return jax.jit(lambda params, state, batch: opt.step(network_loss, params, state, batch))


def assert_same_step(found, wanted):
    np.testing.assert_allclose(found[2].loss_plus, wanted[2].loss_plus, rtol=1e-6)
    # Of losses near 1 that differ in the last bit, over 2 eps; |z| is below 6.
    slope = 2.0**-22 / (2 * 0.1)
    np.testing.assert_allclose(found[2].projected_grad, wanted[2].projected_grad, atol=slope)
    assert_close(found[0], wanted[0], rtol=1e-6, atol=6 * RATE * slope)


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("sampler", "n"),
    [(zo.low_rank(2), 1), pytest.param(zo.gaussian(), 3, marks=slow)],
    ids=["low_rank", "gaussian"],
)
def test_replicas_that_share_a_batch_exchange_the_losses_alone(sampler, n):
    opt = zo.mezo(RATE, eps=0.1, sampler=sampler, num_directions=n, weight_decay=0.1)
    params, batch, mesh = network_params(), network_batch(), make_mesh(data=8)
    state = opt.init(params, KEY)
    spread = jax.device_put((params, state), jax.NamedSharding(mesh, jax.P()))
    shared = jax.device_put(batch, batch_sharding(mesh))
    step = stepped(opt).lower(*spread, shared).compile()
    assert 0 < max(collectives(step)) <= 2 * n
    found = step(*spread, shared)
    assert found[0]["head"]["kernel"].sharding.is_fully_replicated
    assert_same_step(found, stepped(opt)(params, state, batch))


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("sampler", "estimator"),
    [
        (zo.gaussian(), zo.central),
        pytest.param(zo.low_rank(2), zo.forward_gradient, marks=slow),
    ],
    ids=["gaussian", "low_rank"],
)
def test_directions_over_devices_are_those_of_one(sampler, estimator):
    params, batch, mesh = network_params(), network_batch(), make_mesh(data=4, fsdp=2)
    placed = jax.device_put((params, batch), jax.NamedSharding(mesh, jax.P()))
    options = {"eps": 0.1, "sampler": sampler, "estimator": estimator, "num_directions": 8}

    def step(mesh):
        opt = zo.zeroth_order(RATE, **options, mesh=mesh)
        state = opt.init(params, KEY)
        return jax.jit(lambda params, batch: opt.step(network_loss, params, state, batch))

    compiled = step(mesh).lower(*placed).compile()
    assert 0 < max(collectives(compiled)) <= 2 * 8
    assert_same_step(compiled(*placed), step(None)(params, batch))


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("make", "block"),
    [
        pytest.param(lambda params: zo.gaussian(), sites.BLOCK, marks=slow),
        (lambda params: zo.gaussian(), 64),
        pytest.param(lambda params: zo.sphere(), 64, marks=slow),
        (lambda params: zo.low_rank(2), 64),
        pytest.param(lambda params: zo.subspace(2), 64, marks=slow),
        pytest.param(lambda params: zo.layer_blocks(2), 64, marks=slow),
        pytest.param(lambda params: zo.magnitude(params, 0.5), 64, marks=slow),
    ],
    ids=["whole", "gaussian", "sphere", "low_rank", "subspace", "layer_blocks", "magnitude"],
)
def test_shards_are_updated_where_they_are(make, block, monkeypatch):
    monkeypatch.setattr(sites, "BLOCK", block)
    params, mesh = network_params(jnp.bfloat16), make_mesh(fsdp=8)
    sampler, slopes = make(params), jnp.ones(1)
    opt = zo.mezo(RATE, sampler=sampler, weight_decay=0.1, rounding="stochastic")
    state, places = opt.init(params, KEY), param_shardings(params, mesh)
    update = jax.jit(
        opt.update, in_shardings=(places, None, None), out_shardings=(places, None, None)
    )
    spread = jax.device_put(params, places)
    assert spread["layers"]["kernel"].addressable_shards[0].data.shape == (2, 2, 16)
    compiled = update.lower(spread, state, slopes).compile()
    assert max(collectives(compiled)) == 1
    # A layer has 256 elements, of which a device has 32; factors have 16 * 2.
    assert largest_array(compiled) <= 64
    found, wanted = compiled(spread, state, slopes), jax.jit(opt.update)(params, state, slopes)
    # The norm of a sphere is a sum over shards, whose last bits may decide a rounding.
    ulp = 2.0**-7 if isinstance(sampler, zo.Sphere) else 0
    assert_close(found[0], wanted[0], rtol=ulp)
    np.testing.assert_allclose(found[2], wanted[2], rtol=1e-6)


PROCESS = """
import json, sys
import jax
import numpy as np
port, rank = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_enable_compilation_cache", False)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from jaxlm import zo
from jaxlm.sharding import batch_sharding, make_mesh
from tests.zo.hlo import collectives
from tests.zo.problems import network_batch, network_loss, network_params

opt, mesh = zo.mezo(0.1, eps=0.1), make_mesh(data=8)
whole, shared = jax.NamedSharding(mesh, jax.P()), batch_sharding(mesh)
params = network_params()
state = opt.init(params, jax.random.key(3))
batch = jax.tree.map(np.asarray, network_batch())
batch = {k: jax.make_array_from_callback(v.shape, shared, v.__getitem__) for k, v in batch.items()}

def run(params, batch):
    return opt.step(network_loss, params, state, batch)

step = jax.jit(run, out_shardings=whole)
params = {k: {n: jax.make_array_from_callback(x.shape, whole, np.asarray(x).__getitem__)
              for n, x in v.items()} for k, v in params.items()}
compiled = step.lower(params, batch).compile()
params, _, info = compiled(params, batch)
print(json.dumps({
    "devices": jax.device_count(),
    "collectives": collectives(compiled),
    "loss_plus": np.asarray(info.loss_plus).tolist(),
    "projected_grad": np.asarray(info.projected_grad).tolist(),
    "params": [np.asarray(x).ravel().tolist() for x in jax.tree.leaves(params)],
}))
jax.distributed.shutdown()
"""


@pytest.mark.multidevice
def test_two_processes_take_the_step_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, port, rank],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        outputs = [run.communicate(timeout=120) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == second
    assert first["devices"] == 8
    assert 0 < max(first["collectives"]) <= 2
    opt, params = zo.mezo(0.1, eps=0.1), network_params()
    params, _, info = stepped(opt)(params, opt.init(params, KEY), network_batch())
    slope = 2.0**-22 / (2 * 0.1)
    np.testing.assert_allclose(first["loss_plus"], info.loss_plus, rtol=1e-6)
    np.testing.assert_allclose(first["projected_grad"], info.projected_grad, atol=slope)
    for found, wanted in zip(first["params"], jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(found, wanted.ravel(), rtol=1e-6, atol=6 * RATE * slope)
