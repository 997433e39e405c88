"""Likelihood displacement: preference training that makes the chosen responses less likely.

The pairs of a data set are scored by CHES and by simpler similarities. Runs on the pairs around
quantiles of CHES show how far the log-probability of the chosen response falls, and runs on all
pairs compare remedies.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import scipy  # loads its submodules on first use
from jax.sharding import Mesh
from jaxtyping import Float

from jaxlm import preference
from jaxlm.artifacts.config import build
from jaxlm.artifacts.files import write_jsonl
from jaxlm.artifacts.processes import to_host
from jaxlm.core.checks import distinct, number, one_of, real, whole
from jaxlm.core.errors import UserError
from jaxlm.data import EncodedTask
from jaxlm.data.pairs import Pair, Pairs
from jaxlm.data.rows import bucket_of, eval_places, length_buckets, pad
from jaxlm.models import LanguageModel
from jaxlm.studies.figures import new_axes, save_figure
from jaxlm.studies.grid import (
    GridConfig,
    Result,
    Say,
    folder_name,
    listing,
    no_seed_or_output,
    outcome,
    section_of,
    with_keys,
)
from jaxlm.studies.tables import aligned, percent, shown, spreads
from jaxlm.train.finetuning import FinetuneConfig, finetune
from jaxlm.train.load import load_model
from jaxlm.train.objectives.preference import response_scorer, responses
from jaxlm.train.run_folder import RunFolder
from jaxlm.train.state import Program
from jaxlm.typing import Params

SCORES = ("ches", "ches_per_token", "last_hidden_inner_product", "negative_edit_distance")
DRAWN = ("train", "validation", "test", "num_train", "num_validation", "num_test", "test_seed")
"""Keys of `run.pairs` that say which pairs are drawn; the others say how they are read."""
MEASURED = ("chosen_change", "rejected_change", "displaced", "ranking_accuracy")


@dataclass(frozen=True, kw_only=True)
class DisplacementConfig(GridConfig):
    """The configuration of the study. It adds to the keys of `GridConfig`.

    Each seed has a folder with its runs and these files: `train.jsonl` and `validation.jsonl`, the
    pairs that the seed draws; `scores.jsonl`, a line for each of the former; and `kept.jsonl`,
    those with the lowest scores, which a variant trains on by `pairs.train: kept.jsonl`.

    Attributes:
        sft: changes of `run` for a first stage of supervised fine-tuning on the chosen responses;
            null skips it.
        quantiles: of the pairs' CHES, from 0 to 1; there is a run for each.
        pairs_per_quantile: pairs around a quantile; its run is trained and measured on these.
        variants: names of further runs on all pairs of the seed, each with its changes of `run`;
            they are measured on the validation pairs, or without these on all pairs of the seed.
        score: the score by which pairs are kept.
        keep: share of the pairs that is kept.
        figure: whether to draw the runs of the quantiles.
    """

    sft: dict[str, Any] | None = None
    quantiles: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    pairs_per_quantile: int = 16
    variants: dict[str, Any] = field(default_factory=dict)
    score: str = "ches"
    keep: float = 0.5
    figure: bool = True

    study: ClassVar[str] = "displacement"

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.run.get("pairs"), Mapping):
            raise UserError("run.pairs: is missing (got nothing). Give preference pairs.")
        distinct("quantiles", self.quantiles)
        for quantile in self.quantiles:
            real("quantiles", quantile, least=0, most=1)
        whole(self, "pairs_per_quantile", least=2)
        one_of("score", self.score, SCORES)
        number(self, "keep", above=0, most=1)


class Group(NamedTuple):
    """Runs that differ in their seed alone; `quantile` is None for those on other pairs."""

    name: str
    runs: tuple[FinetuneConfig, ...]
    quantile: float | None = None


def plan(config: DisplacementConfig, where: str) -> list[Group]:
    """Return all runs: on the chosen responses, if asked for; on quantiles; of the variants.

    `where` is the configuration file, for error messages.
    """
    groups = []
    if config.sft is not None:
        keys = {"objective": {"name": "preference", "loss": "sft"}} | config.sft
        groups.append(Group("sft", _runs(config, "sft", keys, f"{where}: sft")))
    for q in config.quantiles:
        name = f"quantile-{q:g}"
        files = {"pairs.train": f"{name}.jsonl", "pairs.validation": f"{name}.jsonl"}
        groups.append(Group(name, _runs(config, name, files, where), q))
    for name, section in config.variants.items():
        place = f"{where}: variant {name}"
        keys = section_of(section, place)
        no_seed_or_output(keys, f"variants.{name}")
        folder = f"variants/{folder_name(name, 'variants')}"
        groups.append(Group(name, _runs(config, folder, keys, place)))
    return groups


outline = listing(plan)


def _runs(
    config: DisplacementConfig, folder: str, keys: Mapping[str, Any], place: str
) -> tuple[FinetuneConfig, ...]:
    """Return a run for each seed; its files of pairs are in the folder of the seed."""
    given = config.run["pairs"]
    pairs = {key: value for key, value in given.items() if key not in DRAWN}
    measured = "validation" if given.get("validation") else "train"
    pairs |= {"train": "train.jsonl", "validation": f"{measured}.jsonl"}
    data = with_keys({**config.run, "pairs": pairs, "output": config.output}, keys, place)
    first = build(FinetuneConfig, data, place)
    runs = []
    for seed in config.seeds:
        base = Path(config.output, f"seed-{seed}")
        start = first.model if config.sft is None or folder == "sft" else str(base / "sft")
        output = str(base / folder)
        runs.append(dataclasses.replace(first, seed=seed, model=start, output=output))
    return tuple(runs)


def run(
    config: DisplacementConfig,
    folder: Path,
    where: str,
    *,
    mesh: Mesh | None = None,
    say: Say = print,
) -> Result:
    """Score the pairs, do the runs and compare them; see `jaxlm.studies.study`."""
    groups = plan(config, where)
    data = build(FinetuneConfig, {**config.run, "output": config.output}, where).pairs
    assert data is not None
    found = []
    for i, seed in enumerate(config.seeds):
        pairs = data.load(seed=seed, base_dir=Path(where).parent)
        mine = [group._replace(runs=(group.runs[i],)) for group in groups]
        found.append(_one_seed(config, mine, pairs, folder / f"seed-{seed}", mesh, say))
    table = spreads(found)  # a run that diverged has None for every value
    figures: tuple[Path, ...] = ()
    if config.figure and config.quantiles:
        figures = (
            draw_training(groups, folder / "training.png"),
            draw_quantiles(config.quantiles, table["quantiles"], folder / "quantiles.png"),
        )
    return Result(table, markdown(config, table), figures)


def _one_seed(
    config: DisplacementConfig,
    groups: Sequence[Group],
    pairs: Pairs,
    folder: Path,
    mesh: Mesh | None,
    say: Say,
) -> dict[str, Any]:
    """Return the numbers of one seed: of the quantiles, of the scores, and of the variants."""

    def trained(group: Group) -> dict[str, float | None]:
        (each,) = group.runs
        say(f"run {each.output}")
        result = outcome(each, lambda: finetune(each, base_dir=folder, mesh=mesh))
        return _numbers(each, result.summary is not None)

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "validation"):
        write_pairs(folder / f"{name}.jsonl", getattr(pairs, name))
    if config.sft is not None:
        trained(groups[0])
        groups = groups[1:]
    given = groups[0].runs[0]
    lm = load_model(given.model, param_dtype=given.param_dtype, mesh=mesh)
    encoded = pairs.encode(lm)
    usable = [pair for pair in pairs.train if pair.id not in encoded.dropped["train"]]
    scores = score_pairs(lm, encoded, batch_size=given.eval_batch_size)
    lines = (
        {"id": pair.id} | {k: float(x[i]) for k, x in scores.items()}
        for i, pair in enumerate(usable)
    )
    write_jsonl(folder / "scores.jsonl", lines)
    best = np.argsort(scores[config.score], kind="stable")[: math.ceil(config.keep * len(usable))]
    write_pairs(folder / "kept.jsonl", [usable[i] for i in np.sort(best)])

    scorer, size = Program(response_scorer(lm)), given.eval_batch_size
    result: dict[str, Any] = {"quantiles": {}, "scores": dict.fromkeys(SCORES), "variants": {}}
    measured, falls = [], []
    for group in groups:
        if group.quantile is None:
            result["variants"][group.name] = trained(group)
            continue
        places = around(group.quantile, scores["ches"], config.pairs_per_quantile)
        write_pairs(folder / f"{group.name}.jsonl", [usable[i] for i in places])
        row = trained(group)
        result["quantiles"][group.name] = {"ches": float(scores["ches"][places].mean())} | row
        if row["loss"] is not None:
            part = dataclasses.replace(encoded, train=tuple(encoded.train[i] for i in places))
            after = load_model(group.runs[0].output, mesh=mesh).params
            (old, _), (new, _) = (
                responses(scorer, x, part, "train", size) for x in (lm.params, after)
            )
            measured.append(places)
            falls.append(old[:, 0] - new[:, 0])
    if falls:
        places = np.concatenate(measured)
        for name, values in scores.items():
            rho = float(scipy.stats.spearmanr(values[places], np.concatenate(falls)).statistic)
            result["scores"][name] = rho if math.isfinite(rho) else None  # all scores are equal
    return result


def _numbers(each: FinetuneConfig, finished: bool) -> dict[str, float | None]:
    """Return what a table shows of a run at its last step; None for each number if it diverged.

    The step of the lowest validation loss, which the run tests, would hide what comes after it.
    """
    if not finished:
        return dict.fromkeys(("loss_before", "loss", *MEASURED))
    values = RunFolder(each.output).metrics.arrays()
    last = {name: float(values[f"validation_{name}"][-1]) for name in ("loss", *MEASURED)}
    return {"loss_before": float(values["zero_shot_loss"][0]), **last}


def around(quantile: float, values: Float[np.ndarray, " N"], count: int) -> np.ndarray:
    """Return the places of the `count` values around a quantile, in increasing order.

    >>> around(0.5, np.array([3.0, 1.0, 2.0, 4.0, 5.0]), 3)
    array([0, 2, 3])
    """
    if len(values) < count:
        raise UserError(
            f"pairs_per_quantile: there are only {len(values)} pairs (got {count}). Lower it."
        )
    first = round(quantile * (len(values) - count))
    return np.sort(np.argsort(values, kind="stable")[first : first + count])


def score_pairs(
    lm: LanguageModel, encoded: EncodedTask, *, batch_size: int = 16
) -> dict[str, Float[np.ndarray, " N"]]:
    """Return the scores of the training pairs by name, those of `SCORES`."""

    def score(params: Params, batch: Mapping[str, Any]) -> dict[str, Any]:
        h = lm.hidden(params, batch["input_ids"], batch["attention_mask"])
        sides = (h[0::2], batch["predicting"][0::2], h[1::2], batch["predicting"][1::2])
        return {
            "ches": preference.ches(*sides),
            "ches_per_token": preference.ches(*sides, length_normalize=True),
            "last_hidden_inner_product": preference.last_hidden_inner_product(*sides),
        }

    rows = [[(*x.input_ids[0], *target) for target in x.targets[:2]] for x in encoded.train]
    lengths = [max(map(len, pair)) for pair in rows]
    buckets, program = length_buckets(lengths), Program(score)
    found = {name: np.zeros(len(rows)) for name in SCORES}
    for index in eval_places(lengths, batch_size):
        # A pair's rows follow each other; the last batch is filled with its first pair.
        places = np.where(index < 0, index[0], index)
        length = bucket_of(max(lengths[i] for i in places), buckets)
        ids, mask = pad([row for i in places for row in rows[i]], (length,), encoded.pad_id)
        prompts = np.repeat([len(encoded.train[i].input_ids[0]) for i in places], 2)
        steps = np.arange(length) + 1  # a state predicts the next token
        predicting = (steps >= prompts[:, None]) & (steps < mask.sum(axis=1, keepdims=True))
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "predicting": predicting.astype(np.int32),
        }
        for name, values in program(lm.params, batch).items():
            found[name][index[index >= 0]] = to_host(values)[index >= 0]
    sides = ([x.targets[side] for x in encoded.train] for side in (0, 1))
    found["negative_edit_distance"] = preference.negative_edit_distance(*sides)
    return found


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs as rows that the section `pairs` of a run reads."""

    def plain(text: Any) -> Any:
        return text if isinstance(text, str) else [message._asdict() for message in text]

    names = ("prompt", "chosen", "rejected")
    write_jsonl(path, ({name: plain(getattr(each, name)) for name in names} for each in pairs))


