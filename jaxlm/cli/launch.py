"""Where a command runs: its devices, its processes, and what becomes of them when one is lost.

These flags belong to every command, and to no configuration, since they change no number of a run:

  --mesh=data=2,fsdp=4,model=1   divide batches and parameters over devices; one size may be -1
  --devices=8                    simulate so many CPU devices in each process
  --processes=2                  start so many processes on this machine
  --distributed=auto             join the processes that a TPU pod, Slurm, Open MPI or Kubernetes
                                 started; elsewhere coordinator=host:port,processes=2,process=0
  --profile=FOLDER               write a JAX trace of the command, of a short run preferably
  --compile-cache=FOLDER         keep compiled programs there and use them again

A process of several runs under a parent, which says in one sentence that another one was lost.
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
from dataclasses import dataclass
from typing import Any

from jaxlm.artifacts.files import file_path
from jaxlm.artifacts.processes import barrier, is_main_process
from jaxlm.core.checks import show, whole
from jaxlm.core.errors import UserError

TRY_AGAIN = 75
"""Exit code of a run that lost a process: the same command goes on with it (EX_TEMPFAIL)."""

GRACE = 10
"""Seconds that a process has to end after it was told to."""

MOST_DEVICES, MOST_PROCESSES = 4096, 256
"""That one machine simulates or starts: threads and memory grow with them."""

_CHILD = "JAXLM_PARENT"
_FLAGS = ("mesh", "devices", "processes", "distributed", "profile", "compile_cache")


@dataclass(frozen=True)
class Launch:
    """The flags of this module, each None where it is not given."""

    mesh: str | None = None
    devices: int | None = None
    processes: int | None = None
    distributed: str | None = None
    profile: str | None = None
    compile_cache: str | None = None

    def __post_init__(self):
        try:
            whole(self, "devices", most=MOST_DEVICES)
            whole(self, "processes", most=MOST_PROCESSES)
        except UserError as error:
            raise UserError(f"--{error}") from None
        for name in ("profile", "compile_cache"):
            if (folder := getattr(self, name)) is not None:
                key = f"--{name.replace('_', '-')}"
                object.__setattr__(self, name, str(file_path(folder, key)))
        if self.processes is not None and self.distributed is not None:
            raise UserError(
                "--processes: starts processes here, and --distributed joins others. Give one."
            )

    @property
    def supervised(self) -> bool:
        """Whether this process is to start others and to watch them."""
        return bool(self.processes or self.distributed) and _CHILD not in os.environ

    @contextlib.contextmanager
    def running(self) -> Iterator[Any]:
        """Joins the other processes and gives the mesh, or None; what is in it may be traced."""
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
            _check_all_take_part(mesh)
        with contextlib.ExitStack() as stack:
            if not is_main_process():  # it speaks for all
                silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(silence))
                stack.enter_context(contextlib.redirect_stderr(silence))
            if self.profile is not None:
                stack.enter_context(jax.profiler.trace(self.profile))
            yield mesh
            barrier("the end of the command")  # or one that is early would be taken for lost


def _check_all_take_part(mesh: Any) -> None:
    import jax

    here = {device.process_index for device in mesh.devices.flat}
    if len(here) < jax.process_count():
        raise UserError(
            f"--mesh: has devices of {len(here)} processes, and there are {jax.process_count()}. "
            f"Give sizes whose product is the {jax.device_count()} devices of all."
        )


def parse(args: Sequence[str]) -> tuple[Launch, list[str]]:
    """Takes the flags of this module out of the arguments of a command.

    Raises:
        UserError: a flag has no value, or none that it can have.
    """
    found: dict[str, Any] = {}
    rest: list[str] = []
    words = list(args)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        name = key.replace("-", "_")
        if not word.startswith("--") or name not in _FLAGS:
            rest.append(word)
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{key}: has no value (got nothing). Write --{key}=VALUE.")
            value = words.pop(0)
        if name in found:
            raise UserError(
                f"--{key}: stands twice (got {show(found[name])} and {show(value)}). Keep one."
            )
        if name in ("devices", "processes"):
            if not value.isdecimal() or len(value) > 9:  # and more digits are none that fit
                raise UserError(f"--{key}: must be a whole number (got {show(value)}). Correct it.")
            found[name] = int(value)
        else:
            found[name] = value
    return Launch(**found), rest


def supervise(launch: Launch, args: Sequence[str]) -> int:
    """Runs the command in child processes, and says in one sentence when one was lost.

    Args:
        launch: with `processes` or `distributed`.
        args: of the whole command, with its flags.

    Returns:
        The exit code of the command, or `TRY_AGAIN`.
    """
    children: dict[Any, subprocess.Popen[bytes]] = {}
    if launch.distributed is not None:
        children[None] = _start(args)
    else:
        kept = list(_without(args, "processes"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = f"127.0.0.1:{free.getsockname()[1]}"
        children = {
            i: _start(
                [
                    *kept,
                    f"--distributed=coordinator={where},processes={launch.processes},process={i}",
                ]
            )
            for i in range(launch.processes or 1)
        }
    with _passed_on(children.values()) as told:
        return _watch(children, told)


def _start(args: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {_CHILD: str(os.getpid())}
    command = [sys.executable, "-m", "jaxlm.cli.main", *args]
    # In a session of its own: what a terminal sends comes through this process, once.
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _without(args: Sequence[str], name: str) -> Iterator[str]:
    """The arguments without one flag and its value."""
    words = iter(args)
    for word in words:
        if word == f"--{name}":
            next(words, None)
        elif not word.startswith(f"--{name}="):
            yield word


def _watch(children: dict[Any, subprocess.Popen[bytes]], told: list[int]) -> int:
    """Waits for all; when one fails, the others have a little time to end by themselves.

    And all of them when they are told to stop, since JAX goes on after SIGTERM.
    """
    from jaxlm.sharding.multihost import HEARTBEAT

    deadline, first = None, None
    while any(child.poll() is None for child in children.values()):
        bad = {i: child.returncode for i, child in children.items() if child.returncode}
        if bad and first is None:
            first = next(iter(bad.items()))
            deadline = time.monotonic() + HEARTBEAT + 5
        if told and deadline is None:
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            for child in children.values():
                child.kill()
        time.sleep(0.05)
    if told:
        return 128 + told[0]
    codes = {i: child.returncode for i, child in children.items()}
    if 2 in codes.values():  # a mistake of one process ends the others
        return 2
    first = first or next(((i, code) for i, code in codes.items() if code), None)
    if first is None:
        return 0
    which, code = first
    if code > 0 and code != TRY_AGAIN:
        return code
    if code == -signal.SIGABRT:  # what JAX does when the others are gone
        _say("another process was lost, or never came")
    elif code < 0:
        name = "this process" if which is None else f"process {which} of {len(children)}"
        _say(f"{name} was ended by {signal.Signals(-code).name}")
    return TRY_AGAIN


def leave(code: int) -> None:
    """Ends one process of several at once; at a usual end it would wait for the others.

    The first process, without which no other can go on, lets them say the same mistake before.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main_process():
        time.sleep(3)
    os._exit(code)


def lost(reason: str) -> None:
    """Says that another process was lost, and ends this one, which cannot go on."""
    _say(f"another process was lost ({reason})")
    os._exit(TRY_AGAIN)


def _say(what: str) -> None:
    print(
        f"error: {what}: start all processes again; the run goes on from its last checkpoint.",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def _passed_on(children: Any) -> Iterator[list[int]]:
    """Signals to stop go to the children; which ones came."""
    told: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        told.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """A child whose parent was killed ends too."""
    parent = int(os.environ[_CHILD])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(TRY_AGAIN)

    threading.Thread(target=watch, daemon=True).start()
