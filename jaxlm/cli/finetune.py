"""Fine-tune a model on a task; without arguments, the quickstart.

usage: jaxlm finetune                                      the quickstart, without a network
       jaxlm finetune quickstart [--dotted.path=value ...]   the same with other settings
       jaxlm finetune config.yaml [--dotted.path=value ...]
       jaxlm finetune --task.name=subj --output=runs/subj [--dotted.path=value ...]

A configuration:

  model: path-or-hub-id          # left out: the model that comes with jaxlm
  task: {name: subj}             # mr or subj, opt/rte, roberta/sst-2, ...; or your own files:
  # task: {name: trec, train: train.jsonl, validation: hold_out, test: test.jsonl, k: 16,
  #        template: "{text} This asks about a {label}.", labels: [word, thing, person]}
  optimizer: {name: mezo, learning_rate: 2e-4, eps: 1e-3}      # or sgd, adamw, lion, ...
  peft: {name: lora, rank: 8}    # or prefix, bitfit, head; left out: all parameters are trained
  steps: 500                     # or epochs: 2
  batch_size: 16                 # accumulate: 4 takes it in 4 parts, one in memory at a time
  seed: 0
  output: runs/subj              # the run's folder

All keys are listed below. The run's folder holds config.yaml, metrics.jsonl, log.txt, checkpoints/
and, at the end, summary.json and learning_curve.png, if matplotlib is installed. `log_to:
[tensorboard, wandb]` sends the metrics there, too: pip install 'jaxlm[log]'. The same command
resumes a run that was stopped, and shows the table of a finished one; `--resume=never` refuses
both.

`--dry-run` prints what the run will cost, without running it: shardings, memory per device, FLOPs,
bytes between devices, seconds per step, and the largest batch that fits. The model's folder needs
no weights. It uses the rates of the local device, or of another one: --device.name=H200 (A100,
H100, H200, TPU v4, TPU v5e, TPU v5p), --device.memory=80e9, --device.peak_flops=312e12,
--device.utilisation=0.4, --device.bandwidth=2e12, --device.interconnect=300e9.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxlm.artifacts.files import file_path
from jaxlm.cli import config as configs
from jaxlm.cli import dry_run, screen
from jaxlm.cli.result import RunResult, finished
from jaxlm.core.errors import UserError
from jaxlm.train import finetuning
from jaxlm.train.finetuning import FinetuneConfig

QUICKSTART = Path(__file__).parent.parent / "assets" / "quickstart.yaml"


def config_class() -> type:
    """Return the class of this command's configuration."""
    return FinetuneConfig


def read_config(args: Sequence[str]) -> Any:
    """Return the configuration that the arguments give."""
    path, flags = configs.parse_args(args)
    if path == "quickstart" or not args:
        from jaxlm.studies.quickstart import QuickstartConfig

        return configs.load(QuickstartConfig, QUICKSTART, flags)
    flags.pop("resume", None)
    return configs.load(config_class(), path, flags)


def run(args: Sequence[str], mesh: Any = None) -> None:
    """Run the command `jaxlm finetune`."""
    if dry_run.FLAG in args:
        return dry_run.run(FinetuneConfig, args, mesh)
    path, overrides = configs.parse_args(args)
    if path == "quickstart" or not args:
        if mesh is not None:
            raise UserError(
                "mesh: the quickstart runs on one device (got a mesh). Give a configuration."
            )
        return _quickstart(overrides)
    resume = overrides.pop("resume", "auto")
    if resume not in ("auto", "never"):
        raise UserError(f"--resume: is not known (got {resume}). Choose one of auto, never.")
    config = configs.load(FinetuneConfig, path, overrides)
    if resume == "never" and (file_path(config.output, "output") / "config.yaml").exists():
        raise UserError(
            f"output: there is a run already (got {config.output}). Choose another output."
        )
    base_dir = Path(path).parent if path else None
    show(finetune(config, base_dir=base_dir, mesh=mesh).summary, config.output)


