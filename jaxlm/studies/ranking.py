"""How well a model ranks preference pairs, how well it could, and which pairs training corrects.

Each seed is one run on pairs. Its ranking accuracy over training is compared with that of the
optimum of the loss. Its pairs are grouped by c - l under the reference, before training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxlm import preference
from jaxlm.artifacts.config import build
from jaxlm.core.checks import distinct, number, real, whole
from jaxlm.core.errors import UserError
from jaxlm.data.rows import SplitName
from jaxlm.preference import PairScores
from jaxlm.studies.figures import new_axes, save_figure
from jaxlm.studies.grid import GridConfig, Result, Say, listing, outcomes, per_seed
from jaxlm.studies.tables import aligned, percent, shown, spreads
from jaxlm.train.finetuning import FinetuneConfig, finetune
from jaxlm.train.load import load_model
from jaxlm.train.objectives.preference import REFERENCE, pair_scores, response_scorer, responses
from jaxlm.train.run_folder import RunFolder
from jaxlm.train.state import Program

LOSSES = ("dpo", "dpo_norm", "ipo", "ipo_sum")
"""Losses that have a `jaxlm.preference.flip_threshold`."""
MEASURED: tuple[SplitName, ...] = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class RankingConfig(GridConfig):
    """The configuration of the study. It adds to the keys of `GridConfig`.

    Attributes:
        betas: for the idealized ranking accuracy.
        rate: assumed share of people who prefer the chosen response, clipped to [0.001, 0.999].
        groups: number of groups of equally many pairs, by c - l under the reference.
        figure: whether to draw the accuracy and the flips.
    """

    betas: tuple[float, ...] = (0.01, 0.1, 1.0, 5.0, 10.0)
    rate: float = 1.0
    groups: int = 5
    figure: bool = True

    study: ClassVar[str] = "ranking"

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.run.get("pairs"), Mapping):
            raise UserError("run.pairs: is missing (got nothing). Give preference pairs.")
        if not self.run["pairs"].get("validation"):
            raise UserError("run.pairs.validation: is missing (got nothing). Give hold_out.")
        distinct("betas", self.betas)
        for beta in self.betas:
            real("betas", beta, above=0)
        number(self, "rate", above=0, most=1)
        whole(self, "groups")


class Group(NamedTuple):
    """The runs, one for each seed."""

    runs: tuple[FinetuneConfig, ...]


def plan(config: RankingConfig, where: str) -> list[Group]:
    """Return the runs; `where` is the configuration file, for error messages."""
    first = build(FinetuneConfig, {**config.run, "output": config.output}, where)
    objective = first.chosen_objective
    losses = [term.name for term in getattr(objective, "terms", ())]
    if len(losses) != 1 or losses[0] not in LOSSES:
        raise UserError(
            f"{where}: run.objective.loss: must be one of {', '.join(LOSSES)}, whose loss tells "
            f"how a pair is ranked (got {', '.join(losses)}). Give dpo."
        )
    return [Group(per_seed(first, Path(config.output), config.seeds))]


outline = listing(plan)


def run(
    config: RankingConfig, folder: Path, where: str, *, mesh: Mesh | None = None, say: Say = print
) -> Result:
    """Do the runs and measure their pairs; see `jaxlm.studies.study`."""
    (group,) = plan(config, where)
    here = Path(where).parent
    (found,) = outcomes([group], lambda _, each: finetune(each, base_dir=here, mesh=mesh), say)
    runs = [each for each, outcome in zip(group.runs, found, strict=True) if outcome.summary]
    if not runs:
        raise UserError(
            f"{folder}: every run diverged (got {found[0].failed}). Lower "
            "run.optimizer.learning_rate, and remove the folder."
        )
    numbers = [_numbers(config, each, here, mesh) for each in runs]
    table = spreads(numbers)
    figures: tuple[Path, ...] = ()
    if config.figure:
        ideal = table["validation"]["ideal"]["mean"]
        figures = (
            draw_accuracy(runs, ideal, folder / "accuracy.png"),
            draw_flips(table["train"]["groups"], folder / "flips.png"),
        )
    return Result(table, markdown(config, table), figures)


def _numbers(
    config: RankingConfig, each: FinetuneConfig, here: Path, mesh: Mesh | None
) -> dict[str, Any]:
    """Return what one run did to the pairs of both splits."""
    lm = load_model(each.output, mesh=mesh)
    assert each.pairs is not None
    (term,) = each.chosen_objective.terms  # type: ignore[attr-defined]
    encoded = each.pairs.load(seed=each.seed, base_dir=here).encode(lm)
    scorer, columns = Program(response_scorer(lm)), RunFolder(each.output).columns(dict)
    numbers: dict[str, Any] = {}
    for split in MEASURED:
        sums, tokens = responses(scorer, lm.params, encoded, split, each.eval_batch_size)
        after = pair_scores(sums, tokens, columns[split][REFERENCE], np.ones(len(sums)))
        numbers[split] = split_numbers(config, after, term)
    return numbers


def split_numbers(config: RankingConfig, after: PairScores, term: Any) -> dict[str, Any]:
    """Return the accuracies of a split's pairs under one loss, and what became of each group."""
    before = after._replace(chosen=after.ref_chosen, rejected=after.ref_rejected)
    margins = np.asarray(before.chosen - before.rejected, np.float64)
    if len(margins) < config.groups:
        raise UserError(
            f"groups: there are only {len(margins)} pairs (got {config.groups}). Lower it."
        )
    flips = preference.flip_table(before, after)
    wrong, right = np.maximum(np.asarray(flips.pairs), 1)  # 0 of no pair
    ideal = preference.idealized_ranking_accuracy(after, config.rate, np.asarray(config.betas))
    columns = {
        "margin": margins,
        "began_right": margins >= 0,
        "right": after.chosen >= after.rejected,
        "threshold": preference.flip_threshold(after, term.beta, term.name),
        "loss": preference.loss(after, term),
    }
    groups = np.array_split(np.argsort(margins, kind="stable"), config.groups)
    return {
        "reference": float(preference.ranking_accuracy(before)),
        "trained": float(preference.ranking_accuracy(after)),
        "reward_accuracy": float(preference.reward_accuracy(after)),
        "ideal": float(preference.idealized_ranking_accuracy(after, config.rate, term.beta)),
        "idealized": {f"{b:g}": float(x) for b, x in zip(config.betas, ideal, strict=True)},
        "corrected": float(flips.right[0] / wrong),
        "spoiled": float((flips.pairs[1] - flips.right[1]) / right),
        "groups": [
            {name: float(np.mean(np.asarray(x)[places])) for name, x in columns.items()}
            for places in groups
        ],
    }


