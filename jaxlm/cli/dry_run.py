"""Print what a run will cost: `jaxlm finetune CONFIG --dry-run`, and the same for pretrain.

The model's folder needs no weights, and nothing is written. Programs are compiled for the devices
present, or for those that --devices simulates, and --mesh divides the work over them. The rates are
those of the local device, measured if none are published. Name another device by --device.name
(A100, H100, H200, TPU v4, TPU v5e, TPU v5p), or give rates: --device.peak_flops=312e12 and
--device.utilisation=0.4, --device.bandwidth=2e12 and --device.interconnect=300e9 in bytes a second,
--device.memory=80e9 in bytes.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxlm.artifacts.config import build
from jaxlm.cli import config as configs
from jaxlm.core.errors import UserError, out_of_memory
from jaxlm.studies.tables import aligned, size

FLAG = "--dry-run"


def run(cls: type[Any], args: Sequence[str], mesh: Any = None) -> None:
    """Print the plan of a configuration of the class `cls`."""
    from jaxlm.cost.plan import dry_run

    path, flags = configs.parse_args([word for word in args if word != FLAG])
    if path == "quickstart" or (path is None and not flags):
        raise UserError(
            "--dry-run: needs a configuration (got none). Give a file, or its keys as flags."
        )
    flags.pop("resume", None)
    rates = {key: flags.pop(key) for key in list(flags) if key.startswith("device.")}
    config = configs.load(cls, path, flags)
    device = device_of({key.removeprefix("device."): value for key, value in rates.items()})
    base_dir = Path(path).parent if path else None
    print(text(dry_run(config, base_dir=base_dir, mesh=mesh, device=device)))


@contextlib.contextmanager
def memory_explained(
    config: Any, *, base_dir: Path | None = None, mesh: Any = None
) -> Iterator[None]:
    """If memory runs out in a run, name what did not fit and the largest batch that does."""
    try:
        yield
        return
    except Exception as error:
        asked = out_of_memory(error)
        if asked is None:
            raise
        # Its frames hold the arrays of the run, which the plan below may need the room of.
        failed = error.with_traceback(None)
    from jaxlm.cost.plan import dry_run

    print("too little memory; looking for the largest batch that fits ...", file=sys.stderr)
    try:
        plan = dry_run(config, base_dir=base_dir, mesh=mesh)
    except Exception:  # the plan itself may need too much, and the sentence must still be said
        raise failed from None
    raise UserError(
        f"batch_size: there is too little memory (got {plan.batch_size} examples of at most "
        f"{plan.tokens:,} tokens, which {asked}). {_smaller(plan)}"
    ) from failed


def _smaller(plan: Any) -> str:
    """Return what to do if a run does not fit into memory."""
    given, most = plan.batch_size, plan.largest_batch
    if most is None or most >= given:  # the rest of the memory belongs to others, or is unknown
        return "Lower batch_size or task.max_length, raise accumulate, or set remat: layer."
    room = f"the {size(plan.device.memory)} of a device"
    if not most:
        return (
            f"No batch fits into {room}: take a smaller model, bits: 4 with peft, or more devices."
        )
    return (
        f"The largest that fits into {room} is {most:,}: lower batch_size, raise accumulate to "
        f"{-(-given // most)} or more, or set remat: layer."
    )


def device_of(rates: dict[str, str]) -> Any:
    """Return the device that flags name, or the local one, with rates replaced by the flags."""
    from jaxlm.cost.device import Device, this_device

    if "name" in rates:
        return configs.load(Device, None, rates)
    here = dataclasses.asdict(this_device())
    known = {name: value for name, value in here.items() if value is not None}
    return build(Device, known | rates, "command line")


def text(plan: Any) -> str:
    """Return the plan in words and tables."""
    return "\n\n".join((_head(plan), _parameters(plan), _memory(plan), _step(plan), _end(plan)))


def _head(plan: Any) -> str:
    device, count = plan.device, plan.num_parameters
    rates = [f"{device.peak_flops:.3g} FLOP/s at {100 * device.utilisation:g} %"]
    if device.memory is not None:
        rates.append(size(device.memory))
    if device.bandwidth is not None:
        rates.append(f"{size(device.bandwidth)}/s of memory")
    if device.interconnect is not None and plan.devices > 1:
        rates.append(f"{size(device.interconnect)}/s between devices")
    trained = "all of them" if plan.num_trained == count else f"{plan.num_trained:,} of them"
    return (
        f"{count:,} parameters, {trained} trained; {plan.batch_size} examples of at most "
        f"{plan.tokens:,} tokens in a step; "
        f"devices: {plan.devices} x {device.name} ({', '.join(rates)})"
    )


def _parameters(plan: Any) -> str:
    rows = [
        (
            each.path,
            " x ".join(map(str, each.shape)),
            each.dtype,
            each.spec or "whole",
            size(each.bytes),
            "yes" if each.trained else "no",
        )
        for each in plan.parameters
    ]
    total = size(sum(each.bytes for each in plan.parameters))
    header = ("parameter", "shape", "dtype", "sharded over", "per device", "trained")
    return aligned(header, [*rows, ("all", "", "", "", total, "")])


def _memory(plan: Any) -> str:
    header = ("memory per device", "arguments", "outputs", "temporaries", "aliased", "also held")
    rows = [
        (
            each.program,
            *map(size, (each.arguments, each.outputs, each.temporaries)),
            f"-{size(each.aliased)}" if each.aliased else "0 B",
            size(each.held),
            size(each.peak),
        )
        for each in plan.memory
    ]
    said = (
        f"The state takes {size(plan.state_bytes)} on each device. A checkpoint that is written "
        f"takes up to {size(plan.checkpoint_bytes)} of host memory."
    )
    if plan.device.cpu:
        said += f" The machine needs up to {size(plan.host_bytes)}."
    return f"{aligned((*header, 'total'), rows)}\n\n{said}"


def _step(plan: Any) -> str:
    seconds = plan.seconds
    rows = [
        ("matrix products", f"{plan.device_flops:.3g} FLOPs", _seconds(seconds["products"])),
        ("memory", size(plan.bytes), _seconds(seconds.get("memory"))),
        ("collectives", size(plan.moved), _seconds(seconds.get("collectives"))),
    ]
    for op in dict.fromkeys(each.op for each in plan.costs.collectives):
        some = [each for each in plan.costs.collectives if each.op == op]
        times = sum(each.times for each in some) / plan.dispatch
        moved = sum(each.moved for each in some) / plan.dispatch
        rows.append((f"  {op}, {times:.3g} times", size(moved), ""))
    header = ("per step", "per device", "seconds")
    said = (
        f"All devices together: {plan.flops.products:.3g} FLOPs of matrix products, "
        f"{plan.flops.others:.3g} of other operations."
    )
    return f"{aligned(header, rows)}\n\n{said}"


def _end(plan: Any) -> str:
    step = plan.step_seconds
    lines = [f"Expected: {_seconds(step)} s per step, {plan.steps * step / 3600:.2g} h in all."]
    if plan.largest_batch is not None:
        room = f"the {size(plan.device.memory)} of a device"
        lines.append(
            f"The largest batch that fits into {room}: {plan.largest_batch:,} examples."
            if plan.largest_batch
            else f"No batch fits into {room}."
        )
    return "\n".join(lines)


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3g}"
