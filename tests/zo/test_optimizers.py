"""Updates against closed forms, against optax, and in blocks; what is refused, by its key."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import zo
from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.models import param_shapes
from jaxlm.models.initialise import nest
from jaxlm.zo import optimizers, sites
from tests.helpers.sentences import check_sentence
from tests.zo.problems import (
    directions,
    flat,
    network_batch,
    network_loss,
    network_params,
    quadratic,
    small_decoder,
    small_params,
)

pytestmark = pytest.mark.optimized

BATCH = jnp.float32(0.25)
KEY = jax.random.key(7)


def constant(params, batch):
    return jnp.float32(3)


def compiled(opt, loss_fn):
    return jax.jit(lambda params, state, batch: opt.step(loss_fn, params, state, batch))


def bit_patterns(tree):
    return [np.asarray(x).view(f"u{x.dtype.itemsize}") for x in jax.tree.leaves(tree)]


def assert_same_bits(a, b):
    for x, y in zip(bit_patterns(a), bit_patterns(b), strict=True):
        np.testing.assert_array_equal(x, y)


def decayed(params):
    return paths.map_with_path(
        lambda leaf: not paths.path_predicate(optimizers.NO_DECAY)(leaf.path), params
    )


@pytest.mark.parametrize(
    ("model", "n"),
    [
        ("network", 3),
        pytest.param("network", 1, marks=pytest.mark.slow),
        pytest.param("dict", 3, marks=pytest.mark.slow),
    ],
)
def test_the_optax_chain_and_the_lean_step_agree_to_two_ulp(model, n):
    """From equal parameters; a unit is that of the largest of parameter, update and sum."""
    if model == "dict":
        params, loss_fn, batch = small_params(), quadratic, BATCH
        value = lambda batch: lambda params: loss_fn(params, batch)  # noqa: E731
    else:
        params, loss_fn, batch = network_params(), network_loss, network_batch()
        value = lambda batch: lambda params, view: loss_fn(params, batch, view=view)  # noqa: E731
    opt = zo.mezo(1e-3, weight_decay=0.1, num_directions=n)
    chain = optax.chain(
        zo.scale_by_spsa(1e-3, num_directions=n, key=KEY),
        optax.add_decayed_weights(0.1, mask=decayed),
        optax.scale_by_learning_rate(1e-3),
    )
    lean, state, chain_state = compiled(opt, loss_fn), opt.init(params, KEY), chain.init(params)

    @jax.jit
    def chained(params, state, batch):
        updates, state = chain.update(None, state, params, value_fn=value(batch))
        return optax.apply_updates(params, updates), updates, state

    for _ in range(4):
        expected, updates, chain_state = chained(params, chain_state, batch)
        moved, state, info = lean(params, state, batch)
        np.testing.assert_array_equal(info.projected_grad, chain_state[0].projected_grad)
        for new, other, old, update in zip(
            *map(jax.tree.leaves, (moved, expected, params, updates)), strict=True
        ):
            unit = np.spacing(np.abs(np.stack([new, old, update])).max(0))
            assert (np.abs(new - other) <= 2 * unit).all()
        assert not np.array_equal(flat(moved), flat(params))
        params = moved
    assert int(chain_state[0].step) == int(state.step) == 4
    np.testing.assert_allclose(chain_state[0].loss, info.loss, rtol=1e-6)


@pytest.mark.parametrize(
    "dtype",
    [
        jnp.bfloat16,
        *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (jnp.float32, jnp.float16)),
    ],
)
def test_no_learning_rate_and_no_decay_change_no_bit(dtype):
    params = small_params(dtype)
    params["signed_zero"] = jnp.array([0.0, -0.0] * 8, dtype)
    opt = zo.mezo(0.0)
    moved, _, info = compiled(opt, quadratic)(params, opt.init(params, KEY), BATCH)
    assert info.projected_grad[0] != 0
    assert_same_bits(moved, params)


def test_half_precision_parameters_are_rounded_once():
    params = small_params(jnp.bfloat16)
    opt = zo.mezo(0.125, eps=2.0**-4, sampler=zo.rademacher())
    moved, _, info = compiled(opt, quadratic)(params, opt.init(params, KEY), BATCH)
    draw = jax.jit(directions, static_argnames="sampler")
    z = draw(params, jax.random.fold_in(KEY, 0), sampler=zo.rademacher())
    expected = jax.tree.map(
        lambda w, z: (w.astype(jnp.float32) - 0.125 * info.projected_grad[0] * z).astype(w.dtype),
        params,
        z,
    )
    assert_same_bits(moved, expected)


@pytest.mark.parametrize(("n", "decay"), [pytest.param(1, 0.0, marks=pytest.mark.slow), (2, 0.1)])
def test_blocks_of_rows_change_no_bit(monkeypatch, n, decay):
    params = {
        "odd": jnp.linspace(-1, 1, 13 * 5).reshape(13, 5),
        "vector": jnp.linspace(-2, 2, 29),
        "layers": {"w": jnp.linspace(-1, 1, 2 * 7 * 9).reshape(2, 7, 9), "s": jnp.ones(2)},
        "wide": jnp.linspace(0, 1, 120).reshape(3, 40),
        "scalar": jnp.float32(2),
    }
    opt = zo.mezo(0.1, weight_decay=decay, num_directions=n)
    state = opt.init(params, KEY)
    slopes = jnp.linspace(3, 5, n)
    whole, _, _ = jax.jit(opt.update)(params, state, slopes)
    monkeypatch.setattr(sites, "BLOCK", 12)
    blocks, _, _ = jax.jit(lambda *x: opt.update(*x))(params, state, slopes)
    assert_same_bits(blocks, whole)
    assert not np.array_equal(flat(whole), flat(params))


def constant_slope(params, batch):
    return flat(params).sum()


def test_select_leaves_the_rest_untouched():
    params = small_params(jnp.bfloat16)
    opt = zo.mezo(0.1, weight_decay=0.5, select=r"^layers")
    moved, _, _ = compiled(opt, quadratic)(params, opt.init(params, KEY), BATCH)
    assert_same_bits(moved["head"], params["head"])
    for new, old in zip(
        jax.tree.leaves(moved["layers"]), jax.tree.leaves(params["layers"]), strict=True
    ):
        assert (new != old).any()


def test_decay_spares_biases_and_norms():
    shapes = param_shapes(small_decoder().config)
    params = nest({path: jnp.full((2,), 3.0) for path in [*shapes, "layers.lora.scaling"]})
    opt = zo.mezo(0.1, weight_decay=0.5)
    moved, _, _ = compiled(opt, constant)(params, opt.init(params, KEY), BATCH)
    spared = {path for path, _, _, new in paths.flatten(moved)[0] if np.array_equal(new, [3, 3])}
    assert spared == {path for path in shapes if path.endswith((".bias", ".scale"))}
    for path, _, _, new in paths.flatten(moved)[0]:
        assert path in spared or np.allclose(new, 0.95 * 3)


def test_decay_goes_where_it_is_told():
    params, opt = small_params(), zo.mezo(0.1, weight_decay=0.5, decay=r"bias$")
    moved, _, _ = compiled(opt, constant)(params, opt.init(params, KEY), BATCH)
    np.testing.assert_allclose(moved["head"]["bias"], 0.95 * params["head"]["bias"], rtol=1e-6)
    assert_same_bits((moved["layers"], moved["head"]["w"]), (params["layers"], params["head"]["w"]))


def test_steps_draw_different_directions_and_runs_repeat():
    params, opt = {"w": jnp.zeros(50)}, zo.mezo(1.0)
    step = compiled(opt, constant_slope)

    def run(key):
        state, seen = opt.init(params, key), []
        current = params
        for _ in range(3):
            current, state, _ = step(current, state, BATCH)
            seen.append(np.asarray(current["w"]))
        return np.diff([np.zeros(50), *seen], axis=0)

    first, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    correlation = np.corrcoef(np.concatenate([first, other])) - np.eye(6)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(50)


def test_aux_reaches_the_caller():
    def loss_fn(params, batch, *, key):
        return flat(params).sum(), {"accuracy": jnp.float32(0.5)}

    params, opt = {"w": jnp.ones(3)}, zo.mezo(0.1)
    _, _, info = compiled(opt, loss_fn)(params, opt.init(params, KEY), BATCH)
    assert info.aux == {"accuracy": 0.5}


def initialisations(**options):
    opt = zo.mezo(0.1, **options)
    return [lambda params: opt.init(params, KEY), zo.scale_by_spsa(**options).init]


@pytest.mark.parametrize("init", initialisations(select="adapter"))
def test_a_selection_of_nothing_is_refused(init):
    with pytest.raises(UserError, match=r"^select: "):
        init(small_params())


@pytest.mark.parametrize(
    "init",
    [*initialisations(), lambda params: zo.spsa(lambda p: jnp.float32(1), params, key=KEY)],
    ids=["optimizer", "chain", "estimate"],
)
@pytest.mark.parametrize(
    ("params", "key"),
    [
        ({"plumless": jnp.ones(2), "buckeroo": jnp.ones(2)}, "plumless"),  # of one CRC-32
        ({"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, "a.b"),
    ],
)
def test_parameters_that_would_share_their_noise_are_refused(init, params, key):
    with pytest.raises(UserError) as caught:
        init(params)
    check_sentence(str(caught.value), key)


def test_averages_leave_out_steps_without_a_slope():
    """MEAZO, momentum and Adam over slopes 3, none, 1 against NumPy on 3 and 1."""
    params, b = {"w": jnp.ones(4)}, 0.9
    z = [
        np.asarray(directions(params, jax.random.fold_in(KEY, t))["w"], np.float64) for t in (0, 2)
    ]
    square = (b * 9 + 1) / (1 + b)
    mean = (b * 3 * z[0] + z[1]) / (1 + b)
    expected = {
        "meazo": (zo.meazo(0.1, decay_rate=b), z[1] / (np.sqrt(square) + 1e-8)),
        "momentum": (zo.mezo_momentum(0.1, momentum=b), mean),
        "adam": (
            zo.mezo_adam(0.1, b1=b, b2=b),
            mean / (np.sqrt((b * (3 * z[0]) ** 2 + z[1] ** 2) / (1 + b)) + 1e-8),
        ),
    }
    for opt, u in expected.values():
        moved, state = params, opt.init(params, KEY)
        for slope in (3.0, np.nan, 1.0):
            last = moved
            moved, state, _ = jax.jit(opt.update)(moved, state, jnp.array([slope], jnp.float32))
        np.testing.assert_allclose((last["w"] - moved["w"]) / 0.1, u, rtol=2e-5)


def test_learning_rates_and_decays_can_be_swept_by_vmap():
    params = small_params()

    def end(rate, decay):
        opt = zo.mezo(rate, weight_decay=decay)
        return flat(opt.step(quadratic, params, opt.init(params, KEY), BATCH)[0])

    rates, decays = jnp.array([1e-2, 0.0]), jnp.array([0.5, 0.0])
    first, second = jax.jit(jax.vmap(end))(rates, decays)
    alone = jax.jit(functools.partial(end, 1e-2, 0.5))()
    np.testing.assert_allclose(first, alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(second, flat(params))


def test_one_array_in_two_places_is_refused_by_name():
    tied = jnp.ones(3)
    params, opt = {"a": {"w": tied}, "b": tied}, zo.mezo(0.1)
    step = zo.jit_step(opt, constant_slope)
    with pytest.raises(UserError) as caught:
        step(params, opt.init(params, KEY), BATCH)
    check_sentence(str(caught.value), "params.a.w")
    assert not tied.is_deleted()


def test_the_key_that_a_run_begins_with_stays_the_users():
    key, opt = jax.random.key(5), zo.mezo(0.1)
    zo.jit_step(opt, constant_slope)({"w": jnp.ones(3)}, opt.init({"w": jnp.ones(3)}, key), BATCH)
    assert not key.is_deleted()


VECTOR = {"w": jnp.ones(2)}


def estimate(loss_fn=constant_slope, **options):
    return zo.spsa(loss_fn, VECTOR, BATCH, key=KEY, **options)


def stated(**options):
    """`zo.zeroth_order` without the annotations that tests check."""
    return zo.zeroth_order.__wrapped__(0.1, **options)


def two_devices():
    return jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])


@pytest.mark.parametrize(
    ("key", "call"),
    [
        ("eps", lambda: zo.mezo(0.1, eps=0.0)),
        ("eps", lambda: zo.mezo(0.1, eps=float("inf"))),
        ("eps", lambda: zo.scale_by_spsa(-1.0)),
        ("eps", lambda: estimate(eps=float("nan"))),
        ("num_directions", lambda: zo.mezo(0.1, num_directions=0)),
        ("num_directions", lambda: zo.scale_by_spsa(num_directions=0)),
        ("num_directions", lambda: estimate(num_directions=0)),
        ("num_directions", lambda: stated(num_directions=1.5)),
        ("num_directions", lambda: zo.fzoo(0.1, num_directions=1)),
        ("num_directions", lambda: stated(num_directions=3, mesh=two_devices())),
        ("weight_decay", lambda: zo.mezo(0.1, weight_decay=-0.1)),
        ("weight_decay", lambda: zo.meazo(0.1, weight_decay=float("nan"))),
        ("learning_rate", lambda: zo.mezo(-0.1)),
        ("learning_rate", lambda: zo.lozo_residual(float("nan"))),
        ("rounding", lambda: stated(rounding="up")),
        ("momentum", lambda: zo.mezo_momentum(0.1, momentum=-0.1)),
        ("momentum", lambda: zo.lozo_momentum(0.1, momentum=1.0)),
        ("decay_rate", lambda: zo.meazo(0.1, decay_rate=1 - 1e-12)),  # 1 in float32
        ("b2", lambda: zo.mezo_adam(0.1, b2=1.5)),
        ("floor", lambda: zo.mezo_adam(0.1, floor=-1e-8)),
        ("horizon", lambda: zo.mezo_adam(0.1, horizon=0)),
        ("vector_scale", lambda: zo.zo_muon(0.1, vector_scale=-1.0)),
        ("rank", lambda: zo.low_rank(0)),
        ("interval", lambda: zo.subspace(2, interval=0)),
        ("size", lambda: zo.layer_blocks(2, size=3)),
        ("fraction", lambda: zo.magnitude(VECTOR, 0.0)),
        ("select", lambda: estimate(select="nothing")),
        ("sampler", lambda: estimate(sampler=zo.layer_blocks(2))),  # which take turns by step
        ("sampler", lambda: zo.sphere().sample(KEY, zo.Site("w", (2,)))),
        ("sampler", lambda: stated(rule=zo.factored.factored_momentum()).init(VECTOR, KEY)),
        ("estimator", lambda: stated(estimator=lambda *arguments: None)),
        ("estimator", lambda: stated(estimator=functools.partial(zo.central))),
        ("opt", lambda: zo.float32_master(zo.lozo_residual(0.1))),
        ("params", lambda: zo.scale_by_spsa().update(None, None, value_fn=constant)),
        ("loss_fn", lambda: estimate(lambda p, batch: p["w"])),
        ("loss_fn", lambda: estimate(lambda p, batch: p["w"][:1], estimator=zo.one_sided)),
        ("loss_fn", lambda: estimate(lambda p, batch: (jnp.int32(3), {}))),
        (
            "loss_fn",
            lambda: estimate(lambda p, batch: p["w"].sum() > 0, estimator=zo.forward_gradient),
        ),
    ],
)
def test_mistakes_are_refused_by_their_key(key, call):
    with pytest.raises(UserError) as caught:
        call()
    check_sentence(str(caught.value), key)


def test_an_estimator_states_its_forward_passes():
    @zo.estimator(lambda n: 3 * n)
    def thrice(measurement, eps, previous):
        return zo.central(measurement, eps, previous)

    assert zo.zeroth_order(0.1, estimator=thrice, num_directions=2).forwards == 6
    assert [zo.mezo(0.1).forwards, zo.fzoo(0.1).forwards, zo.lozo_residual(0.1).forwards] == [
        2,
        9,
        2,
    ]


@pytest.mark.parametrize(
    "make",
    [
        *(zo.mezo, zo.mezo_momentum, zo.mezo_adam, zo.meazo, zo.fzoo),
        *(zo.lozo, zo.lozo_momentum, zo.zo_muon, zo.value_and_grad),
    ],
)
def test_signatures_say_what_can_be_given(make):
    found = inspect.signature(make).parameters
    assert not any(x.kind is inspect.Parameter.VAR_KEYWORD for x in found.values())
    assert {"eps", "select", "mesh"} <= found.keys()
