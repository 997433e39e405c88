"""MeZO against closed forms, against optax, and against itself in blocks."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import zo
from jaxlm.core import paths
from jaxlm.models import param_shapes
from jaxlm.models.initialise import nest
from jaxlm.zo import estimators, optimizers, sites
from tests.zo.problems import (
    METHODS,
    directions,
    flat,
    network_batch,
    network_loss,
    network_params,
    nonlinear,
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


def test_a_step_moves_down_the_estimate():
    params = small_params()
    opt = zo.mezo(0.01, eps=1e-2, weight_decay=0.5, num_directions=3)
    state = opt.init(params, KEY)
    moved, state, info = compiled(opt, nonlinear)(params, state, BATCH)
    estimate = jax.jit(
        lambda params: zo.spsa(
            nonlinear, params, BATCH, key=jax.random.fold_in(KEY, 0), eps=1e-2, num_directions=3
        )
    )
    est = estimate(params)
    np.testing.assert_allclose(info.projected_grad, est.projected_grad, rtol=1e-4)
    np.testing.assert_allclose(info.loss, est.loss, rtol=1e-6)
    grads = jax.jit(zo.materialize)(est, params)
    expected = jax.tree.map(
        lambda w, g, takes: w - 0.01 * (g + 0.5 * takes * w), params, grads, decayed(params)
    )
    np.testing.assert_allclose(flat(moved), flat(expected), rtol=1e-5, atol=1e-6)
    assert state.step == 1
    assert info.aux is None
    assert info.learning_rate == jnp.float32(0.01)
    assert info.loss_plus.shape == info.loss_minus.shape == info.projected_grad.shape == (3,)


@pytest.mark.parametrize(("model", "n"), [("dict", 3), ("network", 1)])
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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_no_learning_rate_and_no_decay_change_no_bit(dtype):
    params = small_params(dtype)
    params["signed_zero"] = jnp.array([0.0, -0.0] * 8, dtype)
    opt = zo.mezo(0.0)
    moved, _, info = compiled(opt, quadratic)(params, opt.init(params, KEY), BATCH)
    assert info.projected_grad[0] != 0
    assert_same_bits(moved, params)


def test_a_network_in_half_precision_is_unchanged_by_a_step_of_length_zero():
    params, opt = network_params(jnp.bfloat16), zo.mezo(0.0, sampler=zo.rademacher())
    state = opt.init(params, KEY)
    moved, _, info = compiled(opt, network_loss)(params, state, network_batch())
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


@pytest.mark.parametrize(("n", "decay"), [(1, 0.1), (2, 0.0)])
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
    whole, _, _ = compiled(opt, constant_slope)(params, state, BATCH)
    monkeypatch.setattr(sites, "BLOCK", 12)
    blocks, _, _ = compiled(opt, constant_slope)(params, state, BATCH)
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


def test_schedules_of_optax_set_the_learning_rate():
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    params, opt = {"w": jnp.ones(3)}, zo.mezo(schedule)
    step, state, rates = compiled(opt, constant_slope), opt.init(params, KEY), []
    for _ in range(5):
        before = params
        params, state, info = step(params, state, BATCH)
        rates.append(info.learning_rate)
    np.testing.assert_allclose(rates, [0.1, 0.075, 0.05, 0.025, 0], rtol=1e-6)
    assert_same_bits(params, before)


def test_mezo_lowers_a_loss():
    params, opt = {"w": jnp.full(8, 2.0), "b": jnp.zeros(3)}, zo.mezo(0.05, num_directions=4)
    step, state = compiled(opt, quadratic), opt.init(params, KEY)
    start = quadratic(params, BATCH)
    for _ in range(200):
        params, state, info = step(params, state, BATCH)
    assert info.loss < 0.01 * start


def test_the_compiled_step_donates_parameters_and_state():
    params = {"layers": {"w": jnp.ones((3, 4, 5))}, "b": jnp.ones(7, jnp.bfloat16)}
    opt = zo.mezo(0.1)
    step, state = zo.jit_step(opt, constant_slope), opt.init(params, jax.random.key(0))
    again = zo.jit_step(opt, constant_slope)
    moved, new_state, _ = step(params, state, BATCH)
    assert all(x.is_deleted() for x in jax.tree.leaves((params, state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((moved, new_state)))
    assert again is not step
    assert step._cache_size() == 1
    step(moved, new_state, BATCH)
    assert step._cache_size() == 1


def test_the_plain_step_keeps_its_arguments():
    params, opt = {"w": jnp.ones(3)}, zo.mezo(0.1)
    state = opt.init(params, KEY)
    first, _, _ = opt.step(constant_slope, params, state, BATCH)
    second, _, _ = opt.step(constant_slope, params, state, BATCH)
    assert_same_bits(first, second)


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


def test_a_loss_that_is_not_a_number_shows_in_the_projected_gradient():
    params, opt = {"w": jnp.ones(3)}, zo.mezo(0.1)
    bad = lambda params, batch: params["w"].sum() * jnp.nan  # noqa: E731
    _, _, info = compiled(opt, bad)(params, opt.init(params, KEY), BATCH)
    assert np.isnan(info.projected_grad).all()
    assert np.isnan(info.loss)


def test_scale_by_spsa_feeds_any_chain():
    tx = optax.chain(zo.scale_by_spsa(num_directions=8, sampler=zo.rademacher()), optax.adam(0.1))
    params = {"w": jnp.full(4, 3.0)}
    state = tx.init(params)
    assert not state[0].known.any()
    assert state[0].key == jax.random.key(0)

    @jax.jit
    def step(params, state):
        value_fn = lambda params: quadratic(params, BATCH)  # noqa: E731
        updates, state = tx.update(None, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    for _ in range(100):
        params, state = step(params, state)
    assert state[0].loss < 0.1
    assert state[0].projected_grad.shape == (8,)


@pytest.mark.parametrize("make", [lambda **o: zo.mezo(0.1, **o), zo.scale_by_spsa])
@pytest.mark.parametrize("options", [{"eps": 0.0}, {"eps": -1.0}, {"num_directions": 0}])
def test_impossible_settings_are_refused(make, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)


def initialisations(**options):
    opt = zo.mezo(0.1, **options)
    return [lambda params: opt.init(params, KEY), zo.scale_by_spsa(**options).init]


@pytest.mark.parametrize("init", initialisations(select="adapter"))
def test_a_selection_of_nothing_is_refused(init):
    with pytest.raises(
        ValueError, match=r"takes no parameter \(got .*\)\. Choose among head\.bias, "
    ):
        init(small_params())


@pytest.mark.parametrize(
    "init",
    [*initialisations(), lambda params: zo.spsa(lambda p: jnp.float32(1), params, key=KEY)],
    ids=["optimizer", "chain", "estimate"],
)
@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"plumless": jnp.ones(2), "buckeroo": jnp.ones(2)},
            "'buckeroo' and 'plumless' share a hash",
        ),
        ({"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, r"^a\.b: two parameters have this path"),
    ],
)
def test_parameters_that_would_share_their_noise_are_refused(init, params, message):
    with pytest.raises(ValueError, match=message):
        init(params)


def test_scale_by_spsa_without_parameters_is_refused():
    tx = zo.scale_by_spsa()
    with pytest.raises(ValueError, match=r"update\(None, state, params"):
        tx.update(None, tx.init({"w": jnp.ones(2)}), value_fn=constant)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_without_a_finite_slope_changes_nothing_but_its_number(name, bad):
    """The run that goes on is the run that never saw that step, drawn at the same numbers."""
    params, opt = network_params(), METHODS[name]()
    step = jax.jit(
        lambda params, state, scale: opt.step(
            lambda params, batch: scale * network_loss(params, batch),
            params,
            state,
            network_batch(),
        )
    )
    state = opt.init(params, KEY)
    for scale in (bad, 1.0, 1.0, bad, bad):
        before = opt.finalize(params, state), state
        params, state, info = step(params, state, scale)
        if scale == 1:
            # Of residual feedback the first loss has none to be compared with.
            first = name == "residual_feedback" and not before[1].known.any()
            same = np.array_equal(flat(opt.finalize(params, state)), flat(before[0]))
            assert same == first
            continue
        assert not np.isfinite(info.projected_grad).any()
        kept = before[1]._replace(step=state.step)
        if name == "lozo_residual":  # what its interval has added goes into the parameters
            np.testing.assert_allclose(
                flat(opt.finalize(params, state)), flat(before[0]), rtol=1e-6
            )
            continue
        assert info.moved_fraction == 0
        assert_same_bits(opt.finalize(params, state), before[0])
        assert jax.tree.structure(state) == jax.tree.structure(kept)
        for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(kept), strict=True):
            assert jnp.array_equal(new, old)


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


SHORT = ("mezo", "adam", "momentum", "meazo", "lozo_momentum", "zo_muon", "residual_feedback")


def battery(name, params, batch, steps=3):
    """Steps in a scan, whose state must keep its types."""
    opt = METHODS[name]()

    def body(carry, _):
        params, state, info = opt.step(network_loss, *carry, batch)
        return (params, state), info.learning_rate

    state = opt.init(params, jax.random.key(7))
    (params, state), _ = jax.jit(lambda *x: jax.lax.scan(body, x, length=steps))(params, state)
    return opt.finalize(params, state), state


WIDTHS = [(dtype, name) for dtype in ("float32", "float64") for name in METHODS]


@pytest.mark.parametrize(("dtype", "name"), [*WIDTHS, *(("bfloat16", name) for name in SHORT)])
def test_the_width_of_numbers_is_that_of_the_leaves_and_not_of_the_process(dtype, name):
    """Under 64 bits, methods do what they do without; leaves of 64 bits have states of 64."""
    params, batch = network_params(), network_batch()
    narrow = "float32" if dtype == "float64" else dtype
    plain, _ = battery(name, jax.tree.map(lambda x: x.astype(narrow), params), batch)
    with jax.enable_x64(True):
        measured = jnp.promote_types(dtype, jnp.float32)
        wide, state = battery(
            name,
            jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), params),
            jax.tree.map(lambda x: jnp.asarray(np.asarray(x), measured), batch),
        )
        floats = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype(dtype)}
    if name != "lozo_residual":
        assert floats == {jnp.dtype("float64" if dtype == "float64" else "float32")}
    if dtype != "float64":
        return assert_same_bits(wide, plain)
    moved = flat(plain) - flat(params)
    found = np.asarray(flat(wide), np.float64) - flat(params)
    np.testing.assert_allclose(found, moved, atol=0.02 * float(np.abs(moved).max()))


def test_learning_rates_and_decays_can_be_swept_by_vmap():
    params = small_params()

    def end(rate, decay):
        opt = zo.mezo(rate, weight_decay=decay)
        state = opt.init(params, KEY)
        for _ in range(2):
            current, state, _ = opt.step(quadratic, params, state, BATCH)
        return flat(current)

    rates, decays = jnp.array([1e-2, 1e-3, 0.0]), jnp.array([0.5, 0.1, 0.0])
    swept = jax.jit(jax.vmap(end))(rates, decays)
    for row, rate, decay in zip(swept, rates, decays, strict=True):
        np.testing.assert_allclose(row, end(float(rate), float(decay)), rtol=1e-5, atol=1e-6)


def test_one_array_in_two_places_is_refused_by_name():
    tied = jnp.ones(3)
    params, opt = {"a": {"w": tied}, "b": tied}, zo.mezo(0.1)
    step = zo.jit_step(opt, constant_slope)
    with pytest.raises(ValueError, match=r"^params\.a\.w: is the same array as params\.b"):
        step(params, opt.init(params, KEY), BATCH)
    assert not tied.is_deleted()


def test_the_key_that_a_run_begins_with_stays_the_users():
    key, opt = jax.random.key(5), zo.mezo(0.1)
    zo.jit_step(opt, constant_slope)({"w": jnp.ones(3)}, opt.init({"w": jnp.ones(3)}, key), BATCH)
    assert not key.is_deleted()


@pytest.mark.parametrize("name", METHODS)
def test_nothing_in_a_run_is_not_a_number(name):
    """`JAX_DEBUG_NANS=1` and `JAX_DEBUG_INFS=1` find nothing where the loss is finite."""
    with jax.debug_nans(True), jax.debug_infs(True):
        params, opt = network_params(), METHODS[name]()
        state, step = opt.init(params, KEY), compiled(opt, network_loss)
        for _ in range(3):
            params, state, _ = step(params, state, network_batch())
        tx = zo.scale_by_spsa()
        updates, _ = tx.update(
            None, tx.init(params), params, value_fn=lambda p: network_loss(p, network_batch())
        )
    assert np.isfinite(flat(updates)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zo.mezo(0.1, weight_decay=-0.1), "weight_decay: must be at least 0"),
        (lambda: zo.meazo(0.1, weight_decay=float("nan")), "weight_decay: must be at least 0"),
        (lambda: zo.mezo(-0.1), "learning_rate: must be at least 0"),
        (lambda: zo.mezo(float("nan")), "learning_rate: must be at least 0"),
        (lambda: zo.lozo_residual(-0.1), "learning_rate: must be at least 0"),
        (lambda: zo.lozo_momentum(0.1, momentum=1.0), "decay: must be at least 0 and below 1"),
        (lambda: zo.zo_muon(0.1, vector_scale=-1.0), "vector_scale: must be at least 0"),
        (lambda: zo.zeroth_order.__wrapped__(0.1, rounding="up"), "rounding: not known"),
        (lambda: zo.mezo(0.1, eps=float("inf")), "eps must be positive"),
        (
            lambda: estimators.check.__wrapped__(1e-3, 1.5),
            "num_directions must be a whole number",
        ),
        (lambda: zo.meazo(0.1, decay_rate=1.0), "decay: must be at least 0 and below 1"),
        (lambda: zo.mezo_momentum(0.1, momentum=-0.1), "decay: must be at least 0 and below 1"),
        (lambda: zo.mezo_adam(0.1, b2=1.5), "b2: must be at least 0 and below 1"),
        (lambda: zo.mezo_adam(0.1, floor=-1e-8), "eps: must be at least 0"),
        (lambda: zo.mezo_adam(0.1, horizon=0), "horizon is 0"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


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
