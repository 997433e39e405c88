"""LESS from rows to a table: warm-up, features, scores, selections, and training on each.

The stages, for each seed:

    warmup      LoRA training on a random part of the rows, with a checkpoint after each epoch
    train-E     features of all rows at epoch E: Adam's direction from the warm-up's state
    target-E    features of the target's examples at epoch E: gradients
    select-M    the choice of method M: scores.jsonl and selected.jsonl
    tune-M      LoRA training of the first model on that choice, and the target's metric

References: Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning",
arXiv:2402.04333.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from jax.sharding import Mesh

from jaxlm.artifacts.arrays import fingerprint
from jaxlm.artifacts.config import load
from jaxlm.artifacts.folder import inputs_digest, stage
from jaxlm.core.checks import distinct, dtype_name, number, one_of, seeds, whole
from jaxlm.core.errors import UserError
from jaxlm.cost.device import Device
from jaxlm.data.messages import MessageTemplate
from jaxlm.data.rows import digest
from jaxlm.influence import GradientStore, score
from jaxlm.studies.grid import Result, Say, check_seeds_and_output
from jaxlm.studies.less_choice import (
    METHODS,
    counts,
    read_choice,
    shallow_scores,
    shares_of_answers,
    write_choice,
)
from jaxlm.studies.less_features import Features, store_features, stored_order
from jaxlm.studies.less_rows import PoolRow, Reader, Rows, Source, Target
from jaxlm.studies.less_training import Measure, Recipe, load_epoch, train
from jaxlm.studies.tables import aligned, percent, shown, spread
from jaxlm.train.load import load_model
from jaxlm.train.losses import row_losses
from jaxlm.train.run_folder import to_dict
from jaxlm.train.settings import MOST_ROWS


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """A study of selections.

    Attributes:
        model: folder or hub id; null means the model that comes with the package.
        sources: source name to the source of rows to choose from.
        target: what the chosen rows should improve.
        template: template of conversations, "tulu" or "chat".
        max_length: most tokens of a row; null for the model's length.
        recipe: training in the warm-up and on the chosen rows.
        warmup_fraction: fraction of the rows in the warm-up.
        features: how to compute gradient features.
        aggregate: see `jaxlm.influence.score`; the authors' code has "mean_of_cosines".
        fraction: fraction of the rows to choose.
        match_answers: whether chosen rows must have the target's answers in the target's
            proportions; "random" and "full" ignore it. In a classification task, scores favour the
            label word that the model should predict more often, so the best rows may all have
            that answer.
        methods: names of `jaxlm.studies.less_choice.METHODS`, rows of the table.
        seeds: seeds of warm-up, random choice and training; the table has means over them.
        pool_seed: seed of the rows drawn from the sources and of shuffled labels.
        eval_batch_size: examples in a forward pass of evaluation.
        param_dtype: dtype of the parameters.
        output: folder of the stages and tables.
    """

    model: str | None = None
    sources: dict[str, Source]
    target: Target
    template: MessageTemplate = "tulu"
    max_length: int | None = None
    recipe: Recipe = field(default=Recipe())
    warmup_fraction: float = 0.05
    features: Features = field(default=Features())
    aggregate: Literal["cosine_of_mean", "mean_of_cosines"] = "cosine_of_mean"
    fraction: float = 0.05
    match_answers: bool = False
    methods: tuple[str, ...] = ("less", "random", "full")
    seeds: tuple[int, ...] = (0,)
    pool_seed: int = 0
    eval_batch_size: int = 64
    param_dtype: str = "float32"
    output: str

    study: ClassVar[str] = "less"

    def __post_init__(self):
        number(self, "warmup_fraction", "fraction", above=0, most=1)
        seeds(self, "pool_seed")
        whole(self, "max_length")
        whole(self, "eval_batch_size", most=MOST_ROWS)
        object.__setattr__(self, "param_dtype", dtype_name(self.param_dtype))
        distinct("methods", self.methods)
        for name in self.methods:
            one_of("methods", name, METHODS)
        if not any(source.given for source in self.sources.values()):
            raise UserError("sources: there is nothing to read. Give a source.")
        check_seeds_and_output(self)

    def reader(self, lm: Any, base_dir: Path | None) -> Reader:
        """Return what reads the sources and the target for a model."""
        longest = lm.config.max_positions
        max_length = min(longest, self.max_length or longest)
        return Reader(lm, max_length, self.template, self.pool_seed, base_dir)


def selection_study(
    config: SelectionConfig,
    *,
    base_dir: Path | None = None,
    mesh: Mesh | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Do every stage that is not finished, and return the results.

    Relative paths of sources and target are looked up in `base_dir` first. Features are computed on
    all devices of every process of a mesh, with a copy of the parameters on each. `say` is called
    with a line for each stage.

    Returns:
        `{"pool", "runs"}`: the rows to choose from, and the choice and the metric of every seed
        and method.
    """
    study = _Study(config, base_dir, mesh, say)
    runs = [study.run(seed, method) for seed in config.seeds for method in config.methods]
    return {"pool": study.summary(), "runs": runs}


