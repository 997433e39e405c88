"""Bits and normal numbers are a function of (key, index) alone, and look independent."""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.special import ndtri
from scipy.stats import norm

from jaxlm.core import prng

pytestmark = [pytest.mark.optimized, pytest.mark.default_flags]

GENERATORS = ("counter", "threefry")
SHAPES = ((), (7,), (8, 3, 5))
MORE_SHAPES = ((1,), (1001,), (8, 40), (17, 33), (16, 8, 24))
DRAWN = [
    *(("counter", shape) for shape in SHAPES),
    ("threefry", (5, 6)),
    *(pytest.param("counter", shape, marks=pytest.mark.slow) for shape in MORE_SHAPES),
    pytest.param("threefry", (), marks=pytest.mark.slow),
]
SHARDED = [("counter", shape) for shape in ((64,), (8, 40), (16, 8, 24))] + [("threefry", (8, 40))]


def drawing(shape, generator):
    def draw(key, rows=None):
        drawn = prng.bits(key, shape, rows, generator)
        z = prng.normal(key, shape, rows, generator)
        return drawn, z, prng.rademacher(key, shape, rows, generator)

    return draw


def words(drawn) -> list[np.ndarray]:
    """The bit patterns of 32-bit numbers, so that equality means every bit and no value is NaN."""
    return [np.asarray(array).view(np.uint32) for array in drawn]


def assert_same_bits(drawn, expected):
    for found, wanted in zip(words(drawn), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("generator", "shape"), DRAWN, ids=str)
def test_an_element_is_a_function_of_key_and_index_alone(generator, shape):
    draw, keys = drawing(shape, generator), jax.random.split(jax.random.key(5), 3)
    key, first = keys[2], jax.jit(draw)(keys[0])
    expected = words(jax.jit(draw)(key))
    assert expected[1].shape == shape

    @jax.jit
    def batched(keys, scale):
        _, z, _ = used = jax.lax.optimization_barrier(draw(keys[2]))
        return jax.vmap(draw)(keys), jax.lax.map(draw, keys), used, jnp.tanh(1 + scale * z).sum()

    vmapped, mapped, used, _ = batched(keys, jnp.float32(0.1))
    for drawn in (vmapped, mapped):
        assert_same_bits([x[2] for x in drawn], expected)
        assert_same_bits([x[0] for x in drawn], words(first))
    assert_same_bits(used, expected)
    if not shape:
        return

    length = shape[0]
    ranges = [(0, length), (length // 3, max(1, length // 4)), (length - 1, 1)]
    numbers = np.random.default_rng(0)
    indices = [numbers.integers(0, length, size) for size in ((5,), (2, 3))]

    @jax.jit
    def in_rows(key, starts):
        moving = [draw(key, (starts[i], size)) for i, (_, size) in enumerate(ranges)]
        return (
            [draw(key, rows) for rows in ranges],
            moving,
            [draw(key, jnp.asarray(i)) for i in indices],
        )

    fixed, moving, taken = in_rows(key, jnp.array([start for start, _ in ranges]))
    for drawn in (fixed, moving):
        for (start, size), rows in zip(ranges, drawn, strict=True):
            assert_same_bits(rows, [whole[start : start + size] for whole in expected])
    for index, rows in zip(indices, taken, strict=True):
        assert_same_bits(rows, [whole[index] for whole in expected])


@pytest.mark.parametrize("generator", GENERATORS)
def test_compilation_changes_no_bit(generator):
    draw, key = drawing((8, 40), generator), jax.random.key(3)
    assert_same_bits(draw(key), words(jax.jit(draw)(key)))


@pytest.mark.multidevice
@pytest.mark.parametrize(("generator", "shape"), SHARDED, ids=str)
def test_sharding_changes_no_bit(generator, shape):
    mesh = jax.make_mesh((8,), ("devices",))
    draw, key = drawing(shape, generator), jax.random.key(3)
    expected = words(jax.jit(draw)(key))
    for axis, size in enumerate(shape):
        if size % 8:
            continue
        spec = PartitionSpec(*(None,) * axis, "devices")
        sharded = jax.jit(draw, out_shardings=NamedSharding(mesh, spec))(key)
        assert [shard.data.size for shard in sharded[1].addressable_shards] == [
            expected[1].size // 8
        ] * 8
        assert_same_bits(sharded, expected)


def finalise(x: int) -> int:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x


def test_counter_bits_are_the_stated_hash_of_the_index():
    key, shape = jax.random.key(11), (2**16, 3, 2**12)
    k0, k1 = (int(word) for word in jax.random.key_data(key))
    for row in (0, 1, 2**15, 2**16 - 1):
        drawn = prng.counter_bits(key, shape, (row, 1))
        for i, j in ((0, 0), (1, 5), (2, 2**12 - 1)):
            counter = (row * math.prod(shape[1:]) + i * shape[2] + j + k0) % 2**32
            assert int(drawn[0, i, j]) == finalise(((finalise(counter) ^ k1) + counter) % 2**32)


def test_threefry_bits_are_those_of_jax():
    key = jax.random.key(11)
    drawn = prng.threefry_bits(key, (4, 3, 2))
    for row in range(4):
        expected = jax.random.bits(jax.random.fold_in(key, row), (3, 2), jnp.uint32)
        np.testing.assert_array_equal(drawn[row], expected)


def test_a_leaf_key_is_a_chain_of_folds():
    key, path = jax.random.key(7), "layers.mlp.up_proj.kernel"
    expected = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(path.encode())), 3)
    assert prng.leaf_key(key, path, 3) == expected
    assert prng.leaf_key(key, path, jnp.int32(3)) == expected


