"""Numbers that are not finite are found in every dtype, and named."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.artifacts.arrays import all_finite, check_finite, check_tree_finite
from jaxlm.core.errors import UserError


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_one_number_among_many_is_found(dtype: str, bad: float):
    values = np.ones((50, 7), jnp.dtype(dtype))
    assert all_finite(values)
    check_finite(values, "w", "here")
    values[31, 2] = bad
    assert not all_finite(values.T)
    with pytest.raises(UserError, match=rf"^here: w holds .*\(got {bad}\)"):
        check_finite(values.T, "w", "here")


def test_the_leaf_of_a_tree_is_named_and_whole_numbers_pass():
    tree = {"a": {"b": jnp.ones(3, jnp.bfloat16), "c": np.arange(3)}, "d": [jnp.ones((2, 2))]}
    check_tree_finite(tree, "here")
    tree["d"][0] = tree["d"][0].at[1, 0].set(jnp.nan)
    with pytest.raises(UserError, match=r"^here: d\.0 holds numbers that are not finite"):
        check_tree_finite(tree, "here")
