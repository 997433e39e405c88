"""Starts commands from a process that has imported jaxlm: of a short command, that is most of it.

A line of standard input asks for one: `{"words", "folder", "out", "err", "seconds", "memory"}`. A
fork runs it, and a line of standard output says its exit code; 124 where it took too long.
"""

import atexit
import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
import warnings

from jaxlm.cli import main

IMPORTED = (
    *(f"jaxlm.cli.{name}" for name in ("config", "dry_run", "launch", *main.COMMANDS)),
    *(
        "jaxlm.train.finetuning",
        "jaxlm.train.pretraining",
        "jaxlm.models",
        "jaxlm.peft",
        "jaxlm.zo",
    ),
    *("jaxlm.studies.less", "jaxlm.studies.kernel", "jaxlm.influence"),
    *("datasets", "orbax.checkpoint", "rich.console", "rich.table", "sklearn.linear_model"),
    *("transformers.tokenization_utils_tokenizers", "transformers.models.auto.tokenization_auto"),
)


def child(request: dict) -> None:
    """What a shell would do, then the command, and the end without freeing all that is imported."""
    os.setsid()
    os.chdir(request["folder"])
    resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
    opened = [
        os.open(os.devnull, os.O_RDONLY),
        *(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("out", "err")),
    ]
    for number, descriptor in enumerate(opened):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = ["jaxlm", *request["words"]]
    code = main.main()
    threading._shutdown()  # as the interpreter does: threads end, then what is registered runs
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def wait(process: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return 124


def give_up_override() -> None:
    """What root may open whatever its mode is, this process and its children may not."""
    libc = ctypes.CDLL(None)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    for place in range(2):  # effective and permitted: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        sets[place] &= ~0b110 & 0xFFFFFFFF
    libc.capset(header, sets)


def serve() -> int:
    give_up_override()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in IMPORTED:
        __import__(name)
    while line := sys.stdin.readline():
        request = json.loads(line)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX warns of forks; it has started no thread yet
            process = os.fork()
        if process == 0:
            child(request)
        print(json.dumps(wait(process, request["seconds"])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve())
