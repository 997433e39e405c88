"""What do devices send each other in a step, and how much memory does each need?

usage: python -m benchmarks.scaling [--quick]

A step of MeZO and one of Adam by backpropagation, at the shape of OPT-125M with 16 rows of 64
tokens, compiled and not run: on one device, and with 2, 4 and 8 along one axis of the mesh. The
axis `data` divides rows and replicates parameters, `fsdp` divides rows and parameters, and `model`
divides the matrices of each layer. Simulated CPU devices say nothing about speed, so the columns
describe the compiled program, for one device and one step:

  collectives    number of collective operations, each iteration of a loop counted
  moved_MB       megabytes that the device sends for them, if all devices form a ring
  most           the array that takes most of those, and how often it is sent
  arguments_MB   the device's part of parameters, state and batch
  temp_MB        its temporary memory
  peak_over_one  its peak memory over that of a single device
  difference     largest relative difference from one device, in losses and in slopes or gradient
                 norms of two steps; run at a small shape, on a mesh with two devices along each
                 axis

XLA has no reduce-scatter on CPUs: where gradients are divided, it sums them on every device and
keeps a part. --quick uses 2 layers and meshes of 8. The last line is one JSON object.
"""

import argparse
import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.shapes import LABEL_WORDS, OPT_125M, make_batch
from jaxlm.cost.hlo import Collective, collectives
from jaxlm.models import LanguageModel, ModelConfig, init_params
from jaxlm.sharding import AXES, mesh_from_text, param_shardings, place_batch, place_params
from jaxlm.train.losses import classification_objective
from jaxlm.train.optimizers import Adam, Mezo
from jaxlm.train.state import Method, Program, TrainState, method

METHODS = {"MeZO": Mezo(learning_rate=1e-3), "Adam": Adam(learning_rate=1e-3)}
SMALL = OPT_125M.replace(
    vocab_size=512,
    hidden_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_size=8,
    intermediate_size=128,
    max_positions=64,
    embedding_size=64,
)
ALONE, TOGETHER = "data=1", "data=2,fsdp=2,model=2"


def stepper(name: str, config: ModelConfig) -> tuple[Method, Program]:
    """Return a method, and its step `(state, batch) -> (state, info)`, which donates the state."""
    loss_fn = classification_objective(LanguageModel(config, {}).apply, jnp.asarray(LABEL_WORDS))
    chosen = method(METHODS[name], loss_fn, steps=1000)

    def step(state, batch):
        params, opt_state, info = chosen.step(state.params, state.opt_state, batch)
        return TrainState(params, opt_state), info

    return chosen, Program(step, moves=True)


def compiled(name: str, config: ModelConfig, mesh_text: str) -> Any:
    """Compile a step on a mesh, from shapes alone."""
    mesh = mesh_from_text(mesh_text)
    chosen, program = stepper(name, config)

    def start(key):
        params = init_params(config, key)
        return TrainState(params, chosen.init(params, key))

    def placed(leaf, place):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    shapes = jax.eval_shape(start, jax.random.key(0))
    state = jax.tree.map(placed, shapes, param_shardings(shapes, mesh))
    return program.lower(state, place_batch(make_batch(config, 16, 64), mesh)).compile()


def numbers(name: str, mesh_text: str) -> np.ndarray:
    """Return losses, and slopes or gradient norms, of two steps at the small shape."""
    chosen, step = stepper(name, SMALL)
    params = place_params(init_params(SMALL, jax.random.key(0)), mesh_from_text(mesh_text))
    state, batch = chosen.start(params, jax.random.key(1)), make_batch(SMALL, 16, 32)
    found: list[float] = []
    for _ in range(2):
        state, info = step(state, batch)
        more = ("loss", "projected_grad", "grad_norm")
        found += [float(np.squeeze(info[what])) for what in more if what in info]
    return np.array(found)


def difference(name: str) -> dict[str, Any]:
    """Return the row for which programs are run."""
    wanted = numbers(name, ALONE)
    gaps = np.abs(numbers(name, TOGETHER) - wanted) / np.abs(wanted)
    return {"method": name, "mesh": TOGETHER, "difference": float(gaps.max())}


def row(name: str, mesh_text: str, program: Any, alone: Any) -> dict[str, Any]:
    """Return the row of a compiled program; `alone` is the program for one device."""
    found, memory = collectives(program), program.memory_analysis()
    return {
        "method": name,
        "mesh": mesh_text,
        "collectives": sum(each.times for each in found),
        "moved_MB": sum((each.moved for each in found), 0.0) / 1e6,
        "most": most(found),
        "arguments_MB": memory.argument_size_in_bytes / 1e6,
        "temp_MB": memory.temp_size_in_bytes / 1e6,
        "peak_over_one": common.peak_bytes(program) / common.peak_bytes(alone),
        "difference": None,
    }


def most(found: list[Collective]) -> str | None:
    """Return the kind and shape with most traffic, such as "12 x all-gather f32[768,3072]"."""
    times: collections.Counter[str] = collections.Counter()
    moved: collections.Counter[str] = collections.Counter()
    for each in found:
        kind = f"{each.op} {each.dtype}[{','.join(map(str, each.shape))}]"
        times[kind] += each.times
        moved[kind] += round(each.moved)
    return next((f"{times[kind]} x {kind}" for kind, _ in moved.most_common(1)), None)


def measure(name: str, config: ModelConfig, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return the rows of one method."""
    alone = compiled(name, config, ALONE)
    rows = [row(name, ALONE, alone, alone)]
    for mesh_text in (f"{axis}={count}" for axis in AXES for count in counts):
        rows.append(row(name, mesh_text, compiled(name, config, mesh_text), alone))
        print(f"{name}: {mesh_text} compiled", flush=True)
    return [*rows, dict.fromkeys(rows[0]) | difference(name)]


def main() -> None:
    """Compile, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 layers, meshes of 8")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    config = OPT_125M.replace(num_layers=2) if options.quick else OPT_125M
    counts = (8,) if options.quick else (2, 4, 8)
    rows = [each for name in METHODS for each in measure(name, config, counts)]
    common.print_table(rows)
    common.print_report("scaling", rows)


if __name__ == "__main__":
    main()
