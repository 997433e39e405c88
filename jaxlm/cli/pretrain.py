"""Train a causal language model from scratch on a folder of text.

usage: jaxlm pretrain config.yaml [--dotted.path=value ...]

The configuration names the sizes of the model, a tokenizer, a corpus of `<domain>.jsonl[.gz]`
files with their shares, and an optimizer; configs/pretrain/tiny.yaml is an example. `dynamics`
(svag, noise, or local steps of workers: docs/dynamics.md) changes how steps are made. The run's
folder `output` holds config.yaml, metrics.jsonl, log.txt, checkpoints/ and, at the end,
summary.json, learning_curve.png, if matplotlib is installed, and model/, a model in the Hugging
Face layout. `log_to: [tensorboard, wandb]` sends the metrics there, too: pip install 'jaxlm[log]'.
The same command resumes a run that was stopped, and shows the summary of a finished one.

`--dry-run` prints what the run will cost, without running it; see `jaxlm finetune --help`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxlm.artifacts.files import to_json
from jaxlm.cli import config as configs
from jaxlm.cli import dry_run
from jaxlm.cli.result import RunResult, finished
from jaxlm.core.errors import UserError
from jaxlm.train import pretraining
from jaxlm.train.pretraining import PretrainConfig


def config_class() -> type:
    """Return the class of this command's configuration."""
    return PretrainConfig


def run(args: Sequence[str], mesh: Any = None) -> None:
    """Run the command `jaxlm pretrain`."""
    if dry_run.FLAG in args:
        return dry_run.run(PretrainConfig, args, mesh)
    path, overrides = configs.parse_args(args)
    if path is None and not overrides:
        raise UserError(
            "config: is missing (got nothing). Give one such as configs/pretrain/tiny.yaml."
        )
    summary = pretrain(configs.load(PretrainConfig, path, overrides), mesh=mesh).summary
    shown = {key: value for key, value in summary.items() if key != "config"}
    print(to_json(shown, indent=2))


def pretrain(
    config: PretrainConfig | str | Path | None = None,
    *,
    mesh: Mesh | None = None,
    **overrides: Any,
) -> RunResult:
    """Train a language model from scratch, as the command `jaxlm pretrain` does.

    Args:
        config: a configuration, its YAML file, or None.
        mesh: see `jaxlm.sharding.make_mesh`; None for one device.
        **overrides: keys of `jaxlm.train.pretraining.PretrainConfig`; see `jaxlm.finetune`, also
            for the default of `output`.

    Returns:
        The result, with `summary`, `metrics`, `model` and `plot()`.

    Raises:
        UserError: a key is unknown or a value does not fit; the corpus or the tokenizer cannot be
            used; the folder holds another run, or another process writes there; or it diverged.
    """
    built, _ = configs.from_call(PretrainConfig, config, overrides, "pretrain")
    with dry_run.memory_explained(built, mesh=mesh):
        summary = pretraining.pretrain(built, mesh=mesh)
    return finished(built, summary, mesh)
