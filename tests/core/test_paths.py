"""Paths name parameters alike in every kind of tree, and selections split and merge."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.core import paths

STACKED = {
    "embed": {"kernel": np.ones((5, 2))},
    "layers": {"mlp": {"kernel": np.ones((3, 2, 2)), "bias": np.zeros((3, 2))}},
}
UNSTACKED = {
    "embed": {"kernel": np.ones((5, 2))},
    "layers": [{"mlp": {"kernel": np.ones((2, 2)), "bias": np.zeros(2)}} for _ in range(3)],
}


def rows(tree) -> list[tuple]:
    return [(leaf.path, leaf.layer, leaf.stacked) for leaf in paths.flatten(tree)[0]]


def test_a_stacked_tree():
    assert rows(STACKED) == [
        ("embed.kernel", None, False),
        ("layers.mlp.bias", None, True),
        ("layers.mlp.kernel", None, True),
    ]


@pytest.mark.parametrize("container", [list, tuple, lambda items: dict(enumerate(items))])
def test_an_unstacked_tree_has_the_same_paths_and_its_layers(container):
    tree = {**UNSTACKED, "layers": container(UNSTACKED["layers"])}
    assert rows(tree) == [("embed.kernel", None, False)] + [
        (f"layers.mlp.{name}", layer, False) for layer in range(3) for name in ("bias", "kernel")
    ]


def test_layers_with_names_of_digits():
    assert rows({"layers": {"10": {"w": 1.0}, "2": {"w": 1.0}}}) == [
        ("layers.w", 10, False),
        ("layers.w", 2, False),
    ]


def test_an_integer_elsewhere_stays_in_the_path():
    assert rows({"blocks": [np.ones(2)]}) == [("blocks.0", None, False)]


def test_a_scalar_under_layers_is_not_stacked():
    assert rows({"layers": {"scale": np.float32(1)}}) == [("layers.scale", None, False)]


def test_an_equinox_model():
    class Model(eqx.Module):
        layers: list
        head: eqx.nn.Linear

        def __init__(self, key):
            self.layers = [eqx.nn.Linear(2, 2, key=key) for _ in range(2)]
            self.head = eqx.nn.Linear(2, 3, key=key)

    arrays, _ = eqx.partition(Model(jax.random.key(0)), eqx.is_array)
    assert rows(arrays) == [
        ("layers.weight", 0, False),
        ("layers.bias", 0, False),
        ("layers.weight", 1, False),
        ("layers.bias", 1, False),
        ("head.weight", None, False),
        ("head.bias", None, False),
    ]


def test_an_nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])

    _, state = nnx.split(Model(nnx.Rngs(0)))
    assert rows(nnx.to_pure_dict(state)) == [
        (f"layers.{name}", layer, False) for layer in range(2) for name in ("bias", "kernel")
    ]


def test_map_with_path_takes_several_trees():
    tree = {"a": np.float32(1), "b": np.float32(2)}
    found = paths.map_with_path(lambda leaf, other: (leaf.path, leaf.value + other), tree, tree)
    assert found == {"a": ("a", 2.0), "b": ("b", 4.0)}
    with pytest.raises(ValueError, match="'c'"):
        paths.map_with_path(lambda leaf, other: other, tree, {"c": 1})


def test_a_selection_is_a_search_a_predicate_or_everything():
    def taken(select):
        chosen = jax.tree.leaves(paths.mask(STACKED, select))
        return [row[0] for row, keep in zip(rows(STACKED), chosen, strict=True) if keep]

    everything = [row[0] for row in rows(STACKED)]
    assert taken(None) == everything
    assert taken("kernel$") == ["embed.kernel", "layers.mlp.kernel"]
    assert taken("^layers") == ["layers.mlp.bias", "layers.mlp.kernel"]
    assert taken(lambda path: path.endswith("bias")) == ["layers.mlp.bias"]


def test_a_selection_of_nothing_names_the_paths():
    with pytest.raises(ValueError, match="lora") as caught:
        paths.mask(STACKED, "lora")
    assert str(caught.value) == (
        "select='lora' takes no parameter; "
        "paths are embed.kernel, layers.mlp.bias, layers.mlp.kernel"
    )
    with pytest.raises(ValueError, match=r"a0, a1, a2, a3, a4, a5, a6, a7, \.\.\.$"):
        paths.mask({f"a{i}": 1 for i in range(9)}, "b")


@pytest.mark.parametrize("tree", [STACKED, UNSTACKED], ids=["stacked", "unstacked"])
@pytest.mark.parametrize("select", [None, "bias", lambda path: "embed" in path])
def test_split_and_merge_are_inverse(tree, select):
    selected, rest = paths.split(tree, select)
    count = len(jax.tree.leaves(selected)) + len(jax.tree.leaves(rest))
    assert count == len(jax.tree.leaves(tree))
    merged = paths.merge(selected, rest)
    assert jax.tree.structure(merged) == jax.tree.structure(tree)
    assert all(map(np.array_equal, jax.tree.leaves(merged), jax.tree.leaves(tree)))


def test_gradients_of_the_selected_part_alone():
    tree = {"a": jnp.arange(3.0), "b": jnp.ones(3)}
    selected, rest = paths.split(tree, "a")

    def loss(selected):
        merged = paths.merge(selected, rest)
        return (merged["a"] * merged["b"]).sum()

    grads = jax.grad(loss)(selected)
    assert grads["b"] is None
    np.testing.assert_array_equal(grads["a"], tree["b"])


def test_hashes_are_those_of_every_machine():
    # The check value of CRC-32, by which implementations are compared.
    assert paths.path_hash("123456789") == 0xCBF43926


def test_two_paths_with_one_hash_raise():
    first, second = "olbfmjqn.kernel", "fomlonrv.kernel"
    assert paths.path_hash(first) == paths.path_hash(second)

    def tree(*names):
        return {name.split(".")[0]: {"kernel": 1.0} for name in names}

    paths.check_unique_hashes(tree(first))
    paths.check_unique_hashes(UNSTACKED)
    with pytest.raises(ValueError, match="share a hash; rename one of them"):
        paths.check_unique_hashes(tree(first, second))


def test_lookup():
    assert paths.lookup(STACKED, "layers.mlp.bias") is STACKED["layers"]["mlp"]["bias"]
    assert paths.lookup(STACKED, "layers.mlp.scale") is None
    assert paths.lookup(STACKED, "lora.mlp.scale") is None
