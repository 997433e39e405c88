"""The costs of a run before it starts, without weights: parameters, memory, FLOPs, time.

Programs are compiled for the devices present and not run. The compiler of another device fuses
differently, and that of a CPU computes in float32 what is stored in bfloat16.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.cost.by_shapes import ByShapes, finetuning, pretraining
from jaxlm.cost.device import Device, this_device
from jaxlm.cost.flops import Flops, count_flops
from jaxlm.cost.hlo import Costs, costs
from jaxlm.sharding.placement import mesh_of
from jaxlm.train.checkpoint import copied_bytes
from jaxlm.train.finetuning import FinetuneConfig
from jaxlm.train.pretraining import PretrainConfig


class Parameter(NamedTuple):
    """A leaf; `spec` are the axes of the mesh that shard it, `bytes` are those on one device."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes: int
    trained: bool


class Memory(NamedTuple):
    """Bytes on one device while a program runs, by the compiler; `held` is what else is there."""

    program: str
    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    held: int = 0

    @property
    def peak(self) -> int:
        """Arguments, outputs, temporaries and what else is held, without aliased bytes."""
        used = self.arguments + self.outputs + self.temporaries - self.aliased
        return used + self.held


class Plan(NamedTuple):
    """What a run will cost.

    Attributes:
        device, devices: the kind of device, and how many there are.
        parameters: the leaves.
        memory: memory of each program, on one device.
        state_bytes: size of the state on one device.
        checkpoint_bytes: host memory of a process while a checkpoint is written or read.
        batch_size: examples in a step.
        tokens: tokens of the longest example.
        largest_batch: largest batch that fits into the memory of the device, by compilation; 0 if
            none fits, None if the memory is unknown.
        steps: number of steps of the run.
        dispatch: number of steps in a dispatch.
        flops: FLOPs of a step on all devices together, as the algorithm has them.
        costs: costs of a dispatch on one device, as it is compiled.
    """

    device: Device
    devices: int
    parameters: tuple[Parameter, ...]
    memory: tuple[Memory, ...]
    state_bytes: int
    checkpoint_bytes: int
    batch_size: int
    tokens: int
    largest_batch: int | None
    steps: int
    dispatch: int
    flops: Flops
    costs: Costs

    @property
    def num_parameters(self) -> int:
        """Number of all parameters."""
        return sum(math.prod(each.shape) for each in self.parameters)

    @property
    def num_trained(self) -> int:
        """Number of trained parameters."""
        return sum(math.prod(each.shape) for each in self.parameters if each.trained)

    @property
    def peak_bytes(self) -> int:
        """Largest memory of a device."""
        return max((each.peak for each in self.memory), default=self.state_bytes)

    @property
    def host_bytes(self) -> int:
        """Largest memory of a machine without accelerators.

        While a checkpoint is written or read, a part of the state is in memory twice.
        """
        return max(
            self.devices * self.peak_bytes,
            self.devices * self.state_bytes + self.checkpoint_bytes,
        )

    @property
    def device_flops(self) -> float:
        """FLOPs of matrix products in a step of one device.

        The compiled program has more if devices repeat work, and fewer if products were replaced
        by library calls or rewritten.
        """
        return max(self.flops.products / self.devices, self.costs.products / self.dispatch)

    @property
    def bytes(self) -> float:
        """Bytes that a device reads and writes in a step."""
        return self.costs.bytes / self.dispatch

    @property
    def moved(self) -> float:
        """Bytes that a device sends to others in a step."""
        return self.costs.moved / self.dispatch

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each part of a step whose rate is known.

        A device computes while it accesses memory, and waits while it communicates.
        """
        device = self.device
        found = {"products": self.device_flops / device.flops}
        if device.bandwidth is not None:
            found["memory"] = self.bytes / device.bandwidth
        if device.interconnect is not None:
            found["collectives"] = self.moved / device.interconnect
        return found

    @property
    def step_seconds(self) -> float:
        """Expected seconds of a step."""
        parts = self.seconds
        return max(parts["products"], parts.get("memory", 0.0)) + parts.get("collectives", 0.0)


def dry_run(
    config: FinetuneConfig | PretrainConfig,
    *,
    base_dir: Path | None = None,
    mesh: Mesh | None = None,
    device: Device | None = None,
) -> Plan:
    """Return the costs of a run of `finetune` or `pretrain`, see there.

    The devices of the mesh may be simulated ones. Rates and memory are those of `device`; None
    means the local one.
    """
    if isinstance(config, FinetuneConfig):
        run = finetuning(config, base_dir=base_dir, mesh=mesh)
    else:
        run = pretraining(config, mesh=mesh)
    return plan(run, this_device() if device is None else device)


def plan(run: ByShapes, device: Device) -> Plan:
    """Return the costs of a run given by its shapes."""
    if not run.count:
        raise UserError("steps: must be at least 1 for a dry run (got 0). Correct it.")
    step = run.dispatch()
    (state, batches), compiled = step.args, step.compile(cpu=device.cpu)
    memory = [_memory("training", compiled)]
    if run.evaluation is not None:
        held = _bytes(state.opt_state)
        memory.append(_memory("evaluation", run.evaluation.compile(cpu=device.cpu), held=held))
    method, _ = run.make(run.config.batch_size)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batches)
    mesh = mesh_of(state.params)
    return Plan(
        device=device,
        devices=1 if mesh is None else mesh.size,
        parameters=_parameters(run),
        memory=tuple(memory),
        state_bytes=_bytes(state),
        checkpoint_bytes=copied_bytes(state),
        batch_size=run.config.batch_size,
        tokens=max(leaf.shape[-1] for key, leaf in one.items() if key.endswith("_ids")),
        largest_batch=_largest_batch(run, device, memory[0].peak),
        steps=run.config.steps,
        dispatch=run.count,
        flops=count_flops(method.step, state.params, state.opt_state, one),
        costs=costs(compiled),
    )


def _largest_batch(run: ByShapes, device: Device, peak: int) -> int | None:
    if device.memory is None:
        return None

    def peak_bytes(size: int) -> int:
        if size == first:
            return peak
        return _memory("training", run.dispatch(size).compile(cpu=device.cpu)).peak

    first = run.config.batch_size
    return largest_batch(peak_bytes, device.memory, first=first, unit=run.unit)


def _parameters(run: ByShapes) -> tuple[Parameter, ...]:
    trained = paths.leaf_predicate(run.config.optimizer.select)
    return tuple(
        Parameter(
            leaf.path,
            leaf.value.shape,
            str(leaf.value.dtype),
            _spec(leaf.value),
            _bytes(leaf.value),
            trained(leaf.path, leaf.value),
        )
        for leaf in paths.flatten(run.params)[0]
    )


def _spec(leaf: Any) -> str:
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return ""
    return ", ".join("-" if axis is None else str(axis) for axis in sharding.spec)


def _bytes(tree: Any) -> int:
    """Return the bytes of a tree on one device."""

    def of(leaf: Any) -> int:
        sharding, size = getattr(leaf, "sharding", None), leaf.size
        if sharding is not None:
            size = math.prod(sharding.shard_shape(leaf.shape))
        return size * leaf.dtype.itemsize

    return sum(map(of, jax.tree.leaves(tree)))


def _memory(name: str, compiled: Any, held: int = 0) -> Memory:
    use = compiled.memory_analysis()
    return Memory(
        name,
        use.argument_size_in_bytes,
        use.output_size_in_bytes,
        use.temp_size_in_bytes,
        use.alias_size_in_bytes,
        held,
    )


def largest_batch(
    peak_bytes: Callable[[int], int], memory: float, *, first: int, unit: int = 1
) -> int:
    """Return the largest batch whose training fits into a device's memory, by compiling sizes.

    Two batch sizes give a line, whose crossing with the memory is the next size. If its peak is off
    the line, further sizes follow. The result is a multiple of `unit` of at most 65,536; 0 if none
    fits.

    >>> largest_batch(lambda size: 1000 + 7 * size, 8000.0, first=16)
    1000
    """
    peaks = {first: peak_bytes(first)}
    guess = first * 2 if peaks[first] <= memory else first // 2
    for _ in range(COMPILATIONS):
        guess = max(unit, guess // unit * unit)
        if guess not in peaks:
            peaks[guess] = peak_bytes(guess)
        fits = max(
            (size for size in peaks if size % unit == 0 and peaks[size] <= memory), default=0
        )
        fails = min((size for size in peaks if peaks[size] > memory), default=LARGEST + unit)
        known = [size for size in (fits, fails) if size in peaks]
        low, high = known if len(known) == 2 else (min(peaks), max(peaks))
        slope = (peaks[high] - peaks[low]) / (high - low) if high > low else 0.0
        line = low + (memory - peaks[low]) / slope if slope > 0 else LARGEST
        guess = int(min(max(line, fits + unit), fails - 1, LARGEST))
        if guess // unit * unit <= fits:
            break
    return fits


COMPILATIONS = 4
LARGEST = 2**16
