"""Examples of a task, read from its sources and checked against its configuration."""

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from jaxlm.core import checks
from jaxlm.core.errors import UserError
from jaxlm.data.opt_tasks import OptTask, opt_task
from jaxlm.data.sources import SPLITS, Record, read_rows
from jaxlm.data.splits import draw_per_class, draw_split
from jaxlm.data.tasks import TaskConfig
from jaxlm.data.templates import Field, Template

if TYPE_CHECKING:
    from jaxlm.data.batching import EncodedTask


@dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        fields: texts of the template's fields.
        label: the class, or the right one among the example's own options.
        id: where it came from.
        options: the example's own options, in place of the task's label words.
        gold: all right options, where there are several.
        answers: right texts, where a text is to be generated.
        context: text before the template: demonstrations.
    """

    fields: Mapping[str, str]
    label: int
    id: str
    options: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    context: str = ""


@dataclass(frozen=True)
class Task:
    """The examples of a task; a split that is not there is empty."""

    config: TaskConfig
    template: Template
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    def encode(self, lm: Any, *, max_length: int | None = None) -> "EncodedTask":
        """`jaxlm.data.prepare_for` of this task."""
        from jaxlm.data._prepare import prepare_for

        return prepare_for(lm, self, max_length=max_length)

    def repeated(self, split: str = "test") -> int:
        """How many examples of a split have the very texts of a training example.

        Whatever their labels are, what is measured on them is not how well a model generalizes.
        """
        trained = {_texts(example) for example in self.train}
        return sum(_texts(example) in trained for example in getattr(self, split))

    def digests(self) -> dict[str, str]:
        """SHA-256 of the examples of each split that is there: not of where they came from."""
        return {split: _digest(getattr(self, split)) for split in SPLITS if getattr(self, split)}


def _texts(example: Example) -> tuple[Any, ...]:
    return (example.context, example.options, tuple(sorted(example.fields.items())))


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for each in examples:
        what = (_texts(each), each.label, each.gold, each.answers)
        digest.update(json.dumps(what).encode())
    return digest.hexdigest()


def load_task(config: TaskConfig, *, seed: int, base_dir: str | Path | None = None) -> Task:
    """Reads a task's examples.

    Of the tasks `opt/NAME` and `roberta/NAME`, rows with the label -1 are left out: the hub's data
    sets mark with it what has no label.

    Args:
        config: the task.
        seed: of the draw of k examples per class, or of `num_train` and `num_validation`.
        base_dir: folder where relative paths start, before the working directory.

    Raises:
        UserError: a source, field, or label is not as the configuration says; k is too large.
    """
    checks.seeds(SimpleNamespace(seed=seed), "seed")
    base = None if base_dir is None else Path(base_dir)
    sources = {split: getattr(config, split) for split in SPLITS}
    held_out = sources["validation"] == "hold_out"
    if held_out:
        sources["validation"] = None
    if not any(sources.values()):
        raise UserError("task: has no data. Give task.train, task.test or both.")
    rows = {
        split: read_rows(source, key=split, base_dir=base) if source else []
        for split, source in sources.items()
    }
    columns = tuple(next(split for split in rows.values() if split)[0].values)
    template = Template.parse(config.template).with_names(config.fields, columns)
    known = opt_task(config.name)
    train, validation, test = (
        tuple(_read(row, template, config, known) for row in rows[split] if _has_label(row, config))
        for split in SPLITS
    )
    if train or held_out:
        train, drawn = _draw(train, config, held_out=held_out, seed=seed)
        validation = drawn if held_out else validation
    if test and config.num_test is not None:
        places, _ = draw_split(len(test), config.num_test, 0, seed=config.test_seed)
        test = tuple(test[i] for i in places)
    return Task(config, template, train, validation, test)


def _draw(
    train: Sequence[Example], config: TaskConfig, *, held_out: bool, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The examples to train on, and those that are held out."""
    if config.k is not None:
        labels = [example.label for example in train]
        draw = functools.partial(draw_per_class, labels, config.k, seed=seed, names=config.labels)
        chosen, rest = draw(), draw(skip=config.k) if held_out else []
    elif config.num_train is not None or held_out:
        count = (config.num_validation or 0) if held_out else 0
        if held_out and config.num_validation is None and config.num_train is not None:
            count = min(config.num_train, len(train) - config.num_train)
            if count < 1:
                raise UserError(
                    f"task.num_train: leaves none of the {len(train)} examples of task.train to "
                    f"hold out (got {config.num_train}). Lower it."
                )
        chosen, rest = draw_split(len(train), config.num_train, count, seed=seed)
    else:
        return tuple(train), ()
    return tuple(train[i] for i in chosen), tuple(train[i] for i in rest)


