"""A compiled program is found by the trace of a function, made anew at every call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import kernels
from jaxlm.core import programs
from tests.helpers.models import small_model

X = jnp.array([1.0, 2.0, 3.0])


class Model:
    """An object whose method depends on more than its arguments."""

    power, offset = 2, jnp.ones(3)

    def __call__(self, x):
        return x**self.power + self.offset

    def value(self, x):
        return self(x)


def run(function, *args):
    return np.asarray(programs.Program(function)(*args))


def test_what_a_function_closes_over_may_change():
    shift, table = 1.0, np.zeros(3, np.float32)
    inner = {"scale": jnp.ones(3)}

    def function(x):
        scale = inner["scale"]  # within a function that is compiled itself
        return jax.jit(lambda x: x * scale)(x) + shift + table

    np.testing.assert_array_equal(run(function, X), X + 1)
    shift, inner["scale"] = 5.0, 2 * jnp.ones(3)
    np.testing.assert_array_equal(run(function, X), 2 * X + 5)
    table[:] = 10  # in place, of the same identity
    np.testing.assert_array_equal(run(function, X), 2 * X + 15)


@pytest.mark.parametrize("of", [lambda model: model, lambda model: model.value])
def test_an_object_may_change(of):
    model = Model()
    np.testing.assert_array_equal(run(of(model), X), X**2 + 1)
    model.offset = 3 * jnp.ones(3)
    np.testing.assert_array_equal(run(of(model), X), X**2 + 3)
    model.power = 3
    np.testing.assert_array_equal(run(of(model), X), X**3 + 3)


def test_equal_traces_share_a_program():
    programs._compiled.clear()

    def loss(scale):
        def one(w, x):
            hidden = jax.lax.scan(lambda h, w: (jax.nn.relu(w * h), None), x, w)[0]
            return (jax.nn.softmax(hidden) * scale).sum()

        return lambda w: jax.vmap(jax.grad(one), (None, 0))(w, jnp.stack([X, X]))

    w = jnp.array([0.5, 2.0])
    first = run(loss(1 * X), w)
    np.testing.assert_allclose(run(loss(2 * X), w), 2 * first, rtol=1e-5)
    assert len(programs._compiled) == 1
    run(lambda w: w * 1.0, w)
    run(lambda w: w * -1.0, w)
    run(lambda w: w * np.float32(-1.0), w.astype(jnp.bfloat16))
    assert len(programs._compiled) == 4


def test_what_a_trace_is_past_compiles_nothing_again():
    programs._compiled.clear()
    policies = jax.checkpoint_policies

    def function():
        policy = policies.save_from_both_policies(  # another function at every call
            policies.nothing_saveable, policies.save_only_these_names("name")
        )
        body = jax.checkpoint(
            lambda x: jnp.take(jnp.sin(x), jnp.array([2, 5])).sum(), policy=policy
        )
        return lambda x: body(x) + jax.grad(body)(x)

    first = run(function(), X)  # what is beyond the end is NaN, which is not equal to itself
    np.testing.assert_array_equal(run(function(), X), first)
    assert len(programs._compiled) == 1
    assert programs._as_value(0.0) != programs._as_value(-0.0)


def test_within_a_trace_a_program_is_its_function():
    scale = 3.0
    program = programs.Program(lambda x: scale * x)
    assert float(jax.grad(lambda x: program(x))(2.0)) == 3.0
    np.testing.assert_array_equal(jax.jit(jax.vmap(program))(X), 3 * X)
    # What a function closes over may itself be traced.
    found = jax.jit(lambda y: programs.Program(lambda x: x * y)(np.float32(2.0)))(X)
    np.testing.assert_array_equal(found, 2 * X)


def test_what_is_no_array_is_held():
    params = {"w": np.ones(2), "n": 3, "f": jnp.sin, "name": "a", "none": None, "c": 0.5}

    def function(params, x, *, tap=None):
        assert (params["n"], params["name"], tap) == (3, "a", "tap")
        return params["f"](params["w"] * x * params["c"])

    held, arrays = programs.held(function, params)
    assert {name for name, leaf in arrays.items() if leaf is not None} == {"w", "c"}
    found = jax.jit(lambda arrays, x: held(arrays, x, tap="tap"))(arrays, 2.0)
    np.testing.assert_allclose(found, np.sin(np.ones(2)), rtol=1e-6)


@pytest.mark.parametrize("kind", ["sgd", pytest.param("signgd", marks=pytest.mark.slow)])
def test_a_second_kernel_of_a_language_model_compiles_nothing(kind: str):
    lm, ids = small_model(), jnp.arange(24).reshape(4, 6)

    def f(params, ids, *, tap=None):
        return lm.apply(params, ids, token_ids=np.array([1, 2]), tap=tap)[:, -1]

    first = kernels.ntk(f, lm.params, ids, kind=kind)
    known = set(programs._compiled)
    np.testing.assert_array_equal(kernels.ntk(f, lm.params, ids, kind=kind), first)
    assert set(programs._compiled) == known
