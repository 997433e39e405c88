"""How well methods of unlearning forget some rows, and what else they cost: MUSE's six criteria.

For each seed a target model is trained on the rows to forget and to keep, and a retrained model on
the latter alone. Each method starts from the target and is measured after every `eval_every` steps,
until it knows no more about the forgotten rows than the retrained model does: the rule by which
MUSE (arXiv:2407.06460) compares methods at the same amount of forgetting. Methods that keep rows
read the first half of those; utility is measured on the second half.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxlm.artifacts.config import build
from jaxlm.artifacts.files import read_json, write_json, write_jsonl
from jaxlm.core.checks import one_of, real, whole
from jaxlm.core.errors import UserError
from jaxlm.data import ForgetConfig
from jaxlm.data.forget import ForgetRows
from jaxlm.data.rows import PaddedRows
from jaxlm.evaluation import UnlearningData, unlearning_report
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
from jaxlm.studies.tables import aligned, shown, spreads
from jaxlm.train.finetuning import FinetuneConfig, finetune
from jaxlm.train.load import load_model
from jaxlm.unlearning import relative_auc, task_vector

Report = dict[str, float]
SOURCES = ("forget", "retain", "holdout")
COLUMNS = {
    "verbmem": "VerbMem",
    "knowmem_forget": "KnowMem, forget",
    "utility": "KnowMem, retain",
    "privleak": "PrivLeak",
    "auc_min_k": "AUC",
    "holdout_loss": "loss, held out",
}
REQUEST_COLUMNS = ("verbmem", "knowmem_forget", "utility", "privleak")
DIGITS = {"auc_min_k": 2, "holdout_loss": 2}
QUESTION = "question"
"""`subtask` of the rows that are questions; the others are texts."""


@dataclass(frozen=True, kw_only=True)
class MuseConfig(GridConfig):
    """The configuration of the study. It adds to the keys of `GridConfig`.

    Attributes:
        run: keys of the runs that train the target and the retrained model, without data.
        data: the files `forget`, `retain` and `holdout`, rows of conversations whose `subtask` is
            text or question; and the keys of the section `messages` that all runs share.
        unlearn: changes of `run` for the methods. `steps` are the most that one takes, `eval_every`
            those between two measurements. The schedule must be constant.
        methods: names of the methods, each with its changes of these keys.
        alphas: lengths of the task vectors to try, in increasing order; empty for none.
        requests: methods that are also measured on larger and on successive requests.
        folds: parts of the rows to forget, in their order, that are requested one after the other.
        shares: shares of the rows to forget that are requested at once, each from the target.
        max_new_tokens: most tokens of a continuation or an answer.
        figure: whether to draw forgetting against utility.
    """

    data: dict[str, Any]
    unlearn: dict[str, Any]
    methods: dict[str, Any] = field(default_factory=dict)
    alphas: tuple[float, ...] = ()
    requests: tuple[str, ...] = ()
    folds: int = 4
    shares: tuple[float, ...] = (0.25, 0.5)
    max_new_tokens: int = 64
    figure: bool = True

    study: ClassVar[str] = "muse"

    def __post_init__(self):
        super().__post_init__()
        for name in SOURCES:
            if not self.data.get(name):
                raise UserError(f"data.{name}: is missing (got nothing). Give a file.")
        for name in self.requests:
            one_of("requests", name, tuple(self.methods))
        whole(self, "folds", least=2)
        whole(self, "max_new_tokens")
        for share in self.shares:
            real("shares", share, above=0, most=1)


class Group(NamedTuple):
    """Runs that differ in their seed alone."""

    name: str
    runs: tuple[FinetuneConfig, ...]


def plan(config: MuseConfig, where: str) -> list[Group]:
    """Return the runs whose number is known: the two models of each seed, and the methods."""
    groups = [
        Group(name, tuple(_training(config, where, seed, name) for seed in config.seeds))
        for name in ("target", "retrain")
    ]
    return groups + [
        Group(name, tuple(_unlearning(config, where, seed, name) for seed in config.seeds))
        for name in config.methods
    ]


outline = listing(plan)


def _folder(config: MuseConfig, seed: int) -> Path:
    return Path(config.output, f"seed-{seed}")


def _shared(config: MuseConfig) -> dict[str, Any]:
    return {key: value for key, value in config.data.items() if key not in SOURCES}


def _training(
    config: MuseConfig, where: str, seed: int, name: str, model: Path | None = None
) -> FinetuneConfig:
    """Return a run that trains on the file of its name in the folder of the seed."""
    folder = _folder(config, seed)
    rows = {"train": str(folder / f"{name}.jsonl"), **_shared(config)}
    rows["packing"] = "max_length" in rows  # questions are much shorter than texts
    keys = {**config.run, "messages": rows, "output": str(folder / name)}
    each = build(FinetuneConfig, keys, where)
    start = each.model if model is None else str(model)
    return dataclasses.replace(each, seed=seed, model=start)


def _unlearning(
    config: MuseConfig,
    where: str,
    seed: int,
    name: str,
    *,
    forget: str = "forget",
    model: Path | None = None,
    output: str | None = None,
) -> FinetuneConfig:
    """Return the run of a method, from the target or another model."""
    place, folder = f"{where}: method {name}", _folder(config, seed)
    changes = section_of(config.methods[name], place)
    no_seed_or_output(changes, f"methods.{name}")
    rows = {"train": f"{forget}.jsonl", "retain": "kept.jsonl", **_shared(config)}
    run = {key: value for key, value in config.run.items() if key not in ("steps", "epochs")}
    keys = {**run, "forget": rows, "output": config.output}
    each = build(FinetuneConfig, with_keys(keys, {**config.unlearn, **changes}, place), place)
    schedule = getattr(each.optimizer, "schedule", "constant")
    if schedule != "constant":
        raise UserError(
            f"{place}: optimizer.schedule: must be constant, since steps are added until the model "
            f"has forgotten (got {schedule}). Leave it out."
        )
    if each.steps is None or each.eval_every > each.steps:
        raise UserError(
            f"{place}: eval_every: must be at most steps, {each.steps} (got {each.eval_every}). "
            "Lower it."
        )
    path = folder / "methods" / folder_name(output or name, "methods")
    start = folder / "target" if model is None else model
    return dataclasses.replace(each, seed=seed, model=str(start), output=str(path))


class Measure(NamedTuple):
    """Measures models by one set of rows; reports are kept on disk.

    Attributes:
        data: the rows.
        max_new_tokens: most tokens of a continuation or an answer.
        folder: folder of the reports.
        retrain: report of the retrained model; None until it is measured.
    """

    data: UnlearningData
    max_new_tokens: int
    folder: Path
    retrain: Report | None = None

    def __call__(
        self, name: str, model: Callable[[], LanguageModel | None], **extra: float
    ) -> Report:
        """Return the report of a model by its name, or make it; empty if there is no model."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            report: Report = {}
            if (lm := model()) is not None:
                report = extra | unlearning_report(
                    lm,
                    self.data,
                    retrain_auc=None if self.retrain is None else self.retrain["auc_min_k"],
                    max_new_tokens=self.max_new_tokens,
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, report)
        return read_json(path)

    def has_forgotten(self, report: Report) -> bool:
        """Return whether a model knows no more than the retrained one."""
        assert self.retrain is not None
        key = knowledge_of(report)
        return report[key] <= self.retrain[key]


