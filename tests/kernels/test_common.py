"""One battery for all kernels: every kind by every method is that of an explicit Jacobian.

A new kind is a row of `oracle.KINDS` and of `oracle.kernel`, a new method one of `METHODS`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import kernels
from jaxlm.core import paths, taps
from jaxlm.gradients.projection import projector
from jaxlm.kernels import KernelOptions, empirical
from jaxlm.kernels.contraction import kernel_spec
from jaxlm.sharding import make_mesh
from tests.helpers.frameworks import MODELS
from tests.helpers.slow import slow
from tests.kernels import oracle

METHODS = ("jacobian", "ntk_vector_products", "factorized")
AXES = {"full": {}, "trace": {"trace_axes": (-1,)}, "diagonal": {"diagonal_axes": (1,)}}
UNCHECKED = KernelOptions(check=False)
PRODUCTS = [("adam", METHODS[1]), ("asymmetric_signgd", METHODS[1])]
TAU = {jnp.float64: 1e-12, jnp.float32: 1e-6}


def assert_close(result, wanted, relative):
    assert result.shape == wanted.shape
    np.testing.assert_allclose(result, wanted, rtol=0, atol=relative * np.abs(wanted).max())


@functools.cache
def toy_problem(classes):
    f, params = oracle.toy(classes)
    x1, x2 = oracle.toy_examples(5), oracle.toy_examples(5, seed=1)
    return f, params, x1, x2, oracle.jacobian(f, params, x1), oracle.jacobian(f, params, x2)


@functools.cache
def lm_problem(name, tied, classes):
    """The same of a language model; x1 and x2 are halves of one batch."""
    lm = oracle.model(name, tied=tied)
    f, x = oracle.label_logits(lm, classes), oracle.examples(6)
    rows = oracle.jacobian(f, lm.params, x)
    first, second = (
        (jax.tree.map(lambda a, at=at: a[at], x), {place: g[at] for place, g in rows.items()})
        for at in (slice(0, 3), slice(3, 6))
    )
    return f, lm.params, first[0], second[0], first[1], second[1]


def check(problem, kind, method, dtype, tolerance, *, axes="full", same=False, block_size=None):
    f, params, x1, x2, first, second = problem
    with jax.enable_x64(dtype == jnp.float64):
        result = kernels.ntk(
            f,
            oracle.of_dtype(params, dtype),
            x1,
            None if same else x2,
            kind=oracle.kind_of(kind, params, dtype),
            method=method,
            options=KernelOptions(block_size=block_size, check=False),
            **AXES[axes],
        )
    assert result.dtype == dtype
    wanted = oracle.kernel(
        first,
        first if same else second,
        kind,
        tau=TAU[dtype],
        adam_state=oracle.adam_state(params),
        trace=axes == "trace",
        diagonal=axes == "diagonal",
    )
    assert_close(result, wanted, tolerance)


BATTERY = [  # what a kind makes of a gradient is the same in products as in factors
    slow(*row) if row in PRODUCTS else row for row in itertools.product(oracle.KINDS, METHODS)
]


@pytest.mark.parametrize(("kind", "method"), BATTERY)
@pytest.mark.parametrize("classes", [slow(1), 3])
def test_float64(classes, kind, method):
    check(toy_problem(classes), kind, method, jnp.float64, 1e-12)


SINGLE = [("signgd", "factorized"), ("sgd", "ntk_vector_products")]
SINGLE += [slow(*row) for row in itertools.product(oracle.KINDS, METHODS[1:]) if row not in SINGLE]


@pytest.mark.parametrize(("kind", "method"), SINGLE)  # "jacobian": `test_axes_and_blocks`
def test_float32(kind, method):
    check(toy_problem(3), kind, method, jnp.float32, 1e-5)


# Blocks of the Jacobian share their compiled gradients; each row of another method is a program.
BLOCKS = [
    ("jacobian", kind, axes, same, (2,))
    for kind, axes, same in itertools.product(oracle.KINDS, AXES, (True, False))
    if axes == "full" or kind in ("sgd", "adam")
]
BLOCKS += [
    ("jacobian", "sgd", "full", True, (9,)),  # more than there are
    ("ntk_vector_products", "sgd", "trace", True, (3,)),
    ("ntk_vector_products", "sgd", "diagonal", False, (None,)),
    ("factorized", "signgd", "trace", True, (3,)),
    ("factorized", "adam", "trace", False, (None,)),
]
BLOCKS += [
    slow("jacobian", kind, axes, same, (None, 2, 3))
    for kind, axes, same in itertools.product(oracle.KINDS, AXES, (True, False))
]
BLOCKS += [
    slow("ntk_vector_products", "sgd", "full", True, (3,)),
    slow("ntk_vector_products", "sgd", "diagonal", True, (3,)),
    slow("factorized", "sgd", "trace", True, (3,)),
    slow("factorized", "sgd", "diagonal", False, (None,)),
    slow("factorized", "asymmetric_signgd", "diagonal", True, (None,)),
]


@pytest.mark.parametrize(("method", "kind", "axes", "same", "sizes"), BLOCKS)
def test_axes_and_blocks(method, kind, axes, same, sizes):
    for size in sizes:
        check(
            toy_problem(3), kind, method, jnp.float32, 1e-5, axes=axes, same=same, block_size=size
        )


@pytest.mark.parametrize(
    ("kind", "axes"), [("sgd", "full"), ("sgd", "trace"), ("sgd", "diagonal"), ("signgd", "full")]
)
def test_a_symmetric_kernel_is_equal_to_its_transpose(kind, axes):
    f, params, x1, *_ = toy_problem(3)
    rows = np.array([0, 1, 2, 3, 4, 0, 2, 4, 1, 3, 0])  # enough for tiles
    x = jax.tree.map(lambda a: a[rows], x1)
    params = oracle.of_dtype(params, jnp.float32)
    result = kernels.ntk(f, params, x, kind=kind, method="jacobian", **AXES[axes])
    turned = np.moveaxis(result, (0, 1), (2, 3)) if axes == "full" else result.swapaxes(0, 1)
    np.testing.assert_array_equal(result, turned)
    if axes == "full":
        matrix = np.asarray(result, np.float64).reshape(33, 33)
        # Each of 33 eigenvalues is off by at most the norm of the rounding errors.
        assert np.linalg.eigvalsh(matrix).min() > -33 * 1e-6 * np.abs(matrix).max()


@pytest.mark.parametrize("method", [METHODS[0], slow(METHODS[1]), METHODS[2]])
def test_select(method):
    f, params, x1, x2, *rows = toy_problem(3)
    keep = lambda path: "key" in path or path == "head.scale"  # noqa: E731
    first, second = ({key: g for key, g in side.items() if keep(key[0])} for side in rows)
    wanted = oracle.kernel(first, second, "signgd", tau=1e-6)
    params = oracle.of_dtype(params, jnp.float32)
    for select in ("key|scale", keep):
        options = {"kind": "signgd", "method": method, "options": UNCHECKED}
        assert_close(kernels.ntk(f, params, x1, x2, select=select, **options), wanted, 1e-6)


@pytest.mark.parametrize("method", [METHODS[0], slow(METHODS[1]), METHODS[2]])
def test_under_jit(method):
    f, params, x1, x2, first, second = toy_problem(3)
    size = 3 if method == "jacobian" else None
    options = {"method": method, "trace_axes": (-1,), "options": KernelOptions(block_size=size)}
    at = jax.jit(functools.partial(kernels.ntk, f, **options))
    wanted = oracle.kernel(first, second, "sgd", trace=True)
    assert_close(at(oracle.of_dtype(params, jnp.float32), x1, x2), wanted, 1e-5)


@pytest.mark.parametrize("kind", ["sgd", "signgd", slow("asymmetric_signgd"), slow("adam")])
def test_kernel_vector_product(kind):
    f, params, x1, x2, first, second = toy_problem(3)
    v = np.random.default_rng(2).standard_normal((5, 3))
    with jax.enable_x64(True):
        value = oracle.kind_of(kind, params, jnp.float64)
        params64 = oracle.of_dtype(params, jnp.float64)
        result = kernels.kernel_vector_product(f, params64, x1, x2, v, kind=value)
    wanted = oracle.kernel(first, second, kind, adam_state=oracle.adam_state(params))
    assert_close(result, np.einsum("ncmd,md->nc", wanted, v), 1e-12)


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("kind", "method", "same", "block_size"),
    [
        ("sgd", "jacobian", True, 8),
        slow("signgd", "jacobian", False, None),
        slow("sgd", "ntk_vector_products", False, None),
        ("sgd", "factorized", True, None),
    ],
)
def test_eight_devices(kind, method, same, block_size):
    f, params, *_ = toy_problem(3)
    params = oracle.of_dtype(params, jnp.float32)
    x1, x2 = oracle.toy_examples(11), None if same else oracle.toy_examples(6, seed=1)
    at = functools.partial(kernels.ntk, f, params, x1, x2, kind=kind, method=method)
    options = KernelOptions(block_size=block_size, mesh=make_mesh(data=4, fsdp=2), check=False)
    result = at(options=options)
    assert_close(np.asarray(result), np.asarray(at(options=UNCHECKED)), 1e-6)


# --- Language models


CASES = list(itertools.product(oracle.CONFIGS, (True, False), (1, 3)))
SOME = [
    ("encoder", True, 1),
    ("rotary decoder", False, 3),
    ("encoder", False, 3),
    ("decoder", True, 3),
    ("decoder", False, 1),
    ("rotary decoder", True, 1),
]
LANGUAGE_MODELS = [
    slow("encoder", True, 3, ("adam",), "jacobian", jnp.float64),
    ("encoder", True, 3, ("sgd",), "factorized", jnp.float64),
    ("rotary decoder", False, 3, ("adam",), "factorized", jnp.float64),
    *(slow(*case, oracle.KINDS, "jacobian", jnp.float64) for case in SOME),
    *(slow(*case, oracle.KINDS, "ntk_vector_products", jnp.float64) for case in SOME),
    *(slow(*case, oracle.KINDS, "factorized", jnp.float64) for case in CASES),
    *(slow(*case, oracle.KINDS, m, jnp.float32) for case in SOME for m in METHODS),
]


@pytest.mark.parametrize(("name", "tied", "classes", "kinds", "method", "dtype"), LANGUAGE_MODELS)
def test_language_models(name, tied, classes, kinds, method, dtype):
    tolerance = 1e-9 if dtype == jnp.float64 else 1e-5
    for kind in kinds:
        check(lm_problem(name, tied, classes), kind, method, dtype, tolerance)


def test_padding_and_the_other_examples_never_change_an_entry():
    f, params, x1, x2, *_ = lm_problem("encoder", True, 3)
    assert not x1["attention_mask"].all()
    filled = {**x1, "input_ids": np.where(x1["attention_mask"], x1["input_ids"], 9)}
    mixed = jax.tree.map(lambda a, b: np.stack([a[2], b[1], a[0]]), x1, x2)
    with jax.enable_x64(True):
        params = oracle.of_dtype(params, jnp.float64)
        at = functools.partial(kernels.ntk, f, params, method="jacobian", kind="signgd")
        result, padded = at(x1, x2, options=UNCHECKED), at(filled, x2, options=UNCHECKED)
        composed = at(mixed, x2, options=UNCHECKED)
    np.testing.assert_array_equal(result, padded)
    np.testing.assert_array_equal(result[0], composed[2])
    np.testing.assert_array_equal(result[2], composed[0])


LONGER = [("toy", "factorized", "sgd"), slow("decoder", "factorized", "sgd")]
LONGER += [
    slow(*case) for case in itertools.product(oracle.CONFIGS, METHODS[:2], ("sgd", "signgd"))
]


@pytest.mark.parametrize(("name", "method", "kind"), LONGER)
def test_more_padding_changes_nothing(name, method, kind):
    if name == "toy":
        (f, params), examples = oracle.toy(3), oracle.toy_examples
    else:
        lm, examples = oracle.model(name), oracle.examples
        f, params = oracle.label_logits(lm, 3), lm.params
    x1, x2 = examples(2), examples(3, seed=1)
    longer = {key: np.pad(a, [(0, 0), (0, 3)]) if a.ndim == 2 else a for key, a in x2.items()}
    with jax.enable_x64(True):
        at = functools.partial(
            kernels.ntk, f, oracle.of_dtype(params, jnp.float64), x1, kind=kind, method=method
        )
        one, other = (at(x, options=UNCHECKED) for x in (x2, longer))
    assert_close(other, np.asarray(one), 1e-12)


# --- Any function, as it is now


@pytest.mark.parametrize(
    "make", [make if make.__name__ == "equinox" else slow(make) for make in MODELS]
)
def test_any_model(make):
    model = make()
    x = jax.random.normal(jax.random.key(1), (4, 2))
    moved, rest = paths.split(model.params, None)
    of_floats = jax.jacrev(lambda moved: model.predict(paths.merge(moved, rest), x))
    rows = [np.reshape(j, (4, -1)) for j in jax.tree.leaves(of_floats(moved))]
    rows = np.concatenate(rows, 1)
    result = kernels.ntk(model.predict, model.params, x, method="jacobian", trace_axes=(1,))
    assert_close(result, rows @ rows.T, 1e-5)


@pytest.mark.parametrize("method", ["auto", slow("ntk_vector_products"), "projected"])
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
    result = kernels.ntk(lambda m, x: jax.vmap(m)(x), module, x, method=method, projector=draw)
    assert_close(result, wanted, 0.1 if draw else 1e-5)
    manifest = kernels.describe(module, x)
    assert manifest == kernels.describe(arrays, x)
    assert manifest != kernels.describe(jax.tree.map(lambda a: 2 * a, arrays), x)


def test_auto_is_factorized_where_every_use_has_a_tap():
    params, x = {"w": jnp.ones((3, 1)), "s": jnp.ones(())}, np.ones((2, 3), np.float32)

    def tapped(params, x, *, tap=None):
        return taps.apply(tap, "w", "dense", x, x @ params["w"], None)

    def scaled(params, x, *, tap=None):
        return params["s"] * tapped(params, x, tap=tap)

    def untapped(params, x):
        return tapped(params, x)

    def method(f, select=None):
        spec = kernel_spec(params, select=select)
        return empirical.prepare(f, params, x, None, spec, "auto", UNCHECKED).method

    assert method(tapped) == "factorized"
    assert method(untapped) == "jacobian"
    assert method(scaled) == "jacobian"
    assert method(scaled, "w") == "factorized"


class Scaled:
    """An object whose method is f: 2 or 3 times a linear map."""

    scale = jnp.float32(2)

    def f(self, params, x, *, tap=None):
        return taps.apply(tap, "w", "dense", x, self.scale * x @ params["w"], None)


@pytest.mark.parametrize("method", [*METHODS, "projected"])
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
        result = kernels.ntk(model.f, params, x, **options)
        np.testing.assert_allclose(result, one * 9 / 4, rtol=1e-5)
    if method != "projected":
        np.testing.assert_allclose(one, 4 * x @ x.T, rtol=1e-5)