def read_sides(
    config: SelectionConfig, lm: Any, *, base_dir: Path | None = None, say: Say = lambda line: None
) -> tuple[Rows, Rows]:
    """Read the rows of all sources, and those of the target.

    `lm` tokenizes the rows; its parameters are not read. `say` is called with a line about rows
    that are left out.
    """
    reader = config.reader(lm, base_dir)
    parts = []
    for name, source in config.sources.items():
        if source.given:
            parts.append(reader.source(name, source))
        else:
            say(f"source {name} has no task.train: it is left out")
    pool = Rows(
        tuple(row for part in parts for row in part.rows),
        tuple(name for part in parts for name in part.cut),
    )
    target = reader.target(config.target)
    for what, rows in (("the sources have", pool), ("the target has", target)):
        if rows.cut:
            say(f"{what} {len(rows.cut)} rows whose answers are cut off: they are left out")
        if not rows.rows:
            raise UserError(
                f"max_length: {what} no rows with an answer (got {config.max_length}). Raise it."
            )
    return pool, target


class _Study:
    """The model, the rows, and the stages of a study."""

    def __init__(self, config: SelectionConfig, base_dir: Path | None, mesh: Mesh | None, say: Say):
        self.config, self.say = config, say
        self.lm = load_model(config.model, param_dtype=config.param_dtype, mesh=mesh)
        self.pool, self.target = read_sides(config, self.lm, base_dir=base_dir, say=say)
        ready = config.recipe.prepare(self.lm, 0)
        self.losses = row_losses(ready)
        self.measure = Measure.of(
            config.target,
            ready,
            config.reader(self.lm, base_dir),
            batch_size=config.eval_batch_size,
        )
        shape = np.frombuffer(repr(ready.config).encode(), "u1")
        self.hashes = {
            "model": fingerprint((self.lm.params, shape)),
            "rows": digest(self.pool.rows),
            "target": digest(self.target.rows),
        }
        self.test = inputs_digest({"data": self.measure.data})

    def _stage(
        self,
        seed: int | None,
        name: str,
        inputs: dict[str, Any],
        work: Callable[[Path], dict[str, Any]],
    ) -> tuple[Path, dict[str, Any]]:
        root = Path(self.config.output)
        return stage(
            root if seed is None else root / f"seed-{seed}", name, inputs, work, log=self.say
        )

    def summary(self) -> dict[str, Any]:
        """Count the rows to choose from, and measure the untrained model on the target."""
        inputs = {"model": self.hashes["model"], "test": self.test}
        _, before = self._stage(
            None, "before", inputs, lambda _: {"value": self.measure.value(self.lm.params)}
        )
        return {
            **counts(self.pool.rows, self.pool.rows),
            "cut": len(self.pool.cut),
            "target": len(self.target.rows),
            "metric": self.measure.metric,
            "before": before["value"],
        }

    def run(self, seed: int, method: str) -> dict[str, Any]:
        """Choose rows by a method, train on them, and measure."""
        config, pool, shares = self.config, self.pool.rows, self._shares(method)

        def choose(place: Path) -> dict[str, Any]:
            return write_choice(place, pool, self._scores(seed, method), config.fraction, shares)

        inputs = self._choice_inputs(seed, method)
        folder, chosen = self._stage(seed, f"select-{method}", inputs, choose)
        rows = read_choice(folder, pool)

        def tune(place: Path) -> dict[str, Any]:
            return {
                "value": self.measure.value(train(place, self.lm, rows, config.recipe, seed=seed))
            }

        inputs = {**self._training_inputs(seed), "rows": digest(rows), "test": self.test}
        _, found = self._stage(seed, f"tune-{method}", inputs, tune)
        return {"method": method, "seed": seed, **chosen, **found}

    def _training_inputs(self, seed: int) -> dict[str, Any]:
        recipe = to_dict(self.config.recipe)
        return {"model": self.hashes["model"], "recipe": recipe, "seed": seed}

    def _choice_inputs(self, seed: int, method: str) -> dict[str, Any]:
        """Return what the choice of a method depends on."""
        if method == "full":
            return {"rows": self.hashes["rows"]}
        inputs = {**self.hashes, "fraction": self.config.fraction, "shares": self._shares(method)}
        if method in ("random", "matched"):
            return {**inputs, "seed": seed}
        groups = self.target.subtasks
        inputs["subtasks"] = None if groups is None else groups.tolist()
        if method != "less":
            return inputs
        less = {"features": self._features(), "aggregate": self.config.aggregate}
        return {**inputs, **self._warmup_inputs(seed), **less}

    def _shares(self, method: str) -> dict[str, float] | None:
        """Return the shares of answers that a method must keep to, or None."""
        if method == "matched" or (self.config.match_answers and method not in ("random", "full")):
            return shares_of_answers(self.target)
        return None

    def _scores(self, seed: int, method: str) -> np.ndarray | None:
        if method == "full":
            return None
        if method == "less":
            return self._less(seed)
        return shallow_scores(method, self.lm, self.pool, self.target, seed=seed)

    def _warmup_rows(self, seed: int) -> list[PoolRow]:
        count = max(1, int(self.config.warmup_fraction * len(self.pool.rows) * (1 + 1e-12)))
        generator = np.random.Generator(np.random.PCG64([seed, 0]))
        order = generator.permutation(len(self.pool.rows))
        return [self.pool.rows[place] for place in order[:count]]

    def _warmup_inputs(self, seed: int) -> dict[str, Any]:
        return {**self._training_inputs(seed), "part": digest(self._warmup_rows(seed))}

    def _features(self) -> dict[str, Any]:
        """Return the keys of `features` that change its results."""
        keys = to_dict(self.config.features)
        return {key: keys[key] for key in keys if key != "block_size"}

    def _less(self, seed: int) -> np.ndarray:
        """Return the LESS score of every row, in the order of the pool."""
        config, warmup_inputs = self.config, self._warmup_inputs(seed)
        part = self._warmup_rows(seed)

        def warm_up(place: Path) -> dict[str, Any]:
            train(place, self.lm, part, config.recipe, seed=seed, keep=True)
            return {"rows": len(part)}

        folder, _ = self._stage(seed, "warmup", warmup_inputs, warm_up)
        load = functools.lru_cache(maxsize=1)(
            lambda epoch: load_epoch(folder, self.lm, len(part), config.recipe, epoch, seed=seed)
        )

        def store(side: str, epoch: int, rows: Rows) -> GradientStore:
            def work(place: Path) -> dict[str, Any]:
                return store_features(
                    place,
                    self.losses,
                    rows,
                    load(epoch),
                    config.features,
                    config.recipe,
                    number=epoch,
                    adam=side == "train",
                    pad_id=self.lm.config.pad_id or 0,
                )

            inputs = {
                "warmup": warmup_inputs,
                "epoch": epoch,
                "rows": digest(rows.rows),
                "features": self._features(),
            }
            place, _ = self._stage(seed, f"{side}-{epoch}", inputs, work)
            return GradientStore.open(place / "store")

        sides = {"train": self.pool, "target": self.target}
        stores: dict[str, list[GradientStore]] = {side: [] for side in sides}
        for epoch in range(1, config.recipe.epochs + 1):
            for side, rows in sides.items():
                stores[side].append(store(side, epoch, rows))
        groups = self.target.subtasks
        if groups is not None:
            groups = groups[stored_order(stores["target"][0], self.target)]
        found = score(
            stores["train"],
            stores["target"],
            subtask=groups,
            aggregate=config.aggregate,
            over=None if groups is None else "max",
        )
        scores = np.empty_like(found)
        scores[stored_order(stores["train"][0], self.pool)] = found
        return scores


