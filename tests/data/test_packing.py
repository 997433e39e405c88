"""Packed rows: every row once, no window too long, and the loss of the rows alone."""

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.data import MessagesConfig, TextConfig, TokenRow
from jaxlm.data.rows import EncodedRows, PaddedRows, digest, pack
from jaxlm.train.losses import token_objective
from tests.helpers.models import GOLDEN
from tests.helpers.sentences import refused


def random_rows(count: int, longest: int) -> list[TokenRow]:
    numbers = np.random.default_rng(0)
    rows = []
    for i, size in enumerate(numbers.integers(2, longest + 1, count)):
        ids = tuple(numbers.integers(3, 20, size).tolist())
        scored = np.flatnonzero(numbers.random(size - 1) < 0.5) + 1
        rows.append(TokenRow(str(i), ids, tuple(scored.tolist()) or (1,)))
    return rows


def test_every_row_is_in_one_window_and_the_fullest_that_fits_is_taken():
    rows = random_rows(200, 24)
    windows = pack(rows, 32)
    assert max(len(window.ids) for window in windows) <= 32
    parts = {}
    for window in windows:
        ends = (*window.starts[1:], len(window.ids))
        for name, start, end in zip(window.id.split(), window.starts, ends, strict=True):
            places = tuple(x - start for x in window.loss_positions if start <= x < end)
            parts[name] = TokenRow(name, window.ids[start:end], places)
    assert digest([parts[row.id] for row in rows]) == digest(rows)
    assert len(parts) == len(rows)
    # Of best fit decreasing: at most 11 / 9 of the best number of windows, and one.
    tokens = sum(len(row.ids) for row in rows)
    assert len(windows) <= 11 / 9 * -(-tokens // 32) + 1
    best = pack([TokenRow(str(n), (1,) * n, (1,)) for n in (5, 3, 4, 4, 8)], 8)
    assert [len(window.ids) for window in best] == [8, 8, 8]


def test_windows_are_told_apart_from_rows_of_the_same_tokens():
    row = TokenRow("0 1", (1, 2, 3, 4), (1, 3))
    (window,) = pack([TokenRow("0", (1, 2), (1,)), TokenRow("1", (3, 4), (1,))], 4)
    assert (window.ids, window.loss_positions) == (row.ids, row.loss_positions)
    assert digest([window]) != digest([row])


@pytest.mark.parametrize("form", ["weights", "targets"])
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_loss_and_gradient_are_those_of_the_rows_alone(name, form):
    lm = jaxlm.from_pretrained(GOLDEN / name)
    rows = random_rows(12, 10)
    windows = PaddedRows(pack(rows, 16), 0, form, buckets=(16,), packed=True)
    assert len(windows) < len(rows)
    loss = jax.jit(jax.value_and_grad(lambda params, batch: token_objective(lm)(params, batch)[0]))
    alone, wanted = loss(lm.params, PaddedRows(rows, 0).batch(range(len(rows))))
    found, gradient = loss(lm.params, windows.batch(range(len(windows))))
    np.testing.assert_allclose(found, alone, rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max() + 1e-8),
        gradient,
        wanted,
    )


def test_targets_alone_are_read_where_at_most_half_of_the_tokens_are_in_the_loss():
    few = [TokenRow(str(n), tuple(range(n)), (1,)) for n in (4, 6, 8)]
    many = [TokenRow("0", tuple(range(8)), (1, 2, 3, 4, 5))]
    for rows, form in ((few, "targets"), (many, "weights"), ([], "weights")):
        splits = {"train": rows, "validation": few, "test": []}
        encoded = EncodedRows.pad(splits, pad_id=0).sparse()
        assert (encoded.train.form, encoded.validation.form) == (form, "weights")


def test_only_training_rows_are_packed():
    rows = random_rows(12, 10)
    splits = {"train": rows, "validation": rows[:3], "test": rows[3:6]}
    encoded = EncodedRows.pad(splits, pad_id=0, limit=16, packing=True)
    assert encoded.sizes["train"] < 12
    assert (encoded.sizes["validation"], encoded.sizes["test"]) == (3, 3)
    batch = encoded.batch(0, batch_size=4, seed=0)
    assert batch["input_ids"].shape == batch["segment_ids"].shape == (4, 16)
    assert ((batch["segment_ids"] > 0) == batch["attention_mask"]).all()
    assert "segment_ids" not in next(encoded.eval_batches("test", batch_size=4))


@pytest.mark.parametrize("form", [MessagesConfig, TextConfig])
def test_a_window_needs_a_length(form):
    with refused(f"{form.key}.packing", f"{form.key}.max_length"):
        form(train="rows.jsonl", packing=True)
