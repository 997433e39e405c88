"""Minima over the simplex against enumeration of its faces, and the bound on their distance."""

import itertools

import numpy as np
import pytest
import scipy

from jaxlm.topics import simplex
from tests.helpers.sentences import refused

G = np.array([[1, 0.6, 0.1], [0.6, 1, 0.5], [0.1, 0.5, 0.6]])
B = np.array([[0.6, 0.7, 0.2]])


def problem(seed=0, r=5, n=200):
    """Random problems; in the first ones the minimum is a vertex, or on an edge without a slope."""
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet(np.full(30, 0.3), r)
    mixtures = rng.dirichlet(np.full(r, 0.2), n)
    noise = rng.normal(scale=0.1, size=(n, 30))
    mixtures[0], mixtures[1], noise[:2] = np.eye(r)[0], np.eye(r)[1] / 2 + np.eye(r)[2] / 2, 0
    return rows @ rows.T, (mixtures @ rows + noise) @ rows.T


def values(G, b, c):
    return np.einsum("nr,rs,ns->n", c, G, c) - 2 * (b * c).sum(axis=1)


def by_enumeration(G, b):
    """The best point among the minima of all faces that lie in the simplex."""
    best, lowest = np.zeros_like(b), np.full(len(b), np.inf)
    for size in range(1, len(G) + 1):
        for face in map(list, itertools.combinations(range(len(G)), size)):
            ones = np.ones((size, 1))
            system = np.block([[G[np.ix_(face, face)], ones], [ones.T, np.zeros((1, 1))]])
            sides = np.concatenate([b[:, face], np.ones((len(b), 1))], axis=1)
            c = np.zeros_like(b)
            c[:, face] = np.linalg.solve(system, sides.T).T[:, :size]
            value = np.where((c >= -1e-12).all(axis=1), values(G, b, c), np.inf)
            better = value < lowest - 1e-15
            best[better], lowest[better] = c[better], value[better]
    return best


def test_golden_values():
    newton = np.linalg.solve(G, B[0])[None]
    np.testing.assert_allclose(newton, [[0.17934783, 0.75543478, -0.32608696]], atol=1e-8)
    euclidean = simplex.project(newton)
    np.testing.assert_allclose(euclidean, [[0.21195652, 0.78804348, 0]], atol=1e-8)
    np.testing.assert_allclose(values(G, B, euclidean), [-0.49123346], atol=1e-8)
    found = simplex.minimize(G, B)
    np.testing.assert_allclose(found, [[0.375, 0.625, 0]], atol=1e-15)
    np.testing.assert_allclose(values(G, B, found), [-0.5125], atol=1e-15)


@pytest.mark.parametrize("seed", range(3))
def test_minima_are_those_of_enumeration(seed):
    G, b = problem(seed)
    found = simplex.minimize(G, b)
    np.testing.assert_allclose(found, by_enumeration(G, b), atol=1e-11)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-14)
    assert (found >= 0).all()
    assert np.abs(simplex.violation(G, b, found)).max() < simplex.TOLERANCE * np.diag(G).max()


def test_minima_do_not_depend_on_the_start():
    G, b = problem()
    expected = simplex.minimize(G, b)
    start = np.random.default_rng(1).dirichlet(np.full(5, 0.3), len(b))
    np.testing.assert_allclose(simplex.minimize(G, b, start), expected, atol=1e-12)
    np.testing.assert_allclose(simplex.minimize(G, b, expected), expected, atol=1e-13)
    assert simplex.minimize(G, b[:0]).shape == (0, 5)


def test_projection_is_the_minimum_for_the_identity():
    x = np.random.default_rng(0).normal(size=(100, 6))
    np.testing.assert_allclose(simplex.project(x), simplex.minimize(np.eye(6), x), atol=1e-14)


def test_the_violation_bounds_the_distance():
    G, b = problem()
    exact = by_enumeration(G, b)
    smallest = np.linalg.eigvalsh(G)[0]
    projected = simplex.project(np.linalg.solve(G, b.T).T)
    for c in (projected, np.random.default_rng(2).dirichlet(np.ones(5), len(b))):
        bound = np.linalg.norm(simplex.violation(G, b, c), axis=1) / smallest
        assert (np.linalg.norm(c - exact, axis=1) <= bound + 1e-10).all()


def test_what_cannot_be_solved_is_refused():
    with refused("Q", "nearly dependent"):
        simplex.minimize(G, np.full((1, 3), np.nan))


def test_divergence_of_two_rows_is_that_of_a_search():
    rng = np.random.default_rng(3)
    rows, q = rng.dirichlet(np.ones(8), 2), rng.dirichlet(np.ones(8), 20)
    start = rng.dirichlet(np.full(2, 0.1), 20)
    for found in (simplex.divergence(q, rows), simplex.divergence(q, rows, start)):
        for c, target in zip(found, q, strict=True):

            def loss(share, target=target):
                mixture = share * rows[0] + (1 - share) * rows[1]
                return (target * np.log(target / mixture)).sum()

            best = scipy.optimize.minimize_scalar(loss, bounds=(0, 1), method="bounded")
            assert loss(c[0]) <= best.fun + simplex.GAP


def test_divergence_of_disjoint_rows_has_a_closed_form():
    """Weights are in proportion to the mass on each row; words that no row has do not count."""
    q = np.random.default_rng(4).dirichlet(np.ones(5), 3)
    rows = np.array([[0.5, 0.5, 0, 0, 0], [0, 0, 0.3, 0.7, 0]])
    expected = np.stack([q[:, :2].sum(axis=1), q[:, 2:4].sum(axis=1)], axis=1)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(simplex.divergence(q, rows), expected, atol=1e-3)
