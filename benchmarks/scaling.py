"""What do devices tell each other in a step, and what does each of them hold?

usage: python -m benchmarks.scaling [--quick]

A step of MeZO and one of Adam by backpropagation, at the shape of OPT-125M with 16 rows of 64
tokens, compiled and not run: on one device, and with 2, 4 and 8 along one axis of the mesh. Along
`data` the rows are divided and every device has all parameters, along `fsdp` rows and parameters
are divided, along `model` the matrices of each layer are. Simulated CPU devices say nothing about
speed, so that the columns are of the compiled program, for one device and one step:

  collectives    arrays that it makes together with others, with the turns of loops
  moved_MB       megabytes that it sends for them, where all devices form a ring
  most           the kind of collective and the array that take most of those, with the number
  arguments_MB   its part of parameters, state and batch
  temp_MB        its temporary memory
  peak_over_one  its peak memory over that of one device alone
  difference     of the losses of two steps from those of one device, the largest, at a small shape
                 that is run

A compiler for CPUs has no reduce-scatter of its own: where gradients are divided it sums them
everywhere, and keeps a part. --quick has 2 layers, and 8 devices. The last line is one JSON object.
"""

import argparse
import collections
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common
from benchmarks.mezo_step import LABEL_WORDS, make_batch
from benchmarks.shapes import OPT_125M
from jaxlm.models import LanguageModel, ModelConfig, init_params
from jaxlm.sharding import AXES, make_mesh, param_shardings, place_batch, place_params
from jaxlm.sharding.hlo import Collective, collectives
from jaxlm.train.objective import classification_objective
from jaxlm.train.optimizers import Adam, Mezo
from jaxlm.train.state import Method, Program, TrainState, method

RATE = 1e-3
METHODS = {"MeZO": Mezo(learning_rate=RATE), "Adam": Adam(learning_rate=RATE)}
SMALL = OPT_125M.replace(
    vocab_size=512, hidden_size=64, num_layers=2, num_heads=8, num_kv_heads=8, head_size=8,
    intermediate_size=128, max_positions=64, embedding_size=64,
)  # fmt: skip


def stepper(name: str, config: ModelConfig) -> tuple[Method, Program]:
    """A method, and its step `(state, batch) -> (state, info)` that moves the state."""
    lm = LanguageModel(config, None)
    loss_fn = classification_objective(lm.apply, jnp.asarray(LABEL_WORDS))
    chosen = method(METHODS[name], loss_fn, steps=1000)

    def step(state, batch):
        params, opt_state, info = chosen.step(state.params, state.opt_state, batch)
        return TrainState(params, opt_state), info

    return chosen, Program(step, moves=True)


def compiled(name: str, config: ModelConfig, axis: str, devices: int) -> Any:
    """The program of a step on a mesh, of shapes alone."""
    mesh = make_mesh(**{axis: devices}, devices=jax.devices()[:devices])
    chosen, program = stepper(name, config)

    def start(key):
        params = init_params(config, key)
        return TrainState(params, chosen.init(params, key))

    shapes = jax.eval_shape(start, jax.random.key(0))
    places = param_shardings(shapes, mesh)
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )
    return program.lower(state, place_batch(make_batch(config, 16, 64), mesh)).compile()


def losses(name: str, axis: str, devices: int) -> jax.Array:
    """Of two steps at the small shape."""
    mesh = make_mesh(**{axis: devices}, devices=jax.devices()[:devices])
    chosen, step = stepper(name, SMALL)
    params = place_params(init_params(SMALL, jax.random.key(0)), mesh)
    state, batch = chosen.start(params, jax.random.key(1)), make_batch(SMALL, 16, 32)
    found = []
    for _ in range(2):
        state, info = step(state, batch)
        found.append(float(info["loss"]))
    return jnp.array(found)


def row(name: str, axis: str, devices: int, program: Any) -> dict[str, Any]:
    """A line of the table, without what is compared with one device."""
    found, memory = collectives(program), program.memory_analysis()
    return {
        "method": name,
        "axis": axis,
        "devices": devices,
        "collectives": sum(each.times for each in found),
        "moved_MB": sum(each.moved for each in found) / 1e6,
        "most": most(found),
        "arguments_MB": memory.argument_size_in_bytes / 1e6,
        "temp_MB": memory.temp_size_in_bytes / 1e6,
    }


def most(found: list[Collective]) -> str | None:
    """The kind and the shape that take most of the traffic: "12 all-gather f32[768,3072]"."""
    times: collections.Counter[str] = collections.Counter()
    moved: collections.Counter[str] = collections.Counter()
    for each in found:
        kind = f"{each.op} {each.dtype}[{','.join(map(str, each.shape))}]"
        times[kind] += each.times
        moved[kind] += each.moved
    return next((f"{times[kind]} {kind}" for kind, _ in moved.most_common(1)), None)


def measure(name: str, config: ModelConfig, counts: list[int]) -> list[dict[str, Any]]:
    """Rows of one method."""
    one = compiled(name, config, "data", 1)
    peak, expected = common.peak_bytes(one), losses(name, "data", 1)
    rows = [{**row(name, "", 1, one), "peak_over_one": 1.0, "difference": None}]
    for axis in AXES:
        for devices in counts:
            program = compiled(name, config, axis, devices)
            print(f"{name}: {axis}={devices} compiled", flush=True)
            compared: dict[str, Any] = {"peak_over_one": common.peak_bytes(program) / peak}
            compared["difference"] = None
            if devices == max(counts):
                gaps = jnp.abs(losses(name, axis, devices) - expected)
                compared["difference"] = float(gaps.max())
            rows.append(row(name, axis, devices, program) | compared)
    return rows


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 layers, 8 devices")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    config = OPT_125M.replace(num_layers=2) if options.quick else OPT_125M
    counts = [8] if options.quick else [2, 4, 8]
    rows = [each for name in METHODS for each in measure(name, config, counts)]
    common.print_table(rows)
    common.print_report("scaling", rows)


if __name__ == "__main__":
    main()
