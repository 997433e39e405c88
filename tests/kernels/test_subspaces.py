"""Kernels of subspaces are those of what is trained, and two of them approach the whole kernel."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import peft
from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.kernels import subspaces
from tests.kernels import oracle


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
    [("encoder", r"[kvo]_proj|up"), ("decoder", r"[qo]_proj|down"), ("rotary decoder", "_proj")],
)
def test_lora_at_zero_is_the_kernel_of_projected_activations(name, targets):
    """By autodiff through the adapters, by explicit Jacobian, and by the formula."""
    lm, x = single(name), oracle.examples(4)
    with_adapters = adapted(lm, targets)
    f = oracle.label_logits(with_adapters, 3)
    expected = of_selected(f, with_adapters.params, x, peft.LORA)
    close(subspaces.lora(f, with_adapters.params, x), expected)

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
    np.testing.assert_allclose(run(first, second), whole[:2, :, 2:], rtol=1e-4, atol=1e-5)
    trace = run(x, trace_axes=(-1,))
    np.testing.assert_allclose(trace, whole[:, 0, :, 0], rtol=1e-5)


def test_with_an_orthogonal_square_adapter_nothing_is_lost():
    lm, x = single("decoder"), oracle.examples(4)
    f, path = oracle.label_logits(lm, 3), "layers.attention.q_proj.kernel"
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((2, 8, 8)))[0]
    found = formula(f, lm.params, x, adapters={path: jnp.float32(turn)})
    close(found, of_selected(f, lm.params, x, r"q_proj\.kernel"))


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

    ranks, found = 2 ** np.array([2, 5, 8]), []
    for rank in ranks.tolist():
        drawn = np.asarray(kernels(jnp.arange(16), rank))
        errors = [subspaces.relative_error(kernel, full) for kernel in drawn]
        found.append(math.sqrt(np.mean(np.square(errors))))
    slope = np.polyfit(np.log(ranks), np.log(found), 1)[0]
    assert -0.6 < slope < -0.4
    mean = drawn.mean(0)
    spread = drawn.std(0) / 4
    assert (np.abs(mean - full) < 4.5 * spread + 1e-5 * np.abs(full).max()).all()


def test_the_kernel_of_biases_and_its_closed_form():
    lm, x = single("encoder"), oracle.examples(4)
    f = oracle.label_logits(lm, 3)
    close(subspaces.bitfit(f, lm.params, x), of_selected(f, lm.params, x, r"\.bias$"))
    # f = x W + b: the kernel of b is 1 where the outputs are the same.
    line = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    g = lambda params, x: x @ params["line"]["kernel"] + params["line"]["bias"][None]  # noqa: E731
    found = subspaces.bitfit(g, {"line": line}, jnp.eye(2))
    np.testing.assert_array_equal(found, np.ones((2, 1, 2, 1)) * np.eye(3)[None, :, None])


@pytest.mark.parametrize("name", ["decoder", "rotary decoder"])
def test_the_kernel_of_prefixes(name):
    lm, x = single(name), oracle.examples(4)
    lm = peft.prefix(lm, jax.random.key(0), length=2, init="normal")
    f = oracle.label_logits(lm, 1)
    close(subspaces.prefix(f, lm.params, x), of_selected(f, lm.params, x, peft.PREFIX))


def test_intrinsic_dimension_is_the_kernel_of_the_subspace():
    """Against autodiff through theta + Pi v, with Pi read off the projector one unit at a time."""
    params = {"a": jnp.float32(np.random.default_rng(0).standard_normal((3, 4)))}
    x = jnp.float32(np.random.default_rng(1).standard_normal((5, 3)))
    f = lambda params, x: jnp.tanh(x @ params["a"])  # noqa: E731
    from jaxlm.gradients.projection import projector

    units = {"a": jnp.eye(12, dtype=jnp.float32).reshape(12, 3, 4)}
    basis = projector("gaussian", 7, 3).project(units)

    def moved(v, x):
        return f({"a": params["a"] + (basis @ v).reshape(3, 4)}, x)

    gradients = oracle.jacobian(lambda p, x: moved(p["v"], x), {"v": jnp.zeros(7)}, x)
    expected = oracle.kernel(gradients, gradients, "sgd")
    close(subspaces.intrinsic_dimension(f, params, x, dim=7, seed=3), expected)


def test_expected_error_of_unit_kernels():
    # tr / norm of the identity of size n is sqrt(n); of a rank-one kernel it is 1.
    assert subspaces.expected_error(np.eye(15), 64) == pytest.approx(math.sqrt(16 / 64))
    assert subspaces.expected_error(np.ones((3, 2, 3, 2)), 50) == pytest.approx(math.sqrt(2 / 50))


def test_mistakes_are_said_in_one_sentence():
    lm, x = single("rotary decoder"), oracle.examples(2)
    f = oracle.label_logits(lm, 1)
    plain = lambda params, x: f(params, x)  # noqa: E731
    for act, message in (
        (
            lambda: subspaces.lora(f, lm.params, x),
            "the parameters have no LoRA adapters; take the model that jaxlm.peft.lora returns",
        ),
        (
            lambda: subspaces.bitfit(f, lm.params, x),
            "the parameters have no biases; take another kind of fine-tuning",
        ),
        (
            lambda: subspaces.prefix(f, lm.params, x),
            "the parameters have no prefix; take the model that jaxlm.peft.prefix returns",
        ),
        (lambda: subspaces.draw_adapters(lm.params, 0), "rank is 0: give 1 or more"),
        (
            lambda: subspaces.draw_adapters(lm.params, 2, targets="nothing"),
            "targets='nothing' takes no kernel; kernels have paths like a.kernel",
        ),
        (
            lambda: subspaces.activation_projected(plain, lm.params, x, adapters={}),
            "f takes no keyword tap; give f(params, x, *, tap=None)",
        ),
        (
            lambda: subspaces.activation_projected(f, lm.params, x, adapters={"a.kernel": 1}),
            "adapters has a.kernel, which passes no tap; take paths of kernels",
        ),
        (
            lambda: subspaces.relative_error(np.ones((2, 2)), np.ones((2, 3))),
            "kernels of shapes (2, 2) and (2, 3) cannot be compared",
        ),
        (
            lambda: subspaces.expected_error(np.ones((2, 3)), 4),
            "a kernel of shape (2, 3) is not one of examples with themselves",
        ),
    ):
        with pytest.raises(UserError) as error:
            act()
        assert str(error.value) == message