def finetune(
    config: FinetuneConfig | str | Path | None = None,
    *,
    base_dir: Path | None = None,
    mesh: Mesh | None = None,
    **overrides: Any,
) -> RunResult:
    """Fine-tune a model, as the command `jaxlm finetune` does.

        run = jaxlm.finetune(task="subj", optimizer={"name": "mezo", "learning_rate": 2e-4})
        run.summary["test"]["accuracy"], run.metrics["loss"], run.model, run.plot()

    The run's folder holds its checkpoints, its metrics and its learning curve. The same call
    resumes a run that was stopped, and returns the result of a finished one.

    Args:
        config: a configuration, its YAML file, or None.
        base_dir: where relative paths of the data are looked up, before the working directory; by
            default the folder of the YAML file.
        mesh: see `jaxlm.sharding.make_mesh`; None for one device.
        **overrides: keys of `jaxlm.train.finetuning.FinetuneConfig`, with numbers, texts, lists,
            and a dict or a name for a section. They replace those of `config`. Without `output`
            the run's folder is `runs/finetune-DIGEST`, where the digest is that of the other keys.

    Returns:
        The result, with `summary`, `metrics`, `model` and `plot()`.

    Raises:
        UserError: a key is unknown or a value does not fit; the data or the model cannot be used;
            the folder holds another run, or another process writes there; or the run diverged.
    """
    built, folder = configs.from_call(FinetuneConfig, config, overrides, "finetune")
    with dry_run.memory_explained(built, base_dir=base_dir or folder, mesh=mesh):
        summary = finetuning.finetune(built, base_dir=base_dir or folder, mesh=mesh)
    return finished(built, summary, mesh)


def _quickstart(overrides: dict[str, str]) -> None:
    from rich.table import Table

    from jaxlm.studies import quickstart

    config = configs.load(quickstart.QuickstartConfig, QUICKSTART, overrides)
    model = config.model or "the shipped model"
    table = Table(
        title=f"{config.task.name}, {model}",
        caption="accuracy on the test split; passes over a batch to train or to calibrate; memory "
        "of the largest compiled program; logistic regression reads mean token embeddings",
    )
    for column in ("", "accuracy", "forwards", "backwards", "memory", "seconds"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in quickstart.run(config):
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB"
        cells = (f"{100 * row.accuracy:.1f} %", str(row.forwards), str(row.backwards), memory)
        table.add_row(row.method, *cells, f"{row.seconds:.1f}")
    screen.show(table)
    print("A run with a folder of its own, to evaluate, generate from and convert:")
    print("  jaxlm finetune --task.name=subj --steps=200 --output=runs/subj")


def show(summary: dict[str, Any], output: str) -> None:
    """Print the table of a finished run."""
    from rich.table import Table

    metric = summary["metric"]
    names = {"accuracy": "accuracy", "f1": "F1", "macro_f1": "macro F1"}
    name, scale = names.get(metric, metric), 100 if metric in names else 1

    def shown(section: str, key: str = metric) -> str:
        value = (summary[section] or {}).get(key)
        if value is None:
            return "none"
        return f"{100 * value:.1f} %" if scale == 100 else f"{value:.4f}"

    rows = {f"zero-shot test {name}": shown("zero_shot")}
    if metric == "accuracy":
        rows["zero-shot, calibrated"] = shown("zero_shot", "calibrated_accuracy")
    others = [
        key for key in ("exact_match", "accuracy") if key in summary["test"] and key != metric
    ]
    for key in others:
        rows[f"zero-shot, {key.replace('_', ' ')}"] = shown("zero_shot", key)
    watched = next(iter(summary["validation"]), metric)  # by the key monitor, perhaps another one
    said = name if watched == metric else watched.replace("_", " ")
    if summary["validation"]:  # otherwise no checkpoint is the best
        rows[f"validation {said}"] = shown("validation", watched)
    rows[f"test {name}"] = shown("test")
    for key in others:
        rows[f"test {key.replace('_', ' ')}"] = shown("test", key)
    if (majority := summary.get("majority_accuracy")) is not None:
        always = "test accuracy, most frequent" if others else "test, always the most frequent"
        rows[f"{always} class"] = f"{100 * majority:.1f} %"
    rows |= {
        "steps (tested)": f"{summary['steps']} ({summary['tested_step']})"
        + (", stopped early" if summary.get("stopped_early") else ""),
        "forwards, backwards": f"{summary['forwards']}, {summary['backwards']}",
        "peak memory": f"{summary['peak_memory_bytes'] / 2**20:.0f} MiB",
        "checkpoint": f"{summary['checkpoint_bytes'] / 2**20:.1f} MiB",
        "seconds": f"{summary['seconds']:.1f}",
        "folder": output,
    }
    table = Table(title=f"{summary['task']}: {summary['model']}", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    screen.show(table)
