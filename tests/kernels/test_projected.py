"""Kernels of projected gradients: unbiased, with the error of theory, whatever the blocks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import paths
from jaxlm.gradients.projection import Projector, projector
from jaxlm.kernels import KernelOptions, contraction, empirical, ntk, subspaces
from jaxlm.sharding import make_mesh
from tests.helpers.slow import slow
from tests.kernels import oracle

projected = functools.partial(ntk, method="projected")


def network(params, x):
    """[N, 2], of two layers."""
    return jnp.tanh(x @ params["a"]) @ params["b"]


def problem(count=10):
    rng = np.random.default_rng(0)
    params = {"a": jnp.float32(rng.standard_normal((6, 9))), "b": jnp.float32(rng.random((9, 2)))}
    return params, jnp.float32(rng.standard_normal((count, 6)))


def explicit(params, x):
    return oracle.jacobian(network, params, x)


def rows_of(drawn: Projector, gradients):
    """S of every gradient {(path, layer): [N, C, p]}, in the oracle's order of leaves."""
    shape = next(iter(gradients.values())).shape[:2]
    total = 0
    for (path, layer), g in sorted(gradients.items()):
        flat = jnp.float32(g.reshape(-1, g.shape[-1]))
        total += np.asarray(drawn.leaf(path, layer, flat), np.float64)
    return total.reshape(*shape, -1)


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_every_kind_projects_the_features_of_the_definition(kind):
    params, x = problem()
    gradients, drawn = explicit(params, x), projector("countsketch", 32, 3)
    value = oracle.kind_of(kind, params, jnp.float32)
    signed = oracle.signs(gradients, 1e-6)
    left = signed if kind == "signgd" else gradients
    right = {"sgd": gradients, "signgd": signed, "asymmetric_signgd": signed}.get(kind)
    if right is None:
        right = oracle.adam(gradients, *oracle.adam_state(params))
    expected = np.einsum("ncr,mdr->ncmd", rows_of(drawn, left), rows_of(drawn, right))
    at = functools.partial(projected, network, params, x, projector=drawn, kind=value)
    found = at()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    if kind != "sgd":  # the axes do not see the kind
        return
    trace = at(x[:3], trace_axes=(-1,))
    wanted = np.einsum("ncmc->nm", expected[:, :, :3]) / 2
    np.testing.assert_allclose(trace, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    diagonal = at(diagonal_axes=(-1,))
    wanted = np.einsum("ncmc->nmc", expected)
    np.testing.assert_allclose(diagonal, wanted, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


paths.declare_stacked({"layers.a": 1, "layers.b": 1})


@pytest.mark.parametrize("family", ["countsketch", slow("gaussian"), slow("rademacher"), "srht"])
def test_the_error_falls_as_one_over_the_root_of_dim(family):
    """Slope -0.5 +- 0.1 of the root mean square over seeds, dim from 2**4 to 2**10."""
    params, x = problem(6)
    gradients = explicit(params, x)
    full = oracle.kernel(gradients, gradients, "sgd")
    rows = {"a": gradients["a", None], "b": gradients["b", None]}
    # Several copies of each leaf, for more parameters than the largest dim.
    copies = {
        name: jnp.float32(np.repeat(g.reshape(12, 1, -1), 24, axis=1)) / math.sqrt(24)
        for name, g in rows.items()
    }
    tree = {"layers": copies}
    dims, found = 2 ** np.array([4, 10]), []
    for dim in dims.tolist():

        def one(seed, dim=dim):
            return Projector(family, dim, seed).project(tree)

        drawn = np.asarray(jax.jit(lambda seeds: jax.lax.map(one, seeds))(jnp.arange(16)))
        kernels = np.einsum("sir,sjr->sij", drawn, drawn)
        errors = [subspaces.relative_error(k, full.reshape(12, 12)) for k in kernels]
        found.append(math.sqrt(np.mean(np.square(errors))))
    slope = np.polyfit(np.log(dims), np.log(found), 1)[0]
    assert -0.6 < slope < -0.4


def test_the_error_of_a_gaussian_projection_in_closed_form():
    params, x = problem(5)
    gradients = explicit(params, x)
    full = oracle.kernel(gradients, gradients, "sgd")

    def one(seed):
        drawn = Projector("gaussian", 64, seed)
        return projected(network, params, x, projector=drawn, options=KernelOptions(check=False))

    drawn = jax.jit(lambda seeds: jax.lax.map(one, seeds))(jnp.arange(60))
    squares = np.square([subspaces.relative_error(kernel, full) for kernel in drawn])
    spread = squares.std() / math.sqrt(len(squares))
    assert abs(squares.mean() - subspaces.expected_error(full, 64) ** 2) < 4.5 * spread


def test_it_is_symmetric_and_positive_semidefinite():
    params, x = problem()
    for kind in ("sgd", "signgd"):
        kernel = projected(network, params, x, projector=projector("srht", 64), kind=kind)
        matrix = np.asarray(kernel, np.float64).reshape(20, 20)
        np.testing.assert_array_equal(matrix, matrix.T)
        eigenvalues = np.linalg.eigvalsh(matrix)
        assert eigenvalues[0] > -1e-5 * eigenvalues[-1]


@pytest.mark.parametrize("family", ["countsketch", slow("kronecker"), slow("rademacher"), "srht"])
def test_blocks_and_order_change_nothing(family):
    params, x = problem()
    drawn = projector(family, 64, 1)

    def rows(x, **options):
        spec, options = contraction.kernel_spec(params), KernelOptions(**options)
        work = empirical.prepare(network, params, x, None, spec, "projected", options)
        return np.asarray(work.projected_features(0, drawn))

    whole = rows(x, block_size=4)
    np.testing.assert_array_equal(rows(x[::-1], block_size=4), whole[::-1])
    np.testing.assert_array_equal(rows(x[3:8], block_size=4)[:4], whole[3:7])
    for size in (3, None):
        np.testing.assert_allclose(rows(x, block_size=size), whole, atol=2e-5)


def test_layers_and_selection():
    f, params = oracle.toy(3)
    params, x = oracle.of_dtype(params, jnp.float32), oracle.toy_examples(5)
    drawn = projector("rademacher", 256, 2)
    select = r"key|scale"
    gradients = oracle.jacobian(f, params, x, lambda path: "key" in path or "scale" in path)
    assert {layer for _, layer in gradients} == {0, 1, None}
    rows = rows_of(drawn, gradients)
    expected = np.einsum("ncr,mdr->ncmd", rows, rows)
    found = projected(
        f, params, x, projector=drawn, select=select, options=KernelOptions(block_size=2)
    )
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-4 * scale)


@pytest.mark.multidevice
def test_eight_devices_give_the_same_kernel():
    params, x = problem(20)
    kernel = projected(network, params, x, projector=projector("srht", 64, 1))
    mesh = make_mesh(data=4, fsdp=2)
    divided = projected(network, params, x, projector=projector("srht", 64, 1, mesh=mesh))
    assert len(divided.sharding.device_set) == 8
    np.testing.assert_allclose(divided, kernel, atol=1e-5 * np.abs(kernel).max())
