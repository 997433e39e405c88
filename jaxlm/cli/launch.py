"""Where a command runs: its devices, its processes, and what happens when a process is lost.

Every command takes these flags. They are not part of a configuration, since they change the results
of a run only by rounding:

  --mesh=data=2,fsdp=4,model=1   divide batches and parameters over devices; one size may be -1
  --devices=8                    simulate this many CPU devices in each process
  --processes=2                  start this many processes on this machine
  --distributed=auto             join the processes that a TPU pod, Slurm, Open MPI or Kubernetes
                                 started; elsewhere coordinator=host:port,processes=2,process=0
  --profile=FOLDER               write a JAX trace of the command; best for a short run
  --compile-cache=FOLDER         keep compiled programs there and reuse them

Each of several processes runs under a parent process, which reports if another one was lost.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from jaxlm.artifacts.files import file_path
from jaxlm.artifacts.processes import barrier, is_main_process
from jaxlm.artifacts.stopping import SIGNALS
from jaxlm.cli import config as configs
from jaxlm.core.checks import whole
from jaxlm.core.errors import UserError

TRY_AGAIN = 75
"""Exit code of a run that lost a process; the same command resumes it (EX_TEMPFAIL)."""

GRACE = 10
"""Seconds that a process has to end after it received a signal."""

MOST_DEVICES, MOST_PROCESSES = 4096, 256
"""Limits of what one machine simulates or starts; threads and memory grow with them."""

_PARENT = "JAXLM_PARENT"
"""Environment variable of a child process: the process id of its parent."""


@dataclass(frozen=True)
class Launch:
    """The flags of this module, None if not given."""

    mesh: str | None = None
    devices: int | None = None
    processes: int | None = None
    distributed: str | None = None
    profile: str | None = None
    compile_cache: str | None = None

    def __post_init__(self):
        whole(self, "devices", most=MOST_DEVICES)
        whole(self, "processes", most=MOST_PROCESSES)
        for name in ("profile", "compile_cache"):
            if (folder := getattr(self, name)) is not None:
                object.__setattr__(self, name, str(file_path(folder, name)))
        if self.processes is not None and self.distributed is not None:
            raise UserError(
                "processes: starts processes, while distributed joins others (got both). Give one."
            )

    @property
    def supervised(self) -> bool:
        """Whether this process starts and watches others."""
        return bool(self.processes or self.distributed) and _PARENT not in os.environ

    @contextlib.contextmanager
    def running(self) -> Iterator[Any]:
        """Join the other processes, start the trace, and yield the mesh or None."""
        import jax

        if self.compile_cache is not None:
            jax.config.update("jax_compilation_cache_dir", self.compile_cache)
        if self.devices is not None:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", self.devices)
        if self.distributed is not None:
            from jaxlm.sharding.multihost import group_from_text, initialize

            group = group_from_text(self.distributed)
            _end_with_parent()
            initialize(group)
        from jaxlm.sharding import mesh_from_text

        mesh = None
        if self.mesh is not None or self.distributed is not None:
            mesh = mesh_from_text(self.mesh or "data=-1")
            hosts = len({device.process_index for device in mesh.devices.flat})
            if hosts < jax.process_count():
                raise UserError(
                    f"mesh: has devices of {hosts} processes, not of all {jax.process_count()} "
                    f"(got {self.mesh}). Give sizes whose product is {jax.device_count()}."
                )
        with contextlib.ExitStack() as stack:
            if not is_main_process():  # only the main process prints
                silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(silence))
                stack.enter_context(contextlib.redirect_stderr(silence))
            if self.profile is not None:
                stack.enter_context(jax.profiler.trace(self.profile))
            yield mesh
            barrier("the end of the command")  # others would take an early end for a loss


def parse(args: Sequence[str]) -> tuple[Launch, list[str]]:
    """Split the arguments of a command into the flags of this module and the rest."""
    names = {field.name for field in fields(Launch)}
    taken: list[str] = []
    rest: list[str] = []
    words = iter(args)
    for word in words:
        name, equals, _ = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name.replace("-", "_") not in names:
            rest.append(word)
            continue
        taken.append(word)
        if not equals:
            taken += [value for value in [next(words, None)] if value is not None]
    return configs.load(Launch, None, configs.split_args(taken)[1]), rest


def supervise(launch: Launch, args: Sequence[str], script: str | None = None) -> int:
    """Run a command in child processes and return its exit code; see `jaxlm.cli.main.main`.

    When its peers are gone, JAX aborts a process from a thread that Python cannot interrupt, and it
    goes on after SIGTERM. So a parent without JAX starts it, passes signals on, and reports.
    """
    groups = [launch.distributed]
    if launch.processes is not None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = f"127.0.0.1:{free.getsockname()[1]}"
        groups = [
            f"coordinator={where},processes={launch.processes},process={i}"
            for i in range(launch.processes)
        ]
    program = ["-m", "jaxlm.cli.main"] if script is None else [script]
    children = []
    for group in groups:
        flags = vars(replace(launch, processes=None, distributed=group))
        words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        # In a session of its own, so that a terminal's signal arrives once, through this process.
        children.append(
            subprocess.Popen(
                [sys.executable, *program, *args, *words],
                env=os.environ | {_PARENT: str(os.getpid())},
                start_new_session=True,
            )
        )
    told, first = _watch(children)
    if told:
        return 128 + told[0]
    if any(child.returncode == 2 for child in children):  # a mistake that one process reports
        return 2
    if first is None:
        return 0
    if first.returncode > 0 and first.returncode != TRY_AGAIN:
        return first.returncode
    if first.returncode == -signal.SIGABRT:  # JAX, when the others are gone
        _report("another process was lost, or never came")
    elif first.returncode < 0:
        one = f"process {children.index(first)} of {len(children)}"
        name = "this process" if len(children) == 1 else one
        _report(f"{name} was ended by {signal.Signals(-first.returncode).name}")
    return TRY_AGAIN


def _watch(children: Sequence[subprocess.Popen]) -> tuple[list[int], subprocess.Popen | None]:
    """Wait for all children; return the signals that came, and the first child that failed.

    After a failure or a signal, the other children have a little time to end by themselves.
    """
    from jaxlm.sharding.multihost import HEARTBEAT

    told: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        told.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    deadline, first = None, None
    try:
        while any(child.poll() is None for child in children):
            first = first or next((child for child in children if child.returncode), None)
            if deadline is None and (first or told):
                deadline = time.monotonic() + (HEARTBEAT + 5 if first else GRACE)
            if deadline is not None and time.monotonic() > deadline:
                for child in children:
                    child.kill()
            time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return told, first or next((child for child in children if child.returncode), None)


def leave(code: int) -> None:
    """End this process of several at once, since a normal exit would wait for the others.

    Process 0, which all others need, gives them time to report the same mistake.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main_process():
        time.sleep(3)
    os._exit(code)


def lost(reason: str) -> None:
    """Report that another process was lost and end this one, which cannot continue."""
    _report(f"another process was lost ({reason})")
    os._exit(TRY_AGAIN)


def _report(what: str) -> None:
    advice = "Start all processes again; the run resumes from its last checkpoint."
    print(f"error: distributed: {what}. {advice}", file=sys.stderr, flush=True)


def _end_with_parent() -> None:
    """End this child soon after its parent was killed."""
    parent = int(os.environ[_PARENT])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(TRY_AGAIN)

    threading.Thread(target=watch, daemon=True).start()
