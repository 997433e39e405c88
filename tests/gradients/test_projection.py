"""Projections keep inner products as theory says, and are a function of seed, path and index."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.linalg import hadamard

from jaxlm.core import paths, prng
from jaxlm.gradients import sketches
from jaxlm.gradients.projection import Projector, projector
from jaxlm.sharding import make_mesh
from tests.helpers.sentences import refused

pytestmark = pytest.mark.optimized

paths.declare_stacked(
    {"layers.up.kernel": 2, "layers.up.bias": 1, "layers.bias": 1, "layers.kernel": 2}
)
FAMILIES = sorted(sketches.SKETCHES)
RINGS = ("countsketch", "srht")


def rows(*quick):
    """All families, of which the default run has some: others share their loops."""
    marks = {name: () if name in quick else pytest.mark.slow for name in FAMILIES}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


each_loop = pytest.mark.parametrize("family", rows("rademacher", "srht", "kronecker"))
SHAPES = {
    "embed": {"embedding": (30, 24)},
    "layers": {"up": {"kernel": (3, 24, 96), "bias": (3, 96)}},
    "scale": (24,),
    "temperature": (),
}


SMALL = {"embed": (30, 24), "layers": {"up": {"kernel": (2, 24, 96)}}}
FEW = {"embed": (30, 24), "layers": {"bias": (3, 96)}, "temperature": ()}
"""A leaf of several blocks, a stack of small ones, and a number."""


def is_shape(node):
    return isinstance(node, tuple)


def gradients(count: int, shapes=SHAPES, seed: int = 0, dtype=np.float32):
    """A tree of leaves [count, ...] of normal numbers whose sizes differ a lot."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        sizes = np.exp(rng.standard_normal(shape))
        return jnp.asarray((rng.standard_normal((count, *shape)) * sizes).astype(dtype))

    return jax.tree.map(draw, shapes, is_leaf=is_shape)


def low_rank_gradients(count: int, rows: int, columns: int):
    """Gradients of kernels as networks have them, sums of few products, some columns being large.

    Signs make them independent with mean 0.
    """
    rng = np.random.default_rng(1)
    heavy = np.where(rng.random(columns) < 0.02, 10.0, 1.0)

    def draw(*layers):
        a = rng.standard_normal((count, *layers, 4, rows)) + 0.5 * rng.standard_normal(rows)
        b = rng.standard_normal((count, *layers, 4, columns)) * heavy
        g = np.einsum("n...ti,n...to->n...io", a, b)
        return jnp.asarray(g, jnp.float32)

    return {"layers": {"kernel": draw(2)}, "head": draw()}


def flat(tree):
    """[N, P] in float64, the leaves in the order of their paths."""
    leaves = sorted(paths.flatten(tree)[0])
    return np.concatenate(
        [np.asarray(leaf.value, np.float64).reshape(len(leaf.value), -1) for leaf in leaves], axis=1
    )


@functools.cache
def project(proj: Projector):
    return jax.jit(proj.project)


# What the maps are, from explicit matrices.


def bit(words, place):
    """-1 where bit 31 - place is set, else 1."""
    return 1.0 - 2.0 * ((np.asarray(words) >> (31 - place)) & 1)


