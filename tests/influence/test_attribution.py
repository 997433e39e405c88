"""One battery for all methods of attribution, then what is special about each."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from math import hypot, log, sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics.pairwise import cosine_similarity

from jaxlm import influence
from jaxlm.influence import GradientStore, StoreSpec, products, score, select
from tests.helpers.sentences import refused

E, N, M, R = 2, 11, 5, 4
RNG = np.random.default_rng(0)
TRAIN = RNG.standard_normal((E, N, R))
TARGETS = RNG.standard_normal((E, M, R))
RESIDUALS = RNG.uniform(size=(E, N))
WEIGHTS = np.array([0.7, 0.2])
RAGGED = np.array([1, 0, 1, 2, 1])  # subtasks of 1, 3 and 1 targets


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@dataclasses.dataclass(frozen=True)
class Method:
    """A method as `scores(train, targets, subtask)`, and its equation for one checkpoint.

    `equation(e, train [N, R], targets [m, R]) -> [N]` takes the targets of one subtask; its values
    are added over checkpoints.
    """

    scores: Callable[..., Any]
    equation: Callable[..., np.ndarray]
    factor: Any = 1.0
    """By which the sum of each example is multiplied."""


def ridge(e, train, targets):
    gram = train.T @ train + 0.5 * np.eye(R)
    return train @ np.linalg.inv(gram) @ targets.mean(0) / E


METHODS = {
    "cosine_of_mean": Method(
        lambda train, targets, subtask: score(train, targets, WEIGHTS, subtask),
        lambda e, a, b: WEIGHTS[e] * cosine_similarity(a, b.mean(0)[None])[:, 0],
    ),
    "mean_of_cosines": Method(
        lambda train, targets, subtask: score(train, targets, WEIGHTS, subtask, "mean_of_cosines"),
        lambda e, a, b: WEIGHTS[e] * cosine_similarity(a, b).mean(1),
    ),
    "grad_dot": Method(
        lambda train, targets, subtask: influence.grad_dot(train, targets, subtask),
        lambda e, a, b: (a @ b.T).mean(1) / E,
    ),
    "tracin": Method(
        lambda train, targets, subtask: influence.tracin(train, targets, WEIGHTS, subtask),
        lambda e, a, b: WEIGHTS[e] * (a @ b.T).mean(1),
    ),
    "trak": Method(
        lambda train, targets, subtask: influence.trak(
            train, targets, RESIDUALS, subtask, ridge=0.5
        ),
        ridge,
        RESIDUALS.mean(0),
    ),
    "grand": Method(
        lambda train, targets, subtask: np.stack(
            [influence.grand(train)] * (1 if subtask is None else int(max(subtask)) + 1), axis=-1
        )[:, 0 if subtask is None else slice(None)],
        lambda e, a, b: np.array([hypot(*row) for row in a]) / E,
    ),
}
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def by_equation(method, train, targets, groups):
    columns = [
        sum(method.equation(e, train[e], targets[e][groups == s]) for e in range(E))
        for s in range(groups.max() + 1)
    ]
    return np.stack(columns, axis=1) * np.reshape(method.factor, (-1, 1))


def stores(folder, rows, name="train", ids=None, **changes):
    """A store for every checkpoint."""
    made = []
    for e, checkpoint in enumerate(rows):
        spec = StoreSpec(
            dim=rows.shape[-1],
            projection="srht, seed 0",
            gradient="adam" if name == "train" else "sgd",
            model=str(e),
            data=name,
            checkpoint=100 * (e + 1),
            weight=float(WEIGHTS[e]),
        )
        spec = dataclasses.replace(spec, **changes)
        with GradientStore.create(folder / f"{name}{e}", spec, shard_rows=4) as writer:
            writer.append(checkpoint, ids or list(range(len(checkpoint))))
            writer.commit()
        made.append(GradientStore.open(folder / f"{name}{e}"))
    return made


# --- every method


@EVERY
@pytest.mark.parametrize("groups", [None, RAGGED])
def test_every_method_is_its_equation(method, groups):
    found = method.scores(TRAIN, TARGETS, groups)
    wanted = by_equation(method, TRAIN, TARGETS, np.zeros(M, int) if groups is None else groups)
    assert found.dtype == np.float64
    wanted = wanted[:, 0] if groups is None else wanted
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-14)


@EVERY
def test_every_method_reads_stores_and_lists_like_arrays_bit_for_bit(method, tmp_path):
    train, targets = TRAIN.astype(np.float32), TARGETS.astype(np.float32)
    wanted = method.scores(train, targets, RAGGED)
    assert wanted.dtype == np.float32
    made = stores(tmp_path, train), stores(tmp_path, targets, "targets")
    np.testing.assert_array_equal(method.scores(*made, RAGGED), wanted)
    np.testing.assert_array_equal(method.scores(made[0], targets, RAGGED), wanted)
    np.testing.assert_array_equal(method.scores(list(train), jnp.asarray(targets), RAGGED), wanted)


@EVERY
def test_no_method_reads_more_than_a_block(method, tmp_path, monkeypatch):
    train = TRAIN.astype(np.float32)
    wanted = method.scores(train, TARGETS, RAGGED)
    made = stores(tmp_path, train)
    monkeypatch.setattr(products, "BLOCK_BYTES", 2 * 4 * R)
    largest = [0]
    read = GradientStore.__getitem__

    def counted(self, index):
        found = read(self, index)
        largest[0] = max(largest[0], len(found))
        return found

    monkeypatch.setattr(GradientStore, "__getitem__", counted)
    found = method.scores(made, TARGETS, RAGGED)
    assert largest[0] == 2
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@EVERY
def test_every_method_names_rows_that_are_not_finite(method):
    for value in (np.nan, np.inf):
        broken = TRAIN.copy()
        broken[1, 4, 0] = value
        with refused("train", "row 4"):
            method.scores(broken, TARGETS, RAGGED)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "grand"])
def test_every_method_names_what_does_not_fit(name):
    scores = METHODS[name].scores
    broken = TARGETS.copy()
    broken[1, 3, 0] = np.nan
    for key, part, train, targets, subtask in (
        ("targets", "row 3", TRAIN, broken, RAGGED),
        ("targets", "(got 3)", TRAIN, TARGETS[..., :3], RAGGED),
        ("targets", "2 checkpoints of train (got 1)", TRAIN, TARGETS[:1], RAGGED),
        ("targets", "no rows", TRAIN, TARGETS[:, :0], RAGGED),
        ("train", "(got (4,))", TRAIN[0, 0], TARGETS, RAGGED),
        ("train", "(got (11, 4) and (4, 4))", [TRAIN[0], TRAIN[1, :4]], TARGETS, RAGGED),
        ("subtask", "(got int64 (4,))", TRAIN, TARGETS, RAGGED[:4]),
        ("subtask", "(got float64 (5,))", TRAIN, TARGETS, RAGGED * 1.0),
        ("subtask", "has -1", TRAIN, TARGETS, RAGGED - 1),
        ("subtask", "no target for 0", TRAIN, TARGETS, np.where(RAGGED == 0, 1, RAGGED)),
    ):
        with refused(key, part):
            scores(train, targets, subtask)


# --- cosines


BOTH = pytest.mark.parametrize("aggregate", ["cosine_of_mean", "mean_of_cosines"])


def test_what_the_authors_code_computes():
    """Subtasks of equal size in order: normalize, multiply, reshape, mean, max."""
    targets = RNG.standard_normal((E, 6, R))
    w = WEIGHTS / np.sum(WEIGHTS)
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (TRAIN, targets)]
    wanted = np.einsum("e,enr,emr->nm", w, *unit).reshape(N, 3, 2).mean(-1).max(-1)
    found = score(TRAIN, targets, w, np.repeat(np.arange(3), 2), "mean_of_cosines", over="max")
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_over_subtasks():
    each = score(TRAIN, TARGETS, WEIGHTS, RAGGED)
    for over in ("max", "mean"):
        found = score(TRAIN, TARGETS, WEIGHTS, RAGGED, over=over)
        np.testing.assert_allclose(found, getattr(each, over)(axis=1), rtol=1e-10)


def test_weights_are_not_normalized():
    once, small = (score(TRAIN, TARGETS, w) for w in (WEIGHTS, WEIGHTS * 1e-5))
    np.testing.assert_allclose(small, once * 1e-5, rtol=1e-10)


@BOTH
def test_the_length_of_a_training_row_does_not_count(aggregate):
    scales = 10.0 ** np.linspace(-30, 30, N).astype(np.float32)[:, None]
    train, targets = TRAIN.astype(np.float32), TARGETS.astype(np.float32)
    found = score(train * scales, targets, WEIGHTS, RAGGED, aggregate)
    np.testing.assert_allclose(found, score(train, targets, WEIGHTS, RAGGED, aggregate), atol=1e-6)


def test_a_training_row_of_zeros_scores_zero():
    train = TRAIN.copy()
    train[:, 3] = 0
    found = score(train, TARGETS, WEIGHTS, RAGGED)
    assert (found[3] == 0).all()
    rest = np.delete(np.arange(N), 3)
    np.testing.assert_allclose(found[rest], score(TRAIN, TARGETS, WEIGHTS, RAGGED)[rest])


@BOTH
def test_rows_of_one_checkpoint_need_no_axis_and_no_weight(aggregate):
    wanted = score(TRAIN[:1], TARGETS[:1], [0.5], RAGGED, aggregate)
    found = score(TRAIN[0], jnp.asarray(TARGETS[0]), [0.5], RAGGED, aggregate)
    np.testing.assert_array_equal(found, wanted)
    found = score(TRAIN[0], TARGETS[0], None, RAGGED, aggregate)
    np.testing.assert_allclose(found, 2 * wanted)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("weights", {"weights": [1.0]}),
        ("weights", {"weights": [1.0, -1.0]}),
        ("weights", {"weights": [0.0, 0.0]}),
        ("weights", {"weights": None}),
        ("aggregate", {"aggregate": "mean"}),
        ("over", {"over": "min"}),
        ("targets", {"targets": TARGETS * (RAGGED != 2)[:, None]}),
        ("targets", {"targets": TARGETS * (RAGGED != 2)[:, None], "aggregate": "mean_of_cosines"}),
    ],
)
def test_bad_scores(key, change):
    given = {"train": TRAIN, "targets": TARGETS, "weights": WEIGHTS, "subtask": RAGGED} | change
    with refused(key):
        score(**given)


# --- stores


def test_weights_are_those_of_the_stores(tmp_path):
    train, targets = stores(tmp_path, TRAIN), stores(tmp_path, TARGETS, "targets")
    for method in (score, influence.tracin):
        np.testing.assert_array_equal(method(train, targets), method(train, targets, WEIGHTS))
        assert (method(train, targets, [1.0, 1.0]) != method(train, targets)).any()
    found = score(train[0], targets[0])  # one store is one checkpoint
    np.testing.assert_array_equal(found, score(train[:1], targets[:1]))


def test_quantized_rows_select_what_the_rows_select(tmp_path):
    """512 numbers a row. A cosine by signs has 2/pi of the slope and is off by 1/sqrt(512)."""
    rng = np.random.default_rng(1)
    target = rng.standard_normal((1, 1, 512)).astype(np.float32)
    slopes = np.linspace(-1, 1, 200)[:, None]
    rows = (slopes * target[0] + rng.standard_normal((200, 512))).astype(np.float32)
    wanted = score(rows[None], target)
    for dtype, allowed in {"float16": 1e-4, "int8": 2e-3, "1bit": 0.15}.items():
        (store,) = stores(tmp_path / dtype, rows[None], dtype=dtype)
        found = score(store, target, [1.0])
        np.testing.assert_allclose(found, score(store[:], target[0]), rtol=1e-6, atol=1e-7)
        scale = np.sqrt(2 / np.pi) if dtype == "1bit" else 1
        np.testing.assert_allclose(found, scale * wanted, atol=allowed)
        best = [set(select(values, count=20).tolist()) for values in (found, wanted)]
        assert len(best[0] & best[1]) >= (15 if dtype == "1bit" else 19)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("projection", "none"),
        ("parameters", "lora"),
        ("model", "9"),
        ("checkpoint", 150),
        ("weight", 0.3),
    ],
)
def test_train_and_targets_of_other_checkpoints_are_refused(tmp_path, field, value):
    train = stores(tmp_path, TRAIN[:1])
    targets = stores(tmp_path, TARGETS[:1], "targets", **{field: value})
    with refused(field, f"{tmp_path}/train0 and {tmp_path}/targets0 differ"):
        score(train, targets)


def test_train_and_targets_may_differ_in_data_gradient_and_encoding(tmp_path):
    score(stores(tmp_path, TRAIN, dtype="int8"), stores(tmp_path, TARGETS, "targets"))


@pytest.mark.parametrize(
    ("field", "value"), [("data", "x"), ("gradient", "sgd"), ("dtype", "int8"), ("projection", "")]
)
def test_checkpoints_of_other_rows_are_refused(tmp_path, field, value):
    first, second = stores(tmp_path, TRAIN)[0], stores(tmp_path / "b", TRAIN, **{field: value})[1]
    with refused(field, f"{tmp_path}/train0 and {tmp_path}/b/train1 differ"):
        score([first, second], TARGETS)


def test_checkpoints_of_other_examples_are_refused(tmp_path):
    train = [stores(tmp_path, TRAIN)[0]]
    ids = [0, 1, 2, 4, 3, *range(5, N)]
    with refused("ids", "row 3", "(got 3 and 4)"):
        score([*train, stores(tmp_path / "b", TRAIN, ids=ids)[1]], TARGETS)
    with refused("train", "mixes"):
        score([*train, TRAIN[1]], TARGETS)


# --- inner products and linear models


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
    few = RNG.standard_normal((1, 3, 4))
    with refused("ridge", "(4, 4), is singular"):
        influence.trak(few, few, np.ones((1, 3)))
    twice = np.concatenate([TRAIN, TRAIN[..., :1]], axis=-1)
    with refused("ridge", "is singular"):
        influence.trak(twice, twice, RESIDUALS)
    assert influence.trak(twice, twice, RESIDUALS, ridge=0.1).shape == (N,)


def test_trak_of_rows_in_float64_has_their_digits():
    """Directions of 1e-5 beside 1, which float32 could not tell from none."""
    rows = np.diag([1.0, 1e-5])[None]
    found = influence.trak(rows, rows, np.ones((1, 2)), np.arange(2))
    np.testing.assert_allclose(found, np.eye(2), atol=1e-12)
    with refused("ridge", "is singular"):
        influence.trak(rows.astype(np.float32), rows, np.ones((1, 2)))


def test_bad_trak():
    late = RESIDUALS.copy()
    late[1, 3] = np.nan
    for residuals, part in (
        (RESIDUALS[:1], "(2, 11) (got (1, 11))"),
        (-RESIDUALS, "in [0, 1]"),
        (late, "(got nan for example 3 in model 1)"),
    ):
        with refused("residuals", part):
            influence.trak(TRAIN, TRAIN, residuals)
    with refused("ridge", "(got -1)"):
        influence.trak(TRAIN, TRAIN, RESIDUALS, ridge=-1)


# --- without a target, or without gradients


def test_norms_neither_overflow_nor_vanish():
    rows = TRAIN * 10.0 ** np.linspace(-200, 200, N)[:, None]
    rows[:, 3] = 0
    wanted = [np.mean([hypot(*row) for row in rows[:, n]]) for n in range(N)]
    np.testing.assert_allclose(influence.grand(rows), wanted, rtol=1e-12)


def test_norms_of_errors():
    logits, labels = RNG.standard_normal((E, N, 3)), RNG.integers(0, 3, N)
    errors = softmax(logits, axis=-1) - np.eye(3)[labels]
    wanted = np.sqrt((errors**2).sum(axis=-1))
    np.testing.assert_allclose(influence.el2n(logits, labels), wanted.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(influence.el2n(logits[1], labels), wanted[1], rtol=1e-10)
    sure = np.array([[100.0, 0.0], [100.0, 0.0]])
    np.testing.assert_allclose(influence.el2n(sure, np.array([0, 1])), [0, sqrt(2)], atol=1e-12)
    with refused("labels", "(got 0 to 2)"):
        influence.el2n(sure, np.array([0, 2]))


def test_representations_are_scored_by_cosines():
    found = influence.representation_similarity(TRAIN[0], TARGETS[0], RAGGED, over="max")
    wanted = score(TRAIN[:1], TARGETS[:1], None, RAGGED, over="max")
    np.testing.assert_array_equal(found, wanted)


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
    with refused("how", "last, mean, position"):
        influence.pool(hidden, mask, "first")


def test_random_scores_depend_on_the_key_alone():
    one, two = (influence.random_scores(jax.random.key(seed), 1000) for seed in range(2))
    np.testing.assert_array_equal(one, influence.random_scores(jax.random.key(0), 1000))
    assert abs(np.corrcoef(one, two)[0, 1]) < 4.5 / sqrt(1000)


# --- BM25

DOCUMENTS = ["a b c", "a a d", "b", "a e f g h a b", ""]
QUERIES = ["b d d z", "a", "h c"]


def bm25_by_definition(documents, query, k1, b):
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
    each = np.stack([bm25_by_definition(documents, query, k1, b) for query in queries], axis=1)
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
    for key, call in (
        ("train", lambda: influence.bm25([], [["a"]])),
        ("targets", lambda: influence.bm25([["a"]], [])),
        ("over", lambda: influence.bm25([["a"]], [["a"]], over="min")),
        ("b", lambda: influence.bm25([["a"]], [["a"]], b=2)),
        ("k1", lambda: influence.bm25([["a"]], [["a"]], k1=-1)),
    ):
        with refused(key):
            call()


# --- selections


def test_the_highest_are_selected_in_order():
    scores = np.random.default_rng(0).permutation(100)
    found = select(scores, fraction=0.07)
    assert scores[found].tolist() == [99, 98, 97, 96, 95, 94, 93]
    assert found.dtype == np.int64
    np.testing.assert_array_equal(select(scores.astype(np.float32), count=7), found)
    np.testing.assert_array_equal(select(jnp.asarray(scores, jnp.float32), count=7), found)
    assert len(select(scores)) == 5


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint8, np.float16])
def test_of_ties_the_lower_index_comes_first(dtype):
    scores = np.random.default_rng(1).integers(0, 5, 1000).astype(dtype)
    wanted = sorted(range(1000), key=lambda n: (-float(scores[n]), n))
    for count in (1, 150, 333, 1000):
        assert select(scores, count=count).tolist() == wanted[:count]
    assert select(np.array([-0.0, 0.0, -0.0]), count=3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("count", "fraction", "wanted"),
    [(100, 0.29, 29), (100, 0.07, 7), (270679, 0.05, 13533), (20, 0.05, 1), (3, 1, 3)],
)
def test_a_fraction_is_rounded_down(count, fraction, wanted):
    assert len(select(np.arange(count), fraction)) == wanted


@pytest.mark.parametrize(
    ("scores", "options", "key"),
    [
        (np.zeros((3, 2)), {}, "scores"),
        (np.array([1, np.nan, np.inf]), {}, "scores"),
        (np.zeros(3), {"fraction": 0}, "fraction"),
        (np.zeros(3), {"fraction": 5.0}, "fraction"),
        (np.zeros(19), {"fraction": 0.05}, "fraction"),
        (np.zeros(3), {"count": 4}, "count"),
        (np.zeros(3), {"count": 0}, "count"),
    ],
)
def test_bad_selections(scores, options, key):
    with refused(key):
        select(scores, **options)
