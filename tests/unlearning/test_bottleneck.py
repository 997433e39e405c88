"""The key-value bottleneck: brute force, scikit-learn, and the experiment on Gaussian classes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from jaxlm.core.errors import UserError
from jaxlm.unlearning import bottleneck

CLASSES = 10


def gaussians(seed, count, means):
    keys = jax.random.split(jax.random.key(seed))
    labels = jax.random.randint(keys[0], (count,), 0, len(means))
    return means[labels] + jax.random.normal(keys[1], (count, means.shape[1])), labels


@pytest.fixture(scope="module")
def small():
    """A trained bottleneck of few pairs, its features and labels."""
    x, labels = gaussians(1, 80, 2 * jax.random.normal(jax.random.key(0), (3, 5)))
    state = bottleneck.init(jax.random.key(2), x, books=4, pairs=6, size=3, batch_size=40)
    options = {"classes": 3, "steps": 20, "batch_size": 40, "key": jax.random.key(3)}
    return bottleneck.train(state, x, labels, optax.adam(0.3), **options)[0], x, labels


def by_hand(state, x, disabled):
    """Indices [N, C], by distances in double precision."""
    projections, keys = (np.asarray(a, np.float64) for a in state[:2])
    points = np.einsum("nd,cde->nce", np.asarray(x, np.float64), projections)
    distances = ((points[:, :, None] - keys) ** 2).sum(axis=3)
    return np.where(disabled, np.inf, distances).argmin(axis=2)


def test_an_example_selects_the_nearest_enabled_key(small):
    state, x, _ = small
    none = np.zeros((4, 6), bool)
    np.testing.assert_array_equal(bottleneck.lookup(state, x), by_hand(state, x, none))
    some = np.random.default_rng(0).random((4, 6)) < 0.5
    found = bottleneck.lookup(state, x, jnp.asarray(some))
    np.testing.assert_array_equal(found, by_hand(state, x, some))


@pytest.mark.parametrize("on_disabled", ["reroute", "zero"])
def test_logits_are_the_mean_of_the_values_that_are_left(small, on_disabled):
    state, x, _ = small
    state = bottleneck.forget_by_activations(state, x[:20], 9)
    disabled = np.asarray(state.disabled)
    assert disabled.sum() == 9
    indices = by_hand(state, x, disabled if on_disabled == "reroute" else np.zeros_like(disabled))
    values = np.where(disabled[..., None], 0, small[0].values)
    expected = np.mean([values[c, indices[:, c]] for c in range(4)], axis=0)
    found = bottleneck.logits(state, x, on_disabled=on_disabled)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_pairs_that_are_selected_most_often_are_disabled(small):
    state, x, _ = small
    indices = by_hand(state, x[:20], np.zeros((4, 6), bool))
    hits = np.array([np.bincount(column, minlength=6) for column in indices.T])
    forget = bottleneck.forget_by_activations
    left = forget(state, x[:20], 7)
    assert left.disabled.sum() == 7
    assert hits[left.disabled].min() >= hits[~left.disabled].max()
    assert not left.values[left.disabled].any()
    np.testing.assert_array_equal(left.values[~left.disabled], state.values[~left.disabled])
    # Pairs that no example selects are kept, whatever the count.
    np.testing.assert_array_equal(forget(state, x[:20], 24).disabled, hits > 0)


def test_the_pairs_of_some_examples_are_disabled(small):
    state, x, _ = small
    left = bottleneck.forget_by_examples(state, x, 1, jax.random.key(0))
    np.testing.assert_array_equal(left.disabled.sum(axis=1), [1, 1, 1, 1])
    chosen = left.disabled.argmax(axis=1)
    indices = by_hand(state, x, np.zeros((4, 6), bool))
    assert (indices == np.asarray(chosen)).all(axis=1).any()
    every = bottleneck.forget_by_examples(state, x, len(x), jax.random.key(0))
    expected = bottleneck.forget_by_activations(state, x, 24)
    np.testing.assert_array_equal(every.disabled, expected.disabled)


def test_training_leaves_keys_and_disabled_pairs_alone(small):
    state, x, labels = small
    left = bottleneck.forget_by_activations(state, x[:20], 9)
    options = {"classes": 3, "batch_size": 40, "key": jax.random.key(4)}
    trained, losses = bottleneck.train(left, x, labels, optax.sgd(1.0), steps=40, **options)
    assert losses[-10:].mean() < losses[:10].mean()
    np.testing.assert_array_equal(trained.keys, state.keys)
    assert not trained.values[left.disabled].any()
    # The steps of a shorter training are the first of a longer one.
    _, fewer = bottleneck.train(left, x, labels, optax.sgd(1.0), steps=3, **options)
    np.testing.assert_allclose(fewer, losses[:3], rtol=1e-6)


def test_fit_takes_the_steps_of_gradient_descent():
    """Of one example, every batch of which has the gradient p - y."""
    options = {"steps": 4, "batch_size": 2, "key": jax.random.key(0)}
    watched = jnp.ones((1, 1)), jnp.array([2])
    found = bottleneck.fit(
        jnp.multiply, jnp.zeros((1, 3)), *watched, optax.sgd(0.5), watched=watched, **options
    )
    logits, losses = np.zeros(3), []
    for _ in range(4):
        p = np.exp(logits) / np.exp(logits).sum()
        losses.append(-np.log(p[2]))
        logits -= 0.5 * (p - np.eye(3)[2])
    np.testing.assert_allclose(found.params[0], logits, rtol=1e-5)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    np.testing.assert_array_equal(found.accuracy, np.ones(4))


def test_keys_are_as_close_to_the_points_as_those_of_k_means():
    x, _ = gaussians(5, 600, 3 * jax.random.normal(jax.random.key(6), (8, 4)))
    sizes = {"books": 2, "pairs": 16, "size": 2}
    state = bottleneck.init(jax.random.key(7), x, **sizes, passes=30, batch_size=100)
    indices = np.asarray(bottleneck.lookup(state, x))
    for c in range(2):
        points, keys = np.asarray(x @ state.projections[c]), np.asarray(state.keys[c])
        assert len(set(indices[:, c])) == 16  # no key is dead
        with threadpool_limits(1):
            best = KMeans(16, n_init=10, random_state=0).fit(points).inertia_
        assert ((points - keys[indices[:, c]]) ** 2).sum() < 1.35 * best


def test_gaussian_classes_are_forgotten():
    """The experiment of the specification: 10 classes, 32 codebooks of 64 pairs."""
    means = jax.random.normal(jax.random.key(0), (CLASSES, 64))
    (x, labels), (test, test_labels) = gaussians(1, 5000, means), gaussians(2, 4000, means)
    state = bottleneck.init(jax.random.key(3), x, books=32, pairs=64, size=8)
    state, losses = bottleneck.train(
        state, x, labels, optax.sgd(100.0), classes=CLASSES, steps=300, key=jax.random.key(4)
    )
    assert losses[-1] < 0.5 * losses[0]

    @jax.jit
    def accuracies(state):
        right = bottleneck.logits(state, test).argmax(axis=1) == test_labels
        forgotten = test_labels == 0
        return right.mean(where=forgotten), right.mean(where=~forgotten)

    before, others = map(float, accuracies(state))
    assert min(before, others) > 0.99
    curve, forget = [], x[labels == 0]
    for count in (100, 200, 400, 800):
        less = bottleneck.forget_by_activations(state, forget, count)
        left, kept = map(float, accuracies(less))
        print(f"N_a {count}: forgotten {left:.3f}, others {kept:.3f}")
        curve.append(left)
        assert kept >= others - 0.02
    assert before > curve[0] > curve[1] > curve[2]
    assert max(curve[2:]) <= 0.01
    curve = []
    for count in (1, 5, 20, 100):
        less = bottleneck.forget_by_examples(state, forget, count, jax.random.key(5))
        left, kept = map(float, accuracies(less))
        print(f"N_e {count}: {less.disabled.sum()} pairs, forgotten {left:.3f}, others {kept:.3f}")
        curve.append(left)
        assert kept >= others - 0.02
    assert curve[-1] <= 0.01
    assert curve[0] > curve[2] > curve[3]


def test_a_mistake_is_named(small):
    state, x, labels = small
    with pytest.raises(UserError, match=r"^pairs: must be from 1 to 80 \(got 81\)"):
        bottleneck.init(jax.random.key(0), x, books=1, pairs=81, size=2)
    with pytest.raises(UserError, match=r"^on_disabled: not known \(got 'skip'\)"):
        bottleneck.logits(state, x, on_disabled="skip")
    with pytest.raises(UserError, match=r"^classes: the values have 3 \(got 4\)"):
        bottleneck.train(
            state, x, labels, optax.sgd(0.1), classes=4, steps=1, key=jax.random.key(0)
        )
