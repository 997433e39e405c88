"""Kernels of subspaces are those of what is trained, and two of them approach the whole kernel."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import kernels, peft
from jaxlm.core import paths
from jaxlm.gradients.projection import projector
from jaxlm.kernels import subspaces
from tests.helpers.sentences import refused
from tests.helpers.slow import slow
from tests.kernels import oracle
from tests.kernels.test_common import UNCHECKED


@functools.cache
def single(name):
    """A model in float32."""
    lm = oracle.model(name)
    return lm.replace(params=oracle.of_dtype(lm.params, jnp.float32))


def of_selected(f, params, x, pattern):
    gradients = oracle.jacobian(f, params, x, paths.path_predicate(pattern))
    return oracle.kernel(gradients, gradients, "sgd")


def close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert subspaces.relative_error(found, expected) < tolerance


@functools.partial(jax.jit, static_argnames=("f", "scale", "trace_axes"))
def formula(f, params, x, other=None, **options):
    return subspaces.activation_projected(f, params, x, other, **options)


def adapted(lm, targets):
    return peft.lora(lm, jax.random.key(1), rank=3, alpha=6.0, targets=targets)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        slow("encoder", r"[kvo]_proj|up"),
        slow("decoder", r"[qo]_proj|down"),
        ("rotary decoder", "_proj"),
    ],
)
def test_lora_at_zero_is_the_kernel_of_projected_activations(name, targets):
    """By autodiff through the adapters, by explicit Jacobian, and by the formula."""
    lm, x = single(name), oracle.examples(4)
    with_adapters = adapted(lm, targets)
    f = oracle.label_logits(with_adapters, 3)
    expected = of_selected(f, with_adapters.params, x, peft.LORA)
    close(kernels.ntk(f, with_adapters.params, x, select=peft.LORA, options=UNCHECKED), expected)

    leaves = {leaf.path: leaf.value for leaf in paths.flatten(with_adapters.params)[0]}
    drawn = {
        path.removesuffix(".lora_a") + ".kernel": value
        for path, value in leaves.items()
        if path.endswith(".lora_a")
    }
    plain = oracle.label_logits(lm, 3)
    close(formula(plain, lm.params, x, adapters=drawn, scale=2.0), expected)


def test_activation_projected_of_two_sets_and_unstacked_leaves():
    lm, x = single("encoder"), oracle.examples(5)
    f = oracle.label_logits(lm, 1)
    drawn = subspaces.draw_adapters(lm.params, 4, seed=2, targets="mlm|up_proj")
    assert {path: a.shape for path, a in drawn.items()} == {
        "layers.mlp.up_proj.kernel": (2, 8, 4),
        "mlm.dense.kernel": (8, 4),
    }
    run = functools.partial(formula, f, lm.params, adapters=drawn)
    whole = run(x)
    first, second = (
        jax.tree.map(lambda a, rows=rows: a[rows], x) for rows in (slice(0, 2), slice(2, 5))
    )
    trace = run(first, second, trace_axes=(-1,))
    np.testing.assert_allclose(trace, whole[:2, 0, 2:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_with_an_orthogonal_square_adapter_nothing_is_lost():
    lm, x = single("decoder"), oracle.examples(4)
    f, path = oracle.label_logits(lm, 3), "layers.attention.q_proj.kernel"
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((2, 8, 8)))[0]
    found = formula(f, lm.params, x, adapters={path: jnp.float32(turn)})
    close(found, of_selected(f, lm.params, x, r"q_proj\.kernel"))


@pytest.mark.slow
def test_the_error_of_lora_falls_as_one_over_the_root_of_its_rank():
    lm, x = single("decoder"), oracle.examples(4)
    f = oracle.label_logits(lm, 3)
    full = of_selected(f, lm.params, x, r"(q|v)_proj\.kernel")

    @functools.partial(jax.jit, static_argnums=1)
    def kernels(seeds, rank):
        def one(seed):
            drawn = subspaces.draw_adapters(lm.params, rank, seed, r"(q|v)_proj")
            return subspaces.activation_projected(f, lm.params, x, adapters=drawn)

        return jax.lax.map(one, seeds)

    ranks, found = 2 ** np.array([2, 8]), []
    for rank in ranks.tolist():
        drawn = np.asarray(kernels(jnp.arange(16), rank))
        errors = [subspaces.relative_error(kernel, full) for kernel in drawn]
        found.append(math.sqrt(np.mean(np.square(errors))))
    slope = np.polyfit(np.log(ranks), np.log(found), 1)[0]
    assert -0.6 < slope < -0.4
    mean = drawn.mean(0)
    spread = drawn.std(0) / 4
    assert (np.abs(mean - full) < 4.5 * spread + 1e-5 * np.abs(full).max()).all()


@pytest.mark.slow
def test_the_kernel_of_biases():
    lm, x = single("encoder"), oracle.examples(4)
    f = oracle.label_logits(lm, 3)
    close(
        kernels.ntk(f, lm.params, x, select=peft.BITFIT), of_selected(f, lm.params, x, r"\.bias$")
    )


def test_the_kernel_of_biases_in_closed_form():
    # f = x W + b: the kernel of b is 1 where the outputs are the same.
    line = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    g = lambda params, x: x @ params["line"]["kernel"] + params["line"]["bias"][None]  # noqa: E731
    found = kernels.ntk(g, {"line": line}, jnp.eye(2), select=peft.BITFIT)
    np.testing.assert_array_equal(found, np.ones((2, 1, 2, 1)) * np.eye(3)[None, :, None])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder", "rotary decoder"])
def test_the_kernel_of_prefixes(name):
    lm, x = single(name), oracle.examples(4)
    lm = peft.prefix(lm, jax.random.key(0), length=2, init="normal")
    f = oracle.label_logits(lm, 1)
    close(
        kernels.ntk(f, lm.params, x, select=peft.PREFIX, options=UNCHECKED),
        of_selected(f, lm.params, x, peft.PREFIX),
    )


def test_intrinsic_dimension_is_the_kernel_of_the_subspace():
    """Against autodiff through theta + Pi v, with Pi read off the projector one unit at a time."""
    params = {"a": jnp.float32(np.random.default_rng(0).standard_normal((3, 4)))}
    x = jnp.float32(np.random.default_rng(1).standard_normal((5, 3)))
    f = lambda params, x: jnp.tanh(x @ params["a"])  # noqa: E731
    units = {"a": jnp.eye(12, dtype=jnp.float32).reshape(12, 3, 4)}
    drawn = projector("gaussian", 7, 3)
    basis = drawn.project(units)

    def moved(v, x):
        return f({"a": params["a"] + (basis @ v).reshape(3, 4)}, x)

    gradients = oracle.jacobian(lambda p, x: moved(p["v"], x), {"v": jnp.zeros(7)}, x)
    expected = oracle.kernel(gradients, gradients, "sgd")
    close(kernels.ntk(f, params, x, method="projected", projector=drawn), expected)


def test_expected_error_of_unit_kernels():
    # tr / norm of the identity of size n is sqrt(n); of a rank-one kernel it is 1.
    assert subspaces.expected_error(np.eye(15), 64) == pytest.approx(math.sqrt(16 / 64))
    assert subspaces.expected_error(np.ones((3, 2, 3, 2)), 50) == pytest.approx(math.sqrt(2 / 50))


def test_mistakes_name_the_argument():
    lm, x = single("rotary decoder"), oracle.examples(2)
    f = oracle.label_logits(lm, 1)
    plain = lambda params, x: f(params, x)  # noqa: E731
    run = functools.partial(subspaces.activation_projected, params=lm.params, x1=x)
    with refused("select", "lora"):
        kernels.ntk(f, lm.params, x, select=peft.LORA)
    with refused("rank", "got 0"):
        subspaces.draw_adapters(lm.params, 0)
    with refused("targets", "'nothing'"):
        subspaces.draw_adapters(lm.params, 2, targets="nothing")
    with refused("f", "keyword tap"):
        run(plain, adapters={})
    with refused("adapters", "a.kernel"):
        run(f, adapters={"a.kernel": 1})
    with refused("kernel", "(2, 3)"):
        subspaces.relative_error(np.ones((2, 2)), np.ones((2, 3)))
    with refused("full", "(2, 3)"):
        subspaces.expected_error(np.ones((2, 3)), 4)
