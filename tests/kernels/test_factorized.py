"""Kernels of single parameters against explicit gradients; no table of gradients exists."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.shapes import ROBERTA_BASE
from jaxlm import kernels
from jaxlm.core import taps
from jaxlm.core.errors import UserError
from jaxlm.kernels import cost, factorized, kinds, leaf_kernels
from jaxlm.kernels.leaf_kernels import Pairing
from jaxlm.models import LanguageModel, init_params
from tests.helpers.slow import slow
from tests.kernels import oracle
from tests.kernels.test_common import assert_close

AXES = ("full", "trace", "diagonal")
FIRST = 3


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_pieces(monkeypatch):
    """Every loop over pieces and blocks takes several turns, the last not full."""
    monkeypatch.setattr(cost, "MAX_CHUNK_ENTRIES", 2 * FIRST * 15)
    monkeypatch.setattr(cost, "MAX_TABLE_ENTRIES", 2 * FIRST * 30)
    monkeypatch.setattr(cost, "MAX_PAIR_ENTRIES", 500)


def pairing_of(kind, over="full", first: int | None = FIRST):
    values = (kinds.SGD(), kinds.SignGD(1e-12), kinds.AsymmetricSignGD(1e-12))
    by_name = {value.name: value for value in (*values, kinds.Adam(None, *oracle.ADAM[1:]))}
    return Pairing(by_name[kind], over, first)


def moments(size: int):
    rng = np.random.default_rng(9)
    first, second = rng.standard_normal(size), np.square(rng.standard_normal(size))
    return kinds.Moments(jnp.asarray(first), jnp.asarray(second), jnp.asarray(oracle.ADAM[0]))


def kernel_of(gradients, kind, over, first: int | None = FIRST):
    """The oracle's kernel of one leaf, [N, C, ...] gradients of all examples."""
    flat = np.asarray(gradients).reshape(*gradients.shape[:2], -1)
    left, right = (flat, flat) if first is None else (flat[:first], flat[first:])
    pair = moments(flat.shape[-1])[:2]
    state = ({"w": pair}, *oracle.ADAM)
    options = {"trace": over == "trace", "diagonal": over == "diagonal"}
    return oracle.kernel({"w": left}, {"w": right}, kind, adam_state=state, **options)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def check(leaf, pairing, gradients):
    wanted = kernel_of(gradients, pairing.kind.name, pairing.over, pairing.first)
    assert_close(pairing.join([leaf]), wanted, 1e-12)


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
    pairing = pairing_of(kind, over)
    state = moments(inputs * width) if kind == "adam" else None
    found = jax.jit(lambda a, b: leaf_kernels.dense(pairing, a, b, way, state))(a, b)
    check(found, pairing, np.einsum("nti,cnto->ncio", a, b))


@pytest.mark.usefixtures("double", "small_pieces")
@pytest.mark.parametrize("kind", ["sgd", "signgd", "asymmetric_signgd"])
def test_the_kernel_of_a_matrix_with_itself(kind: str):
    a, b = numbers(5, 4, 3), numbers(2, 5, 4, 6)
    pairing = pairing_of(kind, first=None)
    found = jax.jit(lambda a, b: leaf_kernels.dense(pairing, a, b, "chunked"))(a, b)
    check(found, pairing, np.einsum("nti,cnto->ncio", a, b))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("places", [1, 2])