def knowledge_of(report: Mapping[str, Any]) -> str:
    """Return the measure of what a model knows: of questions or, without these, of texts."""
    return "knowmem_forget" if report.get("knowmem_forget") is not None else "verbmem"


def run(
    config: MuseConfig, folder: Path, where: str, *, mesh: Mesh | None = None, say: Say = print
) -> Result:
    """Train, unlearn and measure; see `jaxlm.studies.study`."""
    plan(config, where)
    found = [_one_seed(config, where, seed, mesh, say) for seed in config.seeds]
    table, requests = (spreads([each[key] for each in found]) for key in ("rows", "requests"))
    curves = [each["curves"] for each in found]
    figures: tuple[Path, ...] = ()
    if config.figure and config.methods:
        figures = (draw(config, table, curves, folder / "forgetting.png"),)
    whole = {"rows": table, "requests": requests, "curves": curves}
    return Result(whole, markdown(table, requests), figures)


def _one_seed(
    config: MuseConfig, where: str, seed: int, mesh: Mesh | None, say: Say
) -> dict[str, Any]:
    """Return the reports of one seed's models."""
    folder = _folder(config, seed)
    folder.mkdir(parents=True, exist_ok=True)
    base = Path(where).parent
    rows = {}
    for name in SOURCES:
        records = ForgetConfig(train=config.data[name]).records(base)["train"]
        rows[name] = [dict(record.values) for record in records]
    half = len(rows["retain"]) // 2
    rows |= {"target": rows["forget"] + rows["retain"], "reinforced": rows["forget"]}
    rows |= {"retrain": rows["retain"], "kept": rows["retain"][:half]}
    rows["utility"] = rows["retain"][half:]
    for name, each in rows.items():
        write_jsonl(folder / f"{name}.jsonl", each)

    def trained(name: str, model: Path | None = None) -> LanguageModel:
        say(f"seed {seed}: {name}")
        each = _training(config, where, seed, name, model)
        if outcome(each, lambda: finetune(each, base_dir=folder, mesh=mesh)).summary is None:
            raise UserError(f"{each.output}: the run diverged. Lower run.optimizer.learning_rate.")
        return load_model(each.output, mesh=mesh)

    target, retrain = trained("target"), trained("retrain")

    def measuring(forget: str) -> Measure:
        data = _encoded(config, where, folder, target, forget)
        reports = folder / f"reports-{config.max_new_tokens}" / forget
        measure = Measure(data, config.max_new_tokens, reports)
        return measure._replace(retrain=measure("retrained", lambda: retrain))

    measure = measuring("forget")
    assert measure.retrain is not None
    own = measure.retrain["auc_min_k"]
    before = _training(config, where, seed, "target").model
    reports = {
        "before training": measure("before", lambda: load_model(before, mesh=mesh)),
        "target": measure("target", lambda: target),
        "retrained": measure.retrain | {"privleak": relative_auc(own, own)},
    }
    curves: dict[str, list[Report]] = {}
    for name in config.methods:
        say(f"seed {seed}: {name}")
        method = _unlearning(config, where, seed, name)
        stages = list(_stages(method, folder, measure, mesh))
        curves[name] = [reports["target"] | {"step": 0.0}, *stages]
        reports[name] = stages[-1] if stages else {}  # it diverged
    if config.alphas:
        say(f"seed {seed}: task vectors")
        reinforced = trained("reinforced", folder / "target")
        curves["task vector"] = [reports["target"] | {"step": 0.0}]
        for alpha in config.alphas:
            params = task_vector(target.params, target.params, reinforced.params, alpha)
            moved = functools.partial(target.replace, params=params)
            found = measure(f"task-vector-{alpha:g}", moved, step=alpha)
            curves["task vector"].append(found)
            if measure.has_forgotten(found):
                break
        reports["task vector"] = curves["task vector"][-1]
    requests = {}
    for name in config.requests:
        say(f"seed {seed}: requests by {name}")
        options = (config, where, seed, name, rows["forget"], measuring, mesh)
        requests[name] = _requests(*options)
    return {"rows": _numbers(reports), "requests": requests, "curves": curves}


