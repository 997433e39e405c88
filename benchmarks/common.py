"""Helpers of all benchmarks: interleaved timing, memory by the compiler, the report line."""

import ctypes
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import optax

PACKAGES = ("jax", "jaxlib", "jaxlm", "numpy", "optax", "flax", "torch", "transformers")


REST = 0.5  # seconds


def versions() -> dict[str, str]:
    """Return the versions of Python and of installed packages."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def device() -> str:
    """Return the name of the first device, and the number of devices."""
    first = jax.devices()[0]
    return f"{first.device_kind} ({first.platform}) x {jax.device_count()}"


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Lower and compile a jitted function; return the program and the seconds taken."""
    start = time.perf_counter()
    program = function.lower(*args).compile()
    return program, time.perf_counter() - start


def gradient_step(
    tx: optax.GradientTransformation, loss_fn: Callable[..., Any]
) -> Callable[..., Any]:
    """Return `step(params, state, batch) -> (params, state, loss)` by backpropagation."""

    def step(params, state, batch):
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def peak_bytes(program: Any) -> int:
    """Return the bytes of arguments, outputs and temporaries, without aliased outputs."""
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def resident_bytes() -> int:
    """Return the peak resident memory of this process."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux a process inherits ru_maxrss from its parent, so VmHWM is read instead.
    (line,) = (each for each in status.read_text().splitlines() if each.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def fresh_peak() -> int:
    """Reset the peak to the memory now in use, if the system allows it, and return it."""
    gc.collect()
    if Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()


def in_fresh_process(call: str) -> Any:
    """Return the value of `module.function(...)` of a benchmark, called in a new process."""
    module = call.partition(".")[0]
    code = f"import json; from benchmarks import {module}; print(json.dumps({call}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def seconds(function: Callable[[], Any]) -> float:
    """Return the wall-clock seconds of one call, until its arrays are ready."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def interleaved(
    functions: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1
) -> dict[str, float]:
    """Return median seconds of each function; they take turns, so other load slows all alike.

    Each call follows a pause of half a second: idle threads of another library spin for a while
    after their work, and would take a core from the next function.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warm_up + repeats):
        for name, function in functions.items():
            time.sleep(REST)
            elapsed = seconds(function)
            if turn >= warm_up:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with equal keys as aligned columns; floats have four significant digits."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [list(rows[0])] + [[cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def print_report(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the last line of a benchmark, one JSON object."""
    report = {"benchmark": benchmark, "device": device(), "versions": versions(), "rows": rows}
    print(json.dumps(report, default=lambda number: number.item()))
