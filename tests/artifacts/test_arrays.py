"""Numbers that are not finite are found in every dtype, and named."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.artifacts.arrays import (
    all_finite,
    check_finite,
    check_tree_finite,
    read_arrays,
    write_arrays,
)
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


def test_arrays_are_read_as_they_were_written(tmp_path):
    arrays = {"b": np.arange(6.0, dtype=np.float32).reshape(2, 3).T, "a": np.zeros((0, 2), int)}
    path = tmp_path / "a.safetensors"
    write_arrays(path, arrays)
    found = read_arrays(path)
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    # Whichever byte changes, the arrays are the same or the file is refused.
    data, refused = path.read_bytes(), 0
    for place, bit in itertools.product(range(len(data)), (1, 4, 32)):
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        try:
            again = read_arrays(path)
        except UserError:
            refused += 1
            continue
        for name, value in arrays.items():
            np.testing.assert_array_equal(again[name], value)
    assert refused > 3 * len(data) - 10
    for other in (data[:-1], data + b"0", b""):
        path.write_bytes(other)
        with pytest.raises(UserError, match=r"a\.safetensors: is damaged \(got another checksum"):
            read_arrays(path)
