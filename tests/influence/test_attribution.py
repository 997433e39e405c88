"""Attributions next to their equations, written out, and to a linear model that is refitted."""

from collections import Counter
from math import hypot, log, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from jaxlm import influence
from jaxlm.core.errors import UserError
from jaxlm.influence import GradientStore, StoreSpec

E, N, M, R = 2, 11, 5, 4
RNG = np.random.default_rng(0)
TRAIN = RNG.standard_normal((E, N, R))
TARGETS = RNG.standard_normal((E, M, R))
RESIDUALS = RNG.uniform(size=(E, N))
WEIGHTS = np.array([0.7, 0.2])
RAGGED = np.array([1, 0, 1, 2, 1])
MEANS = np.stack([TARGETS[:, s == RAGGED].mean(axis=1) for s in range(3)], axis=1)


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def refused(call, text: str) -> None:
    with pytest.raises(UserError) as found:
        call()
    assert text in str(found.value)


def test_inner_products():
    each = np.einsum("enr,esr->ens", TRAIN, MEANS)
    found = influence.tracin(TRAIN, TARGETS, WEIGHTS, RAGGED)
    np.testing.assert_allclose(found, np.einsum("e,ens->ns", WEIGHTS, each), rtol=1e-12, atol=1e-14)
    found = influence.grad_dot(TRAIN, TARGETS, RAGGED)
    np.testing.assert_allclose(found, each.mean(axis=0), rtol=1e-12, atol=1e-14)
    whole = influence.grad_dot(TRAIN, TARGETS)
    np.testing.assert_allclose(whole, influence.grad_dot(TRAIN, TARGETS, np.arange(M)).mean(axis=1))


