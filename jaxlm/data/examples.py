"""Examples of a task, read from its sources and checked against its configuration."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.data.fewshot import draw_per_class
from jaxlm.data.sources import SPLITS, Row, read_rows
from jaxlm.data.tasks import TaskConfig
from jaxlm.data.templates import Template


@dataclass(frozen=True)
class Example:
    """One example: the texts of the template's fields, the class, and where it came from."""

    fields: Mapping[str, str]
    label: int
    id: str


@dataclass(frozen=True)
class Task:
    """The examples of a task; a split that is not there is empty."""

    config: TaskConfig
    template: Template
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


def load_task(config: TaskConfig, *, seed: int, base_dir: str | Path | None = None) -> Task:
    """Reads a task's examples.

    Args:
        config: the task.
        seed: of the draw of k examples per class.
        base_dir: folder where relative paths start, before the working directory.

    Raises:
        UserError: a source, field, or label is not as the configuration says; k is too large.
    """
    base = None if base_dir is None else Path(base_dir)
    sources = {split: getattr(config, split) for split in SPLITS}
    held_out = sources["validation"] == "hold_out"
    if held_out:
        sources["validation"] = None
    if not any(sources.values()):
        raise UserError("task has no data: give task.train, task.test or both.")
    rows = {
        split: read_rows(source, key=split, base_dir=base) if source else []
        for split, source in sources.items()
    }
    columns = tuple(next(split for split in rows.values() if split)[0].values)
    template = Template.parse(config.template).with_names(config.fields, columns)
    train, validation, test = (
        tuple(_example(row, template, config) for row in rows[split]) for split in SPLITS
    )
    if config.k is not None and (train or held_out):
        labels = [example.label for example in train]
        draw = functools.partial(draw_per_class, labels, config.k, seed=seed, names=config.labels)
        if held_out:
            validation = tuple(train[i] for i in draw(skip=config.k))
        train = tuple(train[i] for i in draw())
    return Task(config, template, train, validation, test)


def _example(row: Row, template: Template, config: TaskConfig) -> Example:
    texts = {name: _text(row, name) for name in template.field_names}
    return Example(texts, _label(row, config), f"{row.source}:{row.number}")


def _value(row: Row, name: str, key: str) -> Any:
    if name not in row.values:
        names = ", ".join(repr(name) for name in row.values)
        raise UserError(
            f"{row.where} has no field {name!r}, which task.{key} names: its fields are {names}."
        )
    value = row.values[name]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise UserError(
            f"{row.where}: field {name!r} is null: give a value or leave the {row.unit} out."
        )
    return value


def _text(row: Row, name: str) -> str:
    value = _value(row, name, "template")
    if not isinstance(value, str):
        raise UserError(
            f"{row.where}: field {name!r} holds {value!r}, which is not text: put it in quotes."
        )
    return value


def _label(row: Row, config: TaskConfig) -> int:
    """The class of a row: `classes` decide first, then label words and indices where they agree."""
    value = _value(row, config.label_field, "label_field")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(
            f"{row.where}: label {value!r} is neither text nor a whole number: give an index, a "
            "label word or a class name."
        )
    name = str(value)
    classes = [str(word) for word in config.classes or ()]
    if name in classes:
        return classes.index(name)
    indices = [str(i) for i in range(len(config.labels))]
    found = {words.index(name) for words in (config.labels, indices) if name in words}
    if len(found) > 1:
        raise UserError(
            f"{row.where}: label {value!r} may be an index or a label word: name the classes in "
            "task.classes."
        )
    if not found:
        raise UserError(
            f"{row.where}: label {value!r} is not one of {', '.join(classes or config.labels)} "
            f"nor an index from 0 to {len(config.labels) - 1}: correct it, or name the classes in "
            "task.classes."
        )
    return found.pop()