def _has_label(row: Record, config: TaskConfig) -> bool:
    return "/" not in config.name or row.values.get(config.label_field) != -1


def _read(row: Record, template: Template, config: TaskConfig, known: OptTask | None) -> Example:
    name = f"{row.source}:{row.number}"
    if known is None:
        texts = {name: _text(row, name) for name in template.field_names}
        return Example(texts, _label(row, config), name)
    try:
        reading = known.read(_renumbered(row, known))
        texts = {name: reading.fields[name] for name in template.field_names}
        read = (*texts.values(), *reading.options, *reading.answers)
        places = range(len(reading.options or config.labels))
        if not all(isinstance(text, str) for text in read) or not reading.gold:
            raise TypeError
        if any(place not in places for place in reading.gold):
            raise IndexError
    except KeyError as error:
        names = ", ".join(repr(name) for name in row.values)
        raise UserError(
            f"{row.where}: has no field {error}, which {config.name} reads (got {names}). Give it."
        ) from None
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError):
        raise UserError(
            f"{row.where}: is not a row of {config.name}. Give rows as the data set "
            f"{known.train.partition(':')[0]} has them."
        ) from None
    if template.before and isinstance(first := template.before[0], Field):
        texts[first.name] = texts[first.name].lstrip()
    options = reading.options
    gold = reading.gold if len(reading.gold) > 1 else ()
    return Example(texts, reading.gold[0], name, options, gold, reading.answers)


def _renumbered(row: Record, known: OptTask) -> Mapping[str, Any]:
    """The values of a row with the classes as the task numbers them, where the data name them."""
    names, label = row.class_names.get("label", ()), row.values.get("label", -1)
    if set(names) != set(known.classes) or label not in range(len(names)):
        return row.values
    return {**row.values, "label": known.classes.index(names[label])}


def _value(row: Record, name: str, key: str) -> Any:
    if name not in row.values:
        names = ", ".join(repr(name) for name in row.values)
        raise UserError(
            f"{row.where}: has no field {name!r}, which task.{key} names (got {names}). Name one "
            "of these."
        )
    value = row.values[name]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise UserError(
            f"{row.where}: field {name!r} is null. Give a value or leave the {row.unit} out."
        )
    return value


def _text(row: Record, name: str) -> str:
    value = _value(row, name, "template")
    if not isinstance(value, str):
        raise UserError(
            f"{row.where}: field {name!r} is not text (got {checks.show(value)}). Put it in quotes."
        )
    return value


def _label(row: Record, config: TaskConfig) -> int:
    """The class of a row.

    `classes` decide first; then, for an index, the names that the data give its classes, if any of
    them is one of `classes` or a label word, whatever their case; then label words and indices,
    where they agree.
    """
    value = _value(row, config.label_field, "label_field")
    shown = checks.show(value)
    if config.threshold is not None:
        try:
            score = float(value)
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if not math.isfinite(score):
            raise UserError(
                f"{row.where}: the label is not a number, which task.threshold compares (got "
                f"{shown}). Correct it."
            )
        return int(score >= config.threshold)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(
            f"{row.where}: the label is neither text nor a whole number (got {shown}). Give an "
            "index, a label word or a class name."
        )
    name = str(value)
    classes = [str(word) for word in config.classes or ()]
    if name in classes:
        return classes.index(name)
    names = row.class_names.get(config.label_field, ())
    if isinstance(value, int) and 0 <= value < len(names):
        places = config.classes_of(names)
        if classes or any(place is not None for place in places):
            if (place := places[value]) is not None:
                return place
            raise UserError(
                f"{row.where}: the data name the class {value} {names[value]!r}, which is not one "
                f"of {', '.join(classes or config.labels)} (got {', '.join(names)}). Name the "
                "classes in task.classes, in the order of task.labels."
            )
    indices = [str(i) for i in range(len(config.labels))]
    found = {words.index(name) for words in (config.labels, indices) if name in words}
    if len(found) > 1:
        raise UserError(
            f"{row.where}: the label may be an index or a label word (got {shown}). Name the "
            "classes in task.classes."
        )
    if not found:
        raise UserError(
            f"{row.where}: the label is not one of {', '.join(classes or config.labels)} nor an "
            f"index from 0 to {len(config.labels) - 1} (got {shown}). Correct it, or name the "
            "classes in task.classes."
        )
    return found.pop()
