"""Does a run take the memory that its dry run predicts?

usage: python -m benchmarks.dry_run [--quick]

Real runs, each in a fresh process, with evaluations and checkpoints: fine-tuning a random model of
two hundred million parameters by MeZO and by AdamW with LoRA, fine-tuning one of a hundred million
by AdamW, and pretraining one of that size. The measured value is the peak resident memory minus
that before the parameters were made, for the whole run and for its training programs alone. Memory
of compilation is left out. --quick does two runs, with models so small that the process itself
takes most of the memory. The last line is one JSON object.
"""

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from benchmarks import common
from jaxlm.cli import config as configs
from jaxlm.cost.device import this_device
from jaxlm.cost.plan import dry_run
from jaxlm.models import LanguageModel, ModelConfig, from_pretrained, init_params, save_pretrained
from jaxlm.train.finetuning import FinetuneConfig, finetune
from jaxlm.train.pretraining import PretrainConfig, pretrain
from jaxlm.train.state import Program

WIDTH = 1024
FLAGS = {
    "steps": "4",
    "log_every": "2",
    "eval_every": "4",
    "checkpoint_every": "2",
    "batch_size": "8",
}
TASK = {
    "task.name": "subj",
    "task.k": "16",
    "task.validation": "hold_out",
    "task.num_test": "32",
    "task.max_length": "64",
    "eval_batch_size": "16",
}
ADAM = {"optimizer.name": "adamw", "optimizer.learning_rate": "1e-6"}
RUNS: dict[str, tuple[int, dict[str, str] | None]] = {
    "MeZO": (12, TASK | {"optimizer.name": "mezo"}),
    "AdamW, LoRA": (12, TASK | ADAM | {"peft.name": "lora"}),
    "AdamW": (6, TASK | ADAM),
    "pretraining, AdamW": (6, None),
}
QUICK = ("MeZO", "AdamW, LoRA")
# Without these the allocator keeps freed memory, and resident memory overstates what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}


def make_model(folder: Path, layers: int, width: int) -> Path:
    """Save a random decoder with the tokenizer of the shipped model."""
    path = folder / f"{layers}x{width}"
    if path.exists():
        return path
    tokenizer = from_pretrained().tokenizer
    config = ModelConfig(
        family="llama",
        kind="decoder",
        head="lm",
        vocab_size=len(tokenizer),
        hidden_size=width,
        embedding_size=width,
        num_layers=layers,
        num_heads=8,
        num_kv_heads=8,
        head_size=width // 8,
        intermediate_size=4 * width,
        max_positions=64,
        activation="silu",
        gated_mlp=True,
        norm="rmsnorm",
        positions="rotary",
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
    )
    params = init_params(config, jax.random.key(0))
    save_pretrained(LanguageModel(config, params, tokenizer), path)
    return path


def make_corpus(folder: Path) -> dict[str, str]:
    """Write a corpus, and return the configuration keys that read it."""
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    rows = (json.dumps({"text": f"What is {i} and {i} and {i}? {2 * i}."}) for i in range(2000))
    (corpus / "sums.jsonl").write_text("\n".join(rows) + "\n")
    from_pretrained().tokenizer.save_pretrained(folder / "tokenizer")
    return {
        "tokenizer": str(folder / "tokenizer"),
        "corpus.path": str(corpus),
        "corpus.domains": "[{name: sums, weight: 1}]",
        "seq_len": "63",
    }


def configuration(name: str, folder: Path, *, small: bool, output: str) -> tuple[Any, Any]:
    """Return the configuration of a run and the function that does it."""
    layers, flags = RUNS[name]
    layers, width = (2, 64) if small else (layers, WIDTH)
    given = FLAGS | {"output": str(folder / output)}
    if flags is not None:
        given |= flags | {"model": str(make_model(folder, layers, width))}
        return configs.load(FinetuneConfig, None, given), finetune
    sizes = {
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": 8,
        "intermediate_size": 4 * width,
        "max_positions": 64,
    }
    given |= ADAM | make_corpus(folder) | {f"model.{key}": str(x) for key, x in sizes.items()}
    return configs.load(PretrainConfig, None, given), pretrain


