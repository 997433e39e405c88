"""The rates and memory of a device: published, given by flags, or measured here."""

import functools
import os
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.checks import number, show
from jaxlm.core.errors import UserError

# Dense bfloat16 FLOPs a second, bytes of memory, memory bytes a second, and bytes a second that a
# device sends to others of its node or slice. NVIDIA's data sheets of the SXM models state twice
# the FLOPs, with sparsity, except for the A100, and NVLink in both directions together:
# nvidia.com/en-us/data-center/{a100, h100, h200}. Google's pages state the links of a chip
# together, cloud.google.com/tpu/docs/{v4, v5e, v5p}; for the links of a v4 chip (six of 50 GB/s)
# see arXiv:2304.01433.
_KNOWN: dict[str, dict[str, float]] = {
    "A100": {"peak_flops": 312e12, "memory": 80e9, "bandwidth": 2039e9, "interconnect": 300e9},
    "H100": {"peak_flops": 989e12, "memory": 80e9, "bandwidth": 3350e9, "interconnect": 450e9},
    "H200": {"peak_flops": 989e12, "memory": 141e9, "bandwidth": 4800e9, "interconnect": 450e9},
    "TPU v4": {"peak_flops": 275e12, "memory": 32e9, "bandwidth": 1200e9, "interconnect": 300e9},
    "TPU v5e": {"peak_flops": 197e12, "memory": 16e9, "bandwidth": 819e9, "interconnect": 200e9},
    "TPU v5p": {"peak_flops": 459e12, "memory": 95e9, "bandwidth": 2765e9, "interconnect": 600e9},
}
_KINDS = {"TPU v5 lite": "TPU v5e", "TPU v5": "TPU v5p"}
"""Device kinds of JAX whose names differ from those of the table."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device.

    Attributes:
        name: one of A100, H100, H200, TPU v4, TPU v5e, TPU v5p, whose published rates are used if
            none are given; or any other name, with rates.
        peak_flops: FLOPs a second in the dtype of the matrices; published ones are for bfloat16.
        utilisation: fraction of `peak_flops` that is reached.
        memory: bytes of memory.
        bandwidth: bytes a second from and to its memory.
        interconnect: bytes a second that it sends to other devices.
        cpu: whether it is the CPU of the host, so that both share their memory.
    """

    name: str = "A100"
    peak_flops: float | None = None
    utilisation: float = 0.4
    memory: float | None = None
    bandwidth: float | None = None
    interconnect: float | None = None
    cpu: bool = False

    def __post_init__(self):
        known = _KNOWN.get(self.name, {})
        if not known and self.peak_flops is None:
            raise UserError(
                f"device.name: not known (got {show(self.name)}). Choose one of "
                f"{', '.join(_KNOWN)}, or give device.peak_flops."
            )
        rates = "peak_flops", "memory", "bandwidth", "interconnect"
        for rate in rates:
            if getattr(self, rate) is None:
                object.__setattr__(self, rate, known.get(rate))
        number(self, *rates, above=0, section="device.")
        number(self, "utilisation", above=0, most=1, section="device.")

    @property
    def flops(self) -> float:
        """FLOPs a second that are reached."""
        assert self.peak_flops is not None
        return self.peak_flops * self.utilisation


def this_device() -> Device:
    """Return the device that JAX uses here, with published or measured rates.

    For a device without published rates, a float32 matrix product and a sum of arrays are timed for
    about a second. The memory of a CPU is that of the machine.
    """
    first = jax.devices()[0]
    kind = first.device_kind
    name = _KINDS.get(kind) or next((name for name in _KNOWN if name in kind), None)
    limit = (first.memory_stats() or {}).get("bytes_limit")
    if name is not None:
        return Device(name=name, memory=None if limit is None else float(limit))
    if limit is None and first.platform == "cpu":
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    flops, bandwidth = _measured()
    return Device(
        name=f"{kind}, measured",
        peak_flops=flops,
        utilisation=1.0,
        memory=None if limit is None else float(limit),
        bandwidth=bandwidth,
        interconnect=bandwidth,
        cpu=first.platform == "cpu",
    )


@functools.cache
def _measured() -> tuple[float, float]:
    """Return the FLOPs a second of a matrix product, and the bytes a second of a sum."""
    size, count = 1024, 2**24
    matrix, array = jnp.ones((size, size)), jnp.ones(count)
    product = _fastest(jax.jit(lambda x: x @ x), matrix)
    added = _fastest(jax.jit(lambda x: x + 1), array)
    return 2 * size**3 / product, 8 * count / added


def _fastest(function: Any, arg: Any, seconds: float = 0.3) -> float:
    """Return the seconds of the fastest call among calls that take `seconds` together."""
    jax.block_until_ready(function(arg))  # compile before timing
    times: list[float] = []
    while not times or sum(times) < seconds:
        begin = time.perf_counter()
        jax.block_until_ready(function(arg))
        times.append(time.perf_counter() - begin)
    return min(times)
