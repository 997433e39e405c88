"""How well methods of unlearning forget some rows, and what else they cost: MUSE's six criteria.

For each seed a target model is trained on the rows to forget and to keep, and a retrained model on
the latter alone. Each method starts from the target and is measured after every `eval_every` steps,
until it knows no more about the forgotten rows than the retrained model does: the rule by which
MUSE (arXiv:2407.06460) compares methods at the same amount of forgetting.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
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
from jaxlm.typing import Params
from jaxlm.unlearning import task_vector

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
            text or question; and other keys of the section `forget` of a run.
        unlearn: changes of `run` for the methods. `steps` are the most that one takes, `eval_every`
            those between two measurements. The schedule must be constant.
        methods: names of the methods, each with its changes of these keys.
        alphas: lengths of the task vectors to try, in increasing order; empty for none.
        requests: methods that are also measured on more and on successive requests.
        folds: number of parts of the rows to forget, by people or works in their order.
        shares: shares of them to forget at once.
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
    rows = {"train": f"{forget}.jsonl", "retain": "retain.jsonl", **_shared(config)}
    keys = {**config.run, "forget": rows, "output": config.output}
    each = build(FinetuneConfig, with_keys(keys, {**config.unlearn, **changes}, place), place)
    if getattr(each.optimizer, "schedule", "constant") != "constant":
        raise UserError(
            f"{place}: optimizer.schedule: must be constant, since steps are added until the model "
            "has forgotten (got another). Leave it out."
        )
    path = folder / "methods" / folder_name(output or name, "methods")
    start = folder / "target" if model is None else model
    return dataclasses.replace(each, seed=seed, model=str(start), output=str(path))


class Measure(NamedTuple):
    """Measures models by the rows of one seed."""

    data: UnlearningData
    max_new_tokens: int
    retrain: dict[str, float] | None = None

    def __call__(self, lm: LanguageModel, params: Params | None = None) -> dict[str, float]:
        """Return the report of a model, beside the retrained one if that is known."""
        area = None if self.retrain is None else self.retrain["auc_min_k"]
        return unlearning_report(
            lm,
            self.data,
            params=params,
            retrain_auc=area,
            max_new_tokens=self.max_new_tokens,
        )

    def has_forgotten(self, report: Mapping[str, float]) -> bool:
        """Return whether a model knows no more than the retrained one."""
        assert self.retrain is not None
        key = "knowmem_forget" if "knowmem_forget" in report else "verbmem"
        return report[key] <= self.retrain[key]


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
    rows |= {"target": rows["forget"] + rows["retain"], "reinforced": rows["forget"]}
    rows["retrain"] = rows["retain"]
    for name, each in rows.items():
        write_jsonl(folder / f"{name}.jsonl", each)

    def trained(name: str, model: Path | None = None) -> LanguageModel:
        say(f"seed {seed}: {name}")
        each = _training(config, where, seed, name, model)
        if outcome(each, lambda: finetune(each, base_dir=folder, mesh=mesh)).summary is None:
            raise UserError(f"{each.output}: the run diverged. Lower run.optimizer.learning_rate.")
        return load_model(each.output, mesh=mesh)

    target, retrain = trained("target"), trained("retrain")
    measure = Measure(_encoded(config, where, folder, target), config.max_new_tokens)
    measure = measure._replace(retrain=_kept(folder / "retrain.json", lambda: measure(retrain)))
    assert measure.retrain is not None
    first = load_model(_training(config, where, seed, "target").model, mesh=mesh)
    reports = {
        "before training": _kept(folder / "before.json", lambda: measure(first)),
        "target": _kept(folder / "target.json", lambda: measure(target)),
        "retrained": measure.retrain,
    }
    curves: dict[str, list[dict[str, float]]] = {}
    for name in config.methods:
        say(f"seed {seed}: {name}")
        run = _unlearning(config, where, seed, name)
        curves[name] = [reports["target"] | {"step": 0.0}, *_stages(run, folder, measure, mesh)]
        reports[name] = curves[name][-1]
    if config.alphas:
        say(f"seed {seed}: task vectors")
        reinforced = trained("reinforced", folder / "target")

        def moved(alpha: float) -> dict[str, float]:
            params = task_vector(target.params, target.params, reinforced.params, alpha)
            return measure(target, params) | {"step": alpha}

        curves["task vector"] = [reports["target"] | {"step": 0.0}]
        for alpha in config.alphas:
            path = folder / f"task-vector-{alpha:g}.json"
            curves["task vector"].append(_kept(path, lambda alpha=alpha: moved(alpha)))
            if measure.has_forgotten(curves["task vector"][-1]):
                break
        reports["task vector"] = curves["task vector"][-1]
    requests = {
        name: _requests(config, where, seed, name, measure, mesh, say) for name in config.requests
    }
    return {"rows": _numbers(reports), "requests": requests, "curves": curves}


def _kept(path: Path, make: Any) -> dict[str, float]:
    """Return a report that is on disk, or make and write it."""
    if not path.exists():
        write_json(path, make())
    return read_json(path)


def _numbers(reports: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    return {
        name: {key: report.get(key) for key in ("step", *COLUMNS)}
        for name, report in reports.items()
    }


def _stages(
    each: FinetuneConfig, folder: Path, measure: Measure, mesh: Mesh | None
) -> Iterator[dict[str, float]]:
    """Yield the report after every `eval_every` steps, up to the first that has forgotten.

    Each stage is the same run with more steps, which resumes where the one before ended.
    """
    assert each.steps is not None
    for steps in range(each.eval_every, each.steps + 1, each.eval_every):
        stage = dataclasses.replace(each, steps=steps)

        def report(stage: FinetuneConfig = stage) -> dict[str, float]:
            result = outcome(stage, lambda: finetune(stage, base_dir=folder, mesh=mesh))
            if result.summary is None:
                return {}
            return measure(load_model(stage.output, mesh=mesh)) | {"step": float(stage.steps or 0)}

        path = Path(each.output).with_name(f"{Path(each.output).name}-{steps}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _kept(path, report)
        if not found:  # it diverged
            return
        yield found
        if measure.has_forgotten(found):
            return


def _encoded(config: MuseConfig, where: str, folder: Path, lm: LanguageModel) -> UnlearningData:
    """Return the rows of the report, texts and questions apart."""

    def read(name: str, question: bool) -> PaddedRows | None:
        keys = {"train": str(folder / f"{name}.jsonl"), **_shared(config)}
        encoded = build(ForgetConfig, keys, where).load(seed=0).encode(lm)
        assert isinstance(encoded, ForgetRows)
        rows = [row for row in encoded.train.rows if (row.subtask == QUESTION) == question]
        return PaddedRows(rows, encoded.train.pad_id) if rows else None

    texts = []
    for name in SOURCES:
        rows = read(name, question=False)
        if rows is None:
            raise UserError(f"data.{name}: has no texts, only questions (got {name}). Add some.")
        texts.append(rows)
    forget, retain, holdout = texts
    asked = (read(name, question=True) for name in ("forget", "retain"))
    return UnlearningData(forget, holdout, retain, *asked)


def _requests(
    config: MuseConfig,
    where: str,
    seed: int,
    name: str,
    measure: Measure,
    mesh: Mesh | None,
    say: Say,
) -> dict[str, dict[str, float | None]]:
    """Return the reports after forgetting shares of the rows at once, and parts one by one."""
    folder = _folder(config, seed)
    rows = ForgetConfig(train=str(folder / "forget.jsonl")).records()["train"]
    values = [dict(record.values) for record in rows]
    found = {}

    def forgotten(title: str, part: Sequence[Any], model: Path | None) -> Path:
        path = folder / f"{title.replace(' ', '-')}.jsonl"
        write_jsonl(path, part)
        say(f"seed {seed}: {name}, {title}")
        output = f"{name} {title}"
        each = _unlearning(config, where, seed, name, forget=path.stem, model=model, output=output)
        steps = round((each.steps or 0) * len(part) / len(values))
        each = dataclasses.replace(each, steps=max(each.eval_every, steps))
        finetune(each, base_dir=folder, mesh=mesh)
        path = Path(each.output).with_suffix(".json")
        found[title] = _kept(path, lambda: measure(load_model(each.output, mesh=mesh)))
        return Path(each.output)

    for share in config.shares:
        forgotten(f"share {share:g}", values[: round(share * len(values))], None)
    model = None
    for number, part in enumerate(np.array_split(np.arange(len(values)), config.folds), start=1):
        model = forgotten(f"request {number}", [values[i] for i in part], model)
    return {
        title: {key: report.get(key) for key in REQUEST_COLUMNS} for title, report in found.items()
    }


def markdown(table: Mapping[str, Any], requests: Mapping[str, Any]) -> str:
    """Return the table of methods, and that of requests."""

    def cells(row: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
        return tuple(shown(row[key], digits=DIGITS.get(key, 1)) for key in keys)

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
    for i, name in enumerate(curves[0]):
        for seed, each in enumerate(curves):
            x, y = ([stage[key] for stage in each[name]] for key in ("knowmem_forget", "utility"))
            label = name if seed == 0 else None
            axes.plot(x, y, "o-", color=f"C{i % 10}", markersize=3, alpha=0.7, label=label)
    for name, marker in (("target", "s"), ("retrained", "*")):
        x, y = (table[name][key]["mean"] for key in ("knowmem_forget", "utility"))
        axes.plot(x, y, marker, color="black", markersize=10, label=name)
    axes.set(xlabel="KnowMem of the forgotten (ROUGE-L, %)", ylabel="KnowMem of the kept (%)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
    return save_figure(axes, path)


Config = MuseConfig
