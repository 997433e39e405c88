"""Each mistake ends in one sentence that says what, where and the fix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import kernels
from jaxlm.core.errors import UserError
from jaxlm.gradients.projection import projector
from jaxlm.sharding import make_mesh

X = np.array([[1.0, 2.0], [0.0, 1.0], [3.0, -1.0]], np.float32)
PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}


def f(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None])


def ones(shape):
    return lambda params, x: jnp.ones(shape) * params["b"][0]


def normalised(params, x):
    h = f(params, x)
    return h - h.mean(0, keepdims=True)


def rolled(params, x):
    return f(params, x) * jnp.arange(1.0, 1 + len(x))[:, None]


ADAM = optax.adam(1e-3).init(PARAMS)
WIDER = optax.adam(1e-3).init({"w": jnp.ones((3, 2)), "b": jnp.ones(2)})
BIAS = optax.masked(optax.adam(1e-3), {"w": False, "b": True}).init(PARAMS)
SGD = optax.sgd(1e-3, momentum=0.9).init(PARAMS)

ROWS = [
    (
        {"kind": "lion"},
        "kind='lion' is not known; give one of sgd, signgd, asymmetric_signgd, adam",
    ),
    (
        {"method": "fast"},
        "method='fast' is not known; give one of auto, jacobian, factorized, ntk_vector_products, "
        "projected",
    ),
    (
        {"method": "factorized"},
        "f has no keyword tap, which method='factorized' needs; give method='jacobian'",
    ),
    (
        {"method": "projected"},
        "method='projected' and a projector go together; give both or neither",
    ),
    (
        {"method": "projected", "projector": projector("rademacher", 8), "mesh": make_mesh()},
        "the mesh of method='projected' is that of its projector; give it there",
    ),
    (
        {"trace_axes": (0,)},
        "trace_axes=(0,) has the axis of examples, 0; only the class axis, -1, can be traced or "
        "made diagonal",
    ),
    (
        {"diagonal_axes": (2,)},
        "diagonal_axes=(2,) has axis 2, but f's value has two, [N, C]; give (-1,) or ()",
    ),
    (
        {"trace_axes": (1,), "diagonal_axes": (-1,)},
        "the class axis is in trace_axes and in diagonal_axes; leave it in one",
    ),
    (
        {"block_size": 0},
        "block_size=0 is no number of examples; give 1 or more",
    ),
    (
        {"sign_threshold": 1.5},
        "sign_threshold=1.5 is impossible; give 0 <= τ < 1 or None",
    ),
    (
        {"kind": "adam"},
        "kind='adam' needs adam_state, the state of an optax chain with scale_by_adam",
    ),
    (
        {"adam_state": ADAM},
        "adam_state is given, but kind='sgd' does not use it; give kind='adam'",
    ),
    (
        {"kind": "adam", "adam_state": SGD},
        "adam_state: has no ScaleByAdamState. Give the state of an optax chain with adam, adamw or "
        "scale_by_adam.",
    ),
    (
        {"kind": "adam", "adam_state": BIAS},
        "adam_state: has 0 moments of w, not one. Leave it out by select.",
    ),
    (
        {"kind": "adam", "adam_state": (ADAM, ADAM)},
        "adam_state: has 2 moments of b, not one. Give one state.",
    ),
    (
        {"kind": "adam", "adam_state": WIDER},
        "adam_state: the moments of w must have shape (2, 2) (got (3, 2)). Give the state of these "
        "parameters.",
    ),
    (
        {"kind": "adam", "adam_state": ADAM, "b2": 1},
        "b2: must be at least 0 and below 1 (got 1). Correct it.",
    ),
    (
        {"select": "nothing"},
        "select: takes no parameter (got 'nothing'). Choose among b, w.",
    ),
    (
        {"f": lambda params, x: f(params, x)[:, 0]},
        "f returns (3,) at x1, without a class axis; return f[:, None]",
    ),
    (
        {"f": ones((3, 2, 2))},
        "f returns (3, 2, 2) at x1, which has 3 examples; return [N, C]",
    ),
    (
        {"f": ones((2, 2))},
        "f returns (2, 2) at x1, which has 3 examples; return [N, C]",
    ),
    (
        {"f": lambda params, x: (f(params, x),)},
        "f must return one array [N, C], not tuple",
    ),
    (
        {"f": lambda params, x: f(params, x).argmax(-1, keepdims=True)},
        "f returns int32 at x1; return floats, whose gradient exists",
    ),
    (
        {"f": lambda params, x: f(params, x)[:, : len(x) - 1], "x2": X[:2]},
        "f has 2 outputs at x1 and 1 at x2; give both the same classes",
    ),
    (
        {"x1": {"a": X, "b": X[:2]}},
        "x1: axis 0 of every array must be the examples (got (3, 2), (2, 2)). Give arrays of the "
        "same length.",
    ),
    (
        {"x2": X[:0]},
        "x2: has no examples (got (0, 2)). Give at least one.",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), ROWS)
def test_sentences(change, sentence):
    options = {"f": f, "params": PARAMS, "x1": X, **change}
    with pytest.raises(UserError) as found:
        kernels.ntk(options.pop("f"), options.pop("params"), options.pop("x1"), **options)
    assert str(found.value) == sentence
    assert found.type is UserError


def among_three(params, x):
    """Examples that see their neighbours, unless there are two at most."""
    h = f(params, x)
    return h + jnp.roll(h, 1, axis=0) if len(x) > 2 else h


@pytest.mark.parametrize(
    ("wrong", "what"),
    [(normalised, "each other"), (rolled, "their order"), (among_three, "their order")],
)
def test_one_example_changes_f_at_another(wrong, what):
    with pytest.raises(UserError, match=f"f at examples 0, 1, 2 of x1 depends on {what} "):
        kernels.ntk(wrong, PARAMS, X)
    kernels.ntk(f, PARAMS, X, X[::-1])
    with pytest.raises(UserError, match="of x2 depends"):
        kernels.ntk(wrong, PARAMS, X[:1], X)


def test_duplicate_examples_are_allowed():
    found = np.asarray(kernels.ntk(f, PARAMS, X[[0, 0, 1]]))
    np.testing.assert_array_equal(found[0], found[1])
    with pytest.raises(UserError, match="examples 0, 2 of x1"):
        kernels.ntk(normalised, PARAMS, X[[0, 0, 1]])


@pytest.mark.parametrize("kind", ["sgd", "signgd"])
def test_the_example_and_the_leaf_of_a_gradient_that_is_nan_are_named(kind):
    def root(params, x):  # the derivative of sqrt at 0 is infinite, times 0 NaN
        return jnp.sqrt((x @ params["w"]) ** 2) + params["b"][None]

    sentence = (
        r"^the gradient of f at example 1 of x2 is not finite in w; look at that example and at "
        "the parameters$"
    )
    x2 = np.stack([X[0], 0 * X[0], X[2]])
    for method in ("jacobian", "ntk_vector_products"):
        with pytest.raises(UserError, match=sentence):
            kernels.ntk(root, PARAMS, X, x2, kind=kind, method=method)
    assert not np.isfinite(kernels.ntk(root, PARAMS, X, x2, kind=kind, check=False)).all()
    kernels.ntk(root, PARAMS, X, x2, select="b")


def test_a_value_that_is_not_finite():
    def log(params, x):
        return jnp.log(x @ params["w"])

    with pytest.raises(UserError, match=r"^f at example 2 of x1 is not finite; look at"):
        kernels.ntk(log, PARAMS, np.abs(X) * np.array([[1], [1], [0]], np.float32))


def test_overflow_of_float16():
    half = jax.tree.map(lambda a: a.astype(jnp.float16), PARAMS)
    x = jnp.asarray([[1, 1], [300, 1], [1, 1]], jnp.float16)

    def cubic(params, x):
        return (x @ params["w"]) ** 2 + 0 * params["b"][None]

    sentence = (
        "^f at example 1 of x1 is not finite; float16 ends at 65504, give parameters in float32 "
        "or bfloat16$"
    )
    with pytest.raises(UserError, match=sentence):
        kernels.ntk(cubic, half, x)
    steep = lambda params, x: 300 * (x @ (200 * params["w"]))  # noqa: E731
    with pytest.raises(
        UserError, match=r"^the gradient of f at example 1 of x1 is not finite in w"
    ):
        kernels.ntk(steep, half, jnp.asarray([[1, -1], [2, -2], [1, -1]], jnp.float16), select="w")


def test_vector_of_another_shape():
    with pytest.raises(UserError, match=r"^v is \(3,\), but f's value at x2 is \(3, 2\); give one"):
        kernels.kernel_vector_product(f, PARAMS, X, None, jnp.ones(3))
