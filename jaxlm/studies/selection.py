"""LESS from rows to a table: warm-up, features, scores, selections, and training on each.

For each seed:

    warmup      LoRA training on a random part of the rows, kept at the end of each epoch
    train-E     features of all rows at epoch E: Adam's direction from the state of the warm-up
    target-E    features of the target's examples there: gradients
    select-M    what method M chooses: scores.jsonl and selected.jsonl
    tune-M      LoRA training of the first model on that, and what the target says of it

References: Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning",
arXiv:2402.04333.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.core.fingerprints import fingerprint
from jaxlm.data.messages import MessageFormat
from jaxlm.influence import GradientStore, score
from jaxlm.studies.selection_batches import row_losses
from jaxlm.studies.selection_choice import METHODS, Choice, write_choice
from jaxlm.studies.selection_features import Features, store_features, stored_order
from jaxlm.studies.selection_measure import Measure
from jaxlm.studies.selection_rows import Rows, Source, Target, digest, read_source, read_target
from jaxlm.studies.selection_stage import stage
from jaxlm.studies.selection_training import Recipe, load_epoch, train
from jaxlm.train.run import load_model
from jaxlm.train.run_folder import to_dict

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """A study of selections.

    Attributes:
        model: folder or hub id; null means the model that comes with the package.
        sources: name to source of the rows that are chosen from.
        target: what they are to help with.
        template: of conversations, "tulu" or "chat".
        max_length: most tokens of a row; null for as many as the model takes.
        recipe: of the warm-up and of training on what is chosen.
        warmup_fraction: part of the rows that the warm-up has.
        features: of gradients.
        aggregate: see `jaxlm.influence.score`; "mean_of_cosines" is the authors' code.
        fraction: part of the rows that is chosen.
        methods: names of `jaxlm.studies.selection_choice.METHODS`, rows of the table.
        seeds: of warm-up, random choice and training; the table has their means.
        pool_seed: of the rows drawn from the sources and of shuffled labels.
        eval_batch_size: examples in a forward pass of measurements.
        param_dtype: of the parameters.
        output: folder of the stages and tables.
    """

    model: str | None = None
    sources: dict[str, Source]
    target: Target
    template: MessageFormat = "tulu"
    max_length: int | None = None
    recipe: Recipe = Recipe()
    warmup_fraction: float = 0.05
    features: Features = Features()
    aggregate: Literal["cosine_of_mean", "mean_of_cosines"] = "cosine_of_mean"
    fraction: float = 0.05
    methods: tuple[str, ...] = ("less", "random", "full")
    seeds: tuple[int, ...] = (0,)
    pool_seed: int = 0
    eval_batch_size: int = 64
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    output: str

    def __post_init__(self):
        for name in ("warmup_fraction", "fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name):g}: give 0 < {name} <= 1.")
        for name in ("methods", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} is empty or has a value twice: give each once.")
        for name in self.methods:
            if name not in METHODS:
                raise UserError(f"methods has '{name}': choose of {', '.join(METHODS)}.")
        if not any(source.given for source in self.sources.values()):
            raise UserError("sources has nothing to read: give a source.")
        if not self.output:
            raise UserError("output is empty: give the folder of the study.")


def selection_study(
    config: SelectionConfig, *, base_dir: Path | None = None, say: Say = lambda line: None
) -> dict[str, Any]:
    """Does every stage that is not done, and gathers the numbers.

    Args:
        config: the study.
        base_dir: where relative paths of sources and target start, before the working directory.
        say: is told of each stage.

    Returns:
        `{"pool", "runs"}`: what there is to choose from, and for every seed and method what was
        chosen and measured; see `jaxlm.studies.selection_table.rows`.

    Raises:
        UserError: a source or the target cannot be read, or a stage fails.
    """
    study = _Study(config, base_dir, say)
    return {
        "pool": study.pool_summary(),
        "runs": [run for seed in config.seeds for run in study.runs(seed)],
    }


class _Study:
    """The model and the rows, and the stages on them."""

    def __init__(self, config: SelectionConfig, base_dir: Path | None, say: Say):
        self.config, self.say = config, say
        self.lm = load_model(config.model, param_dtype=config.param_dtype)
        words: dict[str, Any] = {
            "template": config.template,
            "max_length": min(
                self.lm.config.max_positions, config.max_length or self.lm.config.max_positions
            ),
            "seed": config.pool_seed,
            "base_dir": base_dir,
        }
        parts = []
        for name, source in config.sources.items():
            if not source.given:
                say(f"source {name} has no task.train: it is left out")
                continue
            parts.append(read_source(name, source, self.lm, **words))
        self.pool = Rows(
            tuple(row for part in parts for row in part.rows),
            tuple(name for part in parts for name in part.cut),
        )
        self.target = read_target(config.target, self.lm, **words)
        for what, rows in (("the sources have", self.pool), ("the target has", self.target)):
            if rows.cut:
                say(f"{len(rows.cut)} rows are left out, of whose answers nothing is left")
            if not rows.rows:
                raise UserError(f"{what} no rows with an answer: raise max_length.")
        self.measure = Measure(self.lm, config, words)
        self.losses = row_losses(self.lm_with_adapters())
        self.model = fingerprint((self.lm.params, repr(self.lm.config)))
        self.data, self.target_data = digest(self.pool.rows), digest(self.target.rows)

    def lm_with_adapters(self) -> Any:
        return self.config.recipe.prepare(self.lm, 0)

    def pool_summary(self) -> dict[str, Any]:
        names = list(dict.fromkeys(row.source for row in self.pool.rows))
        rows = self.pool.rows
        return {
            "rows": len(rows),
            "sources": {name: sum(row.source == name for row in rows) for name in names},
            "noise": sum(row.noise for row in rows),
            "cut": len(self.pool.cut),
            "target": len(self.target.rows),
            "before": self.measure(self.lm, self.lm.params),
            "metric": self.measure.metric,
        }

    def runs(self, seed: int) -> list[dict[str, Any]]:
        found = []
        for name in self.config.methods:
            choice = self.choose(seed, name)
            found.append({"method": name, "seed": seed, **self.tune(seed, name, choice)})
        return found

    def _stage(
        self, seed: int, name: str, inputs: dict[str, Any], work: Callable[[Path], dict[str, Any]]
    ) -> tuple[Path, dict[str, Any]]:
        root = Path(self.config.output) / f"seed-{seed}"
        return stage(root, name, inputs, work, say=self.say)

    def warmup_places(self, seed: int) -> list[int]:
        count = max(1, int(self.config.warmup_fraction * len(self.pool.rows) * (1 + 1e-12)))
        return _permutation(seed, 0, len(self.pool.rows))[:count]

    def warmup_inputs(self, seed: int) -> dict[str, Any]:
        rows = [self.pool.rows[place] for place in self.warmup_places(seed)]
        recipe = to_dict(self.config.recipe)
        return {"model": self.model, "rows": digest(rows), "recipe": recipe, "seed": seed}

    def warmup(self, seed: int) -> Path:
        rows = [self.pool.rows[place] for place in self.warmup_places(seed)]

        def work(folder: Path) -> dict[str, Any]:
            train(folder, self.lm, rows, self.config.recipe, seed=seed, keep=True)
            return {"rows": len(rows)}

        return self._stage(seed, "warmup", self.warmup_inputs(seed), work)[0]

    def stores(self, seed: int) -> tuple[list[GradientStore], list[GradientStore], dict[str, Any]]:
        """Features of both sides at each epoch, and what they are of."""
        config, folder = self.config, self.warmup(seed)
        shared = {"warmup": self.warmup_inputs(seed), "features": to_dict(config.features)}
        sides = {"train": (self.pool, self.data), "target": (self.target, self.target_data)}
        stores: dict[str, list[GradientStore]] = {"train": [], "target": []}
        for number in range(1, config.recipe.epochs + 1):
            loaded: Any = None
            for side, (rows, data) in sides.items():

                def work(place: Path, side=side, rows=rows, number=number) -> dict[str, Any]:
                    nonlocal loaded
                    if loaded is None:
                        loaded = load_epoch(
                            folder,
                            self.lm,
                            len(self.warmup_places(seed)),
                            config.recipe,
                            number,
                            seed=seed,
                        )
                    return store_features(
                        place,
                        self.losses,
                        rows,
                        loaded,
                        config.features,
                        config.recipe,
                        number=number,
                        adam=side == "train",
                        pad_id=self.lm.config.pad_id or 0,
                    )

                inputs = {**shared, "rows": data, "epoch": number}
                place, _ = self._stage(seed, f"{side}-{number}", inputs, work)
                stores[side].append(GradientStore.open(place / "store"))
        return stores["train"], stores["target"], shared

    def less(self, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        """The score of every row, in the order of the pool."""
        train_stores, target_stores, shared = self.stores(seed)
        subtasks = self.target.subtasks
        if subtasks is not None:
            subtasks = subtasks[stored_order(target_stores[0], self.target)]
        found = score(
            train_stores,
            target_stores,
            subtask=subtasks,
            aggregate=self.config.aggregate,
            over=None if subtasks is None else "max",
        )
        scores = np.empty_like(found)
        scores[stored_order(train_stores[0], self.pool)] = found
        return scores, shared