def test_a_step_on_an_example_lowers_the_target_by_its_inner_product():
    """Of a least-squares model, to first order in the learning rate."""
    params, rate = jnp.array([0.3, -0.2, 0.5, 0.1]), 1e-6
    x, y = RNG.standard_normal((N, R)), RNG.standard_normal(N)
    z, t = RNG.standard_normal((M, R)), RNG.standard_normal(M)

    def loss(params, x, y):
        return (x @ params - y) ** 2

    gradients = jax.vmap(jax.grad(loss), (None, 0, 0))
    g = gradients(params, x, y)
    found = influence.tracin(g[None], gradients(params, z, t)[None], [rate], np.arange(M))
    before = loss(params, z, t)
    moved = np.stack([before - loss(params - rate * g[n], z, t) for n in range(N)])
    np.testing.assert_allclose(found, moved, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("ridge", [0, 0.5])
def test_trak_is_its_equation(ridge):
    found = influence.trak(TRAIN, TARGETS, RESIDUALS, RAGGED, ridge=ridge)
    wanted = np.zeros((N, 3))
    for e in range(E):
        inverse = np.linalg.inv(TRAIN[e].T @ TRAIN[e] + ridge * np.eye(R))
        wanted += TRAIN[e] @ inverse @ MEANS[e].T / E
    np.testing.assert_allclose(found, wanted * RESIDUALS.mean(0)[:, None], rtol=1e-10)
    found = influence.trak(TRAIN, TARGETS, RESIDUALS, ridge=ridge)
    assert found.shape == (N,)


def test_trak_of_a_linear_model_is_what_refitting_without_each_example_changes():
    """Least squares: f(all) - f(all but n) is τ times the residual over 1 - leverage."""
    x, y, z = RNG.standard_normal((N, R)), RNG.standard_normal(N), RNG.standard_normal((M, R))
    theta = np.linalg.lstsq(x, y)[0]
    ones = np.ones((1, N))
    tau = influence.trak(x[None], z[None], ones, np.arange(M))
    leverage = np.diag(influence.trak(x[None], x[None], ones, np.arange(N)))
    change = tau * ((y - x @ theta) / (1 - leverage))[:, None]

    def refitted(mask):
        return z @ np.linalg.lstsq(x[mask], y[mask])[0]

    np.testing.assert_allclose(influence.leave_one_out(refitted, N), change, rtol=1e-8, atol=1e-10)


def test_singular_trak_is_refused():
    wide = RNG.standard_normal((1, 3, 4))
    refused(lambda: influence.trak(wide, wide, np.ones((1, 3))), "is singular; give a ridge, or")
    twice = np.concatenate([TRAIN, TRAIN[..., :1]], axis=-1)
    refused(lambda: influence.trak(twice, twice, RESIDUALS), "is singular; give a ridge, or rows")
    assert influence.trak(twice, twice, RESIDUALS, ridge=0.1).shape == (N,)


@pytest.mark.parametrize(
    ("residuals", "ridge", "text"),
    [
        (
            RESIDUALS[:1],
            0,
            "residuals have shape (1, 11); give [models, training examples], (2, 11)",
        ),
        (-RESIDUALS, 0, "residuals are not in [0, 1]; give 1 - p"),
        (RESIDUALS * np.nan, 0, "residuals are not in [0, 1]; give 1 - p"),
        (RESIDUALS, -1, "ridge is -1; give 0 or more"),
    ],
)
def test_bad_trak(residuals, ridge, text):
    refused(lambda: influence.trak(TRAIN, TRAIN, residuals, ridge=ridge), text)


def test_lengths_of_gradients():
    rows = TRAIN * 10.0 ** np.linspace(-200, 200, N)[:, None]
    rows[:, 3] = 0
    wanted = [np.mean([hypot(*row) for row in rows[:, n]]) for n in range(N)]
    np.testing.assert_allclose(influence.grand(rows), wanted, rtol=1e-12)


def test_lengths_of_errors():
    logits, labels = RNG.standard_normal((E, N, 3)), RNG.integers(0, 3, N)
    errors = softmax(logits, axis=-1) - np.eye(3)[labels]
    wanted = np.sqrt((errors**2).sum(axis=-1))
    np.testing.assert_allclose(influence.el2n(logits, labels), wanted.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(influence.el2n(logits[1], labels), wanted[1], rtol=1e-10)
    sure = np.array([[100.0, 0.0], [100.0, 0.0]])
    np.testing.assert_allclose(influence.el2n(sure, np.array([0, 1])), [0, sqrt(2)], atol=1e-12)
    refused(lambda: influence.el2n(sure, np.array([0, 2])), "labels are 0 to 2, with 2 logits")


def test_representations():
    found = influence.representation_similarity(TRAIN[0], TARGETS[0], RAGGED, over="max")
    np.testing.assert_array_equal(
        found, influence.score(TRAIN[:1], TARGETS[:1], None, RAGGED, over="max")
    )
    cosine = MEANS[0] / np.linalg.norm(MEANS[0], axis=1, keepdims=True)
    rows = TRAIN[0] / np.linalg.norm(TRAIN[0], axis=1, keepdims=True)
    np.testing.assert_allclose(found, (rows @ cosine.T).max(axis=1), rtol=1e-10)


def test_pooling():
    hidden = RNG.standard_normal((3, 5, 2))
    mask = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1]])
    for n, places in enumerate(([0, 1, 2], [2, 3, 4], [0, 2, 4])):
        mine = hidden[n, places]
        for how, wanted in {
            "last": mine[2],
            "mean": mine.mean(axis=0),
            "position": (mine[0] + 2 * mine[1] + 3 * mine[2]) / 6,
        }.items():
            np.testing.assert_allclose(influence.pool(hidden, mask, how)[n], wanted, rtol=1e-12)
    refused(lambda: influence.pool(hidden, mask, "first"), "how='first' is not known; give last")


def test_random_scores_depend_on_the_key_alone():
    one, two = (influence.random_scores(jax.random.key(seed), 1000) for seed in range(2))
    np.testing.assert_array_equal(one, influence.random_scores(jax.random.key(0), 1000))
    assert abs(np.corrcoef(one, two)[0, 1]) < 4.5 / sqrt(1000)


