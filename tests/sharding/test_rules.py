"""Which axis of which parameter is divided, held against a table written by hand."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.core.paths import flatten
from jaxlm.models import ModelConfig, init_params, param_shapes
from jaxlm.sharding import Rules, make_mesh, param_shardings

CONFIG = ModelConfig(
    family="opt", kind="decoder", head="lm", vocab_size=20, hidden_size=16, num_layers=2,
    num_heads=4, num_kv_heads=2, head_size=4, intermediate_size=24, max_positions=7,
    embedding_size=8, activation="relu", gated_mlp=True, query_key_norm="all", token_types=3,
    tie_embeddings=False,
)  # fmt: skip

KERNEL_IN, KERNEL_OUT = P(None, "fsdp", "model"), P(None, "model", "fsdp")
WANTED = {
    "embed.tokens.embedding": P("model", "fsdp"),
    "embed.positions.embedding": P(None, "fsdp"),
    "embed.token_types.embedding": P(None, "fsdp"),
    "embed.project_in.kernel": P("fsdp", None),
    "embed.project_out.kernel": P("fsdp", None),
    "layers.attention.q_proj.kernel": KERNEL_IN,
    "layers.attention.k_proj.kernel": KERNEL_IN,
    "layers.attention.v_proj.kernel": KERNEL_IN,
    "layers.attention.o_proj.kernel": KERNEL_OUT,
    "layers.mlp.gate_proj.kernel": KERNEL_IN,
    "layers.mlp.up_proj.kernel": KERNEL_IN,
    "layers.mlp.down_proj.kernel": KERNEL_OUT,
    "layers.attention.q_proj.bias": P(None, "model"),
    "layers.attention.k_proj.bias": P(None, "model"),
    "layers.attention.v_proj.bias": P(None, "model"),
    "layers.mlp.gate_proj.bias": P(None, "model"),
    "layers.mlp.up_proj.bias": P(None, "model"),
    "lm_head.embedding": P("model", "fsdp"),
}
pytestmark = pytest.mark.multidevice


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def test_every_parameter_has_its_place():
    shapes = param_shapes(CONFIG)
    assert WANTED.keys() < shapes.keys()
    places = param_shardings(shapes, make_mesh(fsdp=4, model=2))
    for path, shape in shapes.items():
        assert places[path].spec == WANTED.get(path, P(*[None] * len(shape))), path


def test_trees_of_arrays_and_of_shapes_agree(params):
    mesh = make_mesh(fsdp=4, model=2)
    flat = param_shardings(param_shapes(CONFIG), mesh)
    for tree in (params, jax.device_put(params), jax.eval_shape(lambda: params)):
        for leaf in flatten(param_shardings(tree, mesh))[0]:
            assert leaf.value == flat[leaf.path]


def test_layers_in_a_list_are_placed_like_stacked_ones(params):
    mesh = make_mesh(fsdp=4, model=2)
    layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(2)]
    places = param_shardings({"layers": layers}, mesh)["layers"]
    assert places[1]["attention"]["o_proj"]["kernel"].spec == P("model", "fsdp")
    assert places[1]["mlp"]["up_proj"]["bias"].spec == P("model")


def test_an_axis_that_does_not_divide_is_left_whole():
    places = param_shardings(param_shapes(CONFIG), make_mesh(model=8))
    assert places["embed.tokens.embedding"].spec == P(None, None)  # 20 rows
    assert places["layers.attention.q_proj.kernel"].spec == P(None, None, "model")


def test_moments_of_an_optimizer_lie_with_their_parameters(params):
    mesh = make_mesh(fsdp=4, model=2)
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    places = param_shardings(state, mesh)
    assert places[0].mu == places[0].nu == param_shardings(params, mesh)
    assert places[0].count.spec == P()


def test_other_rules_and_axes_that_the_mesh_lacks():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = Rules(
        paths=((r"kernel$", ("in", "out")),), axes=(("in", ("data", "fsdp")), ("out", "model"))
    )
    places = param_shardings(param_shapes(CONFIG), mesh, rules)
    assert places["layers.attention.q_proj.kernel"].spec == P(None, ("data", "fsdp"), None)
    assert places["embed.tokens.embedding"].spec == P(None, None)
