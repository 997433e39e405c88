"""Pretraining runs that differ in a few keys, compared by their curves.

Each variant is a way of training the same model. It is trained once for every seed, and a table
gives the distances between the mean loss curves of the variants.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxlm.artifacts.config import build
from jaxlm.core.checks import distinct, number, whole
from jaxlm.core.errors import UserError
from jaxlm.dynamics import scale_rule
from jaxlm.studies.figures import new_axes, save_figure
from jaxlm.studies.grid import (
    GridConfig,
    Outcome,
    Result,
    Say,
    folder_name,
    listing,
    no_seed_or_output,
    outcomes,
    per_seed,
    section_of,
    with_keys,
)
from jaxlm.studies.tables import aligned
from jaxlm.train.optimizers import FirstOrder
from jaxlm.train.pretraining import PretrainConfig, pretrain
from jaxlm.train.run_folder import RunFolder

Y = Literal["loss", "held_out_loss"]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Training with batches k times as large over the same text.

    Attributes:
        rule: how to change the optimizer, see `jaxlm.dynamics.scale_rule`.
        k: integer that divides every number of steps in the configuration.
    """

    rule: Literal["sqrt", "linear", "none"]
    k: int

    def __call__(self, config: PretrainConfig) -> dict[str, Any]:
        """Return the keys of `config` that change, with their new values."""
        whole(self, "k", section="scale.")
        steps = ("steps", "log_every", "eval_every", "checkpoint_every")
        for name in steps:
            if getattr(config, name) % self.k:
                raise UserError(
                    f"{name}: must be a multiple of scale.k = {self.k} (got "
                    f"{getattr(config, name)}). Correct it."
                )
        optimizer = config.optimizer
        if not isinstance(optimizer, FirstOrder):
            raise UserError(
                f"optimizer.name: no scaling rule is known for it (got {optimizer.name}). Give "
                "sgd, adam or adamw."
            )
        scaled = scale_rule(self.rule, self.k, optimizer.hparams(config.steps))
        return {
            **{name: getattr(config, name) // self.k for name in steps},
            "batch_size": config.batch_size * self.k,
            "optimizer": optimizer.with_hparams(scaled),
        }


class Variant(NamedTuple):
    """One way of training: a run for each seed."""

    name: str
    runs: tuple[PretrainConfig, ...]


class Curve(NamedTuple):
    """The curves of a variant.

    Attributes:
        name: name of the variant.
        tokens: predicted tokens so far, [points]; a step of SVAG counts as one of its optimizer.
        values: [seeds, points]; NaN from the point where a run diverged.
        reports: report of `jaxlm.train.dynamics` for each run; None if it diverged.
    """

    name: str
    tokens: np.ndarray
    values: np.ndarray
    reports: tuple[dict[str, Any] | None, ...]

    @property
    def mean(self) -> np.ndarray:
        """Mean over seeds, [points]."""
        return self.values.mean(0)


@dataclass(frozen=True, kw_only=True)
class CurvesConfig(GridConfig):
    """The configuration of a comparison. It adds to the keys of `GridConfig`.

    Attributes:
        variants: variant name to the keys that differ from `run`, and `scale`.
        y: the quantity whose curves are compared.
        start: fraction of the run after which curves are compared, at least 0 and below 1.
        figure: whether to draw the curves.
    """

    variants: dict[str, Any]
    y: Y = "held_out_loss"
    start: float = 0.0
    figure: bool = True

    study: ClassVar[str] = "curves"

    def __post_init__(self):
        super().__post_init__()
        distinct("variants", self.variants)
        number(self, "start", least=0, below=1)
        corpus = self.run.get("corpus")
        if self.y == "held_out_loss" and not (isinstance(corpus, dict) and corpus.get("held_out")):
            raise UserError(
                "y: there is no held-out text (got held_out_loss). Give run.corpus.held_out, or "
                "y: loss."
            )


def plan(config: CurvesConfig, where: str) -> list[Variant]:
    """Return every variant, with a run for each seed; `where` is the file, for error messages."""
    return [_variant(config, name, section, where) for name, section in config.variants.items()]


def _variant(config: CurvesConfig, name: str, section: Any, where: str) -> Variant:
    place = f"{where}: variant {name}"
    section = section_of(section, place)
    no_seed_or_output(section, f"variants.{name}")
    scale = section.pop("scale", None)
    data = {**with_keys(config.run, section, place), "output": config.output}
    first = _scaled(data, scale, place) if scale else build(PretrainConfig, data, place)
    folder = Path(config.output, folder_name(name, "variants"))
    return Variant(name=name, runs=per_seed(first, folder, config.seeds))


def _scaled(data: dict[str, Any], scale: Any, place: str) -> PretrainConfig:
    """Return the run under a scaling rule, with `dynamics` built for the new batch size."""
    plain = build(PretrainConfig, {**data, "dynamics": "null"}, place)
    rule = build(Scale, scale, place, "scale")
    try:
        changed = rule(plain)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    data = {**data, "batch_size": str(changed["batch_size"])}
    dynamics = build(PretrainConfig, data, place).dynamics
    return dataclasses.replace(plain, **changed, dynamics=dynamics)


outline = listing(plan)


def run(
    config: CurvesConfig, folder: Path, where: str, *, mesh: Mesh | None = None, say: Say = print
) -> Result:
    """Do the runs of a file and compare them; see `jaxlm.studies.study`."""
    variants = plan(config, where)
    results = outcomes(variants, lambda _, each: pretrain(each, mesh=mesh), say)
    curves = [_curve(*pair, config.y) for pair in zip(variants, results, strict=True)]
    table = rows(curves, start=config.start)
    figures: tuple[Path, ...] = ()
    if config.figure:
        figures = (draw(curves, folder / "curves.png", y=config.y, start=config.start),)
    return Result({"y": config.y, "rows": table}, markdown(table, y=config.y), figures)


def _curve(variant: Variant, results: Sequence[Outcome], y: Y) -> Curve:
    """Return the curves of a variant, at the points that any of its runs has."""
    found = [_values(*pair, y) for pair in zip(variant.runs, results, strict=True)]
    tokens = sorted(set().union(*found))
    return Curve(
        variant.name,
        np.asarray(tokens, np.float64),
        np.asarray([[each.get(token, math.nan) for token in tokens] for each in found], np.float64),
        tuple(summary and summary["dynamics"] for summary, _ in results),
    )


def _values(config: PretrainConfig, result: Outcome, y: Y) -> dict[int, float]:
    """Return the values of one run by the number of tokens; if it diverged, the last is NaN."""
    metrics = RunFolder(config.output).metrics
    try:
        values = _points(config, metrics.read(), y)
    except (TypeError, ValueError):
        raise UserError(
            f"{metrics.path}: is damaged. Remove its folder to repeat the run."
        ) from None
    if result.summary is None:  # NaN at the last step makes its mean NaN
        values[config.steps] = math.nan
    elif config.steps not in values:
        raise UserError(
            f"{metrics.path}: has no {y} of the last step. Remove its folder to repeat the run."
        )
    size = config.batch_size * config.seq_len
    return {step * size: value for step, value in values.items()}


def _points(config: PretrainConfig, rows: Sequence[dict[str, Any]], y: Y) -> dict[int, float]:
    """Return values by step: losses averaged over `log_every` steps, or what was measured.

    Values measured before the first step are left out.
    """
    known = {row["step"]: float(row[y]) for row in rows if y in row and row["step"]}
    if y != "loss":
        return known
    points = {}
    for first in range(0, config.steps, config.log_every):
        steps = range(first + 1, min(first + config.log_every, config.steps) + 1)
        if all(step in known for step in steps):
            points[steps[-1]] = float(np.mean([known[step] for step in steps]))
    return points


def distance(one: Curve, other: Curve, *, start: float = 0.0) -> float:
    r"""Return the mean distance of two mean curves, $\mathrm{mean}_t |\bar y_1(t) - \bar y_2(t)|$.

    Only points at the same number of tokens after the fraction `start` of the run count. NaN if
    there are none, or if a run diverged.
    """
    _, first, second = np.intersect1d(one.tokens, other.tokens, return_indices=True)
    if not len(first):
        return math.nan
    late = one.tokens[first] >= start * max(one.tokens.max(), other.tokens.max())
    gaps = np.abs(one.mean[first] - other.mean[second])[late]
    return float(gaps.mean()) if len(gaps) else math.nan


def rows(curves: Sequence[Curve], *, start: float = 0.0) -> list[dict[str, Any]]:
    """Return for each variant its last value over seeds, and its distances from all variants.

    Values that a diverged run makes undefined are None.
    """
    return [
        {
            "variant": curve.name,
            "last": _finite(_last(curve)),
            "std": _finite(curve.values[:, -1].std(ddof=1)) if len(curve.values) > 1 else None,
            "relative": _finite(_last(curve) / _last(curves[0]) - 1),
            "distances": [_finite(distance(curve, other, start=start)) for other in curves],
            "reports": curve.reports,
        }
        for curve in curves
    ]


def markdown(rows: Sequence[dict[str, Any]], *, y: Y) -> str:
    """Return the table of a comparison: last values, and distances between mean curves."""
    cells = []
    for row in rows:
        last = "diverged" if row["last"] is None else f"{row['last']:.4f}"
        last += "" if row["std"] is None else f" ({row['std']:.4f})"
        relative = "" if row["relative"] is None else f"{100 * row['relative']:+.2f} %"
        distances = ["" if each is None else f"{each:.4f}" for each in row["distances"]]
        cells.append([row["variant"], last, relative, *distances])
    header = ("", f"last {y}", "of the first", *(row["variant"] for row in rows))
    return aligned(header, cells) + "\n"


def draw(curves: Sequence[Curve], path: Path, *, y: Y, start: float = 0.0) -> Path:
    """Draw the mean curves with the range of their seeds, after the fraction `start` of the run."""
    axes = new_axes((5.2, 3.6))
    for curve in curves:
        late = curve.tokens >= start * curve.tokens.max()
        (line,) = axes.plot(curve.tokens[late], curve.mean[late], label=curve.name)
        if len(curve.values) > 1:
            low, high = curve.values.min(0)[late], curve.values.max(0)[late]
            axes.fill_between(curve.tokens[late], low, high, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="tokens", ylabel=y.replace("_", " "))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return save_figure(axes, path)


def _last(curve: Curve) -> float:
    return float(curve.values[:, -1].mean())


def _finite(value: float | np.floating) -> float | None:
    return float(value) if math.isfinite(value) else None


Config = CurvesConfig