def test_stores_are_read_like_arrays(tmp_path):
    rows = TRAIN.astype(np.float32)
    made = []
    for e in range(E):
        spec = StoreSpec(dim=R, checkpoint=e, weight=float(WEIGHTS[e]))
        with GradientStore.create(tmp_path / str(e), spec, shard_rows=2) as writer:
            writer.append(rows[e], range(N))
            writer.commit()
        made.append(GradientStore.open(tmp_path / str(e)))
    targets = TARGETS.astype(np.float32)
    for of_stores, of_arrays in (
        (influence.tracin(made, targets), influence.tracin(rows, targets, WEIGHTS)),
        (influence.grad_dot(made, targets), influence.grad_dot(rows, targets)),
        (influence.trak(made, targets, RESIDUALS), influence.trak(rows, targets, RESIDUALS)),
        (influence.grand(made), influence.grand(rows)),
        (
            influence.representation_similarity(made[0], targets[0]),
            influence.representation_similarity(rows[0], targets[0]),
        ),
    ):
        np.testing.assert_array_equal(of_stores, of_arrays)


# --- BM25

DOCUMENTS = ["a b c", "a a d", "b", "a e f g h a b", ""]
QUERIES = ["b d d z", "a", "h c"]


def by_definition(documents, query, k1, b):
    average = sum(map(len, documents)) / len(documents)
    found = []
    for document in documents:
        counts, total = Counter(document), 0.0
        for word in filter(counts.get, query):
            having = sum(word in other for other in documents)
            rarity = log(1 + (len(documents) - having + 0.5) / (having + 0.5))
            length = 1 - b + b * len(document) / average
            total += rarity * (k1 + 1) * counts[word] / (counts[word] + k1 * length)
        found.append(total)
    return np.array(found)


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.9, 0.0), (2, 1)])
def test_bm25_is_its_equation(k1, b):
    documents, queries = ([text.split() for text in texts] for texts in (DOCUMENTS, QUERIES))
    each = np.stack([by_definition(documents, query, k1, b) for query in queries], axis=1)
    found = influence.bm25(documents, queries, np.arange(3), k1=k1, b=b)
    np.testing.assert_allclose(found, each, rtol=1e-12)
    found = influence.bm25(documents, queries, np.array([1, 0, 1]), k1=k1, b=b)
    wanted = np.stack([each[:, 1], each[:, [0, 2]].mean(axis=1)], axis=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    over = influence.bm25(documents, queries, np.array([1, 0, 1]), k1=k1, b=b, over="max")
    np.testing.assert_allclose(over, wanted.max(axis=1), rtol=1e-12)
    np.testing.assert_allclose(influence.bm25(documents, queries, k1=k1, b=b), each.mean(axis=1))


def test_bm25_by_hand():
    """Both documents have length 1: log(1 + 1.5 / 1.5) times 2.2 / 2.2."""
    np.testing.assert_allclose(influence.bm25([[7], [8]], [[8]]), [0, log(2)], rtol=1e-12)


def test_bm25_of_nothing():
    np.testing.assert_array_equal(influence.bm25([[], []], [["a"]]), [0, 0])
    refused(lambda: influence.bm25([], [["a"]]), "there are no training examples or no targets")
    refused(lambda: influence.bm25([["a"]], []), "there are no training examples or no targets")
    refused(lambda: influence.bm25([["a"]], [["a"]], over="min"), "over='min' is not known")
    refused(lambda: influence.bm25([["a"]], [["a"]], b=2), "k1=1.2 and b=2 are impossible; give")


def test_trak_of_rows_in_float64_has_their_digits():
    """Directions of 1e-5 beside 1, which float32 could not tell from none."""
    rows = np.diag([1.0, 1e-5])[None]
    found = influence.trak(rows, rows, np.ones((1, 2)), np.arange(2))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, np.eye(2), atol=1e-12)
    refused(
        lambda: influence.trak(rows.astype(np.float32), rows, np.ones((1, 2))), "is singular; give"
    )


def test_what_is_not_finite_is_named():
    broken = TRAIN.copy()
    broken[1, 4, 0] = np.nan
    for call in (
        lambda: influence.trak(broken, TARGETS, RESIDUALS),
        lambda: influence.tracin(broken, TARGETS, [1.0, 1.0]),
        lambda: influence.grad_dot(broken, TARGETS),
        lambda: influence.grand(broken),
    ):
        refused(call, "row 4 of train gives no finite number")
    refused(lambda: influence.tracin(TRAIN, broken, [1.0, 1.0]), "row 4 of targets gives no finite")
    residuals = RESIDUALS.copy()
    residuals[1, 3] = np.nan
    refused(lambda: influence.trak(TRAIN, TARGETS, residuals), "(got nan of example 3 in model 1)")
