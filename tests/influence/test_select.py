"""A selection is the highest scores, and the same one everywhere."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import UserError
from jaxlm.influence import select


def test_the_highest_are_taken_in_order():
    scores = np.random.default_rng(0).permutation(100)
    found = select(scores, fraction=0.07)
    assert scores[found].tolist() == [99, 98, 97, 96, 95, 94, 93]
    assert found.dtype == np.int64
    np.testing.assert_array_equal(select(scores.astype(np.float32), count=7), found)
    np.testing.assert_array_equal(select(jnp.asarray(scores, jnp.float32), count=7), found)
    assert len(select(scores)) == 5


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint8, np.float16])
def test_of_ties_the_lower_index_comes_first(dtype):
    scores = np.random.default_rng(1).integers(0, 5, 1000).astype(dtype)
    wanted = sorted(range(1000), key=lambda n: (-float(scores[n]), n))
    for count in (1, 150, 333, 1000):
        assert select(scores, count=count).tolist() == wanted[:count]
    assert select(np.array([-0.0, 0.0, -0.0]), count=3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("count", "fraction", "wanted"),
    [
        (100, 0.29, 29),
        (100, 0.07, 7),
        (270679, 0.05, 13533),
        (19, 0.05, None),
        (20, 0.05, 1),
        (3, 1, 3),
        (10, 0.999, 9),
    ],
)
def test_a_fraction_is_rounded_down(count, fraction, wanted):
    if wanted is None:
        with pytest.raises(UserError, match=r"^fraction=0.05 of 19 examples takes none; give a"):
            select(np.arange(count), fraction)
    else:
        assert len(select(np.arange(count), fraction)) == wanted


@pytest.mark.parametrize(
    ("scores", "options", "text"),
    [
        (np.zeros((3, 2)), {}, "scores have shape (3, 2); give [N], such as the largest over"),
        (np.array([1, np.nan, np.inf]), {}, "the score of example 1 is not finite; leave the"),
        (np.zeros(3), {"fraction": 0}, "fraction=0 is impossible; give 0 < fraction <= 1"),
        (np.zeros(3), {"fraction": 5.0}, "fraction=5.0 is impossible; give 0 < fraction <= 1"),
        (np.zeros(3), {"count": 4}, "count=4 of 3 examples is impossible"),
        (np.zeros(3), {"count": 0}, "count=0 of 3 examples is impossible"),
    ],
)
def test_bad_input(scores, options, text):
    with pytest.raises(UserError) as found:
        select(scores, **options)
    assert text in str(found.value)
