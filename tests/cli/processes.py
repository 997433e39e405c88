"""Commands in two processes of four simulated devices each, for the tests."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MESH = "data=2,fsdp=2,model=2"
COMMANDS = """
import importlib, json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from jaxlm.sharding import initialize, mesh_from_text
from jaxlm.sharding.multihost import Group
port, rank, mesh, commands = sys.argv[1:]
initialize(Group(f"127.0.0.1:{port}", 2, int(rank)))
for command, *words in json.loads(commands):
    importlib.import_module(f"jaxlm.cli.{command}").run(words, mesh=mesh_from_text(mesh))
    print("", flush=True)
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_in_two(commands: list[list[str]], mesh: str = MESH, timeout: float = 300) -> list[str]:
    """Runs commands one after another in both processes; what each printed."""
    port = str(free_port())
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", COMMANDS, port, rank, mesh, json.dumps(commands)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        outputs = [run.communicate(timeout=timeout)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], "\n".join(out[-2000:] for out in outputs)
    return outputs


def start(
    words: list[str], *, port: int, rank: int, jaxlm: tuple[str, ...] = ("-m", "jaxlm.cli.main")
) -> subprocess.Popen[str]:
    """`jaxlm ...`, or a script that is one, as one of two processes that are started apart."""
    where = f"--distributed=coordinator=127.0.0.1:{port},processes=2,process={rank}"
    return subprocess.Popen(
        [sys.executable, *jaxlm, *words, "--devices=4", where],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
