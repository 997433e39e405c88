"""SPSA estimates against closed forms, and their independence of how parameters are laid out."""

import dataclasses
import functools
import math
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm import zo
from jaxlm.core.errors import UserError
from jaxlm.zo.estimators import standardized
from jaxlm.zo.samplers import register
from jaxlm.zo.structured import LowRankSampler
from tests.zo.problems import (
    assert_mean,
    directions,
    flat,
    label_word_loss,
    network_batch,
    network_loss,
    network_params,
    nonlinear,
    over_keys,
    quadratic,
    small_decoder,
    small_params,
    token_batch,
)

pytestmark = pytest.mark.optimized
slow = pytest.mark.slow

SAMPLERS = (zo.gaussian(), zo.rademacher())
BATCH = jnp.float32(0.25)


def spsa(loss_fn, params, *args, key, **options) -> zo.SPSAEstimate:
    return jax.jit(lambda *args: zo.spsa(loss_fn, *args, key=key, **options))(params, *args)


compiled_directions = jax.jit(directions, static_argnames="sampler")
gradient = jax.jit(jax.grad(nonlinear))


def leaves_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize(
    ("sampler", "extra"), [(zo.gaussian(), 1), (zo.rademacher(), -1), (zo.sphere(), -1)]
)
@pytest.mark.parametrize(("n", "d"), [pytest.param(1, 2, marks=slow), (4, 16)])
def test_the_second_moment_is_that_of_the_theory(sampler, extra, n, d):
    slope = jnp.linspace(0.5, 2, d)
    params = {"w": jnp.zeros(d)}

    def ratio(key):
        est = zo.spsa(lambda p: p["w"] @ slope, params, key=key, sampler=sampler, num_directions=n)
        return jnp.sum(zo.materialize(est, params)["w"] ** 2) / jnp.sum(slope**2)

    assert_mean(over_keys(ratio, 4096), (d + n + extra) / n)


MODIFIED = {"layers": jnp.array([0.5, 2.0]), "head": jnp.float32(3)}
PAIRS = [
    (zo.gaussian(), zo.central, 4),
    (zo.variance_modified(MODIFIED), zo.central, 1),
]
# Their moments are in test_samplers, and their losses and slopes in test_golden.
MORE_PAIRS = [
    (zo.sphere(), zo.forward_gradient, 1),
    (zo.low_rank(1), zo.central, 1),
    (zo.rademacher(), zo.one_sided, 1),
    (zo.rademacher(), zo.central, 1),
    (zo.sphere(), zo.central, 1),
    (zo.low_rank(1), zo.one_sided, 1),
    (zo.low_rank(1), zo.forward_gradient, 1),
]


@pytest.mark.parametrize(
    ("sampler", "estimator", "n"),
    [*PAIRS, *(pytest.param(*pair, marks=slow) for pair in MORE_PAIRS)],
    ids=[f"{type(s).__name__}-{e.__name__}" for s, e, _ in (*PAIRS, *MORE_PAIRS)],
)
def test_every_pair_of_sampler_and_estimator_is_unbiased(sampler, estimator, n):
    params, options = small_params(), {"sampler": sampler, "estimator": estimator}

    def estimate(key):
        est = zo.spsa(nonlinear, params, BATCH, key=key, num_directions=n, **options)
        return flat(zo.materialize(est, params))

    assert_mean(over_keys(estimate, 4096), flat(gradient(params, BATCH)))


def test_samplers_that_weigh_or_hide_coordinates_do_so_to_the_mean():
    params = small_params()
    masked = zo.magnitude(params, 0.5)
    exact = gradient(params, BATCH)

    def estimates(key):
        def mean(sampler):
            est = zo.spsa(nonlinear, params, BATCH, key=key, sampler=sampler)
            return flat(zo.materialize(est, params))

        return mean(zo.expectation_modified(MODIFIED)), mean(masked)

    divided, small = over_keys(estimates, 4096)
    norms = jnp.array([0.5, 2.0])[:, None]
    expected = {
        "layers": jax.tree.map(lambda g: g / norms, exact["layers"]),
        "head": jax.tree.map(lambda g: g / 3, exact["head"]),
    }
    assert_mean(divided, flat(expected))

    def kept(w, axes):
        size = np.abs(np.asarray(w))
        return size <= np.quantile(size, 0.5, axis=axes, keepdims=True, method="lower")

    mask = {
        "layers": jax.tree.map(lambda w: kept(w, 1), params["layers"]),
        "head": jax.tree.map(lambda w: kept(w, None), params["head"]),
    }
    assert_mean(small, flat(exact) * flat(mask))


