import numpy as np
import pytest

from jaxlm.data.splits import draw_per_class
from tests.helpers.sentences import refused

LABELS = np.random.default_rng(0).integers(0, 3, 100).tolist()
NAMES = ["a", "b", "c"]


@pytest.mark.parametrize("k", [1, 7, 16])
def test_k_of_every_class(k: int) -> None:
    chosen = draw_per_class(LABELS, k, seed=3, names=NAMES)
    assert chosen == sorted(set(chosen))
    assert np.bincount([LABELS[i] for i in chosen]).tolist() == [k, k, k]


def test_same_seed_same_draw() -> None:
    draws = [draw_per_class(LABELS, 5, seed=seed, names=NAMES) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_held_out_is_disjoint_and_balanced() -> None:
    train = draw_per_class(LABELS, 10, seed=0, names=NAMES)
    held_out = draw_per_class(LABELS, 10, seed=0, names=NAMES, skip=10)
    assert not set(train) & set(held_out)
    assert np.bincount([LABELS[i] for i in held_out]).tolist() == [10, 10, 10]


def test_draw_of_one_class_does_not_depend_on_the_others() -> None:
    fewer = [label for label in LABELS if label != 2]
    places = [i for i, label in enumerate(LABELS) if label != 2]
    chosen = draw_per_class(fewer, 4, seed=0, names=NAMES[:2])
    expected = [i for i in draw_per_class(LABELS, 4, seed=0, names=NAMES) if LABELS[i] != 2]
    assert [places[i] for i in chosen] == expected


def test_every_example_is_drawn_about_equally_often() -> None:
    """Each of 10 is in a draw of 5 with probability 1/2: 4.5 standard errors over 400 seeds."""
    counts = np.zeros(10)
    for seed in range(400):
        counts[draw_per_class([0] * 10, 5, seed=seed, names=["a"])] += 1
    assert np.abs(counts - 200).max() <= 4.5 * np.sqrt(400 / 4)


@pytest.mark.parametrize(
    ("k", "skip", "said"),
    [
        (3, 0, "asks for 3 examples of every class (got 2 of 'b' in task.train)"),
        (2, 2, "asks for 2 training and 2 held-out examples of every class"),
    ],
)
def test_k_larger_than_a_class(k: int, skip: int, said: str) -> None:
    with refused("task.k", said):
        draw_per_class([0, 1, 0, 1, 0], k, seed=0, names=["a", "b"], skip=skip)
