"""Scores equal their equations, from arrays and from stores, and mismatches are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from jaxlm.core.errors import UserError
from jaxlm.influence import GradientStore, StoreSpec, score, sides

E, N, M, R = 2, 9, 5, 7
RNG = np.random.default_rng(0)
TRAIN = RNG.standard_normal((E, N, R)).astype(np.float32)
TARGETS = RNG.standard_normal((E, M, R)).astype(np.float32)
WEIGHTS = [0.7, 0.2]
RAGGED = np.array([1, 0, 1, 2, 1])  # subtasks of 1, 3 and 1 targets


def brute(aggregate, groups, train=TRAIN, targets=TARGETS, weights=WEIGHTS):
    """The equations, one number after another, with scikit-learn's cosine."""
    found = np.zeros((train.shape[1], groups.max() + 1))
    for s in range(groups.max() + 1):
        for weight, rows, mine in zip(weights, train, targets[:, groups == s], strict=True):
            rows, mine = rows.astype(np.float64), mine.astype(np.float64)
            if aggregate == "cosine_of_mean":
                found[:, s] += weight * cosine_similarity(rows, mine.mean(0)[None])[:, 0]
            else:
                found[:, s] += weight * cosine_similarity(rows, mine).mean(1)
    return found


BOTH = pytest.mark.parametrize("aggregate", ["cosine_of_mean", "mean_of_cosines"])


@BOTH
@pytest.mark.parametrize("groups", [None, RAGGED])
def test_scores_are_their_equations(aggregate, groups):
    found = score(TRAIN, TARGETS, WEIGHTS, groups, aggregate)
    wanted = brute(aggregate, np.zeros(M, int) if groups is None else groups)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted[:, 0] if groups is None else wanted, atol=1e-6)


def test_the_two_aggregates_differ():
    first = score(TRAIN, TARGETS, WEIGHTS)
    second = score(TRAIN, TARGETS, WEIGHTS, aggregate="mean_of_cosines")
    assert np.abs(first - second).max() > 0.05


@BOTH
def test_float64_stays(aggregate):
    with jax.enable_x64(True):
        found = score(TRAIN.astype(np.float64), TARGETS, WEIGHTS, RAGGED, aggregate)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, brute(aggregate, RAGGED), rtol=1e-12, atol=1e-15)


def test_what_the_authors_code_computes():
    """Subtasks of equal size in order: normalize, multiply, reshape, mean, max."""
    targets = RNG.standard_normal((E, 6, R)).astype(np.float32)
    w = np.array(WEIGHTS) / np.sum(WEIGHTS)
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (TRAIN, targets)]
    wanted = np.einsum("e,enr,emr->nm", w, *unit).reshape(N, 3, 2).mean(-1).max(-1)
    found = score(TRAIN, targets, w, np.repeat(np.arange(3), 2), "mean_of_cosines", over="max")
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_over_subtasks():
    each = score(TRAIN, TARGETS, WEIGHTS, RAGGED)
    for over in ("max", "mean"):
        found = score(TRAIN, TARGETS, WEIGHTS, RAGGED, over=over)
        np.testing.assert_allclose(found, getattr(each, over)(axis=1), rtol=1e-6)


def test_weights_are_not_normalized():
    once = score(TRAIN, TARGETS, WEIGHTS)
    np.testing.assert_allclose(
        score(TRAIN, TARGETS, np.array(WEIGHTS) * 1e-5), once * 1e-5, rtol=1e-5
    )


@BOTH
def test_the_length_of_a_training_row_does_not_count(aggregate):
    scales = 10.0 ** np.linspace(-30, 30, N).astype(np.float32)[:, None]
    found = score(TRAIN * scales, TARGETS, WEIGHTS, RAGGED, aggregate)
    np.testing.assert_allclose(found, score(TRAIN, TARGETS, WEIGHTS, RAGGED, aggregate), atol=1e-6)


def test_a_training_row_of_zeros_scores_zero():
    train = TRAIN.copy()
    train[:, 3] = 0
    found = score(train, TARGETS, WEIGHTS, RAGGED)
    assert (found[3] == 0).all()
    rest = np.delete(np.arange(N), 3)
    np.testing.assert_allclose(found[rest], brute("cosine_of_mean", RAGGED)[rest], atol=1e-6)


# --- stores


def stores(folder, rows, side="train", ids=None, **changes):
    """A store for every checkpoint."""
    made = []
    for e, each in enumerate(rows):
        spec = StoreSpec(
            dim=R,
            projection="srht to 7, seed 0",
            gradient="adam" if side == "train" else "sgd",
            model=str(e),
            data=side,
            checkpoint=100 * (e + 1),
            weight=WEIGHTS[e],
        )
        spec = dataclasses.replace(spec, **changes)
        with GradientStore.create(folder / f"{side}{e}", spec, shard_rows=4) as writer:
            writer.append(each, ids or list(range(len(each))))
            writer.commit()
        made.append(GradientStore.open(folder / f"{side}{e}"))
    return made


