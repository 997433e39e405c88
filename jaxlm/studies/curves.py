"""Pretraining runs that differ in a few keys, compared by their curves.

Each variant is a way of training the same model. It is trained once for every seed, and a table
gives the distances between the mean loss curves of the variants.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from jax.sharding import Mesh

from jaxlm.artifacts.config import build
from jaxlm.core.checks import distinct, number, whole
from jaxlm.core.errors import UserError
from jaxlm.dynamics import scale_rule
from jaxlm.studies.figures import new_axes, save_figure
from jaxlm.studies.grid import (
    GridConfig,
    Result,
    Say,
    folder_name,
    no_seed_or_output,
    outcome,
    per_seed,
    section_of,
    with_keys,
)
from jaxlm.studies.tables import cell
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
        """Return the keys of `config` that change, with their new values.

        Raises:
            UserError: a number of steps is not a multiple of k, or as `scale_rule` and
                `FirstOrder.hparams`.
        """
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


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of training.

    Attributes:
        name: name in the table and the figure.
        runs: one run for each seed.
    """

    name: str
    runs: tuple[PretrainConfig, ...]


@dataclass(frozen=True, kw_only=True)
class Curve:
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


def outline(config: CurvesConfig, where: str, plan_flags: Mapping[str, str]) -> str:
    """Return the folder of every run, a line each."""
    del plan_flags
    return "\n".join(run.output for each in plan(config, where) for run in each.runs)


def run(
    config: CurvesConfig, folder: Path, where: str, *, mesh: Mesh | None = None, say: Say = print
) -> Result:
    """Do the runs of a file and compare them; see `jaxlm.studies.study`."""
    curves = compare(plan(config, where), y=config.y, mesh=mesh, say=say)
    table = {"y": config.y, "rows": rows(curves, start=config.start)}
    figures: tuple[Path, ...] = ()
    if config.figure:
        figures = (draw(curves, folder / "curves.png", y=config.y, start=config.start),)
    return Result(table, markdown(curves, y=config.y, start=config.start), figures)


def compare(
    variants: Sequence[Variant], *, y: Y, mesh: Mesh | None = None, say: Say = lambda line: None
) -> list[Curve]:
    """Do every run that is not finished, and return all curves.

    Args:
        variants: variants whose runs all have different outputs.
        y: the quantity to compare.
        mesh: mesh of all runs; None for one device.
        say: called with a line before each run.

    Raises:
        UserError: whatever a run raises, except `Diverged`.
    """
    total, count, curves = sum(len(each.runs) for each in variants), 0, []
    for variant in variants:
        found = []
        for config in variant.runs:
            count += 1
            say(f"run {count}/{total}: {config.output}")
            found.append(_trained(config, y, mesh))
        tokens = sorted({token for run_tokens, _, _ in found for token in run_tokens})
        at = [dict(zip(run_tokens, values, strict=True)) for run_tokens, values, _ in found]
        padded = [[values.get(token, math.nan) for token in tokens] for values in at]
        curves.append(
            Curve(
                name=variant.name,
                tokens=np.asarray(tokens, np.float64),
                values=np.asarray(padded, np.float64),
                reports=tuple(report for _, _, report in found),
            )
        )
    return curves


def _trained(
    config: PretrainConfig, y: Y, mesh: Mesh | None
) -> tuple[list[int], list[float], dict[str, Any] | None]:
    """Return tokens, values and report of one run; if it diverged, the last value is NaN."""
    folder = RunFolder(config.output)
    summary, _ = outcome(config, lambda: pretrain(config, mesh=mesh))
    try:
        steps, values = _points(config, folder.metrics.read(), y)
    except (TypeError, ValueError):
        raise UserError(
            f"{folder.metrics.path}: is damaged. Remove its folder to repeat the run."
        ) from None
    tokens = [step * config.batch_size * config.seq_len for step in steps]
    last = config.steps * config.batch_size * config.seq_len
    if summary is None:  # it diverged, and NaN at the last step makes its mean NaN
        return [*tokens, last], [*values, math.nan], None
    if tokens[-1:] != [last]:
        raise UserError(
            f"{folder.metrics.path}: has no {y} of the last step. Remove its folder to repeat "
            "the run."
        )
    return tokens, values, summary["dynamics"]


def _points(
    config: PretrainConfig, rows: Sequence[dict[str, Any]], y: Y
) -> tuple[list[int], list[float]]:
    """Return steps and values of a curve: loss averaged over `log_every` steps, or measured values.

    Values measured before the first step are left out.
    """
    found = [(row["step"], float(row[y])) for row in rows if y in row and row["step"]]
    if y == "loss":
        ends = range(config.log_every, config.steps + config.log_every, config.log_every)
        groups = [(min(end, config.steps), end - config.log_every) for end in ends]
        known = dict(found)
        found = [
            (end, float(np.mean([known[step] for step in range(first + 1, end + 1)])))
            for end, first in groups
            if all(step in known for step in range(first + 1, end + 1))
        ]
    return [step for step, _ in found], [value for _, value in found]


def distance(one: Curve, other: Curve, *, start: float = 0.0) -> float:
    r"""Return the mean distance of two mean curves, $\mathrm{mean}_t |\bar y_1(t) - \bar y_2(t)|$.

    Args:
        one: a variant's curves.
        other: another variant's curves; only points at the same number of tokens are compared.
        start: fraction of the run after which points count.

    Returns:
        Distance in units of y; NaN if no points are common or a run diverged.
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


def markdown(curves: Sequence[Curve], *, y: Y, start: float = 0.0) -> str:
    """Return the table of a comparison: last values, and distances between mean curves."""
    names = [cell(curve.name) for curve in curves]
    head = ["", f"last {y}", "of the first", *names]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows(curves, start=start):
        last = "diverged" if row["last"] is None else f"{row['last']:.4f}"
        last += "" if row["std"] is None else f" ({row['std']:.4f})"
        relative = "" if row["relative"] is None else f"{100 * row['relative']:+.2f} %"
        distances = ["" if each is None else f"{each:.4f}" for each in row["distances"]]
        lines.append([cell(row["variant"]), last, relative, *distances])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(curves: Sequence[Curve], path: Path, *, y: Y, start: float = 0.0) -> Path:
    """Draw the mean curves with the range of their seeds, after the fraction `start` of the run.

    Raises:
        UserError: matplotlib is not installed.
    """
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
