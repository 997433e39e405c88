"""Paths name parameters alike in every kind of tree, and selections split and merge."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.core.precision import quantize
from jaxlm.models import LanguageModel, ModelConfig, init_params
from jaxlm.models.transformer import unstack
from jaxlm.peft import lora, prefix

paths.declare_stacked({"layers.mlp.kernel": 2, "layers.mlp.bias": 1, "layers.declared": 1})
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
    assert rows({"layers": {"10": {"declared": 1.0}, "2": {"declared": 1.0}}}) == [
        ("layers.declared", 10, False),
        ("layers.declared", 2, False),
    ]
    found = rows({"layers": {"07": {"declared": 1.0}, "²": {"declared": 1.0}}})
    assert [path for path, _, _ in found] == ["layers.07.declared", "layers.².declared"]


@pytest.mark.parametrize(
    "tree",
    [
        {"fc1": {"kernel": np.ones((8, 8)), "bias": np.ones(8)}, "conv": np.ones((3, 8, 8))},
        [{"w": np.ones((2, 3))}, {"w": np.ones((3, 4))}],
        {"mlp": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}},
    ],
    ids=["dict", "list", "the shapes of one declared layer"],
)
def test_a_key_layers_means_nothing_where_no_model_is_declared(tree, own_models_alone):
    plain = [(path.replace("blocks", "layers"), *rest) for path, *rest in rows({"blocks": tree})]
    assert rows({"layers": tree}) == plain


def test_what_is_declared_is_stacked_wherever_the_tree_lies():
    state = optax.adam(1e-3).init({"model": STACKED})
    stacked = [path for path, _, stacked in rows(state) if stacked]
    names = ("layers.mlp.bias", "layers.mlp.kernel")
    assert stacked == [f"0.{moment}.model.{name}" for moment in ("mu", "nu") for name in names]
    without_embed = paths.split(STACKED, "layers")[0]
    assert [stacked for _, _, stacked in rows(without_embed)] == [True, True]


@pytest.mark.parametrize(("path", "axes"), [("blocks.kernel", 2), ("layers.kernel", -1)])
def test_a_declaration_that_cannot_be_is_refused(path, axes):
    with pytest.raises(UserError, match=f"^{path}: a stacked leaf must have a path"):
        paths.declare_stacked({path: axes})


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_every_leaf_of_the_layers_of_a_model_is_stacked(gated, norm):
    config = ModelConfig(
        family="olmo2",
        kind="decoder",
        head="lm",
        vocab_size=8,
        hidden_size=4,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_size=2,
        intermediate_size=6,
        max_positions=8,
        embedding_size=4,
        activation="silu",
        norm=norm,
        norm_position="both",
        query_key_norm="all",
        gated_mlp=gated,
        mlp_bias=True,
        attention_bias=True,
        output_bias=True,
    )
    lm = LanguageModel(config, init_params(config, jax.random.key(0)))
    lm = prefix(lora(lm, jax.random.key(1), rank=2, targets=None), jax.random.key(2), init="normal")
    trees = [lm.params, quantize(lm.params, bits=8)]
    for tree in trees:
        for leaf in paths.flatten(tree)[0]:
            inside = leaf.path.startswith("layers.")
            assert leaf.stacked == inside, leaf.path
            assert not inside or leaf.value.shape[0] == 3
        alone = {**tree, "layers": unstack(tree["layers"])}
        found = {(leaf.path, leaf.layer) for leaf in paths.flatten(alone)[0]}
        layered = {leaf.path for leaf in paths.flatten(tree)[0] if leaf.stacked}
        assert {(path, layer) for path in layered for layer in range(3)} <= found


def test_an_integer_elsewhere_stays_in_the_path():
    assert rows({"blocks": [np.ones(2)]}) == [("blocks.0", None, False)]


def test_a_scalar_under_layers_is_not_stacked():
    assert rows({"layers": {"scale": np.float32(1)}}) == [("layers.scale", None, False)]


def test_an_equinox_model(own_models_alone):
    class Model(eqx.Module):
        layers: list
        head: eqx.nn.Linear

        def __init__(self, key):
            self.layers = [eqx.nn.Linear(2, 2, key=key) for _ in range(2)]
            self.head = eqx.nn.Linear(2, 3, key=key)

    arrays, _ = eqx.partition(Model(jax.random.key(0)), eqx.is_array)
    assert rows(arrays) == [
        ("layers.0.weight", None, False),
        ("layers.0.bias", None, False),
        ("layers.1.weight", None, False),
        ("layers.1.bias", None, False),
        ("head.weight", None, False),
        ("head.bias", None, False),
    ]


def test_an_nnx_model(own_models_alone):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])

    _, state = nnx.split(Model(nnx.Rngs(0)))
    assert rows(nnx.to_pure_dict(state)) == [
        (f"layers.{layer}.{name}", None, False) for layer in range(2) for name in ("bias", "kernel")
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
        "select: takes no parameter (got 'lora'). Choose among embed.kernel, layers.mlp.bias, "
        "layers.mlp.kernel."
    )
    with pytest.raises(ValueError, match=r"a0, a1, a2, a3, a4, a5, a6, a7 and others\.$"):
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
    with pytest.raises(ValueError, match="share a hash"):
        paths.check_unique_hashes(tree(first, second))


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"a.b": 1.0, "a": {"b": 1.0}}, "a.b"),
        ({"layers.0": {"w": 1.0}, "layers": [{"w": 1.0}]}, "layers.0.w"),
        ({"layers.0": {"declared": np.ones(2)}, "layers": {"declared": np.ones((3, 2))}}, None),
    ],
)
def test_two_leaves_with_one_path_raise(tree, path):
    with pytest.raises(UserError, match="two parameters have this path") as caught:
        paths.check_unique_hashes(tree)
    assert path is None or str(caught.value).startswith(f"{path}: ")


def test_paths_that_look_alike_and_are_not_the_same_pass():
    paths.check_unique_hashes({"layers": {"0": {"w": 1.0}, "00": {"w": 1.0}, "w": 1.0}})
    paths.check_unique_hashes({"a.b": 1.0, "a": {"c": 1.0}})


def test_what_is_no_array_of_real_floats_is_not_taken():
    tree = {
        "taken": jnp.ones(2, jnp.bfloat16),
        "empty": jnp.ones((0, 3)),
        "count": jnp.arange(3),
        "key": jax.random.key(0),
        "number": 0.1,
        "function": jnp.tanh,
        "none": None,
    }
    assert [name for name, keep in paths.mask(tree, None).items() if keep] == ["taken"]
    with pytest.raises(UserError, match="takes no parameter"):
        paths.mask(tree, "empty|count|number")


def test_a_complex_leaf_is_refused_by_its_path():
    tree = {"w": jnp.ones(2), "phases": {"z": jnp.ones(2, jnp.complex64)}}
    with pytest.raises(UserError, match=r"^phases.z: parameters must be real \(got complex64\)"):
        paths.mask(tree, None)
    assert paths.mask(tree, "w")["w"]


def test_lookup():
    assert paths.lookup(STACKED, "layers.mlp.bias") is STACKED["layers"]["mlp"]["bias"]
    assert paths.lookup(STACKED, "layers.mlp.scale") is None
    assert paths.lookup(STACKED, "lora.mlp.scale") is None