class Meter:
    """Peak resident memory of this process, without that of compilation.

    Attributes:
        base: bytes resident at the start, plus those that compilation has left behind.
        most: phase to its peak in bytes above `base`.
    """

    def __init__(self) -> None:
        self.most: dict[str, int] = {}
        self.base = common.fresh_peak()

    def note(self, phase: str) -> None:
        """Record the peak of a phase at its end."""
        taken = common.resident_bytes() - self.base
        self.most[phase] = max(taken, self.most.get(phase, 0))

    def apart(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its memory is not counted."""

        def run(*args: Any, **options: Any) -> Any:
            self.note("all")
            before = common.fresh_peak()
            out = function(*args, **options)
            self.base += common.fresh_peak() - before
            return out

        return run


def resident(config: Any, run: Callable[[Any], Any]) -> dict[str, float]:
    """Do a run in this process; return its memory in megabytes and the seconds of a step."""
    meter, call, lower = Meter(), Program.__call__, Program.lower

    class Lowered:
        def __init__(self, lowered: Any):
            self.compile = meter.apart(lowered.compile)

    def watched(self: Program, *args: Any) -> Any:
        meter.note("all")
        gc.collect()
        common.fresh_peak()
        out = jax.block_until_ready(call(self, *args))
        meter.note("all")
        meter.note("training" if self._moves else "evaluation")
        return out

    lowered_apart = lambda self, *args: Lowered(meter.apart(lower)(self, *args))  # noqa: E731
    with (
        mock.patch.object(Program, "__call__", watched),
        mock.patch.object(Program, "lower", lowered_apart),
    ):
        summary = run(config)
    meter.note("all")
    seconds = summary["seconds"] * summary["goodput"] / config.steps
    return {f"{phase}_MB": most / 1e6 for phase, most in meter.most.items()} | {"step_s": seconds}


def row(name: str, folder: Path, *, small: bool) -> dict[str, Any]:
    """Predict a run here, and measure it in a process of its own."""
    config, _ = configuration(name, folder, small=small, output="planned")
    # Without a memory size, the dry run skips its slow search for the largest batch.
    device = dataclasses.replace(this_device(), memory=None)
    plan = dry_run(config, device=device)
    command = [sys.executable, "-m", "benchmarks.dry_run", "--resident", name]
    command += ["--folder", str(folder), *(["--quick"] if small else [])]
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | MALLOC
    ).stdout
    found = json.loads(output.splitlines()[-1])
    training = plan.memory[0].peak / 1e6
    return {
        "run": name,
        "parameters_MB": sum(each.bytes for each in plan.parameters) / 1e6,
        "training_MB": training,
        "measured_training_MB": found["training_MB"],
        "training_ratio": training / found["training_MB"],
        "run_MB": plan.host_bytes / 1e6,
        "measured_run_MB": found["all_MB"],
        "run_ratio": plan.host_bytes / 1e6 / found["all_MB"],
        "step_s": plan.step_seconds,
        "measured_step_s": found["step_s"],
    }


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models, two runs")
    parser.add_argument("--resident", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.resident:
        name, folder = options.resident, options.folder
        config, run = configuration(name, folder, small=True, output=f"warm-up, {name}")
        run(config)  # imports, threads, caches
        config, run = configuration(name, folder, small=options.quick, output=name)
        print(json.dumps(resident(config, run)))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in QUICK if options.quick else RUNS:
            rows.append(row(name, Path(folder), small=options.quick))
            print(f"{name} done", flush=True)
    common.print_table(rows)
    common.print_report("dry_run", rows)


if __name__ == "__main__":
    main()