def test_the_last_layer_may_have_one_place(places: int):
    a, b = numbers(7, 6, 5), np.zeros((2, 7, 6, 4))
    for n in range(7):
        b[:, n, n % 5 : n % 5 + places] = numbers(2, places, 4, seed=n)
    pairing = pairing_of("sgd")
    run = jax.jit(lambda a, b, last: leaf_kernels.dense(pairing, a, b, "paired", None, last))
    for last in (True, False):
        check(run(a, b, last), pairing, np.einsum("nti,cnto->ncio", a, b))


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
    pairing = pairing_of(kind, over)
    state = moments(VOCAB * WIDTH) if kind == "adam" else None

    @jax.jit
    def run(b):
        some = leaf_kernels.head_rows(*map(jnp.asarray, (head_a, head_b, tokens)))
        rows = [leaf_kernels.lookup_rows(jnp.asarray(ids), b), some]
        return leaf_kernels.table(pairing, (VOCAB, WIDTH), rows, None, way, state)

    wide = np.zeros((2, 7, 2, VOCAB))
    np.add.at(wide, (..., tokens), head_b)
    check(run(b), pairing, table_gradients(ids, b, head_a, wide))


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
        pairing = pairing_of(kind, over, first)

        @jax.jit
        def run(b, pairing=pairing):
            head = leaf_kernels.Head(jnp.asarray(head_a), jnp.asarray(head_b).swapaxes(0, 1))
            rows = leaf_kernels.lookup_rows(jnp.asarray(ids), b)
            return leaf_kernels.table(pairing, (VOCAB, WIDTH), [rows], head, "matches", state)

        check(run(b), pairing, table_gradients(ids, b, head_a, head_b))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_the_kernel_of_biases_and_scales(kind: str):
    a, b = numbers(7, 6, 5), numbers(2, 7, 6, 5, seed=1)
    pairing, state = pairing_of(kind), moments(5) if kind == "adam" else None
    tokens, wide = np.array([3, 1, 3]), np.zeros((2, 7, 6, 5))
    np.add.at(wide, (..., tokens), b[..., :3])

    @functools.partial(jax.jit, static_argnums=0)
    def run(op, b, rows=None):
        return leaf_kernels.summed(pairing, op, jnp.asarray(a), b, rows, state)

    check(run("bias", b), pairing, np.einsum("cnto->nco", b))
    check(run("scale", b), pairing, np.einsum("nto,cnto->nco", a, b))
    check(run("bias", b[..., :3], tokens), pairing, np.einsum("cnto->nco", wide))


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
    ("kind", "words"),
    [slow("sgd", np.array([5, 9])), ("signgd", np.array([5, 9])), ("sgd", None)],
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
    run = functools.partial(kernels.ntk, f, kind=kind, method="factorized")
    trace = jax.make_jaxpr(run)(params, x, x)
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
        (without, None, "f: c passes no tap"),
        (twice, "w", "f: w is used more than once"),
        (lambda params, x: x @ params["w"], "w", "f: it has no keyword tap"),
    ):
        assert (factorized.obstacle(f, params, x, select) or "").startswith(message)
        with pytest.raises(UserError, match=message):
            kernels.ntk(f, params, x, select=select, method="factorized")


def test_the_cheaper_contraction_is_chosen():
    many = ((1000, 1000), (1, 1))
    assert cost.dense(*many, 8, 768, 768) == "paired"
    assert cost.dense(*many, 128, 768, 768) == "chunked"
    assert cost.table(*many, 32, 50265, 768) == "matches"
    assert cost.table(*many, 128, 514, 768) == "chunked"


def test_matrices_and_tables_ask_the_cost_model(monkeypatch):
    (f, params), asked, choose = oracle.toy(1), set(), cost.choose
    monkeypatch.setattr(cost, "choose", lambda op, *a: (asked.add(op), choose(op, *a))[1])
    run = functools.partial(kernels.ntk, f, method="factorized")
    jax.eval_shape(run, params, oracle.toy_examples(3))
    assert asked == {"dense", "embed"}


def test_ids_that_are_no_rows_of_the_table_are_refused():
    f, params = oracle.toy(2)
    params, good = oracle.of_dtype(params, jnp.float32), oracle.toy_examples(3)
    runs = [
        jax.jit(functools.partial(kernels.ntk, f, method=method))
        for method in ("factorized", "jacobian")
    ]
    for wrong in (-1, 7):
        bad = {**good, "ids": good["ids"].copy()}
        bad["ids"][1, 1] = wrong
        for method in ("auto", "jacobian"):
            sentence = rf"x2: ids of embed.table.* \(got {wrong} in example 1\)"
            with pytest.raises(UserError, match=sentence):
                kernels.ntk(f, params, good, bad, method=method)
        # Where nothing can be looked at, the methods agree on the row that the look-up takes.
        first, second = (run(params, bad, good) for run in runs)
        np.testing.assert_allclose(first, second, atol=1e-4 * np.abs(second).max())
