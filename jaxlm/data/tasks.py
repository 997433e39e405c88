"""Tasks: where the examples are, the template, and the label words."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from jaxlm.core import checks
from jaxlm.core.errors import UserError
from jaxlm.data.opt_tasks import OPT_TASKS, OptTask, opt_task
from jaxlm.data.roberta_tasks import ROBERTA_TASKS
from jaxlm.data.sources import SHIPPED, SPLITS
from jaxlm.data.templates import Template

if TYPE_CHECKING:
    from jaxlm.data.examples import Task


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A classification task, as the YAML key `task` holds it.

    Attributes:
        name: name of the task.
        train: file or data set with the training examples (`read_rows` says which); None for none.
        validation: the same, or "hold_out" for some of what training leaves: k per class,
            `num_validation` in all, or as many as `num_train` if there are so many.
        test: the same.
        template: see `Template`.
        labels: the label words, in the order of the classes.
        label_field: field that holds the class: its index, its label word, or its name in
            `classes`.
        classes: names of the classes in the data, in the order of `labels`.
        fields: fields that *sent_0*, *sent_1*, ... of an LM-BFF template stand for.
        k: examples of every class to train on; None for all.
        num_train: examples to train on, drawn over all classes; None for all, or for `k`.
        num_validation: examples held out beside `num_train`.
        num_test: examples to test on; None for all.
        test_seed: of the draw of `num_test` examples, which no run's own seed changes.
        max_length: tokens to which an example is cut; None for as many as the model takes.
        max_new_tokens: most tokens of an answer that is written; None for 50.
        first_field_limit: tokens to which the template's first field is cut; None for no limit.
        truncation: what is cut of a longer example: "fields", the ends of the longest, or "left",
            the beginning of the text.
        threshold: where the label is a score, the least score of the second class.

    Raises:
        UserError: a value of the wrong type or size, an empty or repeated label word, fewer than
            two of them, `classes` of another length, "hold_out" without k, `num_validation` or
            `num_train`, or k beside `num_train`.
    """

    name: str
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    template: str
    labels: tuple[str, ...]
    label_field: str = "label"
    classes: tuple[str | int, ...] | None = None
    fields: tuple[str, ...] | None = None
    k: int | None = None
    num_train: int | None = None
    num_validation: int | None = None
    num_test: int | None = None
    test_seed: int = 0
    max_length: int | None = None
    max_new_tokens: int | None = None
    first_field_limit: int | None = None
    truncation: Literal["fields", "left"] = "fields"
    threshold: float | None = None

    def __post_init__(self) -> None:
        for key in _NUMBERS:
            _check_number(self, key)
        Template.parse(self.template)
        if self.labels or not self.own_options:
            self._check_labels()
        if self.k is not None and self.num_train is not None:
            raise UserError(
                f"task.num_train: is given beside task.k (got {self.num_train}). Keep one."
            )
        counts = (self.k, self.num_train, self.num_validation)
        if self.validation == "hold_out" and not any(counts):
            raise UserError(
                "task.validation: nothing says how many examples to hold out (got hold_out). Give "
                "task.k, task.num_train or task.num_validation."
            )

    def load(self, *, seed: int, base_dir: str | Path | None = None) -> "Task":
        """`jaxlm.data.load_task` of this task."""
        from jaxlm.data.examples import load_task

        return load_task(self, seed=seed, base_dir=base_dir)

    @property
    def own_options(self) -> bool:
        """Whether the options come with each example, in place of label words."""
        known = opt_task(self.name)
        return known is not None and not known.labels

    @property
    def answered(self) -> bool:
        """Whether an answer is written, in place of a choice among options."""
        known = opt_task(self.name)
        return known is not None and known.metric == "f1"

    @property
    def answer_length(self) -> int:
        """Most tokens of an answer; a prompt leaves room for them."""
        return 50 if self.max_new_tokens is None else self.max_new_tokens

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called: `classes` or, without these, `labels`."""
        return tuple(map(str, self.classes or self.labels))

    def classes_of(self, names: Sequence[str]) -> list[int | None]:
        """The class that each of some names is, whatever their case; None of a name that is none.

        Data and models name their classes, in an order of their own.
        """
        words = self.class_names
        folded = [word.casefold() for word in words]
        places: list[int | None] = []
        for name in names:
            alike = folded.count(name.casefold()) == 1
            place = folded.index(name.casefold()) if alike else None
            places.append(words.index(name) if name in words else place)
        return places

    def columns_of(self, names: Sequence[str]) -> list[int]:
        """For each class the place of its name among those of a model's outputs.

        Where no name is that of a class they say nothing, and the order is taken as it is.

        Raises:
            UserError: some names are those of classes, but not all, or there are others.
        """
        places = self.classes_of(names)
        count = len(self.labels)
        if all(place is None for place in places):
            return list(range(count))
        if sorted(-1 if place is None else place for place in places) != list(range(count)):
            raise UserError(
                f"model: its classes are not {', '.join(self.class_names)} (got "
                f"{', '.join(names)}). Name those of the model in task.classes, in the order of "
                "task.labels."
            )
        return [places.index(place) for place in range(count)]

    def _check_labels(self) -> None:
        for number, label in enumerate(self.labels, start=1):
            if not label.strip():
                raise UserError(
                    f"task.labels: word {number} is empty. Give a word for every class."
                )
        if len(self.labels) < 2:
            raise UserError(
                "task.labels: needs a word for each class, at least two (got "
                f"{checks.show(self.labels)}). Give the others."
            )
        for key in ("labels", "classes"):
            words = [str(word) for word in getattr(self, key) or ()]
            for word in words:
                if words.count(word) > 1:
                    raise UserError(
                        f"task.{key}: has a word twice (got {word!r}). Give every class its own."
                    )
        if self.classes is not None and len(self.classes) != len(self.labels):
            raise UserError(
                f"task.classes: needs {len(self.labels)} names, as many as task.labels (got "
                f"{len(self.classes)}). Give one for each label, in the same order."
            )


_SUITES: Mapping[str, Mapping[str, OptTask | Mapping[str, Any]]] = {
    "opt": OPT_TASKS,
    "roberta": ROBERTA_TASKS,
}


def shipped_names() -> list[str]:
    """Names of the tasks that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/task.yaml"))


