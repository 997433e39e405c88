"""Weights in few bits: closed forms, brute force, and every way to read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import zo
from jaxlm.core import paths, views
from jaxlm.core.errors import UserError
from jaxlm.core.precision import dequantize, pack, quantize
from jaxlm.zo import Perturbation

pytestmark = pytest.mark.optimized

paths.declare_stacked({"layers.up.kernel": 2, "layers.up.bias": 1, "layers.norm.scale": 1})
slow = pytest.mark.slow
BITS = pytest.mark.parametrize("bits", [8, 4])
BITS_AND_PATHS = pytest.mark.parametrize(
    ("bits", "path"),
    [
        *((8, "embedding"), (4, "kernel")),
        *(pytest.param(*row, marks=slow) for row in ((8, "kernel"), (4, "embedding"))),
    ],
)
TREE = {
    "embed": {"tokens": {"embedding": (11, 6)}, "positions": {"embedding": (9, 6)}},
    "layers": {"up": {"kernel": (3, 10, 7), "bias": (3, 7)}, "norm": {"scale": (3, 10)}},
}


def random_tree(dtype=jnp.float32):
    leaves, structure = jax.tree.flatten(TREE, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return structure.unflatten(
        [jax.random.normal(k, shape, dtype) for k, shape in zip(keys, leaves, strict=True)]
    )


def reference(groups: np.ndarray, bits: int) -> float:
    """The least squared error of a scale for each group (last axis), by a fine grid."""
    limit = 2 ** (bits - 1)
    least = np.full(groups.shape[:-1], np.inf)
    for factor in np.linspace(0.3, 1.3, 4001):
        for sign in (1, -1):
            unit = sign * factor * np.abs(groups).max(-1, keepdims=True) / limit
            values = np.clip(np.round(groups / unit), -limit, limit - 1)
            least = np.minimum(least, ((values * unit - groups) ** 2).sum(-1))
    return float(least.sum())


@BITS
@pytest.mark.parametrize("path", ["kernel", "embedding"])
@pytest.mark.parametrize(
    ("length", "group_size"),
    [
        *((1, None), (7, 4)),
        *(
            pytest.param(*row, marks=slow)
            for row in ((12, 64), (2, 2), (7, None), (12, 6), (12, 8))
        ),
    ],
)
def test_weights_on_the_grid_come_back_as_they_were(bits, path, group_size, length):
    """One scale a group, its largest integer on either side, an odd number of weights."""
    limit = 2 ** (bits - 1)
    rng = np.random.default_rng(length)
    integers = rng.integers(-limit, limit, (length, 5))
    size = min(group_size or length, length)
    size += size % 2
    first = np.arange(0, length, size)
    integers[first] = -limit  # so that the range of each group is known
    signs = rng.choice([-1, 1], (len(first), 5))
    unit = (signs * 2.0 ** rng.integers(-9, 3, (len(first), 5))).repeat(size, 0)[:length]
    matrix = (integers * unit).astype(np.float32)
    matrix = matrix.T if path == "embedding" else matrix
    packed = pack(path, jnp.asarray(matrix), bits=bits, group_size=group_size)
    np.testing.assert_array_equal(packed.dense(), matrix)
    assert packed.shape == matrix.shape
    assert packed.size == matrix.size


@pytest.mark.parametrize(("bits", "group_size", "gain"), [(4, 64, 1.4), (8, 256, 1.04)])
def test_error_is_near_the_least_and_below_that_of_rounding_to_the_largest(bits, group_size, gain):
    matrix = np.asarray(jax.random.normal(jax.random.key(0), (256, 20)))
    packed = pack("kernel", matrix, bits=bits, group_size=group_size)
    found = float(((packed.dense() - matrix) ** 2).sum())
    groups = np.moveaxis(matrix.reshape(-1, group_size, 20), 1, -1)
    least = reference(groups, bits)
    assert least <= found * (1 + 1e-5)
    assert found <= 1.06 * least
    unit = np.abs(groups).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    assert ((np.round(groups / unit) * unit - groups) ** 2).sum() > gain * found


@BITS
@pytest.mark.parametrize(
    "dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=slow), jnp.float16]
)
def test_zeros_and_tiny_weights(bits, dtype):
    matrix = jnp.zeros((8, 3), dtype).at[:, 1].set(jnp.finfo(dtype).tiny)
    dense = pack("kernel", matrix, bits=bits).dense()
    assert dense.dtype == dtype
    np.testing.assert_array_equal(dense[:, 0], 0)
    assert bool(jnp.isfinite(dense.astype(jnp.float32)).all())


@BITS
def test_a_weight_that_is_no_number_stays_none(bits):
    """A broken checkpoint must not turn into a plausible one."""
    matrix = jnp.ones((8, 3)).at[2, 1].set(jnp.nan)
    assert bool(jnp.isnan(pack("kernel", matrix, bits=bits).dense()[:, 1]).any())


@BITS
def test_bytes(bits):
    params = {"layers": {"up": {"kernel": jnp.ones((2, 256, 512), jnp.bfloat16)}}}
    packed = quantize(params, bits=bits)
    stored = sum(x.nbytes for x in jax.tree.leaves(packed))
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    assert stored / whole == {8: 0.5 + 1 / 256, 4: 0.25 + 1 / 64}[bits]


def test_which_leaves_are_packed():
    packed = quantize(random_tree(), bits=8)
    found = {leaf.path for leaf in paths.flatten(packed)[0]}
    assert found == {
        "embed.positions.embedding",
        "embed.tokens.embedding.values",
        "embed.tokens.embedding.scale",
        "layers.up.bias",
        "layers.up.kernel.values",
        "layers.up.kernel.scale",
        "layers.norm.scale",
    }
    only = quantize(random_tree(), bits=8, select="positions")
    assert only["embed"]["positions"]["embedding"].shape == (9, 6)
    assert only["embed"]["tokens"]["embedding"].dtype == jnp.float32


@BITS
def test_layers_of_a_stack_are_packed_each_for_itself(bits):
    params = random_tree()
    whole = quantize(params, bits=bits, group_size=4)["layers"]["up"]["kernel"].dense()
    for layer, kernel in enumerate(params["layers"]["up"]["kernel"]):
        one = pack("layers.up.kernel", kernel, bits=bits, group_size=4).dense()
        np.testing.assert_array_equal(whole[layer], one)


@BITS_AND_PATHS
def test_rows_are_those_of_the_whole(bits, path):
    matrix = jax.random.normal(jax.random.key(1), (10, 6))
    leaf = pack(path, matrix, bits=bits, group_size=4)
    index = jnp.array([[3, 3], [9, 0]])
    dense = leaf.dense()
    np.testing.assert_array_equal(views.take(leaf, index), dense[index])
    np.testing.assert_array_equal(views.take(leaf, (2, 5)), dense[2:7])
    np.testing.assert_array_equal(views.take(leaf, None), dense)


@BITS_AND_PATHS
def test_a_perturbation_moves_the_scales(bits, path):
    """Before the weights are made, so that rows see the noise of the whole leaf."""
    matrix = jax.random.normal(jax.random.key(1), (10, 6))
    leaf = pack(path, matrix, bits=bits, group_size=4)
    view = Perturbation(jax.random.key(2), jnp.float32(0.1), zo.gaussian())
    moved = jax.tree.leaves({path: leaf})
    scale = view(f"{path}.scale", leaf.scale, None)
    values = {"values": leaf.values, "scale": scale}
    wanted = type(leaf)(**values, bits=bits, axis=leaf.axis, length=leaf.length).dense()
    np.testing.assert_array_equal(view(path, leaf, None), wanted)
    index = jnp.array([7, 0, 7])
    np.testing.assert_array_equal(view(path, leaf, None, rows=index), wanted[index])
    composed = views.compose(view, Perturbation(jax.random.key(3), jnp.float32(0), zo.gaussian()))
    np.testing.assert_array_equal(composed(path, leaf, None, rows=(2, 3)), wanted[2:5])
    assert all(a is b for a, b in zip(moved, jax.tree.leaves({path: leaf}), strict=True))


def test_dequantize_undoes_the_tree():
    params = random_tree(jnp.bfloat16)
    whole = dequantize(quantize(params, bits=8))
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.03)


def test_integers_are_never_selected():
    packed = quantize(random_tree(), bits=4)
    chosen = paths.mask(packed, "kernel")
    assert chosen["layers"]["up"]["kernel"].scale is True
    assert chosen["layers"]["up"]["kernel"].values is False
    with pytest.raises(ValueError, match="takes no parameter"):
        paths.mask(packed, r"values$")
    trained, frozen = paths.split(packed, None)
    merged = paths.merge(trained, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(packed)


@pytest.mark.parametrize("size", [0, 7])
def test_a_group_has_an_even_size(size: int):
    with pytest.raises(UserError, match=rf"^group_size: must be .* \(got {size}\)"):
        quantize(random_tree(), bits=4, group_size=size)


def test_twice_is_refused():
    packed = quantize(random_tree(), bits=8)
    with pytest.raises(UserError, match=r"^params: are quantized already"):
        quantize(packed, bits=4)
    with pytest.raises(ValueError, match="takes no parameter"):
        quantize(random_tree(), bits=8, select="nothing")
