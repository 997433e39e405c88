"""Kernels from factors are those of explicit Jacobians; no table of gradients exists."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.shapes import ROBERTA_BASE
from jaxlm import kernels
from jaxlm.core import taps
from jaxlm.core.errors import UserError
from jaxlm.kernels import cost, factorized, rules, tables
from jaxlm.kernels.sides import Sides
from jaxlm.models import LanguageModel, init_params
from tests.kernels import oracle

AXES = ("full", "trace", "diagonal")
WAYS = {"trace": {"trace_axes": (-1,)}, "diagonal": {"diagonal_axes": (1,)}, "full": {}}
FIRST, SECOND = 3, 4
ADAM = (3, 0.9, 0.99, 1e-3)
"""Steps made, b1, b2, eps."""


def assert_near(found, wanted, tolerance):
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_pieces(monkeypatch):
    """Every loop over pieces and blocks takes several turns, the last not full."""
    monkeypatch.setattr(cost, "CHUNK", 2 * FIRST * 15)
    monkeypatch.setattr(cost, "TABLE", 2 * FIRST * 30)
    monkeypatch.setattr(cost, "PAIRS", 500)


def sides_of(kind, over="full", first: int | None = FIRST):
    return Sides(first, over, kind, 1e-12, ADAM[1:])


def moments(size: int):
    rng = np.random.default_rng(9)
    first, second = rng.standard_normal(size), np.square(rng.standard_normal(size))
    return jnp.asarray(first), jnp.asarray(second), jnp.asarray(ADAM[0])


def kernel_of(gradients, kind, over, first: int | None = FIRST):
    """The oracle's kernel of one leaf, [N, C, ...] gradients of all examples."""
    flat = np.asarray(gradients).reshape(*gradients.shape[:2], -1)
    left, right = (flat, flat) if first is None else (flat[:first], flat[first:])
    pair = moments(flat.shape[-1])[:2]
    state = ({"w": pair}, *ADAM)
    options = {"trace": over == "trace", "diagonal": over == "diagonal"}
    return oracle.kernel({"w": left}, {"w": right}, kind, adam_state=state, **options)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def check(slice_, sides, gradients):
    wanted = kernel_of(gradients, sides.kind, sides.over, sides.first)
    assert_near(sides.join([slice_]), wanted, 1e-12)


MATRIX = [(kind, "full", "chunked") for kind in oracle.KINDS]
MATRIX += list(itertools.product(["sgd"], AXES, ["paired"]))
MATRIX += [
    ("sgd", "trace", "chunked"),
    ("signgd", "trace", "chunked"),
    ("sgd", "diagonal", "chunked"),
]


@pytest.mark.usefixtures("double", "small_pieces")
@pytest.mark.parametrize(("inputs", "width"), [(7, 5), (5, 11)])
@pytest.mark.parametrize(("kind", "over", "way"), MATRIX)
def test_the_kernel_of_a_matrix(kind: str, over: str, way: str, inputs: int, width: int):
    a, b = numbers(7, 6, inputs), numbers(2, 7, 6, width)
    sides = sides_of(kind, over)
    state = moments(inputs * width) if kind == "adam" else None
    found = jax.jit(lambda a, b: rules.dense(sides, a, b, way, state))(a, b)
    check(found, sides, np.einsum("nti,cnto->ncio", a, b))


@pytest.mark.usefixtures("double", "small_pieces")
@pytest.mark.parametrize("kind", ["sgd", "signgd", "asymmetric_signgd"])
def test_the_kernel_of_a_matrix_with_itself(kind: str):
    a, b = numbers(5, 4, 3), numbers(2, 5, 4, 6)
    sides = sides_of(kind, first=None)
    found = jax.jit(lambda a, b: rules.dense(sides, a, b, "chunked"))(a, b)
    check(found, sides, np.einsum("nti,cnto->ncio", a, b))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("places", [1, 2])
def test_the_last_layer_may_have_one_place(places: int):
    a, b = numbers(7, 6, 5), np.zeros((2, 7, 6, 4))
    for n in range(7):
        b[:, n, n % 5 : n % 5 + places] = numbers(2, places, 4, seed=n)
    sides = sides_of("sgd")
    run = jax.jit(lambda a, b, last: rules.dense(sides, a, b, "paired", None, last))
    for last in (True, False):
        check(run(a, b, last), sides, np.einsum("nti,cnto->ncio", a, b))


