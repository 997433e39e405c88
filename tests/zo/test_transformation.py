"""The optax adapter against what optax asks of its own transformations, in three widths."""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import zo
from tests.zo.problems import directions, flat, quadratic, small_params

pytestmark = pytest.mark.optimized

OTHERS = ("float32", "float16")
WIDTHS = ("bfloat16", "float64")
EPS = 2.0**-6
CHAINS = {
    "alone": lambda **o: zo.scale_by_spsa(EPS, **o),
    "sgd": lambda **o: optax.chain(zo.scale_by_spsa(EPS, **o), optax.sgd(1e-2, momentum=0.9)),
    "adam": lambda **o: optax.chain(zo.scale_by_spsa(EPS, **o), optax.adam(0.1)),
    "then": lambda **o: zo.scale_by_spsa(EPS, then=optax.adamw(0.1), **o),
}
"""Adam's steps are as long as its rate: of a tenth of it, bfloat16 would lose the last ones."""


def width_of(dtype):
    """64 bits are there where a leaf has them."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


@pytest.fixture(params=[*WIDTHS, *(pytest.param(x, marks=pytest.mark.slow) for x in OTHERS)])
def dtype(request):
    with width_of(request.param):
        yield request.param


def pairs(*quick, of="name", names=tuple(CHAINS)):
    """Rows of which the default run has some: the others go the ways of these."""
    every = itertools.product(names, [*WIDTHS, *OTHERS])
    rows = [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in every]
    return pytest.mark.parametrize((of, "dtype"), rows, indirect=["dtype"])


def value_fn(params):
    return quadratic(params, 0.25)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree)


@pairs(("adam", "bfloat16"), ("then", "bfloat16"), ("sgd", "float64"), ("then", "float64"))
def test_updates_are_like_the_parameters_and_the_state_keeps_its_types(name, dtype):
    params, tx = small_params(dtype), CHAINS[name](num_directions=2)
    state = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    update = functools.partial(tx.update, value_fn=value_fn)
    updates, after = jax.eval_shape(update, None, state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    assert types(after) == types(state)


@pairs(("adam", "bfloat16"), ("sgd", "float64"), ("then", "float64"), names=("sgd", "adam", "then"))
def test_a_chain_is_scanned_to_the_minimum_of_a_parabola(name, dtype):
    tx, target = CHAINS[name](num_directions=4), jnp.array([1.0, -1.0, 1.0], dtype)
    params = jnp.array([-1.0, 3.0, 1.0], dtype)

    def loss(params):
        return jnp.square(params - target).astype(jnp.promote_types(dtype, jnp.float32)).sum()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda *x: jax.lax.scan(step, x, length=2000))(params, tx.init(params))
    assert params.dtype == dtype
    np.testing.assert_allclose(np.asarray(params, np.float64), target, atol=3e-2)


def test_a_chain_is_scanned_down_the_valley_of_rosenbrock():
    """In two dimensions with four directions an estimate is close to the gradient."""
    tx = optax.chain(zo.scale_by_spsa(1e-3, num_directions=4), optax.adam(1e-2))

    def loss(params):
        return (1 - params[0]) ** 2 + 100 * (params[1] - params[0] ** 2) ** 2

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.zeros(2)
    (params, _), _ = jax.jit(lambda *x: jax.lax.scan(step, x, length=10_000))(
        params, tx.init(params)
    )
    np.testing.assert_allclose(params, [1, 1], atol=5e-2)


def test_defaults_need_no_static_arguments():
    params, tx = small_params(), optax.inject_hyperparams(zo.scale_by_spsa)(eps=EPS)
    state = jax.jit(tx.init)(params)
    updates, _ = jax.jit(functools.partial(tx.update, value_fn=value_fn))(None, state, params)
    plain = zo.scale_by_spsa(EPS)
    update = jax.jit(functools.partial(plain.update, value_fn=value_fn))
    expected, _ = update(None, plain.init(params), params)
    np.testing.assert_allclose(flat(updates), flat(expected), rtol=1e-4)


@pairs((True, "float64"), of="compiled", names=(False, True))
def test_hyperparameters_can_be_injected(compiled, dtype):
    wrap = jax.jit if compiled else lambda function: function
    params = small_params(dtype)
    static = ("num_directions", "estimator") if compiled else "estimator"
    options = {"num_directions": 2, "estimator": zo.one_sided}
    plain = zo.scale_by_spsa(EPS, **options)
    injected = optax.inject_hyperparams(zo.scale_by_spsa, static)(EPS, **options)
    found = []
    for tx in (plain, injected):

        def updated(params, tx=tx):
            return tx.update(None, tx.init(params), params, value_fn=value_fn)

        found.append(wrap(updated)(params))
    (updates, state), (other, outer) = found
    np.testing.assert_allclose(flat(other), flat(updates), rtol=1e-4)
    np.testing.assert_allclose(outer.inner_state.loss_plus, state.loss_plus, rtol=1e-4)
    assert outer.hyperparams["eps"] == EPS


def test_a_number_of_directions_that_is_not_known_is_refused():
    tx = optax.inject_hyperparams(zo.scale_by_spsa)(EPS, num_directions=2)
    state = tx.init(small_params())  # known here, and afterwards by the shape of the state
    jax.jit(functools.partial(tx.update, value_fn=value_fn))(None, state, small_params())
    with pytest.raises(ValueError, match='static_args="num_directions"'):
        jax.jit(tx.init)(small_params())


def test_eps_can_follow_a_schedule():
    schedule = optax.linear_schedule(0.5, 0.25, 1)
    tx = optax.inject_hyperparams(zo.scale_by_spsa)(schedule)
    params, key = small_params(), jax.random.key(0)
    state, draw = tx.init(params), jax.jit(directions)
    update = jax.jit(functools.partial(tx.update, value_fn=value_fn))
    for step, eps in enumerate([0.5, 0.25]):
        _, state = update(None, state, params)
        z = draw(params, jax.random.fold_in(key, step))
        moved = jax.tree.map(lambda w, z, eps=eps: w + eps * z, params, z)
        np.testing.assert_allclose(state.inner_state.loss_plus[0], value_fn(moved), rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["adam", "then", *(pytest.param(name, marks=pytest.mark.slow) for name in ("alone", "sgd"))],
)
def test_the_state_can_be_mapped_and_other_arguments_pass(name):
    params, tx = small_params(), CHAINS[name]()
    state = optax.tree_utils.tree_map_params(tx, lambda x: x, tx.init(params))
    assert types(state) == types(tx.init(params))
    updates, _ = tx.update(params, state, params, value_fn=value_fn, temperature=3)
    plain, _ = tx.update(None, state, params, value_fn=value_fn)
    np.testing.assert_array_equal(flat(updates), flat(plain))


def test_accumulation_behind_the_estimate_is_the_mean_over_batches():
    """Four estimates, each on its own batch; the parameters move with the last."""
    params, batches = small_params(), [0.0, 0.5, -1.0, 2.0]
    multi = optax.MultiSteps(optax.sgd(0.1), 4)
    tx = optax.chain(zo.scale_by_spsa(EPS), multi.gradient_transformation())

    @jax.jit
    def update(state, params, batch):
        return tx.update(None, state, params, value_fn=lambda params: quadratic(params, batch))

    @jax.jit
    def estimate(batch, key):
        return zo.materialize(zo.spsa(quadratic, params, batch, key=key, eps=EPS), params)

    state, current, expected = tx.init(params), params, []
    for step, batch in enumerate(batches):
        updates, state = update(state, current, batch)
        current = optax.apply_updates(current, updates)
        assert np.array_equal(flat(current), flat(params)) == (step < 3)
        expected.append(flat(estimate(batch, jax.random.fold_in(jax.random.key(0), step))))
    np.testing.assert_allclose(
        flat(current), flat(params) - 0.1 * np.mean(expected, 0), rtol=1e-4, atol=1e-6
    )


def test_what_follows_can_be_masked_and_parted():
    """Weights by descent, biases and scales not at all; the gradient is one for both."""
    params = small_params()

    def labels(tree):
        return jax.tree.map(lambda x: "rest" if x.ndim < 2 else "matrices", tree)

    parted = optax.multi_transform(
        {"matrices": optax.sgd(0.1), "rest": optax.set_to_zero()}, labels
    )
    masked = optax.masked(optax.sgd(0.1), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))
    gradient, _ = zo.scale_by_spsa(EPS).update(
        None, zo.scale_by_spsa(EPS).init(params), params, value_fn=value_fn
    )
    for follow, left in ((parted, 0.0), (masked, 1.0)):
        tx = optax.chain(zo.scale_by_spsa(EPS), follow)
        updates, _ = tx.update(None, tx.init(params), params, value_fn=value_fn)
        expected = jax.tree.map(lambda g, left=left: -0.1 * g if g.ndim > 1 else left * g, gradient)
        np.testing.assert_allclose(flat(updates), flat(expected), rtol=1e-6)


def test_around_the_estimate_a_mask_hands_on_a_part_that_the_loss_can_complete():
    params = small_params()
    mask = {"layers": True, "head": False}
    tx = optax.masked(zo.scale_by_spsa(EPS), mask)

    def loss(part):
        return value_fn(part | {"head": params["head"]})

    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, value_fn=loss)
    tx = zo.scale_by_spsa(EPS, select="^layers")
    expected, _ = tx.update(None, tx.init(params), params, value_fn=value_fn)
    np.testing.assert_array_equal(flat(updates), flat(expected))


def finite(tree):
    return all(
        np.isfinite(x).all() for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)
    )


@pairs(("adam", "bfloat16"), ("then", "float64"))
def test_a_slope_that_is_not_finite_reaches_no_state(name, dtype):
    params, tx = small_params(dtype), CHAINS[name](num_directions=2)
    update = jax.jit(
        lambda state, scale: tx.update(None, state, params, value_fn=lambda p: value_fn(p) * scale)
    )
    _, before = update(tx.init(params), 1.0)
    for bad in (np.nan, np.inf):
        updates, after = update(before, bad)
        assert finite((updates, after))
        own, last = (state if name == "alone" else state[0] for state in (after, before))
        assert (own.step, own.skipped) == (2, 1)
        for new, old in zip(own._replace(step=1, skipped=0), last, strict=True):
            assert jnp.array_equal(new, old)
        if name in ("alone", "then"):
            assert not flat(updates).any()
        if name == "then":  # the moments and the count of Adam are as before
            for new, old in zip(*map(jax.tree.leaves, (after[1], before[1])), strict=True):
                np.testing.assert_array_equal(np.asarray(new), np.asarray(old))


def test_one_bad_direction_of_two_is_left_out():
    params, tx = {"w": jnp.ones(4)}, zo.scale_by_spsa(EPS, num_directions=2)
    state = tx.init(params)
    est = zo.spsa(
        lambda p: p["w"].sum(),
        params,
        key=jax.random.fold_in(state.key, 0),
        eps=EPS,
        num_directions=2,
    )
    z = zo.materialize(
        zo.SPSAEstimate(**{**vars(est), "projected_grad": jnp.array([1.0, 0.0])}), params
    )["w"]
    away = params["w"] + EPS * 2 * z

    def loss(p):
        return jnp.where(jnp.abs(p["w"] - away).max() < 1e-5, jnp.nan, p["w"].sum())

    updates, after = tx.update(None, state, params, value_fn=loss)
    only = zo.SPSAEstimate(**{**vars(est), "projected_grad": est.projected_grad.at[0].set(0)})
    np.testing.assert_allclose(updates["w"], zo.materialize(only, params)["w"], rtol=1e-5)
    assert (after.skipped, *after.known.tolist()) == (0, False, True)


def test_the_gradient_of_value_and_grad_is_rounded_once_to_the_dtype_of_each_leaf(dtype):
    """Against the slope times z, in NumPy; without `jit`, which may leave roundings out."""
    params, key = {"w": small_params(dtype)["layers"]["w"]}, jax.random.key(3)
    loss, grads = zo.value_and_grad(value_fn, eps=EPS)(params, key=key)
    est = zo.spsa(value_fn, params, key=key, eps=EPS)
    drawn = directions(jax.tree.map(lambda x: x.astype("float32"), params), key)
    assert loss == est.loss
    for grad, z in zip(jax.tree.leaves(grads), jax.tree.leaves(drawn), strict=True):
        assert grad.dtype == dtype
        exact = np.asarray(est.projected_grad[0]) * np.asarray(z, est.projected_grad.dtype)
        np.testing.assert_array_equal(np.asarray(grad), exact.astype(dtype))
