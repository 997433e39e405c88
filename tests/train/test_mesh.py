"""Training on a mesh: what devices tell each other, and where a state lies."""

import jax
import numpy as np
import pytest

from jaxlm.cost.hlo import collectives
from jaxlm.models import from_pretrained
from jaxlm.sharding import make_mesh, mesh_of, place_batch, place_params
from jaxlm.train.losses import accumulate, lm_objective, num_targets
from jaxlm.train.optimizers import Adam, Mezo
from jaxlm.train.state import Program, many_steps, method

STEPS, ROWS, LENGTH = 3, 8, 6


def compiled(optimizer, tiny_model, **sizes):
    """The program of some steps on a mesh, and the state that it was compiled for."""
    mesh = make_mesh(**sizes)
    lm = from_pretrained(tiny_model, mesh=mesh)
    way = method(optimizer, lm_objective(lm.log_probs), STEPS)
    state = way.start(lm.params, jax.random.key(0))
    tokens = np.ones((STEPS, ROWS, LENGTH), np.int32)
    batches = place_batch({"input_ids": tokens}, mesh, axis=1)
    program = Program(many_steps(way.step), moves=True, rows=1 + way.rows)
    return program.lower(state, batches).compile(), state


@pytest.mark.slow
@pytest.mark.multidevice
def test_copies_tell_each_other_the_losses_of_mezo_alone(tiny_model):
    """The two losses, the perplexity's sum, and the number of targets of each."""
    program, _ = compiled(Mezo(learning_rate=1e-3), tiny_model, data=8)
    found = collectives(program)
    assert {each.op for each in found} == {"all-reduce"}
    assert 2 <= sum(each.size * each.times for each in found) / STEPS <= 6
    assert max(each.size for each in found) <= 2


@pytest.mark.multidevice
def test_copies_tell_each_other_the_gradients_of_adam(tiny_model):
    program, state = compiled(Adam(learning_rate=1e-3), tiny_model, data=8)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    twice = state.params["embed"]["tokens"]["embedding"].size  # it is the head too
    moved = sum(each.size * each.times for each in collectives(program)) / STEPS
    assert count <= moved <= count + twice + 20


@pytest.mark.multidevice
def test_parts_of_a_batch_are_taken_on_all_devices(tiny_model):
    ends = []
    tokens = np.random.default_rng(0).integers(3, 12, (STEPS, ROWS, LENGTH), np.int32)
    for mesh, count in ((None, 1), (make_mesh(data=2, fsdp=2, model=2), 2)):
        lm = from_pretrained(tiny_model, mesh=mesh)
        loss_fn = accumulate(lm_objective(lm.log_probs), count, share=num_targets)
        way = method(Adam(learning_rate=1e-3), loss_fn, STEPS)
        state = way.start(lm.params, jax.random.key(0))
        run = Program(many_steps(way.step), moves=True, rows=1 + way.rows)
        ends.append(run(state, {"input_ids": tokens}))
    (_, one), (_, other) = jax.device_get(ends)
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)
    np.testing.assert_allclose(one["grad_norm"], other["grad_norm"], rtol=1e-4)
    assert (other["tokens"] == ROWS * (LENGTH - 1)).all()


@pytest.mark.multidevice
def test_moments_lie_where_their_parameters_do(tiny_model):
    _, state = compiled(Adam(learning_rate=1e-3), tiny_model, fsdp=4, model=2)
    for moments in jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, dict)):
        if isinstance(moments, dict):
            for leaf, param in zip(*map(jax.tree.leaves, (moments, state.params)), strict=True):
                assert leaf.sharding == param.sharding


@pytest.mark.multidevice
def test_a_batch_that_devices_do_not_divide_is_given_to_each():
    mesh = make_mesh(data=4, fsdp=2)
    placed = place_batch({"eight": np.ones((8, 3)), "six": np.ones(6), "one": np.ones(())}, mesh)
    rows = {name: leaf.addressable_shards[0].data.shape for name, leaf in placed.items()}
    assert rows == {"eight": (1, 3), "six": (6,), "one": ()}
    assert mesh_of(placed) == mesh


@pytest.mark.multidevice
def test_leaves_on_two_meshes_are_refused():
    one, other = make_mesh(data=8), make_mesh(fsdp=8)
    tree = [place_params({"w": np.ones(8)}, mesh) for mesh in (one, other)]
    with pytest.raises(ValueError, match=r"^mesh: all leaves must be on one \(got 2\)"):
        mesh_of(tree)