def test_stores_score_like_arrays_bit_for_bit_with_their_own_weights(tmp_path):
    train, targets = stores(tmp_path, TRAIN), stores(tmp_path, TARGETS, "targets")
    wanted = score(TRAIN, TARGETS, WEIGHTS, RAGGED)
    np.testing.assert_array_equal(score(train, targets, subtask=RAGGED), wanted)
    np.testing.assert_array_equal(score(train, TARGETS, WEIGHTS, RAGGED), wanted)
    np.testing.assert_array_equal(score(list(TRAIN), jnp.asarray(TARGETS), WEIGHTS, RAGGED), wanted)
    other = score(train, targets, [1.0, 1.0], RAGGED)
    np.testing.assert_allclose(other, brute("cosine_of_mean", RAGGED, weights=[1, 1]), atol=1e-6)


def test_one_store_is_one_checkpoint(tmp_path):
    (train,), (targets,) = stores(tmp_path, TRAIN[:1]), stores(tmp_path, TARGETS[:1], "targets")
    wanted = WEIGHTS[0] * score(TRAIN[:1], TARGETS[:1])
    np.testing.assert_allclose(score(train, targets), wanted, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "int8", "1bit"])
def test_quantized_stores_score_as_their_rows_read(tmp_path, dtype):
    train = stores(tmp_path, TRAIN, dtype=dtype)
    read = np.stack([store[:] for store in train])
    assert np.abs(read - TRAIN).max() > 1e-5
    found = score(train, stores(tmp_path, TARGETS, "targets"), subtask=RAGGED)
    np.testing.assert_allclose(found, brute("cosine_of_mean", RAGGED, read), atol=1e-6)


def test_quantized_rows_select_what_the_rows_select(tmp_path):
    """512 numbers a row. A cosine by signs has 2/pi of the slope and is off by 1/sqrt(512)."""
    rng = np.random.default_rng(1)
    target = rng.standard_normal((1, 1, 512)).astype(np.float32)
    slopes = np.linspace(-1, 1, 200)[:, None]
    rows = (slopes * target[0] + rng.standard_normal((200, 512))).astype(np.float32)
    wanted = score(rows[None], target)
    tolerance = {"float16": 1e-4, "int8": 2e-3, "1bit": 0.15}
    for dtype, allowed in tolerance.items():
        with GradientStore.create(tmp_path / dtype, StoreSpec(dim=512, dtype=dtype)) as writer:
            writer.append(rows, range(200))
            writer.commit()
        found = score(GradientStore.open(tmp_path / dtype), target)
        scale = np.sqrt(2 / np.pi) if dtype == "1bit" else 1
        np.testing.assert_allclose(found, scale * wanted, atol=allowed)
        best = [set(np.argsort(-each)[:20].tolist()) for each in (found, wanted)]
        assert len(best[0] & best[1]) >= (15 if dtype == "1bit" else 19)


def test_blocks_change_nothing_and_no_more_than_one_is_read(tmp_path, monkeypatch):
    rows = np.random.default_rng(3).standard_normal((1, 37, R)).astype(np.float32)
    wanted = score(rows, TARGETS[:1], subtask=RAGGED)
    (store,) = stores(tmp_path, rows)
    monkeypatch.setattr(sides, "BLOCK_BYTES", 8 * 4 * R)
    largest = [0]
    read = GradientStore.__getitem__

    def counted(self, index):
        found = read(self, index)
        largest[0] = max(largest[0], len(found))
        return found

    monkeypatch.setattr(GradientStore, "__getitem__", counted)
    found = score(store, TARGETS[:1], [1.0], RAGGED)
    assert largest[0] == 8
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_array_equal(found, score(rows, TARGETS[:1], [1.0], RAGGED))


# --- what is refused


def refused(call, text: str) -> None:
    with pytest.raises(UserError) as found:
        call()
    assert text in str(found.value)


BETWEEN = [
    ({"projection": "srht to 7, seed 1"}, "projection ('srht to 7, seed 0' and 'srht to 7, seed 1"),
    ({"parameters": "lora"}, "parameters ('' and 'lora')"),
    ({"model": "9"}, "model ('0' and '9')"),
    ({"checkpoint": 150}, "checkpoint (100 and 150)"),
    ({"weight": 0.3}, "weight (0.7 and 0.3)"),
]


@pytest.mark.parametrize(("change", "text"), BETWEEN)
def test_stores_of_two_sides_that_differ_are_refused(tmp_path, change, text):
    train = stores(tmp_path, TRAIN[:1])
    targets = stores(tmp_path, TARGETS[:1], "targets", **change)
    both = f"{tmp_path}/train0 and {tmp_path}/targets0 differ in {text}"
    refused(lambda: score(train, targets), both)


