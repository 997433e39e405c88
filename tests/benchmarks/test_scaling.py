"""Traffic of steps whose closed form is known."""

import math

import jax
import pytest

from benchmarks import scaling
from jaxlm.models import init_params


@pytest.mark.multidevice
def test_replicas_of_adam_sum_the_gradient_in_a_ring():
    program = scaling.compiled("Adam", scaling.SMALL, "data=8")
    found = scaling.row("Adam", "data=8", program, program)
    shapes = jax.eval_shape(lambda key: init_params(scaling.SMALL, key), jax.random.key(0))
    gradient = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    # The rows of two label words come once more, before they are added to those of the tokens; and
    # there are loss, accuracy and the number of rows.
    more = 4 * (2 * 64 + 3)
    assert found["moved_MB"] == pytest.approx(2 * 7 / 8 * (gradient + more) / 1e6, rel=1e-9)
    assert found["arguments_MB"] > 3 * gradient / 1e6  # with both moments
    assert found["peak_over_one"] == 1


def test_the_largest_traffic_is_named():
    each = scaling.Collective("all-gather", "f32", (2, 3), devices=4, times=5)
    many = scaling.Collective("all-reduce", "f32", (), devices=4, times=9)
    assert scaling.most([many, each, each]) == "10 x all-gather f32[2,3]"
    assert scaling.most([]) is None