def markdown(config: RankingConfig, table: Mapping[str, Any]) -> str:
    """Return the tables of the study: of the accuracies, and of the groups of training pairs."""
    names = {
        "reference": "ranked correctly before, %",
        "trained": "after, %",
        "reward_accuracy": "reward accuracy after, %",
        "corrected": "corrected, % of the pairs ranked wrong",
        "spoiled": "spoiled, % of the pairs ranked correctly",
    }
    rows = [
        (
            split,
            *(percent(table[split][name]) for name in names),
            *(percent(table[split]["idealized"][f"{beta:g}"]) for beta in config.betas),
        )
        for split in MEASURED
    ]
    ideal = (f"ideal at beta {beta:g}, %" for beta in config.betas)
    header = ("pairs", *names.values(), *ideal)
    flips = [
        (
            shown(row["margin"], digits=1),
            percent(row["began_right"]),
            percent(row["right"]),
            shown(row["threshold"]),
            shown(row["loss"]),
        )
        for row in table["train"]["groups"]
    ]
    margins = (
        "c - l under the reference (nats)",
        "ranked correctly before, %",
        "after, %",
        "mean threshold of the loss",
        "loss after",
    )
    return f"{aligned(header, rows)}\n\n{aligned(margins, flips)}\n"


def draw_accuracy(runs: Sequence[FinetuneConfig], ideal: float, path: Path) -> Path:
    """Draw the ranking accuracy on the validation pairs over training, beside the ideal one."""
    axes = new_axes((5.2, 3.4))
    for kind, color in (("ranking_accuracy", "C0"), ("reward_accuracy", "C1")):
        for i, each in enumerate(runs):
            metrics = RunFolder(each.output).metrics.arrays()
            values = metrics[f"validation_{kind}"]
            known = np.isfinite(values)
            label = kind.replace("_", " ") if i == 0 else None
            axes.plot(metrics["step"][known], values[known], color=color, label=label)
    axes.axhline(ideal, color="grey", linestyle="--", label="idealized, beta of the run")
    axes.set(xlabel="step", ylabel="share of validation pairs", ylim=(0, 1.03))
    axes.legend(frameon=False, fontsize="small")
    return save_figure(axes, path)


def draw_flips(groups: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the share of pairs ranked correctly before and after, against c - l before."""
    axes = new_axes((4.4, 3.2))
    margins = [row["margin"]["mean"] for row in groups]
    for name, label in (("began_right", "before"), ("right", "after")):
        axes.plot(margins, [row[name]["mean"] for row in groups], "o-", label=label)
    axes.set(
        xlabel="c - l under the reference (nats)", ylabel="ranked correctly (training pairs)",
        ylim=(-0.03, 1.03),
    )  # fmt: skip
    axes.legend(frameon=False)
    return save_figure(axes, path)


Config = RankingConfig
