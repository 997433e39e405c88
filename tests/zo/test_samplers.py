"""Every sampler: moments, and that a part drawn alone is that part of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import zo
from jaxlm.core import paths, views
from jaxlm.zo.perturbation import directions as drawn
from tests.zo.problems import (
    assert_mean,
    directions,
    flat,
    network_batch,
    network_loss,
    network_params,
    over_keys,
)

pytestmark = pytest.mark.optimized

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


NAMES = list(samplers())


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
        # A projection on 2 of 5, or of 4, dimensions.
        return over_leaves(lambda leaf: {"e": 2 / 5, "l": 2 / 4, "h": 1}[leaf.path[0]])
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


@pytest.mark.parametrize("name", NAMES)
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

    @jax.jit
    def draw(value, layer, rows):
        path, shape = ("embed.tokens", (5, 3)) if layer is None else ("layers.kernel", (4, 3))
        site = zo.Site(path, shape, layer, rows, views.take(value, rows))
        return dense(sampler.sample(key, site))

    for value, layer in (
        (params["embed"]["tokens"], None),
        (params["layers"]["kernel"][1], jnp.int32(1)),
    ):
        whole = np.asarray(draw(value, layer, None))
        indices = jnp.array([[3, 0], [2, 2]])
        np.testing.assert_array_equal(draw(value, layer, indices), whole[np.asarray(indices)])
        path, shape = ("embed.tokens", (5, 3)) if layer is None else ("layers.kernel", (4, 3))
        block = zo.Site(path, shape, layer, (1, 2), value[1:3])
        np.testing.assert_array_equal(
            jax.jit(lambda block=block: dense(sampler.sample(key, block)))(), whole[1:3]
        )


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


@pytest.mark.parametrize(
    "name", ["rademacher", "low_rank", "layer_blocks", "magnitude", "variance_modified"]
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


@pytest.mark.parametrize("make", [zo.low_rank, zo.subspace])
def test_the_lazy_factor_stays_for_its_interval(make):
    run, site = jax.random.key(0), zo.Site("w", (6, 5))

    def factors(step):
        z = (
            make(2, interval=3)
            .at(run, jnp.int32(step))
            .factors(jax.random.fold_in(run, step), site)
        )
        lazy, new = (z.right, z.left) if make is zo.low_rank else (z.left, z.right)
        return np.asarray(lazy), np.asarray(new)

    (a, first), (b, second), (c, _), (d, _) = (factors(step) for step in (0, 2, 3, 5))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(c, d)
    assert (a != c).all()
    assert (first != second).all()


def test_the_columns_of_a_subspace_are_orthonormal():
    z = zo.subspace(3).factors(KEY, zo.Site("w", (40, 5)))
    np.testing.assert_allclose(z.left.T @ z.left, np.eye(3), atol=2e-6)


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
    params = {"w": jnp.array(values), "layers": {"k": jnp.array([values[:4], values[4:]])}}
    limits = zo.magnitude(params, 0.5).limits
    assert float(limits["w"]) == 3
    np.testing.assert_array_equal(limits["layers.k"], [2, 5])
    assert float(zo.magnitude(params, 1.0).limits["w"]) == 7


def gradient(sampler, **options):
    estimate = zo.value_and_grad(lambda params: flat(params).sum(), sampler=sampler, **options)
    return estimate(tree(), key=KEY)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zo.low_rank(0), "rank and interval are at least 1, not 0 and 50"),
        (lambda: zo.subspace(2, interval=0), "rank and interval are at least 1, not 2 and 0"),
        (lambda: zo.layer_blocks(2, size=3), "size is 3: give 1 to 2 layers"),
        (lambda: zo.magnitude(tree(), 0.0), "fraction is 0.0: give more than 0 and at most 1"),
        (
            lambda: zo.magnitude({"layers": [{"w": jnp.ones(2)}]}),
            "layers are a list: give stacked layers",
        ),
        (
            lambda: zo.mezo(0.1, sampler=zo.layer_blocks(3)).init(tree(), KEY),
            "num_layers is 3, but layers.kernel has 2",
        ),
        (
            lambda: zo.mezo(0.1, sampler=zo.low_rank(4)).init(tree(), KEY),
            r"rank 4 is more than embed.tokens of shape (5, 3) has",
        ),
        (
            lambda: zo.mezo(0.1, sampler=zo.low_rank(2), select="bias").init(tree(), KEY),
            "LowRankSampler needs a matrix among the selected parameters; there is none",
        ),
        (
            lambda: zo.mezo(0.1, sampler=zo.magnitude({"head": tree()["head"]})).init(tree(), KEY),
            "embed.tokens has no threshold: give magnitude the parameters that are trained, or "
            "leave embed.tokens out by select",
        ),
        (
            lambda: gradient(zo.variance_modified({"layers": NORMS["layers"]}), select="bias"),
            "head.bias has no norm: give one for 'head' beside those for ['layers'], or leave "
            "head.bias out by select",
        ),
        (
            lambda: gradient(zo.expectation_modified({})),
            "embed.tokens has no norm: give one for 'embed' beside those for [], or leave "
            "embed.tokens out by select",
        ),
    ],
)
def test_samplers_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert str(caught.value) == message
