"""The kernels are those of an explicit Jacobian, by every method, in blocks and on a mesh."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import ScaleByAdamState

from jaxlm import kernels
from jaxlm.core import paths, taps
from jaxlm.gradients.projection import projector
from jaxlm.sharding import make_mesh
from tests.helpers.frameworks import MODELS
from tests.kernels import oracle

METHODS = ("jacobian", "ntk_vector_products")
B1, B2, EPS, COUNT = 0.9, 0.99, 1e-4, 5
AXES = {"full": {}, "trace": {"trace_axes": (-1,)}, "diagonal": {"diagonal_axes": (1,)}}


def adam_of(params, dtype):
    """The state as optax has it in a chain, and as the oracle reads it."""
    moments = oracle.moments_like(params)
    adam = ScaleByAdamState(jnp.int32(COUNT), *oracle.of_dtype(moments, dtype))
    chain = (optax.EmptyState(), (adam, optax.EmptyState()))
    return chain, (oracle.by_place(*moments), COUNT, B1, B2, EPS)


@functools.cache
def toy_problem(classes):
    f, params = oracle.toy(classes)
    x1, x2 = oracle.toy_examples(5), oracle.toy_examples(5, seed=1)
    return f, params, x1, x2, oracle.jacobian(f, params, x1), oracle.jacobian(f, params, x2)


def options_of(kind, chain):
    adam = {"adam_state": chain, "b1": B1, "b2": B2, "eps": EPS}
    return {"kind": kind, **(adam if kind == "adam" else {})}


def assert_close(found, wanted, relative):
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=relative * np.abs(wanted).max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("classes", [1, 3])
def test_a_network_in_float64(classes, kind, method):
    f, params, x1, x2, first, second = toy_problem(classes)
    with jax.enable_x64(True):
        chain, adam = adam_of(params, jnp.float64)
        options = {**options_of(kind, chain), "method": method, "check": False}
        params = oracle.of_dtype(params, jnp.float64)
        found = kernels.ntk(f, params, x1, x2, **options)
    assert found.dtype == np.float64
    assert_close(found, oracle.kernel(first, second, kind, adam_state=adam), 1e-12)


FLOAT32 = [(kind, "jacobian") for kind in oracle.KINDS] + [("adam", "ntk_vector_products")]


@pytest.mark.parametrize(("kind", "method"), FLOAT32)
def test_a_network_in_float32(kind, method):
    f, params, x1, x2, first, second = toy_problem(3)
    chain, adam = adam_of(params, jnp.float32)
    options = {**options_of(kind, chain), "method": method, "check": False}
    found = kernels.ntk(f, oracle.of_dtype(params, jnp.float32), x1, x2, **options)
    assert found.dtype == np.float32
    assert_close(found, oracle.kernel(first, second, kind, adam_state=adam, tau=1e-6), 1e-5)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("kind", ["signgd", "asymmetric_signgd"])
@pytest.mark.parametrize("same", [True, False])
def test_blocks_and_axes(kind, axes, same):
    f, params, x1, x2, first, second = toy_problem(3)
    wanted = oracle.kernel(first, first if same else second, kind, tau=1e-6, **flags(axes))
    params = oracle.of_dtype(params, jnp.float32)
    for block_size in (None, 2, 3, 9):
        options = {"kind": kind, "method": "jacobian", "block_size": block_size, "check": False}
        found = kernels.ntk(f, params, x1, None if same else x2, **options, **AXES[axes])
        assert_close(found, wanted, 1e-5)


def flags(axes):
    return {} if axes == "full" else {axes: True}


@pytest.mark.parametrize("axes", AXES)
def test_blocks_and_axes_of_vector_products(axes):
    f, params, x1, _, first, _ = toy_problem(3)
    params = oracle.of_dtype(params, jnp.float32)
    found = kernels.ntk(
        f, params, x1, method="ntk_vector_products", block_size=3, check=False, **AXES[axes]
    )
    assert_close(found, oracle.kernel(first, first, "sgd", **flags(axes)), 1e-5)


def test_half_of_a_symmetric_kernel_in_tiles():
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.standard_normal((6, 2)), jnp.float32)
    x = rng.standard_normal((11, 6)).astype(np.float32)
    for axes in AXES:
        found = kernels.ntk(lambda params, x: x @ params, params, x, **AXES[axes])
        # f_c(x) = x · params_c: K[n, c, m, d] = δ_cd x_n · x_m
        wanted = np.einsum("np,mp,cd->ncmd", x, x, np.eye(2))
        if axes != "full":
            wanted = np.einsum("ncmc->nmc", wanted)
        assert_close(found, wanted.mean(-1) if axes == "trace" else wanted, 1e-6)
        np.testing.assert_array_equal(
            found, np.moveaxis(found, (0, 1), (2, 3)) if axes == "full" else found.swapaxes(0, 1)
        )


def test_the_methods_by_their_own_names_under_jit():
    f, params, x1, x2, first, second = toy_problem(1)
    params = oracle.of_dtype(params, jnp.float32)
    wanted = oracle.kernel(first, second, "sgd", trace=True)
    for method in (kernels.jacobian_contraction, kernels.ntk_vector_products):
        found = jax.jit(functools.partial(method, f, trace_axes=(-1,)))(params, x1, x2)
        assert_close(found, wanted, 1e-5)
    found = jax.jit(lambda params: kernels.ntk(f, params, x1, x2, block_size=2))(params)
    assert_close(found, oracle.kernel(first, second, "sgd"), 1e-5)


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_kernel_vector_product(kind):
    f, params, x1, x2, first, second = toy_problem(3)
    v = np.random.default_rng(2).standard_normal((5, 3))
    with jax.enable_x64(True):
        chain, adam = adam_of(params, jnp.float64)
        params = oracle.of_dtype(params, jnp.float64)
        found = kernels.kernel_vector_product(f, params, x1, x2, v, **options_of(kind, chain))
    wanted = oracle.kernel(first, second, kind, adam_state=adam)
    assert_close(found, np.einsum("ncmd,md->nc", wanted, v), 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_select(method):
    f, params, x1, x2, *_ = toy_problem(1)
    keep = lambda path: "key" in path or path == "head.scale"  # noqa: E731
    first, second = (oracle.jacobian(f, params, x, keep) for x in (x1, x2))
    params = oracle.of_dtype(params, jnp.float32)
    options = {"kind": "signgd", "method": method, "check": False}
    for select in (r"key|^head", keep):
        found = kernels.ntk(f, params, x1, x2, select=select, **options)
        assert_close(found, oracle.kernel(first, second, "signgd", tau=1e-6), 1e-6)


def test_the_adam_kernel_is_one_step_of_optax():
    f, params, x1, x2, first, _ = toy_problem(1)
    with jax.enable_x64(True):
        params = oracle.of_dtype(params, jnp.float64)
        tx = optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(1e-3, b2=B2, eps=EPS))
        state = tx.init(params)
        rng = np.random.default_rng(1)
        for _ in range(3):
            noise = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), params)
            state = tx.update(noise, state, params)[1]
        found = kernels.ntk(f, params, x1, x2, kind="adam", adam_state=state, b2=B2, eps=EPS)
        adam = optax.scale_by_adam(b2=B2, eps=EPS)
        for m in range(2):
            row = jax.tree.map(lambda a, m=m: a[m : m + 1], x2)
            gradient = jax.grad(lambda params, row=row: f(params, row)[0, 0])(params)
            step = adam.update(gradient, state[1][0])[0]
            moved = oracle.by_place(step, step)
            wanted = sum(first[place][:, 0] @ np.ravel(moved[place][0]) for place in first)
            assert_close(found[:, 0, m, 0], wanted, 1e-10)


def test_a_fresh_adam_is_signgd():
    f, params, x1, x2, *_ = toy_problem(1)
    with jax.enable_x64(True):
        params = oracle.of_dtype(params, jnp.float64)
        fresh = optax.adam(1.0).init(params)
        options = {"check": False, "select": "up|head|embed"}
        adam = kernels.ntk(f, params, x1, x2, kind="adam", adam_state=fresh, eps=0, **options)
        signs = kernels.ntk(
            f, params, x1, x2, kind="asymmetric_signgd", sign_threshold=0, **options
        )
        assert_close(adam, np.asarray(signs), 1e-12)


@pytest.mark.parametrize("kind", ["sgd", "signgd"])
def test_symmetric_and_positive(kind):
    f, params, x1, *_ = toy_problem(3)
    found = kernels.ntk(f, oracle.of_dtype(params, jnp.float32), x1, kind=kind)
    matrix = np.asarray(found, np.float64).reshape(15, 15)
    np.testing.assert_array_equal(matrix, matrix.T)
    # of 15 eigenvalues, each off by at most the norm of the rounding errors
    assert np.linalg.eigvalsh(matrix).min() > -15 * 1e-6 * np.abs(matrix).max()


def test_diagonals_of_sign_kernels():
    f, params, x1, _, first, _ = toy_problem(3)
    params = oracle.of_dtype(params, jnp.float32)
    size = sum(np.abs(g).sum(-1) for g in first.values())
    count = sum((g != 0).sum(-1) for g in oracle.signs(first, 1e-6).values())
    for kind, wanted in (("asymmetric_signgd", size), ("signgd", count)):
        found = np.asarray(kernels.ntk(f, params, x1, kind=kind)).reshape(15, 15)
        assert_close(np.diagonal(found), wanted.ravel(), 1e-5)


def test_the_useless_bias_has_no_sign():
    f, params, x1, *_ = toy_problem(1)
    params = oracle.of_dtype(params, jnp.float32)
    options = {"select": "key.bias|up.bias", "check": False}
    found, info = kernels.ntk_with_info(f, params, x1, kind="signgd", **options)
    # Two layers of four entries in up.bias; key.bias is noise.
    np.testing.assert_array_equal(np.diagonal(found[:, 0, :, 0]), 8)
    noisy = kernels.ntk(f, params, x1, kind="signgd", sign_threshold=0, **options)
    assert (np.diagonal(noisy[:, 0, :, 0]) > 8).any()
    np.testing.assert_array_equal(info.dropped1, info.dropped2)
    # at most those of key.bias, half of all; in an example of one token even that is exactly 0
    assert info.dropped1.max() > 0.2
    assert np.all(info.dropped1 <= 0.5)


def test_the_dropped_fraction_in_closed_form():
    x1, x2 = np.array([[1.0, 1e-3, 0, 0]], np.float32), np.array([[1.0, 1, 1e-3, 1e-4]], np.float32)
    f = lambda params, x: x @ params  # noqa: E731
    at = functools.partial(kernels.ntk_with_info, f, jnp.ones((4, 1)), x1, x2, check=False)
    for kind, lost in (("sgd", (0, 0)), ("asymmetric_signgd", (0, 0.5)), ("signgd", (0.5, 0.5))):
        found, info = at(kind=kind, sign_threshold=0.01)
        assert (info.dropped1[0], info.dropped2[0]) == lost
        assert info.method == "jacobian"
        wanted = {"sgd": 1 + 1e-3, "asymmetric_signgd": 1 + 1e-3, "signgd": 1}[kind]
        np.testing.assert_allclose(found[0, 0, 0, 0], wanted, rtol=1e-6)


@pytest.mark.parametrize("make", MODELS)
def test_any_model(make):
    model = make()
    x = jax.random.normal(jax.random.key(1), (4, 2))
    moved, rest = paths.split(model.params, None)
    of_floats = jax.jacrev(lambda moved: model.predict(paths.merge(moved, rest), x))
    jacobian = jax.tree.leaves(of_floats(moved))
    rows = np.concatenate([np.reshape(j, (4, -1)) for j in jacobian], 1)
    found = kernels.ntk(model.predict, model.params, x, method="jacobian", trace_axes=(1,))
    assert_close(found, rows @ rows.T, 1e-5)


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("kind", "method", "same", "block_size"),
    [
        ("sgd", "jacobian", True, 8),
        ("signgd", "jacobian", False, None),
        ("sgd", "ntk_vector_products", False, None),
    ],
)
def test_eight_devices(kind, method, same, block_size):
    f, params, *_ = toy_problem(3)
    params = oracle.of_dtype(params, jnp.float32)
    x1, x2 = oracle.toy_examples(11), None if same else oracle.toy_examples(6, seed=1)
    options = {"kind": kind, "method": method, "check": False}
    one = kernels.ntk(f, params, x1, x2, **options)
    mesh = make_mesh(data=4, fsdp=2)
    found = kernels.ntk(f, params, x1, x2, mesh=mesh, block_size=block_size, **options)
    assert_close(np.asarray(found), np.asarray(one), 1e-6)


LANGUAGE_MODELS = [
    pytest.param("encoder", True, 1, id="encoder"),
    pytest.param("rotary decoder", False, 3, marks=pytest.mark.slow, id="rotary decoder"),
    pytest.param("encoder", False, 3, marks=pytest.mark.slow, id="untied encoder"),
    pytest.param("decoder", True, 3, marks=pytest.mark.slow, id="decoder"),
    pytest.param("decoder", False, 1, marks=pytest.mark.slow, id="untied decoder"),
    pytest.param("rotary decoder", True, 1, marks=pytest.mark.slow, id="tied rotary decoder"),
]


@functools.cache
def lm_problem(name, tied, classes):
    lm = oracle.model(name, tied=tied)
    f = oracle.label_logits(lm, classes)
    x = oracle.examples(6)
    rows = oracle.jacobian(f, lm.params, x)
    parts = [
        (jax.tree.map(lambda a, at=at: a[at], x), {place: g[at] for place, g in rows.items()})
        for at in (slice(0, 3), slice(3, 6))
    ]
    return lm, f, *parts


def lm_kernels(name, tied, classes, kinds, method, dtype, tolerance):
    lm, f, (x1, first), (x2, second) = lm_problem(name, tied, classes)
    chain, adam = adam_of(lm.params, dtype)
    params = oracle.of_dtype(lm.params, dtype)
    tau = 1e-12 if dtype == jnp.float64 else 1e-6
    for kind in kinds:
        options = {**options_of(kind, chain), "method": method, "check": False}
        found = kernels.ntk(f, params, x1, x2, **options)
        wanted = oracle.kernel(first, second, kind, adam_state=adam, tau=tau)
        assert_close(found, wanted, tolerance)


@pytest.mark.parametrize(("name", "tied", "classes"), LANGUAGE_MODELS)
def test_language_models_in_float64(name, tied, classes):
    with jax.enable_x64(True):
        lm_kernels(name, tied, classes, oracle.KINDS, "jacobian", jnp.float64, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ntk_vector_products", "factorized"])
@pytest.mark.parametrize(("name", "tied", "classes"), LANGUAGE_MODELS)
def test_language_models_by_other_methods(name, tied, classes, method):
    with jax.enable_x64(True):
        lm_kernels(name, tied, classes, oracle.KINDS, method, jnp.float64, 1e-9)


def test_auto_is_factorized_where_every_use_has_a_tap():
    params, x = {"w": jnp.ones((3, 1)), "s": jnp.ones(())}, np.ones((2, 3), np.float32)

    def tapped(params, x, *, tap=None):
        return taps.apply(tap, "w", "dense", x, x @ params["w"], None)

    def scaled(params, x, *, tap=None):
        return params["s"] * tapped(params, x, tap=tap)

    def untapped(params, x):
        return tapped(params, x)

    def method(f, select=None):
        return kernels._ntk.prepare(f, params, x, None, select=select, check=False).method

    assert method(tapped) == "factorized"
    assert method(untapped) == "jacobian"
    assert method(scaled) == "jacobian"
    assert method(scaled, "w") == "factorized"


def test_projected_is_a_method():
    f, params, x = lambda params, x: x @ params, jnp.ones((9, 2)), np.eye(4, 9, dtype=np.float32)
    options = {"projector": projector("countsketch", 8), "trace_axes": (1,), "check": False}
    found = kernels.ntk(f, params, x, method="projected", **options)
    np.testing.assert_array_equal(found, kernels.projected(f, params, x, **options))


@pytest.mark.slow
@pytest.mark.multidevice
def test_eight_devices_factorized():
    lm = oracle.model("encoder")
    f, x = oracle.label_logits(lm, 1), oracle.examples(11)
    params = oracle.of_dtype(lm.params, jnp.float32)
    one = kernels.ntk(f, params, x, method="factorized")
    found = kernels.ntk(f, params, x, method="factorized", mesh=make_mesh(data=8))
    assert_close(np.asarray(found), np.asarray(one), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "factorized"])
@pytest.mark.parametrize(("name", "tied", "classes"), LANGUAGE_MODELS)
def test_language_models_in_float32(name, tied, classes, method):
    lm_kernels(name, tied, classes, oracle.KINDS, method, jnp.float32, 1e-5)


def test_padding_and_the_other_examples_never_change_an_entry():
    lm, f, (x1, _), (x2, _) = lm_problem("encoder", True, 1)
    assert not x1["attention_mask"].all()
    filled = {**x1, "input_ids": np.where(x1["attention_mask"], x1["input_ids"], 9)}
    mixed = jax.tree.map(lambda a, b: np.stack([a[2], b[1], a[0]]), x1, x2)
    with jax.enable_x64(True):
        params = oracle.of_dtype(lm.params, jnp.float64)
        at = functools.partial(kernels.ntk, f, params, method="jacobian", kind="signgd")
        found, padded = at(x1, x2, check=False), at(filled, x2, check=False)
        composed = at(mixed, x2, check=False)
    np.testing.assert_array_equal(found, padded)
    np.testing.assert_array_equal(found[0], composed[2])
    np.testing.assert_array_equal(found[2], composed[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", oracle.CONFIGS)
def test_more_padding_changes_nothing(name):
    lm = oracle.model(name)
    f, x = oracle.label_logits(lm, 3), oracle.examples(3)
    longer = {
        **x,
        **{key: np.pad(x[key], ((0, 0), (0, 3))) for key in ("input_ids", "attention_mask")},
    }
    with jax.enable_x64(True):
        params = oracle.of_dtype(lm.params, jnp.float64)
        for kind, method in itertools.product(("sgd", "signgd"), METHODS):
            options = {"kind": kind, "method": method, "check": False}
            one, other = (kernels.ntk(f, params, each, **options) for each in (x, longer))
            assert_close(other, np.asarray(one), 1e-12)


class Scaled:
    """An object whose method is f: 2 or 3 times a linear map."""

    scale = jnp.float32(2)

    def f(self, params, x, *, tap=None):
        return taps.apply(tap, "w", "dense", x, self.scale * x @ params["w"], None)


@pytest.mark.parametrize("method", [*METHODS, "factorized", "projected"])
def test_a_kernel_is_that_of_what_f_closes_over_now(method):
    scale, model = jnp.float32(2), Scaled()

    def f(params, x, *, tap=None):
        x = scale * x
        return taps.apply(tap, "w", "dense", x, x @ params["w"], None)

    draw = projector("rademacher", 256) if method == "projected" else None
    params, x = {"w": jnp.ones((3, 2))}, np.eye(3, dtype=np.float32)[:, :3] + 1
    options = {"method": method, "projector": draw, "trace_axes": (-1,)}
    one = kernels.ntk(f, params, x, **options)
    scale = jnp.float32(3)
    np.testing.assert_allclose(kernels.ntk(f, params, x, **options), one * 9 / 4, rtol=1e-5)
    if method != "factorized":  # its tap says that x itself goes in
        np.testing.assert_allclose(kernels.ntk(model.f, params, x, **options), one, rtol=1e-5)
        model.scale = jnp.float32(3)
        found = kernels.ntk(model.f, params, x, **options)
        np.testing.assert_allclose(found, one * 9 / 4, rtol=1e-5)
    if method != "projected":
        np.testing.assert_allclose(one, 4 * x @ x.T, rtol=1e-5)


@pytest.mark.parametrize("method", ["auto", "ntk_vector_products", "projected"])
def test_a_whole_module_of_equinox(method):
    import equinox as eqx

    module = eqx.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    arrays, static = eqx.partition(module, eqx.is_inexact_array)

    def of_arrays(arrays, x):
        return jax.vmap(eqx.combine(arrays, static))(x)

    rows = [g.reshape(4, 2, -1) for g in jax.tree.leaves(jax.jacrev(of_arrays)(arrays, x))]
    wanted = sum(np.einsum("ncp,mdp->ncmd", g, g) for g in rows)
    draw = projector("gaussian", 4096) if method == "projected" else None
    found = kernels.ntk(lambda m, x: jax.vmap(m)(x), module, x, method=method, projector=draw)
    assert_close(found, wanted, 0.1 if draw else 1e-5)
    manifest = kernels.describe(module, x)
    assert manifest == kernels.describe(arrays, x)
    assert manifest != kernels.describe(jax.tree.map(lambda a: 2 * a, arrays), x)