@slow
def test_residual_feedback_is_unbiased_where_the_two_directions_are_independent():
    params = small_params()

    def estimate(key):
        def measured(j, **options):
            key_j = jax.random.fold_in(key, j)
            return zo.spsa(
                nonlinear,
                params,
                BATCH,
                key=key_j,
                eps=0.01,
                sampler=zo.rademacher(),
                estimator=zo.residual_feedback,
                **options,
            )

        before = measured(0)
        return flat(zo.materialize(measured(1, previous=before.loss_plus), params))

    assert_mean(over_keys(estimate, 4096), flat(gradient(params, BATCH)), rounding=2e-3)


@pytest.mark.parametrize("n", [pytest.param(2, marks=slow), 5])
def test_a_population_climbs_a_slope_by_the_mean_of_a_standard_deviation(n):
    """For a linear loss, 1/n sum_j score_j z_j has mean E[std] slope / |slope|."""
    slope = jnp.array([3.0, -1.0, 0.5])

    def estimate(key):
        est = zo.spsa(
            lambda p: p["w"] @ slope,
            {"w": jnp.zeros(3)},
            key=key,
            eps=0.5,
            estimator=zo.population,
            num_directions=n,
        )
        return zo.materialize(est, {"w": jnp.zeros(3)})["w"]

    spread = math.sqrt(2 / n) * math.gamma(n / 2) / math.gamma((n - 1) / 2)
    assert_mean(over_keys(estimate, 4096), spread * slope / jnp.linalg.norm(slope))


def test_a_member_of_a_population_without_a_loss_is_left_out():
    losses = jnp.array([1.0, jnp.nan, 3.0, jnp.inf])
    np.testing.assert_array_equal(standardized(losses), [-1, np.nan, 1, np.nan])


def test_differences_tend_to_the_derivative_by_a_power_of_eps():
    sampler = zo.gaussian()
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), small_params())
        key, batch = jax.random.key(8), jnp.float64(0.25)

        @jax.jit
        def slopes(params):
            along = lambda eps, estimator: zo.spsa(  # noqa: E731
                nonlinear, params, batch, key=key, eps=eps, sampler=sampler, estimator=estimator
            ).projected_grad[0]
            z = jax.tree.map(jnp.float64, directions(params, key, sampler=sampler))
            exact = jax.jvp(lambda params: nonlinear(params, batch), (params,), (z,))[1]
            sizes = 2.0 ** -jnp.array([6.0, 8, 10, 12])
            found = [
                jax.lax.map(functools.partial(along, estimator=estimator), sizes)
                for estimator in (zo.one_sided, zo.central)
            ]
            return exact, found, along(1.0, zo.forward_gradient)

        exact, (one_sided, central), forward = slopes(params)
        for found, order, close in ((one_sided, 1, 1e-2), (central, 2, 1e-5)):
            assert found.dtype == jnp.float64
            errors = np.abs(found - exact)
            np.testing.assert_allclose(errors[:-1] / errors[1:], 4**order, rtol=0.15 / order**2)
            assert errors[-1] < close * abs(exact)
        np.testing.assert_allclose(forward, exact, rtol=1e-12)


@pytest.mark.parametrize(
    "sampler",
    [pytest.param(zo.gaussian(), marks=slow), zo.low_rank(2)],
    ids=["gaussian", "low_rank"],
)
def test_forward_gradients_through_a_view_are_those_of_jvp(sampler):
    with jax.enable_x64(True):
        params, batch = network_params(jnp.float64), jax.tree.map(jnp.float64, network_batch())
        key = jax.random.key(2)

        @jax.jit
        def slopes(params):
            est = zo.spsa(
                network_loss, params, batch, key=key, sampler=sampler, estimator=zo.forward_gradient
            )
            z = jax.tree.map(jnp.float64, directions(params, key, sampler=sampler))
            return est.projected_grad[0], jax.jvp(lambda p: network_loss(p, batch), (params,), (z,))

        found, (_, exact) = slopes(params)
        np.testing.assert_allclose(found, exact, rtol=1e-6 if sampler.factored else 1e-12)