def signs_matrix(key, size, dim):
    """Number i has row i % 512 of block i // 512, whose 32 neighbours share words."""
    rows = []
    for block, start in enumerate(range(0, size, 512)):
        length = min(512, size - start)
        words = prng.counter_bits(jax.random.fold_in(key, block), (-(-length // 32), dim))
        words = np.asarray(words)
        rows += [bit(words[row // 32], row % 32) for row in range(length)]
    return np.array(rows) / math.sqrt(dim)


def ring_matrix(key, size, dim, mix):
    width = dim // mix * mix
    count = sketches.windows_in_group(width)
    sets = 2 if mix > 1 else 1
    padded = -(-size // mix) * mix
    before, after, place = np.ones(padded), np.ones(padded), np.zeros((padded, dim))
    groups = [
        np.asarray(prng.counter_bits(jax.random.fold_in(key, group), (sets * width + count,)))
        for group in range(-(-padded // (width * count)))
    ]
    for index in range(padded):
        window, within = divmod(index, width)
        group, window = divmod(window, count)
        words = groups[group]
        before[index] = bit(words[within], window)
        if mix > 1:
            after[index] = bit(words[width + within], window)
        place[index, (int(words[sets * width + window]) + within) % dim] = 1
    mixing = np.kron(np.eye(padded // mix), hadamard(mix)) / math.sqrt(mix)
    return ((before[:, None] * mixing) @ (after[:, None] * place))[:size]


@pytest.mark.parametrize(
    ("family", "size", "dim"),
    [
        ("rademacher", 700, 5),
        ("countsketch", 700, 7),
        ("countsketch", 50, 64),
        ("srht", 700, 70),
        ("srht", 30, 64),
        ("srht", 40, 3),
    ],
)
def test_maps_are_the_stated_matrices(family, size, dim):
    key = jax.random.key(3)
    g = np.random.default_rng(0).standard_normal((3, size))
    if family == "rademacher":
        matrix = signs_matrix(key, size, dim)
    else:
        mix = 1 if family == "countsketch" else sketches.mixed_block(dim)
        matrix = ring_matrix(key, size, dim, mix)
        np.testing.assert_allclose((matrix**2).sum(1), 1, rtol=1e-12)
    with jax.enable_x64(True):
        found = jax.jit(sketches.SKETCHES[family], static_argnums=1)(key, dim, jnp.asarray(g))
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, g @ matrix, atol=1e-12)
    single = jax.jit(sketches.SKETCHES[family], static_argnums=1)(key, dim, jnp.float32(g))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, g @ matrix, atol=2e-5)


@pytest.mark.parametrize("size", [1, 4, 64, 256, 1024])
def test_the_mixing_matrix_is_hadamards(size):
    x = np.random.default_rng(0).standard_normal(3 * size).astype(np.float32)
    expected = (x.astype(np.float64).reshape(3, size) @ hadamard(size)).ravel() / math.sqrt(size)
    np.testing.assert_allclose(
        jax.jit(sketches.hadamard, static_argnums=1)(x, size), expected, atol=1e-5
    )


def test_kronecker_is_a_product_of_two_sign_matrices():
    proj, tree = projector("kronecker", dim=32, seed=4), gradients(3)
    g = tree["layers"]["up"]["kernel"][:, 1]
    key = prng.leaf_key(jax.random.key(4), "layers.up.kernel", 1)
    left, right = (
        np.asarray(sketches.signs(jax.random.fold_in(key, side), rows, size, jnp.float32))
        for side, rows, size in ((0, 24, 4), (1, 96, 8))
    )
    expected = np.einsum("nio,ik,om->nkm", g, left, right).reshape(3, 32) / math.sqrt(32)
    np.testing.assert_allclose(proj.leaf("layers.up.kernel", 1, g), expected, atol=2e-4)


def test_a_projection_is_the_sum_of_its_leaves_under_their_keys():
    tree, total = gradients(2), 0
    for path, value in (("embed.embedding", tree["embed"]["embedding"]), ("scale", tree["scale"])):
        key = prng.leaf_key(jax.random.key(9), path)
        size = math.prod(value.shape[1:])
        total += np.asarray(value, np.float64).reshape(2, -1) @ signs_matrix(key, size, 11)
    part = {"embed": tree["embed"], "scale": tree["scale"], "nothing": None}
    np.testing.assert_allclose(project(projector("rademacher", 11, 9))(part), total, atol=1e-4)


# Quality.


def over_seeds(family, dim, seeds, tree):
    """[seeds, N, dim], in float64."""

    def one(seed):
        return Projector(family, dim, seed).project(tree)

    return np.asarray(jax.jit(lambda seeds: jax.lax.map(one, seeds))(jnp.arange(seeds)), np.float64)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "kronecker"])
def test_mean_and_variance_over_seeds(family):
    """Of <Sx, Sy> and |Sx|^2, in closed form for dense maps and as a bound for rings."""
    dim, seeds = 16, 2000
    rows = flat(gradients(2, {"a": (40,), "b": (25, 6)}))
    unit = rows / np.linalg.norm(rows, axis=1)[:, None]
    tree = {"a": jnp.float32(unit[:, :40]), "b": jnp.float32(unit[:, 40:].reshape(2, 25, 6))}
    drawn = over_seeds(family, dim, seeds, tree)
    x, y = unit
    for found, wanted, overlap in (
        (np.einsum("sd,sd->s", drawn[:, 0], drawn[:, 1]), x @ y, (x**2 * y**2).sum()),
        (np.einsum("sd,sd->s", drawn[:, 0], drawn[:, 0]), 1.0, (x**4).sum()),
    ):
        error = found - wanted
        assert abs(error.mean()) < 4.5 * error.std() / math.sqrt(seeds)
        variance = (1 + wanted**2 - 2 * overlap * (family != "gaussian")) / dim
        if family == "srht":
            variance = (1 + wanted**2) / dim
        spread = np.std(error**2) / math.sqrt(seeds)
        assert (error**2).mean() < variance + 4.5 * spread
        if family not in RINGS:
            assert (error**2).mean() > variance - 4.5 * spread


def errors(family, dim, tree):
    """(<Sx, Sy> - <x, y>) / sqrt((1 + c^2) / dim) of pairs, and (|Sx|^2 - 1) / sqrt(2 / dim)."""
    drawn = np.asarray(project(projector(family, dim, 5))(tree), np.float64)
    rows = flat(tree)
    length = np.linalg.norm(rows, axis=1)[:, None]
    cosine, found = (part @ part.T for part in (rows / length, drawn / length))
    pairs = np.triu_indices(len(rows), 1)
    scaled = (found - cosine)[pairs] * np.sqrt(dim / (1 + cosine[pairs] ** 2))
    return scaled, (np.diag(found) - 1) * math.sqrt(dim / 2)


@pytest.mark.parametrize(
    "family", [pytest.param("rademacher", marks=pytest.mark.slow), "countsketch", "srht"]
)
@pytest.mark.parametrize(
    ("dim", "columns"),
    [
        (512, 256),
        pytest.param(512, 1024, marks=pytest.mark.slow),
        pytest.param(2048, 1024, marks=pytest.mark.slow),
        pytest.param(8192, 1024, marks=pytest.mark.slow),
    ],
)
def test_ten_thousand_pairs(family, dim, columns):
    """Bias within 4.5 standard errors, RMSE and norms as theory says; 11,175 pairs."""
    tree = low_rank_gradients(150, 32 if columns == 256 else 64, columns)
    scaled, norms = errors(family, dim, tree)
    assert abs(scaled.mean()) < 4.5 * scaled.std() / math.sqrt(scaled.size)
    within = 0.1 if family == "rademacher" else 0.2
    assert abs(np.sqrt((scaled**2).mean()) - 1) < within
    assert np.abs(norms).max() < (6 if family == "rademacher" else 12)


@pytest.mark.parametrize(
    "family",
    [
        "countsketch",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("rademacher", "srht")),
    ],
)
def test_blocks_filled_alike_meet_by_chance(family):
    """Leaves of which only a few numbers count, at the same places of each."""
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((2, 12, 64)) * (np.arange(64) < 4)
    numbers /= np.linalg.norm(numbers, axis=(1, 2), keepdims=True)
    tree = {f"leaf{i}": jnp.float32(numbers[:, i]) for i in range(12)}
    x, y = numbers.reshape(2, -1)
    drawn = over_seeds(family, 64, 500, tree)
    squares = (np.einsum("sd,sd->s", drawn[:, 0], drawn[:, 1]) - x @ y) ** 2
    spread = squares.std() / math.sqrt(len(squares))
    assert squares.mean() < (1 + (x @ y) ** 2) / 64 + 4.5 * spread
    assert 4.5 * spread < 0.7 / 64


@pytest.mark.slow
@pytest.mark.parametrize("family", ["rademacher", "countsketch", "srht"])
def test_the_best_five_percent_stay_the_best(family):
    """By cosine with a query: planted examples share a direction with it."""
    rng = np.random.default_rng(3)
    tree = low_rank_gradients(401, 16, 128)
    query = jax.tree.map(lambda g: g[400], tree)
    planted = np.arange(401) < 20
    strength = np.where(planted, rng.uniform(0.6, 1.2, 401), rng.uniform(0, 0.2, 401))

    def plant(g, q):
        return g + jnp.float32(strength).reshape(-1, *(1,) * q.ndim) * q[None]

    tree = jax.tree.map(plant, tree, query)

    def best(rows):
        unit = rows / np.linalg.norm(rows, axis=1)[:, None]
        return set(np.argsort(-(unit[:400] @ unit[400]))[:20].tolist())

    found = best(np.asarray(project(projector(family, 1024, 2))(tree), np.float64))
    assert len(found & best(flat(tree))) >= 18


# The same rows whatever stands beside them, and wherever they lie.


@each_loop
def test_a_row_does_not_depend_on_its_batch(family):
    shapes = {"embed": FEW["embed"], "layers": FEW["layers"]}
    run, tree = project(projector(family, 64, 1)), gradients(37, shapes)
    whole = np.asarray(run(tree))
    order = np.random.default_rng(0).permutation(37)
    for rows in ([0], list(range(20)), order):
        part = run(jax.tree.map(lambda g, rows=rows: g[jnp.asarray(rows)], tree))
        np.testing.assert_array_equal(part, whole[np.asarray(rows)])
    assert run(jax.tree.map(lambda g: g[:0], tree)).shape == (0, 64)


@each_loop
def test_layers_may_be_stacked_streamed_or_apart(family):
    proj, tree = projector(family, 64, 1), gradients(3, SMALL)
    whole = project(proj)(tree)
    layers = [jax.tree.map(lambda g, i=i: g[:, i], tree["layers"]) for i in range(2)]
    np.testing.assert_array_equal(project(proj)({**tree, "layers": layers}), whole)
    np.testing.assert_array_equal(proj.project(tree), whole)

    stack = tree["layers"]["up"]["kernel"]
    total = None
    for i in range(2):
        total = proj.leaf("layers.up.kernel", i, stack[:, i], total)
    np.testing.assert_array_equal(proj.leaf("layers.up.kernel", None, stack), total)
    traced = jax.jit(lambda i: proj.leaf("layers.up.kernel", i, stack[:, 1]))(1)
    np.testing.assert_array_equal(traced, proj.leaf("layers.up.kernel", 1, stack[:, 1]))

    streamed = sum(proj.leaf(leaf.path, None, leaf.value) for leaf in paths.flatten(tree)[0])
    np.testing.assert_allclose(streamed, whole, atol=1e-4)


def test_every_leaf_layer_and_seed_has_a_map_of_its_own():
    g = gradients(1, {"a": (60,)})["a"]
    rows = [
        projector("rademacher", 64, seed).leaf(path, layer, g)
        for seed, path, layer in ((0, "a", None), (1, "a", None), (0, "b", None), (0, "a", 1))
    ]
    rows = np.concatenate(rows)
    unit = rows / np.linalg.norm(rows, axis=1)[:, None]
    assert np.abs(unit @ unit.T - np.eye(4)).max() < 4.5 / 8


EXAMPLES, ROWS = PartitionSpec(("data", "fsdp")), PartitionSpec(None, None, ("fsdp", "model"))


@pytest.mark.multidevice
@pytest.mark.parametrize(
    "spec",
    [
        PartitionSpec("data", None, "fsdp"),
        *(pytest.param(spec, marks=pytest.mark.slow) for spec in (EXAMPLES, ROWS)),
    ],
    ids=["both", "examples", "rows"],
)
@each_loop
def test_sharding_changes_no_bit(family, spec):
    mesh = make_mesh(data=2, fsdp=2, model=2)
    tree = {"layers": gradients(12, SMALL["layers"])}
    plain = projector(family, 64, 1)
    whole = np.asarray(project(plain)(tree))
    sharded = jax.device_put(tree, NamedSharding(mesh, spec))
    found = project(projector(family, 64, 1, mesh=mesh))(sharded)
    np.testing.assert_array_equal(found, whole)
    assert len(found.sharding.device_set) == 8
    np.testing.assert_array_equal(plain.project(sharded), whole)


@pytest.mark.slow  # as the stated matrices are
@each_loop
def test_it_is_linear(family):
    run = project(projector(family, 64, 1))
    x, y = gradients(3), gradients(3, seed=1)
    both = run(jax.tree.map(lambda x, y: 2 * x - 3 * y, x, y))
    size = np.abs(flat(x)).sum(1).max()
    np.testing.assert_allclose(both, 2 * run(x) - 3 * run(y), atol=1e-6 * size)


def test_other_machines_have_other_loops_and_the_same_map():
    g = jnp.float32(np.random.default_rng(0).standard_normal((5, 9000)))
    key = jax.random.key(0)
    blocks = functools.partial(sketches.dense_blocks, sketches.signs, key, dim=96)
    small, large = (
        jax.jit(functools.partial(blocks, blocks_at_once=at_once, examples=examples))(g)
        for at_once, examples in ((1, 16), (4, 128))
    )
    np.testing.assert_allclose(small, large, atol=2e-5)
    ring = functools.partial(sketches.ring_sketch, key, dim=96, mix=64)
    added, gathered = (
        jax.jit(functools.partial(ring, place=place))(g)
        for place in (sketches.add_windows, sketches.gather_windows)
    )
    np.testing.assert_allclose(added, gathered, atol=2e-5)


@each_loop
def test_narrow_gradients_are_summed_in_float32(family):
    tree = gradients(3, FEW)
    narrow = {
        "embed": tree["embed"].astype(jnp.bfloat16),
        "layers": {"bias": tree["layers"]["bias"].astype(jnp.float16)},
        "temperature": tree["temperature"].astype(jnp.bfloat16),
    }
    run = project(projector(family, 64, 1))
    found = run(narrow)
    assert found.dtype == jnp.float32
    wide = run(jax.tree.map(lambda g: g.astype(jnp.float32), narrow))
    np.testing.assert_array_equal(found, wide)


@each_loop
def test_only_blocks_are_alive(family):
    """Temporary memory is that of a block, whatever the size of the leaf."""
    count, dim = 32, 256

    def temporary(rows):
        g = jax.ShapeDtypeStruct((count, rows, 256), jnp.float32)
        run = jax.jit(projector(family, dim, 0).project)
        return run.lower({"w": g}).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(256), temporary(2048)
    ring = 2 * count * dim
    blocks = {
        "rademacher": 2 * (512 * (dim + count) + ring),
        "gaussian": 4 * (512 * (dim + count) + ring),
        "countsketch": 4 * ring + 2**17,
        "srht": 3 * count * 32 * dim + 4 * ring,
        "kronecker": None,
    }[family]
    if blocks is None:  # one gradient and its two matrices of signs
        assert large < 4 * 4 * 2048 * 256
    else:
        assert large < 4 * blocks
        assert large < 1.2 * small + 2**16


@pytest.mark.parametrize("family", ["kronecker", "rademacher"])
def test_factors_stand_for_their_gradient(family):
    rng = np.random.default_rng(0)
    a, b = (jnp.float32(rng.standard_normal((5, 7, size))) for size in (24, 40))
    proj = projector(family, 64, 1)
    formed = jnp.einsum("nti,nto->nio", a, b)
    found = jax.jit(lambda a, b: proj.factors("w.kernel", 2, a, b))(a, b)
    np.testing.assert_allclose(found, proj.leaf("w.kernel", 2, formed), atol=2e-4)
    one = proj.factors("w.kernel", 2, a[:, 0], b[:, 0], total=found)
    expected = proj.leaf("w.kernel", 2, jnp.einsum("ni,no->nio", a[:, 0], b[:, 0]), found)
    np.testing.assert_allclose(one, expected, atol=2e-4)


def test_a_projector_crosses_jit_and_seeds_do_not_recompile():
    @jax.jit
    def run(proj, g):
        return proj.project({"w": g})

    g = jnp.ones((2, 10))
    first = run(projector("countsketch", 8, 0), g)
    second = run(projector("countsketch", 8, 1), g)
    assert run._cache_size() == 1
    assert (first != second).any()
    np.testing.assert_array_equal(second, projector("countsketch", 8, 1).project({"w": g}))
    assert dataclasses.replace(projector("srht", 8), dim=16).dim == 16


def projected(tree):
    return lambda: projector("countsketch", 8).project(tree)


HUGE = jnp.full((2, 90), 3e38)
NOT_FINITE = jnp.ones((4, 3)).at[2, 1].set(jnp.nan)
OVERFLOW = jnp.full((2, 3), 300, jnp.float16) ** 2


@pytest.mark.parametrize(
    ("act", "key", "parts"),
    [
        (lambda: projector("hadamard", 8), "family", ["countsketch, gaussian, kronecker"]),
        (lambda: projector("srht", 0), "dim", []),
        (lambda: projector("srht", 8, -1), "seed", ["(got -1)"]),
        (lambda: projector("kronecker", 514), "dim", ["kronecker (got 514)"]),
        (projected({}), "gradients", ["empty"]),
        (projected({"a": None}), "gradients", ["empty"]),
        (projected({"a": jnp.ones((2, 3)), "b": jnp.ones((4, 3))}), "gradients", ["b ", "(got 4)"]),
        (projected({"a": jnp.ones((2, 3), int)}), "gradients", ["a must hold floats (got int32)"]),
        (projected({"a": jnp.ones(())}), "gradients", ["a has no axis of examples"]),
        (projected({"a": jnp.ones((4, 3)), "b": NOT_FINITE}), "gradients", ["example 2", "at b"]),
        (projected({"a": OVERFLOW}), "gradients", ["example 0", "Use float32 or bfloat16"]),
        (lambda: projector("gaussian", 8).project({"a": HUGE}), "gradients", ["0 overflows"]),
    ],
)
def test_mistakes_are_named(act, key, parts):
    with refused(key, *parts):
        act()


def test_paths_that_share_a_hash_are_refused():
    tree = {word: jnp.ones((1, 2)) for word in ("plumless", "buckeroo")}  # one CRC-32
    with pytest.raises(ValueError, match="share a hash"):
        projector("countsketch", 8).project(tree)