def _numbers(reports: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    return {
        name: {key: report.get(key) for key in ("step", *COLUMNS)}
        for name, report in reports.items()
    }


def _stages(
    each: FinetuneConfig, folder: Path, measure: Measure, mesh: Mesh | None
) -> Iterator[Report]:
    """Yield the report after every `eval_every` steps, up to the first that has forgotten.

    Each stage is the same run with more steps, which resumes where the one before ended.
    """
    assert each.steps is not None
    for steps in range(each.eval_every, each.steps + 1, each.eval_every):
        stage = dataclasses.replace(each, steps=steps)

        def trained(stage: FinetuneConfig = stage) -> LanguageModel | None:
            done = outcome(stage, lambda: finetune(stage, base_dir=folder, mesh=mesh))
            return load_model(stage.output, mesh=mesh) if done.summary else None

        found = measure(f"{Path(each.output).name}-{steps}", trained, step=float(steps))
        if not found:
            return
        yield found
        if measure.has_forgotten(found):
            return


def _encoded(
    config: MuseConfig, where: str, folder: Path, lm: LanguageModel, forget: str
) -> UnlearningData:
    """Return the rows of the report, texts and questions apart."""

    def read(name: str, question: bool) -> PaddedRows | None:
        keys = {"train": str(folder / f"{name}.jsonl"), **_shared(config)}
        encoded = build(ForgetConfig, keys, where).load(seed=0).encode(lm)
        assert isinstance(encoded, ForgetRows)
        rows = [row for row in encoded.train.rows if (row.subtask == QUESTION) == question]
        return PaddedRows(rows, encoded.train.pad_id) if rows else None

    texts = []
    for name in (forget, "holdout", "utility"):
        rows = read(name, question=False)
        if rows is None:
            raise UserError(f"data: {name} has no texts, only questions (got none). Add some.")
        texts.append(rows)
    return UnlearningData(*texts, *(read(name, question=True) for name in (forget, "utility")))


def _requests(
    config: MuseConfig,
    where: str,
    seed: int,
    name: str,
    rows: Sequence[Any],
    measuring: Callable[[str], Measure],
    mesh: Mesh | None,
) -> dict[str, dict[str, float | None]]:
    """Return the reports after forgetting shares of the rows at once, and parts one by one.

    Reports are of all rows that have been asked for so far.
    """
    folder, found = _folder(config, seed), {}

    def forgotten(title: str, part: range, so_far: range, model: Path | None) -> Path:
        label = title.replace(" ", "-")
        for stem, places in ((label, part), (f"{label}-so-far", so_far)):
            write_jsonl(folder / f"{stem}.jsonl", [rows[i] for i in places])
        output = f"{name} {title}"
        each = _unlearning(config, where, seed, name, forget=label, model=model, output=output)
        stages = list(_stages(each, folder, measuring(f"{label}-so-far"), mesh))
        found[title] = stages[-1] if stages else {}
        return Path(each.output)

    for share in config.shares:
        part = range(round(share * len(rows)))
        forgotten(f"share {share:g}", part, part, None)
    model, ends = None, np.linspace(0, len(rows), config.folds + 1).astype(int).tolist()
    for number, (start, end) in enumerate(itertools.pairwise(ends), start=1):
        if model is None or found[f"request {number - 1}"]:
            model = forgotten(f"request {number}", range(start, end), range(end), model)
        else:  # the one before diverged
            found[f"request {number}"] = {}
    return {
        title: {key: report.get(key) for key in REQUEST_COLUMNS} for title, report in found.items()
    }


def markdown(table: Mapping[str, Any], requests: Mapping[str, Any]) -> str:
    """Return the table of methods, and that of requests."""

    def cells(row: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
        diverged = row["verbmem"]["mean"] is None
        missing = "diverged" if diverged else ""
        return tuple(shown(row[key], digits=DIGITS.get(key, 1), missing=missing) for key in keys)

    rows = [
        (name, shown(row["step"], digits=0), *cells(row, tuple(COLUMNS)))
        for name, row in table.items()
    ]
    parts = [aligned(("model", "steps or alpha", *COLUMNS.values()), rows)]
    if requests:
        rows = [
            (name, title, *cells(row, REQUEST_COLUMNS))
            for name, reports in requests.items()
            for title, row in reports.items()
        ]
        titles = (COLUMNS[key] for key in REQUEST_COLUMNS)
        parts.append(aligned(("method", "forgotten", *titles), rows))
    return "\n\n".join(parts) + "\n"


def draw(
    config: MuseConfig,
    table: Mapping[str, Any],
    curves: Sequence[Mapping[str, Sequence[Mapping[str, float]]]],
    path: Path,
) -> Path:
    """Draw what models know of what they keep against what they know of what they forget."""
    axes = new_axes((6.4, 4.2))
    first = {key: value["mean"] for key, value in table["target"].items()}
    asked = knowledge_of(first) == "knowmem_forget"
    keys = ("knowmem_forget", "utility") if asked else ("verbmem", "holdout_loss")
    for i, name in enumerate(curves[0]):
        for seed, each in enumerate(curves):
            x, y = ([stage[key] for stage in each[name]] for key in keys)
            label = name if seed == 0 else None
            style = "o-" if i < 10 else "o--"  # there are ten colors
            axes.plot(x, y, style, color=f"C{i % 10}", markersize=3, alpha=0.7, label=label)
    for name, marker in (("target", "s"), ("retrained", "*")):
        x, y = (table[name][key]["mean"] for key in keys)
        axes.plot(x, y, marker, color="black", markersize=10, label=name)
    names = [COLUMNS[key] for key in keys]
    axes.set(xlabel=f"{names[0]} (%)" if asked else f"{names[0]}, forget (%)", ylabel=names[1])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
    return save_figure(axes, path)


Config = MuseConfig
