"""Every sampler: moments, and that a part drawn alone is that part of the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import zo
from jaxlm.core import paths, views
from jaxlm.core.errors import UserError
from jaxlm.zo.factored import newton_schulz
from jaxlm.zo.perturbation import directions as drawn
from jaxlm.zo.structured import orthonormal
from tests.helpers.sentences import check_sentence
from tests.zo.problems import (
    assert_mean,
    directions,
    flat,
    network_batch,
    network_loss,
    network_params,
    over_keys,
)

pytestmark = [pytest.mark.optimized, pytest.mark.default_flags]

slow = pytest.mark.slow
KEY = jax.random.key(11)
SHAPES = {"head.bias": (3,), "embed.tokens": (5, 3), "layers.kernel": (2, 4, 3)}
NORMS = {"layers": jnp.array([0.5, 2.0]), "embed": jnp.float32(4), "head": jnp.float32(3)}


def tree():
    size = np.linspace(-1, 1.3, 42, dtype=np.float32)
    values = jnp.asarray(np.random.default_rng(0).permutation(size))
    return {
        "embed": {"tokens": values[:15].reshape(5, 3)},
        "head": {"bias": values[15:18]},
        "layers": {"kernel": values[18:].reshape(2, 4, 3)},
    }


def samplers():
    return {
        "gaussian": zo.gaussian(),
        "rademacher": zo.rademacher(),
        "sphere": zo.sphere(),
        "low_rank": zo.low_rank(2),
        "subspace": zo.subspace(2),
        "layer_blocks": zo.layer_blocks(2).at(KEY, 1),
        "magnitude": zo.magnitude(tree(), 0.5),
        "variance_modified": zo.variance_modified(NORMS),
        "expectation_modified": zo.expectation_modified(NORMS),
    }


# The others share the way by which these come to their numbers.
QUICK = ("subspace", "layer_blocks", "magnitude", "variance_modified")
NAMES = [pytest.param(name, marks=() if name in QUICK else slow) for name in samplers()]


def dense(z):
    return z.dense() if isinstance(z, views.LowRank) else z


def perturbation(sampler, key, params):
    """z as the loss sees it, a tree like params."""
    one = drawn(key, sampler, params, None, 1)
    key, sampler = one.at(0)

    def leaf_z(leaf):
        shape = leaf.value.shape

        def at(shape, layer, value):
            return dense(sampler.sample(key, zo.Site(leaf.path, shape, layer, None, value)))

        if not leaf.stacked:
            return at(shape, leaf.layer, leaf.value)
        return jnp.stack([at(shape[1:], jnp.int32(i), leaf.value[i]) for i in range(shape[0])])

    return paths.map_with_path(leaf_z, params)


def over_leaves(value_of):
    return np.concatenate(
        [np.full(leaf.value.size, value_of(leaf)) for leaf in paths.flatten(tree())[0]]
    )


def expected_variance(name):
    """Of each coordinate; different ones are uncorrelated."""
    if name == "subspace":
        # A projection on 2 of 3 outputs.
        return over_leaves(lambda leaf: {"e": 2 / 3, "l": 2 / 3, "h": 1}[leaf.path[0]])
    if name == "layer_blocks":
        return flat(jax.tree.map(jnp.zeros_like, tree()) | {"layers": {"kernel": _second_layer()}})
    if name == "magnitude":
        return flat(small_half())
    if name.endswith("modified"):
        layer = np.repeat([1 / 0.5**2, 1 / 2.0**2], 12)
        return np.concatenate([np.full(15, 1 / 16), np.full(3, 1 / 9), layer])
    return np.ones(42)


def _second_layer():
    return jnp.zeros((2, 4, 3)).at[1].set(1)


def small_half():
    """1 where |w| is among the smaller half of its leaf and layer, by sorting."""

    def kept(x):
        order = np.sort(np.abs(x).ravel())
        return (np.abs(x) <= order[(x.size - 1) // 2]).astype(np.float32)

    params = jax.tree.map(np.asarray, tree())
    return {
        "embed": {"tokens": kept(params["embed"]["tokens"])},
        "head": {"bias": kept(params["head"]["bias"])},
        "layers": {"kernel": np.stack([kept(x) for x in params["layers"]["kernel"]])},
    }


@pytest.mark.parametrize("name", samplers())
def test_mean_and_covariance_are_those_of_the_docstring(name):
    sampler, params = samplers()[name], tree()
    z = np.asarray(over_keys(lambda key: flat(perturbation(sampler, key, params)), 4096))
    assert_mean(z, 0)
    products = np.einsum("ni,nj->nij", z, z)
    assert_mean(products, np.diag(expected_variance(name)), rounding=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_rows_drawn_alone_are_those_of_the_whole(name):
    params = tree()
    one = drawn(KEY, samplers()[name], params, None, 1)
    key, sampler = one.at(0)

    indices = jnp.array([[3, 0], [2, 2]])

    @jax.jit
    def draw(value, layer):
        path = "embed.tokens" if layer is None else "layers.kernel"

        def at(rows):
            site = zo.Site(path, value.shape, layer, rows, views.take(value, rows))
            return dense(sampler.sample(key, site))

        return at(indices), at((1, 2)), at(None)

    for value, layer in (
        (params["embed"]["tokens"], None),
        (params["layers"]["kernel"][1], jnp.int32(1)),
    ):
        taken, block, whole = draw(value, layer)
        np.testing.assert_array_equal(taken, whole[indices])
        np.testing.assert_array_equal(block, whole[1:3])


@pytest.mark.parametrize("name", NAMES)
def test_layers_of_a_list_get_the_noise_of_stacked_ones(name):
    params, sampler = tree(), samplers()[name]
    layers = [{"kernel": kernel} for kernel in params["layers"]["kernel"]]
    make = jax.jit(lambda params: perturbation(sampler, KEY, params))
    stacked, listed = make(params), make(params | {"layers": layers})
    joined = jnp.stack([layer["kernel"] for layer in listed["layers"]])
    # Sums have an order, which is the compiler's: the norm of a sphere, the products of a subspace.
    ulp = 1e-6 if name in ("sphere", "subspace") else 0
    np.testing.assert_allclose(stacked["layers"]["kernel"], joined, rtol=ulp)
    np.testing.assert_allclose(stacked["embed"]["tokens"], listed["embed"]["tokens"], rtol=ulp)


MORE = ("rademacher", "layer_blocks", "variance_modified")


@pytest.mark.parametrize(
    "name",
    [
        *("low_rank", "magnitude"),
        *(pytest.param(name, marks=slow) for name in MORE),
    ],
)
def test_a_view_along_any_sampler_sees_perturbed_parameters(name):
    params, batch = network_params(), network_batch()
    sampler = zo.magnitude(params, 0.5) if name == "magnitude" else samplers()[name]
    options = {"key": KEY, "eps": 0.01, "sampler": sampler}
    lean, plain = (
        jax.jit(lambda params, m=m: zo.spsa(network_loss, params, batch, **options, **m))(params)
        for m in ({}, {"materialize_params": True})
    )
    np.testing.assert_allclose(lean.loss_plus, plain.loss_plus, rtol=2e-6)
    np.testing.assert_allclose(lean.loss_minus, plain.loss_minus, rtol=2e-6)
    assert lean.loss_plus != lean.loss_minus


@pytest.mark.parametrize("path", ["w", "w.weight", "table.embedding"])
@pytest.mark.parametrize("make", [zo.low_rank, zo.subspace])
def test_the_lazy_factor_stays_for_its_interval_on_the_side_of_the_authors(make, path):
    """Of weights [out, in], LOZO keeps V [in, r], ZO-Muon P [out, r]; kernels are [in, out]."""
    run, site = jax.random.key(0), zo.Site(path, (6, 5))
    lazy_is_right = (path == "w") == (make is zo.subspace)

    def factors(step):
        z = (
            make(2, interval=3)
            .at(run, jnp.int32(step))
            .factors(jax.random.fold_in(run, step), site)
        )
        assert (z.left.shape, z.right.shape) == ((6, 2), (2, 5))
        lazy, new = (z.right, z.left) if lazy_is_right else (z.left, z.right)
        return np.asarray(lazy), np.asarray(new)

    (a, first), (b, second), (c, _), (d, _) = (factors(step) for step in (0, 2, 3, 5))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(c, d)
    assert (a != c).all()
    assert (first != second).all()


def ill_conditioned(n: int, rank: int) -> dict[str, np.ndarray]:
    """Columns that are nearly or wholly alike, of very different size, or zeros."""
    rng = np.random.default_rng(n * 100 + rank)
    x = rng.standard_normal((n, rank))
    return {
        "normal": x,
        "alike": 1 + 1e-6 * x,
        "the same": np.ones_like(x),
        "signs": np.sign(x),
        "sizes": x * 10.0 ** rng.integers(-30, 30, rank),
        "zeros": x * (np.arange(rank) % 3 > 0),
    }


@pytest.mark.parametrize("n", [1, 3, 64, *(pytest.param(n, marks=slow) for n in (2, 8, 31, 96))])
def test_a_basis_is_orthonormal_at_every_rank_whatever_is_drawn(n):
    for rank in range(1, n + 1) if n <= 8 else sorted({1, 2, n // 2, n - 1, n}):
        drawn = jnp.asarray(np.stack([*ill_conditioned(n, rank).values()]), jnp.float32)
        for p in np.asarray(jax.jit(jax.vmap(orthonormal))(drawn), np.float64):
            np.testing.assert_allclose(p.T @ p, np.eye(rank), atol=1e-5)


@pytest.mark.parametrize(("rank", "size"), [pytest.param(32, 32, marks=slow), (64, 64), (64, 3)])
def test_a_subspace_is_orthonormal_step_after_step(rank, size):
    """A new basis in each of many steps, as large as the matrix or larger."""
    sampler = zo.subspace(rank, interval=1)

    def error(step):
        p = sampler.at(KEY, step).basis(KEY, zo.Site("w", (5, size)))
        return jnp.abs(p.T @ p - jnp.eye(p.shape[1])).max()

    assert jax.jit(lambda: jax.lax.map(error, jnp.arange(64)))().max() < 1e-5


def test_a_basis_is_drawn_uniformly():
    """By the first moments of the uniform distribution on orthonormal columns."""
    sampler = zo.subspace(3)
    p = np.asarray(over_keys(lambda key: sampler.basis(key, zo.Site("w", (2, 3))), 8192))
    assert_mean(p, 0)
    assert_mean(p**2, 1 / 3)
    assert_mean(p**4, 3 / (3 * 5))
    assert_mean(np.linalg.det(p), 0)


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (12, 12)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    x = np.random.default_rng(2).standard_normal(shape)
    left, values, right = np.linalg.svd(np.asarray(newton_schulz(jnp.float32(x))))
    assert (np.abs(values - 1) < 0.35).all()
    k = min(shape)
    polar_left, _, polar_right = np.linalg.svd(x)
    wanted = polar_left[:, :k] @ polar_right[:k]
    found = left[:, :k] @ right[:k]
    np.testing.assert_allclose(found, wanted, atol=1e-3)


MUON = functools.partial(zo.zo_muon, vector_scale=1.0)
NO_MATRIX = {"b": jnp.ones(3), "x": jnp.ones((2, 2, 2)), "t": jnp.float32(1)}


@pytest.mark.parametrize(
    "make",
    [
        zo.lozo_residual,
        MUON,
        *(pytest.param(make, marks=slow) for make in (zo.lozo, zo.lozo_momentum)),
    ],
)
@pytest.mark.parametrize(
    "params",
    [
        {"one output": jnp.ones((5, 1)), "one input": jnp.ones((1, 5)), **NO_MATRIX},
        pytest.param(NO_MATRIX, marks=slow),
    ],
    ids=["matrices", "no matrix"],
)
def test_a_rank_is_at_most_that_of_the_matrix_and_other_leaves_get_dense_noise(make, params):
    opt = make(1e-3, rank=4, interval=2)
    loss = lambda params, batch: sum((x**2).sum() for x in jax.tree.leaves(params))  # noqa: E731
    state, start = opt.init(params, KEY), params
    step = jax.jit(lambda params, state: opt.step(loss, params, state, None))
    for _ in range(3):
        params, state, info = step(params, state)
    assert np.isfinite(info.loss)
    moved = opt.finalize(params, state)
    for a, b in zip(*map(jax.tree.leaves, (moved, start)), strict=True):
        assert (np.asarray(a) != np.asarray(b)).all()


@pytest.mark.slow
def test_a_subspace_of_all_outputs_trains_for_many_steps():
    """A square matrix, a basis of full rank, new in each step."""
    params = {"w": jnp.eye(32) / 2}
    opt = zo.zo_muon(1e-3, rank=32, interval=1, num_directions=2)
    step = zo.jit_step(opt, lambda params, batch: jnp.sum((params["w"] - batch) ** 2))
    state, batch = opt.init(params, KEY), jnp.ones((32, 32))
    for _ in range(40):
        params, state, info = step(params, state, batch)
    assert np.isfinite(flat(params)).all()
    assert info.loss < 1000


def users_tree(name):
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        name: {"fc1": {"kernel": draw(8, 8), "bias": draw(8)}, "fc2": {"kernel": draw(8, 8)}},
        "output": {"kernel": draw(8, 3)},
    }


@pytest.mark.parametrize("kind", ["low_rank", "subspace", "magnitude", "layer_blocks", "norms"])
def test_a_tree_with_a_key_layers_is_treated_like_any_other(kind):
    """As with a key that means nothing to jaxlm: noise of the same rank, thresholds and norms."""

    def seen(name):
        params = users_tree(name)
        if kind == "magnitude":
            return [np.shape(x) for _, x in sorted(zo.magnitude(params).limits.items())]
        if kind == "norms":
            return sorted(np.ravel(zo.tree_norms(params)["head"]).tolist())
        if kind == "layer_blocks":
            zo.mezo(0.1, sampler=zo.layer_blocks(3)).init(params, KEY)
            return None
        sampler = getattr(zo, kind)(2)
        z = jax.jit(lambda params: directions(params, KEY, sampler=sampler))(params)
        return [np.linalg.matrix_rank(x, 1e-4) if x.ndim == 2 else None for x in jax.tree.leaves(z)]

    found = seen("layers")
    assert found == seen("aayers")
    if kind in ("low_rank", "subspace"):
        assert found == [None, 2, 2, 2]


def test_a_loop_over_layers_that_are_not_declared_is_refused():
    """Its noise would be drawn by layer, and that of the update for the whole leaf."""
    params = {"layers": {"mine": jnp.ones((2, 3))}}

    def loss(params, *, view=None):
        def body(total, item):
            layer, w = item
            return total + views.apply(view, "layers.mine", w, layer).sum(), None

        return jax.lax.scan(body, 0.0, (jnp.arange(2), params["layers"]["mine"]))[0]

    with pytest.raises(UserError, match=r"declare_stacked\(\{'layers.mine': 1\}\)"):
        zo.spsa(loss, params, key=KEY)


def test_a_sphere_of_more_parameters_than_an_int_of_32_bits_counts():
    params = {"w": jax.ShapeDtypeStruct((2**16, 2**15 + 1), jnp.float32)}
    found = jax.eval_shape(lambda params: zo.sphere().along(KEY, params, None), params)
    assert found.scale.shape == ()


def test_thresholds_and_norms_are_of_arrays_of_floats():
    params = {"w": jnp.ones((4, 4)), "none": jnp.zeros((0, 3)), "count": jnp.arange(3), "eps": 0.1}
    sampler = zo.magnitude(params, 1.0)
    est = zo.spsa(lambda params: (params["w"] ** 2).sum(), params, key=KEY, sampler=sampler)
    assert np.isfinite(est.projected_grad).all()
    assert set(zo.tree_norms(params)) == {"head"}
    assert float(zo.tree_norms(params)["head"]) == 4


def test_blocks_of_layers_take_turns_and_add_up_to_the_whole():
    params = network_params() | {"layers": {"kernel": jnp.zeros((3, 2, 2))}}
    sampler = zo.layer_blocks(3, size=2)
    make = jax.jit(lambda step: perturbation(sampler.at(KEY, step), KEY, params))
    z = [make(jnp.int32(step)) for step in range(4)]
    moved = [
        [bool(x.any()) for x in [*part["layers"]["kernel"], part["head"]["bias"]]] for part in z
    ]
    first, second, rest = (
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    )
    assert moved == [first, second, rest, first]
    whole = jax.jit(lambda: perturbation(zo.gaussian(), KEY, params))()
    np.testing.assert_array_equal(flat(z[0]) + flat(z[1]) + flat(z[2]), flat(whole))


@pytest.mark.parametrize("select", [None, "kernel"])
def test_a_sphere_has_the_radius_of_its_dimension(select):
    params = tree()
    z = jax.jit(lambda: directions(params, KEY, sampler=zo.sphere(), select=select))()
    d = 24 if select else 42
    np.testing.assert_allclose(np.linalg.norm(flat(z)), np.sqrt(d), rtol=1e-6)


def test_thresholds_are_those_found_by_sorting():
    values = [4.0, -1.0, 3.0, -2.0, 0.5, 6.0, -5.0, 7.0]
    params = {"w": jnp.array(values), "layers": {"w": jnp.array([values[:4], values[4:]])}}
    limits = zo.magnitude(params, 0.5).limits
    assert float(limits["w"]) == 3
    np.testing.assert_array_equal(limits["layers.w"], [2, 5])
    assert float(zo.magnitude(params, 1.0).limits["w"]) == 7


def test_a_list_of_layers_has_the_thresholds_and_norms_of_a_stack():
    params = tree()
    layers = [{"kernel": kernel} for kernel in params["layers"]["kernel"]]
    for of in (lambda tree: zo.magnitude(tree, 0.5).limits, zo.tree_norms):
        stacked, listed = of(params), of(params | {"layers": layers})
        assert set(stacked) == set(listed)
        for name, value in stacked.items():
            np.testing.assert_allclose(listed[name], value, rtol=1e-6)


def gradient(sampler, **options):
    estimate = zo.value_and_grad(lambda params: flat(params).sum(), sampler=sampler, **options)
    return estimate(tree(), key=KEY)


@pytest.mark.parametrize(
    ("key", "make"),
    [
        ("num_layers", lambda: zo.mezo(0.1, sampler=zo.layer_blocks(3)).init(tree(), KEY)),
        (
            "embed.tokens",
            lambda: zo.mezo(0.1, sampler=zo.magnitude({"head": tree()["head"]})).init(tree(), KEY),
        ),
        (
            "head.bias",
            lambda: gradient(zo.variance_modified({"layers": NORMS["layers"]}), select="bias"),
        ),
        ("embed.tokens", lambda: gradient(zo.expectation_modified({}))),
    ],
)
def test_samplers_that_do_not_fit_the_parameters_are_refused(key, make):
    with pytest.raises(UserError) as caught:
        make()
    check_sentence(str(caught.value), key)
