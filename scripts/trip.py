"""Fine-tune on conversations, be killed twice, move, predict, convert, and go on: one trip.

usage: python -m scripts.trip --data FOLDER --out FOLDER [--model smollm2] [--rows 500]
                              [--template chat] [--length 256] [--twin]

FOLDER of ``--data`` has train.jsonl, validation.jsonl and test.jsonl of
scripts/prepare_conversations.py. LoRA by AdamW on a base in 4 bits, cosine with warm-up, four
micro-batches a step, two epochs of packed windows. The process is killed (SIGKILL) twice and
resumes; with ``--twin`` a second run that nobody disturbs must end with the same adapter, bit for
bit. Then the run moves, predicts 200 rows without answers, becomes a PEFT folder and a merged
model, and that model is trained for one epoch more. The last line is one JSON object with the held-
out losses.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

JAXLM = [sys.executable, "-m", "jaxlm.cli.main"]


def jaxlm(*words: str) -> None:
    """Run a command of jaxlm, which must succeed."""
    subprocess.run([*JAXLM, *words], check=True)


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """Return the run's configuration."""
    data = options.data.resolve()
    return {
        "model": options.model,
        "messages": {
            **{split: str(data / f"{split}.jsonl") for split in ("train", "validation", "test")},
            "num_train": options.rows,
            "num_validation": options.rows // 10,
            "num_test": options.rows // 5,
            "template": options.template,
            "max_length": options.length,
            "packing": True,
        },
        "bits": 4,
        "peft": {"name": "lora", "rank": 8},
        "optimizer": {
            "name": "adamw", "learning_rate": 5e-4, "schedule": "cosine", "warmup": 0.1
        },
        "epochs": 2,
        "batch_size": 8,
        "accumulate": 4,
        "eval_every": 5,
        "checkpoint_every": 1,
        "log_every": 1,
    }  # fmt: skip


def steps_of(run: Path) -> int:
    """Return the last step in the metrics of a run."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def killed(config: Path, run: Path, step: int) -> int:
    """Start a run, kill it after that step, and return the step where it was."""
    process = subprocess.Popen([*JAXLM, "finetune", str(config), f"--output={run}"])
    while steps_of(run) < step and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return steps_of(run)


def held_out(run: Path) -> dict[str, float]:
    """Return the losses on validation by step, and on the test before and after training."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = {str(row["step"]): row["validation_loss"] for row in rows if "validation_loss" in row}
    summary = json.loads((run / "summary.json").read_text())
    return {
        "before": summary["zero_shot"]["loss"],
        **{f"validation at step {step}": value for step, value in values.items()},
        "after": summary["test"]["loss"],
    }


def questions(data: Path, path: Path, count: int) -> None:
    """Write conversations without their answers."""
    lines = [
        line
        for split in ("test", "validation", "train")
        for line in (data / f"{split}.jsonl").read_text().splitlines()
    ]
    rows = ({"messages": json.loads(line)["messages"][:-1]} for line in lines[:count])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def adapter(run: Path, folder: Path) -> bytes:
    """Write the adapter of a run, and return its weights."""
    jaxlm("convert", str(run), str(folder), "--adapter")
    return (folder / "adapter_model.safetensors").read_bytes()


def trip(options: argparse.Namespace) -> dict[str, Any]:
    """Do all of it, and return the losses."""
    out: Path = options.out.resolve()
    out.mkdir(parents=True)
    config, run, moved = out / "trip.yaml", out / "run", out / "elsewhere" / "run"
    config.write_text(yaml.safe_dump(configuration(options)))
    for step in (2, 4):
        print(f"killed at step {killed(config, run, step)}", flush=True)
    jaxlm("finetune", str(config), f"--output={run}")
    report: dict[str, Any] = {"held-out loss": held_out(run)}
    moved.parent.mkdir()
    os.rename(run, moved)
    if options.twin:
        jaxlm("finetune", str(config), f"--output={out / 'twin'}")
        same = adapter(moved, out / "one") == adapter(out / "twin", out / "other")
        report["same bits as undisturbed"] = same
    questions(options.data, out / "questions.jsonl", 200)
    words = [f"--output={out / 'answers.jsonl'}", "--max_new_tokens=8"]
    jaxlm("predict", str(moved), str(out / "questions.jsonl"), *words)
    answers = (out / "answers.jsonl").read_text().splitlines()
    report["predictions"] = len(answers)
    adapter(moved, out / "peft")
    jaxlm("convert", str(moved), str(out / "merged"))
    # In floats: 4 bits again would round what was learned.
    more = [f"--model={out / 'merged'}", "--bits=null", "--epochs=1", f"--output={out / 'more'}"]
    jaxlm("finetune", str(config), *more)
    return report | {"held-out loss, one epoch more": held_out(out / "more")}


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Do the trip, and print its report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--template", default="chat")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--twin", action="store_true", help="also train without being killed")
    report = trip(parser.parse_args(args))
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    main()
