"""One program in several processes, with the distributed runtime of JAX.

On a Cloud TPU pod, under Slurm or Open MPI, and in a Kubernetes job, `initialize()` finds the other
processes by itself. Elsewhere it needs the address of process 0.
"""

import os
from dataclasses import dataclass

import jax

from jaxlm.core.checks import show
from jaxlm.core.errors import UserError

HEARTBEAT = 20
"""Seconds without a message after which a process counts as lost, and the others end."""


@dataclass(frozen=True)
class Group:
    """The "host:port" of process 0, the number of processes, and the index of this one.

    All are None if the environment describes the group.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def __post_init__(self):
        if (self.coordinator, self.processes, self.process) == (None, None, None):
            return
        if self.coordinator is None or self.processes is None or self.process is None:
            raise UserError(
                "distributed: coordinator (host:port), processes and process belong together (got "
                "some). Add what is missing, or leave all to the environment (auto)."
            )
        host, colon, port = self.coordinator.rpartition(":")
        if not host or not colon or not (port.isdecimal() and len(port) < 6 and int(port) < 2**16):
            raise UserError(
                f"coordinator: not an address (got {show(self.coordinator)}). Give host:port of "
                "process 0."
            )
        if self.processes < 1 or not 0 <= self.process < self.processes:
            raise UserError(
                f"process: must be from 0 to the number of processes minus 1 (got {self.process} "
                f"of {self.processes}). Correct it."
            )


def group_from_text(text: str) -> Group:
    """Parse `coordinator=host:port,processes=2,process=0`, or `auto`.

    >>> group_from_text("coordinator=10.0.0.1:1234,processes=2,process=0").process
    0
    """
    if text == "auto":
        return Group()
    parts = text.split(",")
    values = dict(part.strip().partition("=")[::2] for part in parts)
    known = {"coordinator", "processes", "process"}
    numbers = [values.get(name, "0") for name in ("processes", "process")]
    read = all(number.isdecimal() and len(number) < 10 for number in numbers)
    if set(values) - known or len(values) < len(parts) or not read:
        raise UserError(
            f"distributed: not known (got {show(text)}). Write auto, or "
            "coordinator=host:port,processes=2,process=0."
        )
    return Group(
        coordinator=values.get("coordinator"),
        **{name: int(values[name]) for name in ("processes", "process") if name in values},
    )


def initialize(group: Group = Group(), *, timeout: int = 300) -> None:
    """Join the other processes. Call it once, before anything uses a device.

    If a process is lost, the others notice within `HEARTBEAT` seconds and end.

    Args:
      group: the processes; the default asks the environment.
      timeout: seconds to wait for the others.

    Raises:
      UserError: the environment describes no group, or the others do not join in time.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms.split(",")[0] in ("", "cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # With jax 0.10.1, collectives of a CPU program that comes from the cache can wait for ever.
        jax.config.update("jax_enable_compilation_cache", False)
    try:
        jax.distributed.initialize(
            group.coordinator,
            group.processes,
            group.process,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"distributed: the other processes could not be joined (got {reason}). Start them all, "
            "with one coordinator=host:port."
        ) from error