@pytest.mark.parametrize("shape", [(2**32,), (2**16, 2**16), (2**20, 2, 2**11)])
def test_a_leaf_of_two_to_the_32_elements_is_refused(shape):
    with pytest.raises(ValueError, match=r"has 2\*\*32 elements or more"):
        prng.bits(jax.random.key(0), shape, (0, 1))


@pytest.mark.parametrize("apart", [pytest.param(1, marks=pytest.mark.slow), 15])
def test_normal_is_within_5e_5_of_the_inverse_distribution_function(apart):
    """Over every argument that there is, so that variance and kurtosis are known exactly."""
    x = (2 * np.arange(0, 2**24, apart) - (2**24 - 1)) * 2.0**-24
    z = np.asarray(jax.jit(prng._inverse_normal)(jnp.asarray(x, jnp.float32)), np.float64)
    assert np.abs(z - ndtri((x + 1) / 2)).max() < 5e-5
    np.testing.assert_array_equal(z, -z[::-1])
    assert (np.diff(z) >= 0).all()
    if apart == 1:
        assert abs((z**2).mean() - 1) < 1e-6
        assert abs((z**4).mean() - 3) < 1e-5


def test_normal_takes_the_upper_24_bits_and_rademacher_the_top_one():
    key, shape = jax.random.key(2), (5, 100)
    upper = np.asarray(prng.bits(key, shape) >> 8, np.int64)
    x = ((2 * upper - (2**24 - 1)) * 2.0**-24).astype(np.float32)
    expected = jax.jit(prng._inverse_normal)(jnp.asarray(x))
    np.testing.assert_array_equal(prng.normal(key, shape), expected)
    signs = np.where(upper >= 2**23, -1.0, 1.0)
    np.testing.assert_array_equal(prng.rademacher(key, shape), signs)


# Statistics. Each returns scores that are standard normal, or nearly so, for uniform 32-bit words.


def chi_square_score(observed, expected) -> float:
    """A chi-square sum as a standard normal score (Wilson and Hilferty)."""
    freedom = np.size(expected) - 1
    ratio = (np.square(observed - expected) / expected).sum() / freedom
    spread = 2 / (9 * freedom)
    return (np.cbrt(ratio) - (1 - spread)) / math.sqrt(spread)


def moments(x: np.ndarray) -> list[float]:
    """Central moments of orders 1 to 4, of the words and of their lower halves."""
    scores = []
    for u in ((x + 0.5) * 2.0**-32 - 0.5, ((x & 0xFFFF) + 0.5) * 2.0**-16 - 0.5):
        for order in range(1, 5):
            mean = 0 if order % 2 else 1 / ((order + 1) * 2**order)
            variance = 1 / ((2 * order + 1) * 4**order) - mean**2
            scores.append(((u**order).mean() - mean) / math.sqrt(variance / u.size))
    return scores


def correlations(x: np.ndarray) -> list[float]:
    """Every bit with every other of the same word, and with all of words 1, 2 and 8 places on."""
    bits = np.unpackbits(x.view(np.uint8).reshape(-1, 4), axis=1).T.copy()
    count = x.size // 64 * 64 - 64
    packed = {n: np.packbits(bits[:, n : n + count], axis=1).view(np.uint64) for n in (0, 1, 2, 8)}
    scores = []
    for lag, later in packed.items():
        differ = np.array([np.bitwise_count(bit ^ later).sum(1, np.int64) for bit in packed[0]])
        pairs = (count - 2 * differ) / math.sqrt(count)
        scores += pairs[np.triu_indices(32, 1)].tolist() if lag == 0 else pairs.ravel().tolist()
    return scores


def byte_counts(x: np.ndarray) -> list[float]:
    """Chi-square of the four bytes, and of pairs of neighbours' bytes."""
    scores = []
    for shift in (0, 8, 16, 24):
        byte = (x >> shift) & 0xFF
        scores.append(
            chi_square_score(np.bincount(byte, minlength=256), np.full(256, x.size / 256))
        )
        pairs = np.bincount(byte[:-1] * 256 + byte[1:], minlength=2**16)
        scores.append(chi_square_score(pairs, np.full(2**16, (x.size - 1) / 2**16)))
    return scores


