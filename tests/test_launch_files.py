"""The files in launch/: jaxlm knows the flags that they pass."""

import re
from pathlib import Path

import pytest
import yaml

from jaxlm.cli import launch, main
from jaxlm.sharding import make_mesh
from jaxlm.sharding.multihost import group_from_text

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def container() -> dict:
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    return {**job["template"]["spec"]["containers"][0], "job": job, "name": jobset["metadata"]}


def commands() -> list[str]:
    """Every command of jaxlm, with what a shell would put in."""
    texts = [path.read_text().replace("\\\n", " ") for path in SCRIPTS]
    texts.append(container()["args"][0].replace("$JOB_COMPLETION_INDEX", "1"))
    found = [line for text in texts for line in re.findall(r"\bjaxlm finetune .*", text)]
    assert len(found) == 3
    return [line.replace("$config", "c.yaml").replace('"', "") for line in found]


@pytest.mark.parametrize("line", commands())
def test_jaxlm_knows_its_flags(line):
    _, command, *words = line.split()
    assert command in main.COMMANDS
    flags, rest = launch.parse(words)
    assert flags.compile_cache is not None
    assert flags.mesh is not None
    assert len(rest) == 1
    group_from_text(flags.distributed)
    sizes = dict(part.split("=") for part in flags.mesh.split(","))
    assert list(sizes.values()).count("-1") == 1
    make_mesh(**{axis: 1 if size == "-1" else int(size) for axis, size in sizes.items()})


def test_a_job_set_starts_as_many_pods_as_it_tells_its_processes():
    found, (line,) = container(), [each for each in commands() if "coordinator" in each]
    (text,) = re.findall(r"--distributed=(\S+)", line)
    group, job = group_from_text(text), found["job"]
    assert group.processes == job["completions"] == job["parallelism"]
    host, port = group.coordinator.split(":")
    name = found["name"]["name"]
    assert host == f"{name}-workers-0-0.{name}"
    assert [each["containerPort"] for each in found["ports"]] == [int(port)]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert launch.TRY_AGAIN not in rule["onExitCodes"]["values"]