Config = SelectionConfig
PLAN = ("device", "sizes")
"""Sections of flags that a dry run accepts."""


def outline(config: SelectionConfig | None, where: str, plan_flags: Mapping[str, str]) -> str:
    """Return the cost of each stage of the study, or of the paper's if `config` is None."""
    from jaxlm.studies.less_cost import Plan, Sizes, markdown, plan_of

    def section(name: str) -> dict[str, str]:
        start = f"{name}."
        flags = {key: value for key, value in plan_flags.items() if key.startswith(start)}
        return {key.removeprefix(start): value for key, value in flags.items()}

    device, sizes = load(Device, None, section("device")), load(Sizes, None, section("sizes"))
    plan = Plan() if config is None else plan_of(config, base_dir=Path(where).parent)
    given = {key: getattr(sizes, key) for key in section("sizes")}
    return markdown(plan._replace(sizes=dataclasses.replace(plan.sizes, **given)), device)


def run(
    config: SelectionConfig, folder: Path, where: str, *, mesh: Mesh | None = None, say: Say = print
) -> Result:
    """Do every stage; see `jaxlm.studies.study`."""
    del folder
    found = selection_study(config, base_dir=Path(where).parent, mesh=mesh, say=say)
    return Result({**found, "rows": rows(found)}, _markdown(found))


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each method, with means over the seeds.

    A row has the number of chosen rows, the share of each source and of noise among them, and the
    target's metric. The first one describes all rows, with the metric before training.
    """
    pool = found["pool"]
    first = {**pool, "method": "no training", "value": pool["before"]}
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in (first, *found["runs"]):
        groups.setdefault(run["method"], []).append(run)
    return [
        {
            "method": method,
            "rows": runs[0]["rows"],
            "sources": {
                name: statistics.fmean(run["sources"][name] / run["rows"] for run in runs)
                for name in pool["sources"]
            },
            "noise": statistics.fmean(run["noise"] / run["rows"] for run in runs),
            **spread([run["value"] for run in runs]),
        }
        for method, runs in groups.items()
    ]


def _markdown(found: dict[str, Any]) -> str:
    """Return the table as Markdown that is also aligned for a terminal."""
    pool, table = found["pool"], rows(found)
    accuracy = pool["metric"] == "accuracy"
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(run["seed"] for run in found["runs"]))
    what = "accuracy in per cent" if accuracy else "loss in nats a token, lower is better"
    said = (
        f"Rows chosen from {pool['rows']} with {pool['target']} target examples; shares of the "
        f"sources and of rows with a wrong label in per cent; {what}, "
        f"mean (standard deviation) over the seeds {seeds}."
    )
    header = ("method", "rows", *pool["sources"], "wrong label", pool["metric"])
    cells = [
        (
            each["method"],
            str(each["rows"]),
            *(f"{100 * share:.1f}" for share in each["sources"].values()),
            f"{100 * each['noise']:.1f}",
            percent(each) if accuracy else shown(each),
        )
        for each in table
    ]
    return f"{said}\n\n{aligned(header, cells)}\n"