def markdown(config: DisplacementConfig, table: Mapping[str, Any]) -> str:
    """Return the tables of the study: of the quantiles, of the scores, and of the variants."""

    def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
        digits = {"loss_before": 3, "loss": 3, "chosen_change": 3, "rejected_change": 1}
        numbers = [shown(row[k], digits=n, missing="diverged") for k, n in digits.items()]
        return (*numbers, percent(row["displaced"]), percent(row["ranking_accuracy"]))

    header = (
        "loss before",
        "after",
        "change of chosen",
        "of rejected",
        "displaced %",
        "ranked correctly %",
    )
    parts = []
    if table["quantiles"]:
        rows = [
            (f"{q:g}", shown(row["ches"], digits=0), *cells(row))
            for q, row in zip(config.quantiles, table["quantiles"].values(), strict=True)
        ]
        parts.append(aligned(("CHES quantile", "CHES", *header), rows))
        rows = [(name, shown(rho, digits=2)) for name, rho in table["scores"].items()]
        parts.append(aligned(("score", "Spearman with the fall of chosen"), rows))
    if table["variants"]:
        rows = [(name, *cells(row)) for name, row in table["variants"].items()]
        parts.append(aligned(("variant", *header), rows))
    return "\n\n".join(parts) + "\n"


def draw_training(groups: Sequence[Group], path: Path) -> Path:
    """Draw the change of both log-probabilities over the runs of the lowest and highest CHES."""
    both = new_axes((7.6, 3.2), columns=2)  # the rejected responses fall a hundred times as far
    groups = sorted((g for g in groups if g.quantile is not None), key=lambda g: g.quantile or 0.0)
    for color, group in zip(("C0", "C3"), (groups[0], groups[-1]), strict=True):
        runs = [RunFolder(each.output).metrics.arrays() for each in group.runs]
        for axes, side in zip(both, ("chosen", "rejected"), strict=True):
            name = f"validation_{side}_change"
            curves = [(x["step"], x[name]) for x in runs if name in x]
            for i, (steps, values) in enumerate(curves):
                known = np.isfinite(values)
                label = f"CHES quantile {group.quantile:g}" if i == 0 else None
                points = (np.append(0, steps[known]), np.append(0, values[known]))
                axes.plot(*points, color=color, label=label, alpha=0.8)
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.set(xlabel="step", ylabel=f"change of {side} (nats)")
    both[0].legend(frameon=False, fontsize="small")
    return save_figure(both[0], path)


def draw_quantiles(
    quantiles: Sequence[float], rows: Mapping[str, Mapping[str, Any]], path: Path
) -> Path:
    """Draw the change of the chosen log-probability against the quantile of CHES."""
    axes = new_axes((4.2, 3.2))
    changes = [row["chosen_change"] for row in rows.values()]
    for q, change in zip(quantiles, changes, strict=True):
        known = [value for value in change["by_seed"] if value is not None]
        axes.plot([q] * len(known), known, "o", color="C0", alpha=0.4)
    means = [np.nan if change["mean"] is None else change["mean"] for change in changes]
    axes.plot(quantiles, means, "-", color="C0")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="quantile of CHES", ylabel="change of the chosen\nlog-probability (nats)")
    return save_figure(axes, path)


Config = DisplacementConfig
