"""What a view makes is what the model sees, whole or by rows, in every family."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import paths, views
from jaxlm.models import layers
from tests.helpers.models import GOLDEN

pytestmark = [pytest.mark.optimized, pytest.mark.default_flags]

slow = pytest.mark.slow
FAMILIES = ("gpt2", "llama", "bert-untied")
OTHERS = ("opt-projected", "bert", "roberta-classifier")
IDS = jnp.array([[5, 6, 7, 1, 1], [8, 9, 10, 11, 12]])
MASK = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def wave(phase, path, layer, shape, rows=None):
    """Numbers in [-1, 1] for each element, from its place alone; cheap to compile."""
    index = jnp.arange(shape[0]) if rows is None else rows
    index = rows[0] + jnp.arange(rows[1]) if isinstance(rows, tuple) else index
    index = index.reshape(*index.shape, *(1,) * (len(shape) - 1))
    within = jnp.arange(math.prod(shape[1:])).reshape(
        (1,) * (index.ndim - len(shape) + 1) + shape[1:]
    )
    layer = 0 if layer is None else layer + 1
    return jnp.cos(3.1 * index + 1.7 * within + 2.3 * layer + phase + paths.path_hash(path) % 1000)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wave:
    """`leaf + scale * wave`."""

    phase: Any
    scale: Any

    def __call__(self, path, leaf, layer, *, rows=None):
        shape = views.shape_of(leaf, rows)
        return views.add(
            views.take(leaf, rows), self.scale * wave(self.phase, path, layer, shape, rows)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """`LowRankSum` on every kernel of the layers."""

    scale: Any

    def __call__(self, path, leaf, layer, *, rows=None):
        leaf = views.take(leaf, rows)
        if layer is None or not path.endswith("kernel"):
            return leaf
        left, right = (wave(i, path, layer, (size, 2)) for i, size in enumerate(leaf.shape))
        return views.LowRankSum(leaf, self.scale * left, right)


def materialized(view, params):
    """The parameters as the view shows them, made leaf by leaf outside the model."""

    def whole(leaf):
        if not leaf.stacked:
            return dense(view(leaf.path, leaf.value, None))
        layers = jnp.arange(leaf.value.shape[0])
        return jax.vmap(lambda block, i: dense(view(leaf.path, block, i)))(leaf.value, layers)

    return paths.map_with_path(whole, params)


def dense(leaf):
    return leaf.dense() if isinstance(leaf, views.LowRankSum) else leaf


def assert_seen(lm, view, **options):
    """The model under the view gives what it gives on the materialised parameters."""

    @jax.jit
    def outputs(view, params):
        seen = lm.apply(params, IDS, MASK, view=view, **options)
        return seen, lm.apply(materialized(view, params), IDS, MASK, **options)

    seen, wanted = outputs(view, lm.params)
    np.testing.assert_allclose(seen, wanted, rtol=1e-4, atol=1e-4)
    return seen


WAVE = Wave(0.3, 0.1)


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_no_leaf_escapes_the_view(name: str):
    lm, seen = jaxlm.from_pretrained(GOLDEN / name), set()

    def record(path, leaf, layer, *, rows=None):
        seen.add((path, layer is not None))
        return views.take(leaf, rows)

    jax.eval_shape(lambda: lm.apply(lm.params, IDS, MASK, view=record))
    assert seen == {(leaf.path, leaf.stacked) for leaf in paths.flatten(lm.params)[0]}


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(x, marks=slow) for x in OTHERS)])
def test_every_leaf_and_low_rank_sum_of_every_family_is_seen_through_the_view(name: str):
    lm = jaxlm.from_pretrained(GOLDEN / name)
    assert_seen(lm, views.compose(Adapter(0.1), Wave(0.7, 0.05)))


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=slow)])
def test_restricted_heads_see_the_same_rows(name: str):
    lm = jaxlm.from_pretrained(GOLDEN / name)
    whole = assert_seen(lm, WAVE)
    options = {"positions": jnp.array([2, 4]), "token_ids": jnp.array([30, 4, 5])}
    part = assert_seen(lm, WAVE, **options)
    np.testing.assert_allclose(
        part, whole[jnp.arange(2), options["positions"]][:, options["token_ids"]], atol=1e-5
    )


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        *((5, "gpt2"), (36, "bert-untied")),
        *(pytest.param(*row, marks=slow) for row in ((5, "bert-untied"), (36, "gpt2"))),
    ],
)
def test_a_large_head_is_consumed_in_blocks(name: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    # 37 rows: seven blocks of 5 and a rest of 2; one of 36 and a row.
    lm = jaxlm.from_pretrained(GOLDEN / name)
    whole = assert_seen(lm, WAVE)
    monkeypatch.setattr(layers, "HEAD_BLOCK", rows * 24 + 3)
    shapes = []

    def record(path, leaf, layer, *, rows=None):
        leaf = views.take(leaf, rows)
        shapes.append(leaf.shape)
        return leaf

    jax.eval_shape(lambda: lm.apply(lm.params, IDS, MASK, view=record))
    assert (rows, 24) in shapes
    assert (37, 24) not in shapes
    np.testing.assert_allclose(assert_seen(lm, WAVE), whole, atol=1e-5)


def test_a_view_crosses_vmap_over_any_of_its_arrays():
    lm = jaxlm.from_pretrained(GOLDEN / "gpt2")
    seen = jax.jit(lambda view: lm.apply(lm.params, IDS, MASK, view=view))
    phases, scales = jnp.array([0.0, 1.0, 2.0]), jnp.array([0.1, -0.1, 0.0])
    for stack in (Wave(jnp.float32(0.5), scales), Wave(phases, scales)):
        axes = jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, stack)
        found = jax.jit(jax.vmap(seen, in_axes=(axes,)))(stack)
        for i, out in enumerate(found):
            one = jax.tree.map(lambda x, i=i: x[i] if jnp.ndim(x) else x, stack)
            np.testing.assert_allclose(out, seen(one), rtol=1e-4, atol=1e-4)


def test_the_derivative_along_the_wave_by_jvp():
    lm = jaxlm.from_pretrained(GOLDEN / "llama")

    @jax.jit
    def derivatives(params):
        z = jax.tree.map(jnp.subtract, materialized(Wave(WAVE.phase, 1.0), params), params)
        _, wanted = jax.jvp(lambda p: lm.apply(p, IDS, MASK).sum(), (params,), (z,))
        seen = lambda scale: lm.apply(params, IDS, MASK, view=Wave(WAVE.phase, scale)).sum()  # noqa: E731
        return wanted, jax.jvp(seen, (0.0,), (1.0,))[1]

    np.testing.assert_allclose(*derivatives(lm.params), rtol=1e-3)


LEAF = jnp.arange(42.0).reshape(7, 3, 2)
ROWS = (jnp.array([6, 0, 0]), jnp.array([[1, 2], [3, 3]]), (2, 3), (jnp.int32(4), 2))


@pytest.mark.parametrize("rows", ROWS, ids=["indices", "table", "block", "traced block"])
def test_rows_are_rows_of_the_whole(rows):
    first, second = Wave(0.0, 1.0), Wave(1.0, 2.0)
    for view in (None, first, views.compose(first, second), views.compose(first, first, second)):
        whole = views.apply(view, "a", LEAF, None)
        wanted = whole[slice(rows[0], rows[0] + rows[1]) if isinstance(rows, tuple) else rows]
        np.testing.assert_array_equal(views.apply(view, "a", LEAF, None, rows=rows), wanted)


@pytest.mark.parametrize("rows", ROWS[::2], ids=["indices", "block"])
def test_rows_of_a_low_rank_sum(rows):
    weight, left, right = jnp.ones((7, 3)), jnp.arange(14.0).reshape(7, 2), jnp.ones((3, 2))
    sum_ = views.LowRankSum(weight, left, right)
    np.testing.assert_array_equal(
        views.take(sum_, rows).dense(), views.take(weight + left @ right.T, rows)
    )
    assert (sum_.shape, sum_.dtype) == ((7, 3), weight.dtype)


def test_a_low_rank_sum_is_not_formed_before_it_is_used():
    sum_ = views.LowRankSum(jnp.ones((7, 3)), jnp.arange(14.0).reshape(7, 2), jnp.ones((3, 2)))
    x = jnp.arange(14.0).reshape(2, 7)
    np.testing.assert_allclose(sum_.dot(x), x @ sum_.dense(), rtol=1e-6)
    moved = views.add(sum_, jnp.full((7, 3), 2.0))
    np.testing.assert_array_equal(moved.left, sum_.left)
    np.testing.assert_array_equal(moved.dense(), sum_.dense() + 2)


def test_composition_leaves_out_the_identity():
    view = Wave(0.0, 1.0)
    assert views.compose() is None
    assert views.compose(None, None) is None
    assert views.compose(None, view) is view
    assert views.compose(view, None, view) == views.Composed((view, view))


def test_the_order_of_composition_is_from_the_store_to_the_model():
    double = lambda path, leaf, layer, *, rows=None: 2 * views.take(leaf, rows)  # noqa: E731
    add_one = lambda path, leaf, layer, *, rows=None: 1 + views.take(leaf, rows)  # noqa: E731
    leaf = jnp.array([1.0, 2.0])
    np.testing.assert_array_equal(views.compose(double, add_one)("a", leaf, None), [3, 5])
    taken = views.compose(add_one, double)("a", leaf, None, rows=jnp.array([1]))
    np.testing.assert_array_equal(taken, [6])


def test_a_sum_is_rounded_once():
    half = jnp.array([1.0], jnp.bfloat16)
    # 1 + 3 * 2^-9 rounds to 1 + 2^-7; three roundings of 2^-9 would each be lost.
    found = views.add(half, jnp.array([3 * 2.0**-9]))
    assert found.dtype == jnp.bfloat16
    assert float(found[0]) == 1 + 2**-7