def shipped_task(name: str) -> TaskConfig:
    """The configuration of a task that comes with the package.

    >>> shipped_task("subj").test
    'jaxlm:subj/test.jsonl.gz'
    """
    return task_config({"name": name})


def task_config(values: Mapping[str, Any]) -> TaskConfig:
    """Makes a task's configuration from a mapping, as YAML gives it.

    Where `name` is that of a shipped task, or one of `opt/NAME` and `roberta/NAME`, the keys that
    are not given are that task's; a key given as None counts as given.

    Raises:
        UserError: an unknown or missing key, a value of the wrong type, or as `TaskConfig`.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"task: not a section of keys (got {checks.show(values)}). Give its keys.")
    known = [field.name for field in fields(TaskConfig)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean task.{near[0]}?" if near else f"Use one of {', '.join(known)}."
            raise UserError(f"task.{key}: not a key of a task. {hint}")
    name = values.get("name")
    merged = {**_known_values(str(name)), **values}
    for key in ("name", "template", "labels"):
        if key not in merged:
            meant = [f"{suite}/{name}" for suite, known in _SUITES.items() if str(name) in known]
            hint = f" Did you mean {' or '.join(meant)}?" if meant else ""
            raise UserError(
                f"task.{key}: missing, and task.name is not that of a task that is known (got "
                f"{checks.show(name)}). Give it, or the name of a shipped task "
                f"({', '.join(shipped_names())}).{hint}"
            )
    return TaskConfig(**{key: _typed(key, value) for key, value in merged.items()})


_COUNTS = (
    *("k", "num_train", "num_validation", "num_test"),
    *("max_length", "max_new_tokens", "first_field_limit"),
)
_NUMBERS = (*_COUNTS, "test_seed", "threshold")
_KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("name", "template", "label_field"), ((str,), "text. Put it in quotes")),
    **dict.fromkeys(SPLITS, ((str, type(None)), "the name of a file or data set. Give that")),
}
_LISTS = {"labels": (str,), "classes": (str, int), "fields": (str,)}


def _typed(key: str, value: Any) -> Any:
    """The value of a key, with lists as tuples.

    Raises:
        UserError: a value of the wrong type.
    """
    if key in _NUMBERS:
        _check_number(SimpleNamespace(**{key: value}), key)
    if key == "truncation":
        checks.one_of("task.truncation", value, ("fields", "left"))
    if key in _KEYS:
        types, wanted = _KEYS[key]
        if not isinstance(value, types) or isinstance(value, bool):
            reason, _, remedy = wanted.partition(". ")
            raise UserError(f"task.{key}: not {reason} (got {checks.show(value)}). {remedy}.")
    if key not in _LISTS or (value is None and key != "labels"):
        return _unicode(key, value)
    if not isinstance(value, list | tuple):
        raise UserError(f"task.{key}: not a list (got {checks.show(value)}). Give one.")
    for item in value:
        large = isinstance(item, int) and abs(item) > checks.MOST
        if not isinstance(item, _LISTS[key]) or isinstance(item, bool) or large:
            raise UserError(
                f"task.{key}: holds what is not text (got {checks.show(item)}). Put it in quotes."
            )
        _unicode(key, item)
    return tuple(value)


def _check_number(config: Any, key: str) -> None:
    check = {"test_seed": checks.seeds, "threshold": checks.number}.get(key, checks.whole)
    try:
        check(config, key)
    except UserError as error:
        raise UserError(f"task.{error}") from None


def _unicode(key: str, value: Any) -> Any:
    """The value; a text must be one, since YAML may write half of a character."""
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"task.{key}: holds half of a character (got {ascii(value)[:60]}). Write the whole one."
        ) from None
    return value


def _known_values(name: str) -> Mapping[str, Any]:
    """The keys of a task that is known by its name; none of any other."""
    if name in shipped_names():
        return _shipped_values(name)
    prefix, _, known = name.partition("/")
    if prefix not in _SUITES or not known:
        return {}
    if known not in _SUITES[prefix]:
        names = ", ".join(f"{prefix}/{name}" for name in _SUITES[prefix])
        raise UserError(f"task.name: not known (got {name!r}). Choose one of {names}.")
    task = _SUITES[prefix][known]
    return task.values if isinstance(task, OptTask) else task


def _shipped_values(name: str) -> dict[str, Any]:
    import yaml

    content = yaml.safe_load((SHIPPED / name / "task.yaml").read_text(encoding="utf-8"))
    splits = {split: f"jaxlm:{name}/{split}.jsonl.gz" for split in SPLITS}
    return {"name": name, **splits, **content["task"]}