TABLE = [(kind, "full", way) for kind in oracle.KINDS for way in ("matches", "chunked")]
TABLE += [("sgd", over, "matches") for over in AXES[1:]]
TABLE += [("adam", over, "matches") for over in AXES[1:]]
VOCAB, WIDTH = 11, 3


def table_gradients(ids, b, head_a=None, head_b=None):
    """[N, C, V, D] by adding up rows."""
    full = np.zeros((len(ids), b.shape[0], VOCAB, WIDTH))
    for n, c, t in itertools.product(range(len(ids)), range(b.shape[0]), range(ids.shape[1])):
        full[n, c, ids[n, t]] += b[c, n, t]
    return full if head_a is None else full + np.einsum("nkd,cnkv->ncvd", head_a, head_b)


@pytest.mark.usefixtures("double", "small_pieces")
@pytest.mark.parametrize(("kind", "over", "way"), TABLE)
def test_the_kernel_of_a_table_that_is_looked_up_and_gives_some_logits(kind, over, way):
    ids = np.random.default_rng(1).integers(0, VOCAB - 3, (7, 6))
    b, tokens = numbers(2, 7, 6, WIDTH), np.array([4, 9, 4])
    head_a, head_b = numbers(7, 2, WIDTH, seed=2), numbers(2, 7, 2, 3, seed=3)
    sides = sides_of(kind, over)
    state = moments(VOCAB * WIDTH) if kind == "adam" else None

    @jax.jit
    def run(b):
        some = tables.restricted(*map(jnp.asarray, (head_a, head_b, tokens)))
        rows = [tables.looked_up(jnp.asarray(ids), b), some]
        return tables.table(sides, (VOCAB, WIDTH), tables.joined(rows), None, way, state)

    wide = np.zeros((2, 7, 2, VOCAB))
    np.add.at(wide, (..., tokens), head_b)
    check(run(b), sides, table_gradients(ids, b, head_a, wide))


@pytest.mark.usefixtures("double", "small_pieces")
@pytest.mark.parametrize(
    ("kind", "over"), [(k, "full") for k in oracle.KINDS] + [("sgd", a) for a in AXES[1:]]
)
def test_the_kernel_of_a_table_that_is_tied_to_the_whole_head(kind: str, over: str):
    ids = np.random.default_rng(1).integers(0, VOCAB - 3, (7, 6))
    b, head_a = numbers(2, 7, 6, WIDTH), numbers(7, 2, WIDTH, seed=2)
    head_b = numbers(2, 7, 2, VOCAB, seed=3)
    state = moments(VOCAB * WIDTH) if kind == "adam" else None
    for first in (FIRST, None):
        sides = sides_of(kind, over, first)

        @jax.jit
        def run(b, sides=sides):
            head = tables.Head(jnp.asarray(head_a), jnp.asarray(head_b).swapaxes(0, 1))
            rows = tables.looked_up(jnp.asarray(ids), b)
            return tables.table(sides, (VOCAB, WIDTH), rows, head, "matches", state)

        check(run(b), sides, table_gradients(ids, b, head_a, head_b))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_the_kernel_of_biases_and_scales(kind: str):
    a, b = numbers(7, 6, 5), numbers(2, 7, 6, 5, seed=1)
    sides, state = sides_of(kind), moments(5) if kind == "adam" else None
    tokens, wide = np.array([3, 1, 3]), np.zeros((2, 7, 6, 5))
    np.add.at(wide, (..., tokens), b[..., :3])

    def run(op, b, rows=None):
        a_, b_, rows = (x if x is None else jnp.asarray(x) for x in (a, b, rows))
        return rules.summed(sides, op, a_, b_, rows, state)

    check(run("bias", b), sides, np.einsum("cnto->nco", b))
    check(run("scale", b), sides, np.einsum("nto,cnto->nco", a, b))
    check(run("bias", b[..., :3], tokens), sides, np.einsum("cnto->nco", wide))


@functools.cache
def jacobian(name: str, tied: bool, classes: int):
    """Of seven examples; of which the first three are x."""
    lm = oracle.model(name, tied=tied)
    return oracle.jacobian(oracle.label_logits(lm, classes), lm.params, oracle.examples(7))


