"""Run the benchmarks one after another, each in its own process, and make one table of them.

usage: python -m benchmarks.all [--quick] [--only NAME,NAME] [--output FOLDER] [--beside FOLDER]
                                [--timeout SECONDS]

The folder (by default runs/benchmarks) then holds

  results.json   device, versions, and the outcome, wall-clock seconds, CPU seconds and rows of each
                 benchmark
  results.md     a table of headlines, and below it all rows
  logs/          the output of each benchmark

Results of an earlier run there are overwritten. --beside adds a column with the headlines of
another such folder, for example of another device. If a benchmark fails or takes longer than
--timeout (600 with --quick, else none), its row says so, the others still run, and the exit code is
1. A benchmark is skipped if a package that it needs is not installed. --quick takes minutes: it
measures small sizes, to check that everything works.
"""

import argparse
import ast
import importlib.util
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Result, device_of, markdown, versions_of
from benchmarks.suite import SUITE, Benchmark

FOLDER = Path(__file__).parent


def run(
    name: str, benchmark: Benchmark, folder: Path, output: Path, quick: bool, timeout: float | None
) -> Result:
    """Run one benchmark."""
    result = Result(name, question(folder / f"{name}.py"), "skipped")
    missing = [each for each in benchmark.needs if importlib.util.find_spec(each) is None]
    if missing:
        return result._replace(reason=f"{missing[0]} is not installed (extra: parity)")
    command = [sys.executable, "-m", f"{folder.name}.{name}"]
    command += ["--quick"] if quick else [each.format(output=output) for each in benchmark.full]
    logs = [output / "logs" / f"{name}.{kind}" for kind in ("out", "err")]
    logs[0].parent.mkdir(parents=True, exist_ok=True)
    begin, cpu = time.perf_counter(), cpu_seconds()
    code = ended(command, folder.parent, logs, timeout)
    spent = {"seconds": time.perf_counter() - begin, "cpu_s": cpu_seconds() - cpu}
    out, err = (log.read_text(errors="replace").splitlines() for log in logs)
    notes = tuple(line for line in out if "is not installed" in line and not line.startswith("{"))
    return judged(result._replace(exit_code=code, notes=notes, **spent), out, err)


def question(path: Path) -> str:
    """Return the first line of a file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def cpu_seconds() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ended(
    command: Sequence[str], where: Path, logs: Sequence[Path], timeout: float | None
) -> int | None:
    """Run a command and return its exit code, or None if it exceeded the timeout."""
    # With filtering, the last line of an error is a note of JAX on the traceback.
    env = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}
    with logs[0].open("w") as out, logs[1].open("w") as err:
        process = subprocess.Popen(
            command, cwd=where, env=env, stdout=out, stderr=err, start_new_session=True
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.returncode is None:  # also kills processes that it has started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def judged(result: Result, out: Sequence[str], err: Sequence[str]) -> Result:
    """Return the result with its outcome, judged by exit code and output."""
    if result.exit_code is None:
        return result._replace(outcome="timed out", reason=f"after {result.seconds:.0f} seconds")
    last = next((line.strip() for line in reversed(err) if line.strip()), "")
    if result.exit_code != 0:
        return result._replace(outcome="failed", reason=last[:300])
    try:
        report = json.loads(out[-1])
        complete = {"benchmark", "device", "versions", "rows"} <= set(report)
    except (IndexError, TypeError, ValueError):
        complete = False
    if not complete:
        return result._replace(outcome="failed", reason="its last line is no JSON report")
    return result._replace(outcome="passed", report=report)


def write(
    results: Sequence[Result], suite: Mapping[str, Benchmark], output: Path, options: Any
) -> None:
    """Write both files."""
    command = shlex.join(["python", "-m", "benchmarks.all", *options.arguments])
    found = {
        "command": command,
        "quick": options.quick,
        "device": device_of(results),
        "versions": versions_of(results),
        "benchmarks": {each.benchmark: each.as_json() for each in results},
    }
    (output / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    figures = {name: benchmark.figures for name, benchmark in suite.items()}
    page = markdown(results, figures, command=command, beside=options.other)
    (output / "results.md").write_text(page)


def parsed(arguments: Sequence[str], suite: Mapping[str, Benchmark]) -> argparse.Namespace:
    """Return the options, with the benchmarks' `names`, and the results of --beside as `other`."""
    parser = argparse.ArgumentParser(prog="benchmarks.all", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, minutes in all")
    parser.add_argument("--only", default=",".join(suite), help="names, with commas between")
    parser.add_argument("--output", type=Path, default=Path("runs", "benchmarks"))
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="results of another device")
    parser.add_argument("--timeout", type=float, help="seconds for each benchmark")
    options = parser.parse_args(arguments)
    options.arguments, options.names = arguments, options.only.split(",")
    for name in options.names:
        if name not in suite:
            parser.error(f"--only: there is no benchmark {name}; there are {', '.join(suite)}")
    options.other = None
    if options.beside is not None:
        if not (options.beside / "results.json").exists():
            parser.error(f"--beside: {options.beside} has no results.json; give one of --output")
        options.other = json.loads((options.beside / "results.json").read_text())
    if options.timeout is None and options.quick:
        options.timeout = 600.0
    return options


def main(
    arguments: Sequence[str] | None = None,
    suite: Mapping[str, Benchmark] = SUITE,
    folder: Path = FOLDER,
) -> int:
    """Run the benchmarks, write results after each, and return the exit code."""
    options = parsed(sys.argv[1:] if arguments is None else arguments, suite)
    output = options.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for name in options.names:
        print(f"{name}: ", end="", flush=True)
        result = run(name, suite[name], folder, output, options.quick, options.timeout)
        reason = f" ({result.reason})" if result.reason else ""
        print(f"{result.outcome} in {result.seconds:.0f} s{reason}", flush=True)
        results.append(result)
        write(results, suite, output, options)
    print(f"{sum(each.seconds for each in results):.0f} s in all: {options.output / 'results.md'}")
    return int(any(result.went_wrong for result in results))


if __name__ == "__main__":
    sys.exit(main())
