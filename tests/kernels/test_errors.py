"""Each mistake ends in one sentence that names the argument, the value and the fix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import kernels
from jaxlm.core.errors import UserError
from jaxlm.gradients.projection import projector
from jaxlm.kernels import Adam, KernelOptions, SignGD
from jaxlm.sharding import make_mesh
from tests.helpers.sentences import refused

X = np.array([[1.0, 2.0], [0.0, 1.0], [3.0, -1.0]], np.float32)
PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
DRAWN = projector("rademacher", 8)


def f(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None])


def ones(shape):
    return lambda params, x: jnp.ones(shape) * params["b"][0]


def normalised(params, x):
    h = f(params, x)
    return h - h.mean(0, keepdims=True)


def rolled(params, x):
    return f(params, x) * jnp.arange(1.0, 1 + len(x))[:, None]


def test_a_whole_sentence():
    with pytest.raises(UserError) as error:
        kernels.ntk(f, PARAMS, X, kind="lion")
    assert str(error.value) == (
        "kind: not known (got 'lion'). Choose one of sgd, signgd, asymmetric_signgd."
    )


ROWS = [
    ({"kind": "adam"}, "kind", "kernels.Adam(state)"),
    ({"method": "fast"}, "method", "ntk_vector_products"),
    ({"method": "factorized"}, "f", "keyword tap"),
    ({"method": "projected"}, "projector", "no projector"),
    ({"projector": DRAWN}, "projector", "'auto'"),
    (
        {
            "method": "projected",
            "projector": DRAWN,
            "options": lambda: KernelOptions(mesh=make_mesh()),
        },
        "options.mesh",
        "projector",
    ),
    ({"trace_axes": (0,)}, "trace_axes", "got 0"),
    ({"diagonal_axes": (2,)}, "diagonal_axes", "got 2"),
    ({"trace_axes": (1,), "diagonal_axes": (-1,)}, "diagonal_axes", "axis is traced"),
    ({"options": lambda: KernelOptions(block_size=0)}, "block_size", "got 0"),
    ({"kind": lambda: SignGD(1.5)}, "threshold", "got 1.5"),
    ({"kind": lambda: Adam(None, b2=1)}, "b2", "got 1"),
    ({"select": "nothing"}, "select", "got 'nothing'"),
    ({"f": lambda params, x: f(params, x)[:, 0]}, "f", "(3,)", "f[:, None]"),
    ({"f": ones((3, 2, 2))}, "f", "(3, 2, 2)"),
    ({"f": ones((2, 2))}, "f", "[3, C]", "(2, 2)"),
    ({"f": lambda params, x: (f(params, x),)}, "f", "got tuple"),
    ({"f": lambda params, x: f(params, x).argmax(-1, keepdims=True)}, "f", "int32 at x1"),
    ({"f": lambda params, x: f(params, x)[:, : len(x) - 1], "x2": X[:2]}, "f", "got 2 and 1"),
    ({"x1": {"a": X, "b": X[:2]}}, "x1", "(3, 2), (2, 2)"),
    ({"x2": X[:0]}, "x2", "no examples"),
]


@pytest.mark.parametrize(("change", "key", "parts"), [(row[0], row[1], row[2:]) for row in ROWS])
def test_sentences(change, key, parts):
    with refused(key, *parts):
        made = ("options", "kind")  # a value that is wrong fails where it is made
        change = {k: v() if k in made and callable(v) else v for k, v in change.items()}
        options = {"f": f, "params": PARAMS, "x1": X, **change}
        kernels.ntk(options.pop("f"), options.pop("params"), options.pop("x1"), **options)


ADAM = optax.adam(1e-3).init(PARAMS)
STATES = [
    (optax.sgd(1e-3, momentum=0.9).init(PARAMS), "ScaleByAdamState"),
    (optax.masked(optax.adam(1e-3), {"w": False, "b": True}).init(PARAMS), "w"),
    ((ADAM, ADAM), "b"),
    (optax.adam(1e-3).init({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}), "w"),
]


@pytest.mark.parametrize(("state", "part"), STATES)
def test_a_state_without_the_moments(state, part):
    with refused("adam_state", part):
        kernels.ntk(f, PARAMS, X, kind=Adam(state))


def among_three(params, x):
    """Examples that see their neighbours, unless there are two at most."""
    h = f(params, x)
    return h + jnp.roll(h, 1, axis=0) if len(x) > 2 else h


@pytest.mark.parametrize(
    ("wrong", "what"),
    [(normalised, "each other"), (rolled, "their order"), (among_three, "their order")],
)
def test_one_example_changes_f_at_another(wrong, what):
    with refused("f", f"got examples 0, 1, 2 of x1, which depend on {what} "):
        kernels.ntk(wrong, PARAMS, X)
    kernels.ntk(f, PARAMS, X, X[::-1])
    with refused("f", "of x2"):
        kernels.ntk(wrong, PARAMS, X[:1], X)


def test_duplicate_examples_are_allowed():
    result = np.asarray(kernels.ntk(f, PARAMS, X[[0, 0, 1]]))
    np.testing.assert_array_equal(result[0], result[1])
    with refused("f", "examples 0, 2 of x1"):
        kernels.ntk(normalised, PARAMS, X[[0, 0, 1]])


@pytest.mark.parametrize("method", ["jacobian", "ntk_vector_products", "projected"])
@pytest.mark.parametrize("kind", ["sgd", "signgd"])
def test_the_example_and_the_leaf_of_a_gradient_that_is_nan_are_named(kind, method):
    def root(params, x):  # the derivative of sqrt at 0 is infinite, times 0 NaN
        return jnp.sqrt((x @ params["w"]) ** 2) + params["b"][None]

    x2 = np.stack([X[0], 0 * X[0], X[2]])
    options = {"kind": kind, "method": method}
    options |= {"projector": DRAWN} if method == "projected" else {}
    with refused("f", "gradient is not finite in w", "example 1 of x2"):
        kernels.ntk(root, PARAMS, X, x2, **options)
    unchecked = kernels.ntk(root, PARAMS, X, x2, options=KernelOptions(check=False), **options)
    assert not np.isfinite(unchecked).all()
    kernels.ntk(root, PARAMS, X, x2, select="b", **options)


def test_the_check_within_a_function_that_is_traced():
    def linear(params, x):
        return x @ params["w"]

    def centred(params, x):
        return linear(params, x - x.mean(0, keepdims=True))

    x = jnp.asarray(X)
    total = jax.jit(lambda scale: scale * kernels.ntk(linear, PARAMS, x).sum())(2.0)
    np.testing.assert_allclose(total, 2 * kernels.ntk(linear, PARAMS, x).sum(), rtol=1e-6)
    with refused("f", "depend on each other"):
        jax.jit(lambda: kernels.ntk(centred, PARAMS, x))()


def test_a_value_that_is_not_finite():
    def log(params, x):
        return jnp.log(x @ params["w"])

    with refused("f", "not finite", "example 2 of x1"):
        kernels.ntk(log, PARAMS, np.abs(X) * np.array([[1], [1], [0]], np.float32))


def test_overflow_of_float16():
    half = jax.tree.map(lambda a: a.astype(jnp.float16), PARAMS)
    x = jnp.asarray([[1, 1], [300, 1], [1, 1]], jnp.float16)

    def square(params, x):
        return (x @ params["w"]) ** 2 + 0 * params["b"][None]

    with refused("f", "example 1 of x1", "float16 ends at 65504"):
        kernels.ntk(square, half, x)
    steep = lambda params, x: 300 * (x @ (200 * params["w"]))  # noqa: E731
    with refused("f", "gradient is not finite in w", "example 1 of x1"):
        kernels.ntk(steep, half, jnp.asarray([[1, -1], [2, -2], [1, -1]], jnp.float16), select="w")


def test_vector_of_another_shape():
    with refused("v", "(3, 2)", "got (3,)"):
        kernels.kernel_vector_product(f, PARAMS, X, None, jnp.ones(3))