@register("base", "reuse_key")
@dataclasses.dataclass(frozen=True)
class OneByOne(LowRankSampler):
    factored = False


@pytest.mark.parametrize("estimator", [zo.central, pytest.param(zo.forward_gradient, marks=slow)])
def test_low_rank_directions_in_one_pass_are_those_one_after_another(estimator):
    options = {"key": jax.random.key(0), "num_directions": 3, "eps": 0.01, "estimator": estimator}
    params, batch = network_params(), network_batch()
    one = OneByOne(2, 50, zo.gaussian())
    together, apart = (
        spsa(network_loss, params, batch, sampler=sampler, **options)
        for sampler in (zo.low_rank(2), one)
    )
    np.testing.assert_allclose(together.loss_plus, apart.loss_plus, rtol=2e-6)
    np.testing.assert_allclose(together.projected_grad, apart.projected_grad, rtol=1e-4, atol=1e-4)
    assert len(np.unique(together.projected_grad)) == 3


def test_the_order_of_a_dict_changes_no_noise():
    params = OrderedDict(a=jnp.zeros((3, 2)), b=OrderedDict(c=jnp.zeros(5), d=jnp.zeros(2)))
    swapped = OrderedDict(b=OrderedDict(d=jnp.zeros(2), c=jnp.zeros(5)), a=jnp.zeros((3, 2)))
    assert jax.tree.structure(params) != jax.tree.structure(swapped)
    key = jax.random.key(0)
    first, second = compiled_directions(params, key), compiled_directions(swapped, key)
    leaves_equal(
        [first["a"], *first["b"].values()], [second["a"], second["b"]["c"], second["b"]["d"]]
    )
    alone = compiled_directions({"b": {"c": jnp.zeros(5)}}, key)
    leaves_equal(alone["b"]["c"], first["b"]["c"])


@pytest.mark.multidevice
@pytest.mark.parametrize(
    "sampler", [zo.gaussian(), pytest.param(zo.rademacher(), marks=slow)], ids=repr
)
def test_sharded_parameters_get_the_same_noise_and_estimate(sampler):
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.ones((16, 6)), "layers": {"k": jnp.ones((3, 4, 24))}, "b": jnp.ones(5)}
    specs = {"w": PartitionSpec("devices"), "layers": {"k": PartitionSpec(None, None, "devices")}}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs | {"b": PartitionSpec()})
    make = lambda params: directions(params, jax.random.key(1), sampler=sampler)  # noqa: E731
    spread = jax.jit(make, out_shardings=shardings)(jax.device_put(params, shardings))
    assert len(spread["w"].sharding.device_set) == 8
    leaves_equal(spread, jax.jit(make)(params))

    estimate = jax.jit(lambda params: zo.spsa(quadratic, params, BATCH, key=jax.random.key(1)))
    alone, together = estimate(params), estimate(jax.device_put(params, shardings))
    np.testing.assert_allclose(together.loss_plus, alone.loss_plus, rtol=1e-6)


def test_a_view_sees_what_perturbed_parameters_are():
    """Of a decoder; of a network along other samplers in test_samplers."""
    lm, n = small_decoder(), 3
    loss_fn, batch = label_word_loss(lm, [3, 7]), token_batch(4, 9, 50)

    def estimate(materialize_params):
        return jax.jit(
            lambda params: zo.spsa(
                loss_fn,
                params,
                batch,
                key=jax.random.key(6),
                eps=1e-2,
                num_directions=n,
                materialize_params=materialize_params,
            )
        )(lm.params)

    lean, plain = estimate(False), estimate(True)
    assert lean.loss_plus.shape == (n,)
    np.testing.assert_allclose(lean.loss_plus, plain.loss_plus, rtol=2e-6)
    np.testing.assert_allclose(lean.loss_minus, plain.loss_minus, rtol=2e-6)
    np.testing.assert_allclose(lean.loss, plain.loss, rtol=2e-6)
    np.testing.assert_allclose(lean.projected_grad, plain.projected_grad, atol=2e-4)
    moved = np.abs(lean.loss_plus - lean.loss_minus)
    assert (moved > 1e-4).all()