def rows_of(tree, part):
    return jax.tree.map(lambda a: a[part], tree)


def check_model(name, tied, kind, classes, dtype, *, over="full", plan=None, keep=None, tau=1e-12):
    lm, x = oracle.model(name, tied=tied), oracle.examples(7)
    f, params = oracle.label_logits(lm, classes), oracle.of_dtype(lm.params, dtype)
    left, right = slice(None, FIRST), slice(FIRST, None)
    options, known = {}, None
    if kind == "adam":
        first, second = oracle.moments_like(lm.params)
        known = (oracle.by_place(first, second), *ADAM)
        state = (oracle.of_dtype(first, dtype), oracle.of_dtype(second, dtype))
        state = optax.ScaleByAdamState(jnp.asarray(ADAM[0]), *state)
        options = {"adam_state": state, "b1": ADAM[1], "b2": ADAM[2], "eps": ADAM[3]}
    jacobians = jacobian(name, tied, classes)
    jacobians = {place: g for place, g in jacobians.items() if keep is None or keep(place[0])}
    pair = [{place: g[part] for place, g in jacobians.items()} for part in (left, right)]
    axes = {"trace": over == "trace", "diagonal": over == "diagonal"}
    wanted = oracle.kernel(*pair, kind, tau=tau, adam_state=known, **axes)

    @jax.jit
    def run(params, x1, x2):
        return factorized.factorized(
            f, params, x1, x2, kind=kind, plan=plan, select=keep, **WAYS[over], **options
        )

    found = run(params, rows_of(x, left), rows_of(x, right))
    assert found.dtype == dtype
    assert_near(found, wanted, 1e-9 if dtype == jnp.float64 else 1e-5)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("name", "tied", "kind", "classes"),
    [
        ("encoder", True, "sgd", 3),
        ("decoder", False, "signgd", 1),
        ("rotary decoder", True, "adam", 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(oracle.CONFIGS, (True, False), oracle.KINDS, (1, 3))
        ),
    ],
)
def test_kernels_of_models_against_explicit_jacobians(name, tied, kind, classes):
    check_model(name, tied, kind, classes, jnp.float64)


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("over", AXES[1:])
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_axes_of_the_kernels_of_a_model(kind: str, over: str):
    check_model("encoder", True, kind, 3, jnp.float64, over=over)


@pytest.mark.parametrize("kind", ["sgd", pytest.param("adam", marks=pytest.mark.slow)])
def test_kernels_in_float32(kind: str):
    check_model("encoder", True, kind, 3, jnp.float32)


@pytest.mark.usefixtures("double")
def test_selected_parameters_alone():
    check_model("encoder", True, "sgd", 3, jnp.float64, keep=lambda path: "v_proj" in path)


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("way", ["paired", "chunked"])
def test_a_plan_is_followed(way: str, monkeypatch):
    lm, seen = oracle.model("encoder"), []
    f = oracle.label_logits(lm, 3)
    plan = dict.fromkeys(factorized.plan(f, lm.params, oracle.examples(3)), way)
    for name in ("paired_dense", "chunked"):
        real = getattr(rules, name)
        monkeypatch.setattr(rules, name, lambda *a, n=name, r=real: (seen.append(n), r(*a))[1])
    check_model("encoder", True, "sgd", 3, jnp.float64, plan=plan)
    assert ("chunked" in seen) == (way == "chunked")


@pytest.mark.usefixtures("double")
def test_padding_and_other_lengths_change_nothing():
    lm = oracle.model("decoder")
    f, params = oracle.label_logits(lm, 3), oracle.of_dtype(lm.params, jnp.float64)
    x1, x2 = oracle.examples(2), oracle.examples(3, seed=1)
    wider = {name: a if a.ndim == 1 else np.pad(a, [(0, 0), (0, 3)]) for name, a in x2.items()}
    run = jax.jit(functools.partial(factorized.factorized, f, select="attention|embed|lm_head"))
    kernel = run(params, x1, x2)
    assert_near(run(params, x1, wider), np.asarray(kernel), 1e-12)
    exchanged = run(params, x1, rows_of(x2, np.array([2, 0, 0])))
    assert_near(exchanged, np.asarray(kernel)[:, :, [2, 0, 0]], 1e-12)


