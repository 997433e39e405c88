"""Linearization, fixed features and drift, next to functions whose derivatives are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels import behaviour
from tests.helpers.sentences import refused


def network(params, x):
    hidden = jnp.tanh(x @ params["first"])
    return hidden @ params["second"]


def parameters(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    first = jax.random.normal(keys[0], (4, 6))
    return {"first": first, "second": jax.random.normal(keys[1], (6, 3)), "step": jnp.array(7)}


def test_a_linearized_network_is_value_and_jacobian():
    before, after = parameters(0), parameters(1)
    x = jax.random.normal(jax.random.key(2), (5, 4))
    f_lin = jax.jit(behaviour.linearize(network, before))
    with jax.default_matmul_precision("highest"):
        jacobian = jax.jacrev(
            lambda first, second: network({"first": first, "second": second}, x), (0, 1)
        )(before["first"], before["second"])
        wanted = network(before, x)
        for name, part in zip(("first", "second"), jacobian, strict=True):
            wanted += jnp.einsum("ncij,ij->nc", part, after[name] - before[name])
    np.testing.assert_allclose(f_lin(after, x), wanted, rtol=2e-5)
    np.testing.assert_allclose(f_lin(before, x), network(before, x), rtol=1e-6)


def test_its_error_is_of_second_order():
    before, other = parameters(0), parameters(1)
    x = jax.random.normal(jax.random.key(2), (5, 4))
    f_lin = behaviour.linearize(network, before)
    errors = []
    for size in (0.1, 0.05):
        moved = {name: before[name] + size * other[name] for name in ("first", "second")}
        moved["step"] = before["step"]
        errors.append(float(jnp.abs(f_lin(moved, x) - network(moved, x)).max()))
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_a_function_that_is_linear_in_its_parameters_is_its_linearization():
    def f(params, x):
        return x @ params["w"]

    x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    before, after = ({"w": jnp.array(w)} for w in ([[1.0], [2.0]], [[4.0], [-3.0]]))
    np.testing.assert_allclose(behaviour.linearize(f, before)(after, x), f(after, x))
    drift = behaviour.kernel_drift(lambda params: x @ x.T, [before, after])
    assert drift.from_first[1] == (0.0, 0.0, 0.0, pytest.approx(1.0), 0.0)


def test_bfloat16_parameters_move_along_their_difference():
    before = {"w": jnp.full(2, 1.0, jnp.bfloat16)}
    after = {"w": jnp.full(2, 1.5, jnp.bfloat16)}

    def f(params, x):
        return (x @ params["w"].astype(jnp.float32)[:, None]) ** 2

    value = behaviour.linearize(f, before)(after, jnp.ones((1, 2)))
    assert value.item() == 4.0 + 2 * 2 * 1.0


@pytest.mark.parametrize(
    ("accuracies", "score"),
    [((0.5, 0.9, 0.8), 0.75), ((0.5, 0.9, 0.4), -0.25), ((0.5, 0.6, 0.7), 2.0)],
)
def test_a_linearization_score_is_the_share_recovered(accuracies, score):
    assert behaviour.linearization_score(*accuracies) == pytest.approx(score)


@pytest.mark.parametrize("final", [0.5, 0.4])
def test_without_improvement_there_is_nothing_to_recover(final):
    assert behaviour.linearization_score(0.5, final, 0.6) is None


def test_a_change_of_kernel_by_hand():
    before = np.array([[1.0, -2.0], [-2.0, 4.0]]).reshape(2, 1, 2, 1)
    after = np.array([[2.0, -2.0], [-2.0, 10.0]]).reshape(2, 1, 2, 1)
    change = behaviour.kernel_change(before, after)
    assert change.mean == (1 + 0 + 0 + 1.5) / 4
    assert change.median == 0.5
    assert change.frobenius == pytest.approx((37 / 25) ** 0.5)
    assert change.alignment == pytest.approx((2 + 4 + 4 + 40) / (5 * (4 + 4 + 4 + 100) ** 0.5))


def test_an_entry_that_leaves_zero_has_no_relative_change():
    for zero in (0.0, 1e-9):  # what rounding makes of zero is one
        first = np.array([4.0, zero, 2.0], np.float32)
        change = behaviour.kernel_change(first, [5.0, 0.5, 2.0])
        assert (change.mean, change.median) == (0.125, 0.125)
        assert change.left_out == pytest.approx(1 / 3)
        assert change.frobenius == pytest.approx((1.25 / 20) ** 0.5)
    stays = behaviour.kernel_change([1.0, 0.0], [2.0, 0.0])
    assert (stays.mean, stays.left_out) == (0.5, 0.0)


def test_drift_of_a_product_of_two_scalars():
    """f = a w x has the kernel (a² + w²) x x'."""
    x = np.array([[1.0], [2.0]])

    def kernel_fn(params):
        return (params["a"] ** 2 + params["w"] ** 2) * (x @ x.T)

    points = [(1.0, 1.0), (2.0, 1.0), (2.0, 3.0)]  # factors 2, 5, 13
    drift = behaviour.kernel_drift(kernel_fn, ({"a": a, "w": w} for a, w in points))
    assert [each.frobenius for each in drift.from_first] == pytest.approx([0, 1.5, 5.5])
    assert [each.mean for each in drift.from_first] == pytest.approx([0, 1.5, 5.5])
    assert [each.mean for each in drift.from_previous] == pytest.approx([1.5, 8 / 5])
    assert [each.alignment for each in drift.from_first] == pytest.approx([1, 1, 1])


def test_mistakes_name_the_argument():
    with refused("after", "[1, 1] (got [1])"):
        behaviour.kernel_change([[1.0]], [1.0])
    with refused("kernel", "not finite"):
        behaviour.kernel_change([1.0], [np.nan])
    with refused("before", "zeros"):
        behaviour.kernel_change([0.0], [1.0])
    with refused("trajectory", "empty"):
        behaviour.kernel_drift(lambda p: p, [])
    f_lin, x = behaviour.linearize(network, parameters(0)), jnp.ones((1, 4))
    with refused("params", "second", "(6, 2) and (6, 3)"):
        f_lin({**parameters(0), "second": jnp.ones((6, 2))}, x)
    with refused("params", "third", "() and None"):
        f_lin({**parameters(0), "third": 2.0}, x)


def test_the_gain_is_judged_by_mcnemars_exact_test():
    rng = np.random.default_rng(0)
    before, after = rng.random(80) < 0.5, rng.random(80) < 0.65
    gained, lost = (after & ~before).sum(), (before & ~after).sum()
    n = gained + lost
    wanted = sum(math.comb(n, k) for k in range(gained, n + 1)) / 2**n
    assert behaviour.gain_p_value(before, after) == pytest.approx(wanted, rel=1e-12)
    assert behaviour.gain_p_value(before, before) == 1.0


def test_nulls_move_as_far_and_have_the_same_numbers():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 3)).astype(np.float32), "ids": np.arange(3)}
    other = {"w": params["w"] + np.float32(0.5), "ids": np.arange(3)}
    moved = behaviour.random_move(params, other, jax.random.key(0))
    gaps = [np.linalg.norm(tree["w"] - params["w"]) for tree in (moved, other)]
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-5)
    assert not np.allclose(moved["w"], other["w"])
    dealt = behaviour.shuffled(params, jax.random.key(1))
    np.testing.assert_array_equal(np.sort(dealt["w"], None), np.sort(params["w"], None))
    assert not np.array_equal(dealt["w"], params["w"])
    np.testing.assert_array_equal(dealt["ids"], params["ids"])