def test_two_sides_may_differ_in_data_gradient_and_encoding(tmp_path):
    train = stores(tmp_path, TRAIN, dtype="int8")
    score(train, stores(tmp_path, TARGETS, "targets"))


WITHIN = [
    ({"data": "other"}, "data ('train' and 'other')"),
    ({"gradient": "sgd"}, "gradient ('adam' and 'sgd')"),
    ({"dtype": "int8"}, "dtype ('float32' and 'int8')"),
    ({"projection": "none"}, "projection ('srht to 7, seed 0' and 'none')"),
]


@pytest.mark.parametrize(("change", "text"), WITHIN)
def test_checkpoints_of_one_side_that_differ_are_refused(tmp_path, change, text):
    first, _ = stores(tmp_path, TRAIN)
    _, second = stores(tmp_path / "other", TRAIN, **change)
    text = f"{tmp_path}/train0 and {tmp_path}/other/train1 differ in {text}; give stores that agree"
    refused(lambda: score([first, second], TARGETS), text)


def test_checkpoints_of_other_examples_are_refused(tmp_path):
    train = [stores(tmp_path, TRAIN)[0]]
    train += stores(tmp_path / "b", TRAIN, ids=[0, 1, 2, 4, 3, 5, 6, 7, 8])[1:]
    refused(
        lambda: score(train, TARGETS),
        f"row 3 is of example 3 in {tmp_path}/train0 and of 4 in {tmp_path}/b/train1; write the",
    )


def changed(rows, index, value):
    rows = rows.copy()
    rows[index] = value
    return rows


BAD = [
    ({"train": TRAIN[0, 0]}, "train has shape (7,); give [checkpoints, examples, numbers]"),
    ({"train": TRAIN[:, :0]}, "train has no rows; give at least one"),
    ({"targets": TARGETS[:, :0]}, "targets has no rows; give at least one"),
    ({"train": TRAIN[:1]}, "train has 1 checkpoints and targets 2; give both the same"),
    (
        {"train": [TRAIN[0], TRAIN[1, :4]]},
        "train has checkpoints of shapes (9, 7) and (4, 7); give",
    ),
    ({"targets": TARGETS[:, :, :4]}, "train has rows of 7 numbers and targets of 4; give both the"),
    ({"weights": [1.0]}, "weights have shape (1,); give one for each of 2 checkpoints"),
    ({"weights": [1.0, -1.0]}, "weights are [1.0, -1.0]; give learning rates, 0 or more"),
    ({"weights": [0.0, 0.0]}, "weights are [0.0, 0.0]; give learning rates, 0 or more"),
    ({"weights": None}, "weights are missing; give the learning rate of every checkpoint"),
    ({"subtask": RAGGED[:4]}, "subtask is int64 of shape (4,); give an integer for each of the 5"),
    ({"subtask": RAGGED * 1.0}, "subtask is float64 of shape (5,); give an integer for each of"),
    ({"subtask": RAGGED - 1}, "subtask has -1; number subtasks from 0"),
    ({"subtask": np.where(RAGGED == 0, 1, RAGGED)}, "subtask 0 has no target; number subtasks"),
    ({"aggregate": "mean"}, "aggregate='mean' is not known; give cosine_of_mean or mean_of_"),
    ({"over": "min"}, "over='min' is not known; give max, mean or None"),
    ({"train": changed(TRAIN, (1, 6, 2), np.nan)}, "row 6 of train gives no finite number; leave"),
    ({"train": changed(TRAIN, (0, 2, 2), np.inf)}, "row 2 of train gives no finite number; leave"),
    ({"targets": changed(TARGETS, (1, 3, 2), np.nan)}, "row 3 of targets gives no finite number"),
    (
        {"targets": changed(TARGETS, (1, 3), 0)},
        "the mean of targets in subtask 2 is zero and has no",
    ),
    (
        {"targets": changed(TARGETS, (1, 4), 0), "aggregate": "mean_of_cosines"},
        "row 4 of targets is zero and has no direction; leave it out",
    ),
]


@pytest.mark.parametrize(("change", "text"), BAD)
def test_bad_input(change, text):
    given = {"train": TRAIN, "targets": TARGETS, "weights": WEIGHTS, "subtask": RAGGED} | change
    refused(lambda: score(**given), text)


@BOTH
def test_rows_of_one_checkpoint_need_no_axis(aggregate):
    wanted = score(TRAIN[:1], TARGETS[:1], [0.5], RAGGED, aggregate)
    found = score(TRAIN[0], jnp.asarray(TARGETS[0]), [0.5], RAGGED, aggregate)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(2 * found, score(TRAIN[0], TARGETS[0], None, RAGGED, aggregate))