def arrays(jaxpr):
    """The shape of every array in a trace."""
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars)
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from arrays(inner)


@pytest.mark.parametrize(
    ("kind", "words"), [("sgd", np.array([5, 9])), ("signgd", np.array([5, 9])), ("sgd", None)]
)
def test_no_example_has_an_array_like_the_table(kind: str, words):
    config = ROBERTA_BASE.replace(num_layers=2)
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    lm = LanguageModel(config, params)
    count, length = 16, 32

    def f(params, x, *, tap=None):
        where = {"positions": x["positions"], "token_ids": words, "tap": tap}
        logits = lm.apply(params, x["input_ids"], x["attention_mask"], **where)
        return jax.nn.log_softmax(logits)[:, :2]

    ids = jax.ShapeDtypeStruct((count, length), jnp.int32)
    x = {"input_ids": ids, "attention_mask": ids}
    x["positions"] = jax.ShapeDtypeStruct((count,), jnp.int32)
    trace = jax.make_jaxpr(functools.partial(factorized.factorized, f, kind=kind))(params, x, x)
    largest = max(arrays(trace.jaxpr), key=math.prod)
    table = config.vocab_size * config.hidden_size
    assert math.prod(largest) <= 1.5 * table, largest
    assert not any(
        config.vocab_size in shape and math.prod(shape) > table for shape in arrays(trace.jaxpr)
    )


def linear(params, x, *, tap=None):
    return taps.apply(tap, "w", "dense", x, x @ params["w"], None)


def test_what_has_no_factors_is_named():
    params = {"w": jnp.ones((2, 1)), "c": jnp.ones(())}
    x = jnp.eye(2)

    def without(params, x, *, tap=None):
        return linear(params, x, tap=tap) * params["c"]

    def twice(params, x, *, tap=None):
        return linear(params, x, tap=tap) * linear(params, x, tap=tap)

    assert factorized.obstacle(linear, params, x, None) is None  # c is not used at all
    assert factorized.obstacle(without, params, x, "w") is None
    for f, select, message in (
        (without, None, "c passes no tap in f, so its gradient has no factors"),
        (twice, "w", "w is used more than once in f"),
        (lambda params, x: x @ params["w"], "w", "f has no keyword tap"),
    ):
        assert (factorized.obstacle(f, params, x, select) or "").startswith(message)
        with pytest.raises(UserError, match=message):
            factorized.factorized(f, params, x, select=select)


def test_the_cheaper_way_is_planned():
    many = ((1000, 1000), (1, 1))
    assert cost.dense(*many, 8, 768, 768) == "paired"
    assert cost.dense(*many, 128, 768, 768) == "chunked"
    assert cost.table(*many, 32, 50265, 768) == "matches"
    assert cost.table(*many, 128, 514, 768) == "chunked"
    lm = oracle.model("encoder")
    plan = factorized.plan(oracle.label_logits(lm, 1), lm.params, oracle.examples(3))
    assert plan["embed.tokens.embedding", "head"] == "paired"
    assert ("layers.mlp.up_proj.kernel", "dense") in plan
    assert all(op in ("dense", "embed", "head") for _, op in plan)


def test_ids_that_are_no_rows_of_the_table_are_refused():
    lm = oracle.model("decoder")
    f, params = oracle.label_logits(lm, 2), oracle.of_dtype(lm.params, jnp.float32)
    good = oracle.examples(3)
    for wrong in (-1, oracle.BASE["vocab_size"]):
        bad = {**good, "input_ids": good["input_ids"].copy()}
        bad["input_ids"][1, 2] = wrong
        for method in ("auto", "jacobian"):
            sentence = rf"x2: ids of embed.tokens.* \(got {wrong} in example 1\)"
            with pytest.raises(UserError, match=sentence):
                kernels.ntk(f, params, good, bad, method=method)
        # Where nothing can be looked at, the methods agree on the row that the look-up takes.
        first, second = (
            jax.jit(functools.partial(kernels.ntk, f, method=method))(params, bad, good)
            for method in ("factorized", "jacobian")
        )
        np.testing.assert_allclose(first, second, atol=1e-4 * np.abs(second).max())