def test_the_losses_and_their_difference_are_what_they_say():
    params, key = small_params(), jax.random.key(4)
    est = spsa(quadratic, params, BATCH, key=key, eps=0.125, num_directions=2)
    z = compiled_directions(params, key)

    @jax.jit
    def at(s):
        return quadratic(jax.tree.map(lambda w, z: w + s * z, params, z), BATCH)

    np.testing.assert_allclose(est.loss_plus[0], at(0.125), rtol=1e-6)
    np.testing.assert_allclose(est.loss_minus[0], at(-0.125), rtol=1e-6)
    np.testing.assert_array_equal(est.projected_grad, (est.loss_plus - est.loss_minus) / 0.25)
    np.testing.assert_allclose(est.loss, (est.loss_plus + est.loss_minus).mean() / 2, rtol=1e-6)


def test_select_moves_only_what_it_takes():
    params = small_params()

    def loss_fn(moved):
        frozen = [
            moved["layers"]["w"] - params["layers"]["w"],
            moved["head"]["w"] - params["head"]["w"],
        ]
        return quadratic(moved, BATCH), sum(jnp.abs(x).max() for x in frozen)

    est = spsa(loss_fn, params, key=jax.random.key(0), select=r"scale|bias")
    assert est.aux == 0
    grads = jax.jit(zo.materialize)(est, params)
    for path in (("layers", "w"), ("head", "w")):
        assert not np.any(grads[path[0]][path[1]])
    whole = compiled_directions(params, jax.random.key(0))
    np.testing.assert_allclose(
        grads["head"]["bias"], est.projected_grad[0] * whole["head"]["bias"], rtol=1e-6
    )


def test_the_loss_gets_one_key_for_all_its_evaluations():
    def loss_fn(params, batch, *, key):
        return jax.random.uniform(key), {"drawn": jax.random.uniform(key)}

    run = jax.jit(lambda key: zo.spsa(loss_fn, {"w": jnp.ones(2)}, None, key=key, num_directions=3))
    first, second = run(jax.random.key(0)), run(jax.random.key(1))
    assert len(np.unique(np.concatenate([first.loss_plus, first.loss_minus]))) == 1
    assert not first.projected_grad.any()
    assert first.loss != second.loss


def test_what_stands_beside_the_loss_is_averaged():
    def loss_fn(params):
        return jnp.float32(1), {
            "w": params["w"],
            "positive": params["w"] > 0,
            "count": jnp.int32(4),
        }

    est = spsa(loss_fn, {"w": jnp.float32(0)}, key=jax.random.key(0), num_directions=4)
    assert est.aux["w"] == 0
    assert est.aux["positive"] == 0.5
    assert est.aux["count"] == 4
    assert {x.dtype for x in jax.tree.leaves(est.aux)} == {jnp.dtype("float32")}


def test_value_and_grad_is_a_drop_in():
    params = small_params()
    est = spsa(quadratic, params, BATCH, key=jax.random.key(0), num_directions=2)
    with_aux = lambda params, batch: (quadratic(params, batch), batch)  # noqa: E731
    function = jax.jit(zo.value_and_grad(with_aux, num_directions=2, has_aux=True))
    (value, aux), grads = function(params, BATCH, key=jax.random.key(0))
    assert value == est.loss
    assert aux == BATCH
    leaves_equal(grads, jax.jit(zo.materialize)(est, params))
    alone = zo.value_and_grad(quadratic, num_directions=2)
    found = jax.eval_shape(lambda key: alone(params, BATCH, key=key), jax.random.key(0))
    assert jax.tree.structure(found) == jax.tree.structure((value, grads))


def test_half_precision_parameters_are_read_and_measured_in_float32():
    params = small_params(jnp.bfloat16)
    est = spsa(lambda p: flat(p).sum(), params, key=jax.random.key(0), eps=2.0**-3)
    assert est.projected_grad.dtype == jnp.float32
    found = jax.eval_shape(zo.materialize, est, params)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("sampler", [*SAMPLERS, zo.gaussian("threefry"), zo.rademacher("threefry")])