def birthday_spacings(x: np.ndarray) -> list[float]:
    """Equal spacings among 4096 sorted words are Poisson with mean 4; also with halves swapped."""
    scores = []
    for days in (x, x >> 16 | x << 16):
        blocks = np.sort(days[: x.size // 4096 * 4096].reshape(-1, 4096), axis=1)
        spacings = np.sort(np.diff(blocks, axis=1), axis=1)
        equal = (np.diff(spacings, axis=1) == 0).sum()
        mean = 4 * len(blocks)
        scores.append((equal - mean) / math.sqrt(mean))
    return scores


def gaps(x: np.ndarray) -> list[float]:
    """Distances between words whose upper (lower) three bits are zero are geometric."""
    scores = []
    for part in (x >> 29, x & 7):
        lengths = np.diff(np.flatnonzero(part == 0))
        counts = np.bincount(np.minimum(lengths, 40), minlength=41)[1:]
        probability = (7 / 8) ** np.arange(40) / 8
        probability[-1] = (7 / 8) ** 39
        scores.append(chi_square_score(counts, probability * lengths.size))
    return scores


def matrix_ranks(x: np.ndarray) -> list[float]:
    """Ranks over GF(2) of matrices of 32 neighbouring words: 32, 31, or less."""
    rows = x[: 2**18].reshape(-1, 32).copy()
    rank, every = np.zeros(len(rows), np.int64), np.arange(len(rows))
    for bit in range(32):
        one = (rows >> bit) & 1 == 1
        candidates = one & (np.arange(32) >= rank[:, None])
        found = every[candidates.any(1)]
        pivot, top = candidates[found].argmax(1), rank[found]
        pivot_row = rows[found, pivot]
        rows[found, pivot] = rows[found, top]
        one[found, pivot] = one[found, top]
        rows[found, top] = pivot_row
        below = one[found] & (np.arange(32) > top[:, None])
        rows[found] ^= np.where(below, pivot_row[:, None], np.uint32(0))
        rank[found] += 1
    full = np.prod(1 - 0.5 ** np.arange(1, 33))
    probability = np.array([full, 2 * full, 1 - 3 * full])
    counts = np.array([(rank == 32).sum(), (rank == 31).sum(), (rank < 31).sum()])
    errors = np.sqrt(len(rows) * probability * (1 - probability))
    return ((counts - len(rows) * probability) / errors).tolist()


STATISTICS = (moments, correlations, byte_counts, birthday_spacings, gaps, matrix_ranks)


def worst(statistic, x: np.ndarray) -> float:
    """The largest score over the threshold, which is as rare as 4.5 for a single score."""
    scores = np.abs(statistic(x))
    return scores.max() / norm.isf(norm.sf(4.5) / scores.size)


AXES = ("seed", "step", "direction", "layer", "index")


def streams() -> np.ndarray:
    """Words [seed, step, direction, layer, index], from keys as `jaxlm.zo` derives them."""

    def stream(seed, step, direction, layer):
        key = jax.random.fold_in(jax.random.key(seed), step)
        key = jax.random.fold_in(jax.random.fold_in(key, 0), direction)
        key = prng.leaf_key(key, "layers.attention.q_proj.kernel", layer)
        return prng.counter_bits(key, (16, 64)).reshape(-1)

    axes = np.meshgrid(*(np.arange(size) for size in (8, 8, 2, 4)), indexing="ij")
    drawn = jax.jit(jax.vmap(stream))(*(axis.ravel() for axis in axes))
    return np.asarray(drawn).reshape(8, 8, 2, 4, -1)


@pytest.fixture(scope="module")
def five_axes() -> np.ndarray:
    return streams()


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("fastest", AXES)
def test_interleaved_streams_look_independent(five_axes, fastest, statistic):
    assert worst(statistic, np.moveaxis(five_axes, AXES.index(fastest), -1).ravel()) < 1


def good(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**32, count, np.uint32)


def mean_of_two(count: int) -> np.ndarray:
    return (good(2 * count) >> 1).reshape(2, -1).sum(0, np.uint32)


def linear_congruential(count: int) -> np.ndarray:
    powers = np.cumprod(np.full(count, 1664525, np.uint32), dtype=np.uint32)
    return np.cumsum(powers, dtype=np.uint32) * np.uint32(1013904223)


def two_seeds_with_the_same_noise(count: int) -> np.ndarray:
    return np.repeat(good(count // 2), 2)


def steps_that_shift_the_index(count: int) -> np.ndarray:
    """Element i of step t is good[i + t]; steps alternate."""
    return np.lib.stride_tricks.sliding_window_view(good(count // 8 + 7), 8).ravel()


def hash_of_step_xor_hash_of_index(count: int) -> np.ndarray:
    return (good(count // 8)[:, None] ^ good(8)[None, ::-1]).ravel()


@pytest.mark.parametrize(
    ("statistic", "generator"),
    [
        (moments, mean_of_two),
        (correlations, two_seeds_with_the_same_noise),
        (byte_counts, linear_congruential),
        (birthday_spacings, steps_that_shift_the_index),
        (gaps, linear_congruential),
        (matrix_ranks, hash_of_step_xor_hash_of_index),
    ],
)
def test_each_statistic_finds_a_bad_generator_and_passes_a_good_one(statistic, generator):
    assert worst(statistic, good(2**18)) < 1
    assert worst(statistic, generator(2**18)) > 2