def test_samplers_are_static_and_cross_jit(sampler):
    assert jax.tree.leaves(sampler) == []
    assert isinstance(sampler, zo.Sampler)
    z = jax.jit(lambda sampler, key: sampler.sample(key, zo.Site("w", (200, 10))))(
        sampler, jax.random.key(0)
    )
    assert z.dtype == jnp.float32
    assert abs(float(z.mean())) < 4.5 / 2000**0.5
    assert hash(sampler) == hash(dataclasses.replace(sampler))


def test_a_key_that_the_user_has_bound_is_the_users():
    """By partial, by partial of partial, under jit, and by position."""
    mine, params = jax.random.key(42), {"w": jnp.ones(2)}

    def loss(params, batch=None, key=None):
        return params["w"].sum() * 0 + jax.random.uniform(key)

    expected = jax.random.uniform(mine)
    bound = functools.partial(loss, key=mine)
    for fn, args in (
        (bound, ()),
        (functools.partial(bound, batch=3), ()),
        (jax.jit(bound), ()),
        (jax.tree_util.Partial(loss, key=mine), ()),
        (loss, (None, mine)),
    ):
        assert zo.spsa(fn, params, *args, key=jax.random.key(0)).loss == expected
    free = zo.spsa(loss, params, key=jax.random.key(0)).loss
    assert free == jax.random.uniform(jax.random.fold_in(jax.random.key(0), 1)) != expected


def test_a_view_that_the_user_has_bound_is_the_users():
    batch, key = network_batch(), jax.random.key(1)
    bound = functools.partial(network_loss, view=None)
    est = spsa(bound, network_params(), batch, key=key)
    plain = spsa(network_loss, network_params(), batch, key=key, materialize_params=True)
    np.testing.assert_allclose(est.loss_plus, plain.loss_plus, rtol=1e-6)


def in_parts(function, spec, **options):
    """`function(w, batch)` inside shard_map over eight devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    options = {"out_specs": PartitionSpec(), **options}
    specs = (spec, PartitionSpec("data"))
    run = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, **options))
    return run(jnp.ones((8, 3)), jnp.arange(8.0))


def mean_loss(params, batch):
    return jax.lax.pmean((params["w"] ** 2).sum() * batch.sum(), "data")


@pytest.mark.multidevice
@pytest.mark.parametrize("checked", [True, False])
def test_shards_of_parameters_which_would_share_their_noise_are_refused(checked):
    def estimate(w, batch):
        return zo.spsa(mean_loss, {"w": w}, batch, key=jax.random.key(0)).loss

    reason = "w differs between the devices" if checked else "check_vma=False"
    with pytest.raises(UserError, match=reason):
        in_parts(estimate, PartitionSpec("data"), check_vma=checked)
    opt = zo.mezo(0.1)

    def update(w, batch):
        params = {"w": w}
        return opt.update(params, opt.init(params, jax.random.key(0)), jnp.ones(1))[0]["w"]

    with pytest.raises(UserError, match=reason):
        in_parts(update, PartitionSpec("data"), out_specs=PartitionSpec("data"), check_vma=checked)


@pytest.mark.multidevice
def test_whole_parameters_inside_shard_map_move_as_outside():
    """Data-parallel: each device has its rows, and the loss is a mean over devices."""
    opt = zo.mezo(0.1, num_directions=2)

    def step(w, batch):
        params = {"w": w}
        state = opt.init(params, jax.random.key(0))
        params, _, info = opt.step(mean_loss, params, state, batch)
        return params["w"], info.loss

    def outside(params, batch):
        return (params["w"] ** 2).sum() * batch.mean()

    params = {"w": jnp.ones((8, 3))}
    moved, loss = in_parts(step, PartitionSpec())
    state = opt.init(params, jax.random.key(0))
    expected, _, info = jax.jit(opt.step, static_argnums=0)(outside, params, state, jnp.arange(8.0))
    np.testing.assert_allclose(loss, info.loss, rtol=1e-5)
    np.testing.assert_allclose(moved, expected["w"], rtol=1e-4, atol=1e-5)
