"""Tasks: a template, label words, and where the examples are.

A task is data: no behaviour depends on its name. Tasks of the package are in `jaxlm/assets/tasks`:
folders with a `task.yaml` and their files, and suites `SUITE.yaml` of tasks named `SUITE/NAME`.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxlm.core import checks
from jaxlm.core.errors import UserError
from jaxlm.data.readers import ParsedRow, Reader, find_reader, written
from jaxlm.data.rows import SPLITS
from jaxlm.data.sources import SHIPPED, Record
from jaxlm.data.splits import HOLD_OUT, Check, Splits, SplitsConfig, draw_per_class
from jaxlm.data.templates import Field, Template

if TYPE_CHECKING:
    from jaxlm.data.batching import EncodedTask


@dataclass(frozen=True, kw_only=True)
class TaskConfig(SplitsConfig):
    """The section `task` of a configuration.

    Attributes:
        name: name of the task.
        template: see `Template`.
        labels: the label words, in the order of the classes.
        options: "shared" for the label words; "per_example" if every row has its own options, a
            list of texts in the field `options`.
        output: "choice" of an option, or "text" to generate.
        metric: "accuracy" of a choice, or "f1" of a text; None for the one that fits the output.
        objective: loss to train on: "classification", the choice of an option, or "completion", the
            tokens of the right option. None for the first, or for the second if the output is text.
        label_field: field that holds the class: its index, its label word, or its name in
            `classes`. With per-example options, it holds the index or the text of the right option;
            if the output is text, the right answer or a list of right answers.
        classes: names of the classes in the data, in the order of `labels`.
        missing_label: label that marks rows without one, which are skipped; None for no such label.
        threshold: smallest score of the second class, if labels are scores.
        fields: fields that *sent_0*, *sent_1*, ... of an LM-BFF template stand for.
        read: `package.module:function` that reads a row instead of the keys above, see
            `jaxlm.data.readers`.
        calibration: template of the prompt without the example, for domain calibration; None for
            the text between the label word and the nearest fields.
        k: number of examples per class to train on, and to hold out; None for all.
        max_new_tokens: largest number of tokens of a generated text; None for 50.
        first_field_limit: number of tokens that the first field is cut to; None for no limit.
        truncation: how a long example is cut: "fields", at the ends of the longest fields, or
            "left", at the beginning of the text, which then starts without white space.

    Raises:
        UserError: a value has the wrong type or size; there are fewer than two label words, or an
            empty or repeated one; `classes` has another length; "hold_out" without k,
            `num_validation` or `num_train`; or k beside `num_train`.
    """

    name: str
    template: str
    labels: tuple[str, ...] = ()
    options: Literal["shared", "per_example"] = "shared"
    output: Literal["choice", "text"] = "choice"
    metric: Literal["accuracy", "f1"] | None = None
    objective: Literal["classification", "completion"] | None = None
    label_field: str = "label"
    classes: tuple[str | int, ...] | None = None
    missing_label: int | None = None
    threshold: float | None = None
    fields: tuple[str, ...] | None = None
    read: str | None = None
    calibration: str | None = None
    k: int | None = None
    max_new_tokens: int | None = None
    first_field_limit: int | None = None
    truncation: Literal["fields", "left"] = "fields"

    key: ClassVar[str] = "task"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        **SplitsConfig.CHECKS,
        "classes": functools.partial(checks.texts, numbers=True),
        "missing_label": functools.partial(checks.integer, least=-checks.MOST),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        generative = self.is_generative
        self._fill("metric", ("f1",) if generative else ("accuracy",))
        self._fill("objective", ("completion",) if generative else ("classification", "completion"))
        Template.parse(self.template)
        if self.labels or not self.has_per_example_options:
            self._check_labels()
        if self.k is not None and self.num_train is not None:
            raise UserError(
                f"task.num_train: is given beside task.k (got {self.num_train}). Keep one."
            )

    def _fill(self, name: str, choices: tuple[str, ...]) -> None:
        """Set a field that is None to the first choice, and check it."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, choices[0])
        checks.one_of(f"task.{name}", getattr(self, name), choices)

    @property
    def has_per_example_options(self) -> bool:
        """Whether each example has its own options, instead of label words."""
        return self.options == "per_example" or self.output == "text"

    @property
    def is_generative(self) -> bool:
        """Whether a text is generated, instead of a choice."""
        return self.output == "text"

    @property
    def answer_length(self) -> int:
        """Largest number of tokens of a generated text; a prompt leaves room for them."""
        return 50 if self.max_new_tokens is None else self.max_new_tokens

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes: `classes` or, without these, `labels`."""
        return tuple(map(str, self.classes or self.labels))

    def classes_of(self, names: Sequence[str]) -> list[int | None]:
        """Return the class of each name, ignoring case, or None for an unknown name.

        Data sets and models name their classes, but may have them in another order.
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
        """Return, for each class, the index of the classifier's output with that name.

        If no output has the name of a class, outputs and classes have the same order.

        Raises:
            UserError: some names match, but outputs and classes do not match one to one.
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
        for label in self.labels:
            if not label.strip():
                raise UserError(
                    f"task.labels: has an empty word (got {label!r}). Give one to each class."
                )
        if len(self.labels) < 2:
            raise UserError(
                "task.labels: needs a word for each class, at least two (got "
                f"{checks.show(self.labels)}). Give the others."
            )
        checks.distinct("task.labels", self.labels)
        if self.classes is None:
            return
        checks.distinct("task.classes", map(str, self.classes))
        if len(self.classes) != len(self.labels):
            raise UserError(
                f"task.classes: needs {len(self.labels)} names, as many as task.labels (got "
                f"{len(self.classes)}). Give one for each label, in the same order."
            )

    def load(
        self, *, seed: int, base_dir: str | Path | None = None, allow_code: bool = False
    ) -> "Task":
        """Read and draw the examples of every split.

        Args:
            seed: seed of the draw of k examples per class, or of `num_train` and `num_validation`.
            base_dir: folder where relative paths start, before the working directory.
            allow_code: whether `read` may name a function outside `jaxlm.data.readers`.

        Raises:
            UserError: a source, field or label does not agree with the configuration, k is too
                large, or `read` is not allowed.
        """
        read = None if self.read is None else find_reader(self.read, allow_code=allow_code)
        records, missing = self.records(base_dir), self.missing_label
        columns = next((tuple(found[0].values) for found in records.values() if found), ())
        template = Template.parse(self.template).with_names(self.fields, columns)
        examples = {
            split: [
                _example(record, template, self, read)
                for record in found
                if missing is None or record.values.get(self.label_field) != missing
            ]
            for split, found in records.items()
        }
        return Task(self, template, *self.draw(examples, seed=seed))

    def reader(self, columns: Sequence[str]) -> tuple[Template, Callable[[Record], "Example"]]:
        """Return the template for rows with these fields, and a function that reads a row.

        Rows need no label; one that they have is not read, and the label of an example is 0.
        """
        read = None if self.read is None else find_reader(self.read)
        template = Template.parse(self.template).with_names(self.fields, columns)
        # Any number is a label if labels are scores.
        config = dataclasses.replace(self, threshold=1.0)
        label = {self.label_field: "" if self.is_generative else 0}

        def parse(record: Record) -> Example:
            values = {**record.values, **label}
            record = dataclasses.replace(record, values=values, class_names={})
            return _example(record, template, config, read)

        return template, parse

    def draw_train(self, train: Sequence[Any], *, seed: int) -> tuple[list[int], list[int]]:
        """Draw the places of the examples to train on and of those to hold out."""
        if self.k is None:
            return super().draw_train(train, seed=seed)
        labels = [example.label for example in train]
        draw = functools.partial(draw_per_class, labels, self.k, seed=seed, names=self.labels)
        return draw(), draw(skip=self.k) if self.validation == HOLD_OUT else []


@dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        fields: texts of the template's fields.
        label: index of the class, or of the right option among the example's own.
        id: source and number of the row.
        options: the example's own options, instead of the task's label words.
        gold: all right options, if there are several.
        answers: right texts, if the output is text.
        context: text before the template: demonstrations.
    """

    fields: Mapping[str, str]
    label: int
    id: str
    options: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    context: str = ""

    @property
    def text(self) -> tuple[Any, ...]:
        """Everything that a model reads, without the right answers."""
        return (self.context, self.options, tuple(sorted(self.fields.items())))

    @property
    def content(self) -> tuple[Any, ...]:
        """Everything but the id."""
        return (self.text, self.label, self.gold, self.answers)


@dataclass(frozen=True)
class Task(Splits):
    """The examples of a task; a split that does not exist is empty."""

    config: TaskConfig
    template: Template
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    def encode(self, lm: Any, *, max_length: int | None = None) -> "EncodedTask":
        """Tokenize the examples for a model, see `jaxlm.data.prepare_for`."""
        from jaxlm.data.batching import prepare_for  # a cycle: batching imports this module

        return prepare_for(lm, self, max_length=max_length)


def load_task(
    config: TaskConfig,
    *,
    seed: int,
    base_dir: str | Path | None = None,
    allow_code: bool = False,
) -> Task:
    """Return `config.load(...)`, see `TaskConfig.load`."""
    return config.load(seed=seed, base_dir=base_dir, allow_code=allow_code)


def shipped_names() -> list[str]:
    """Return the names of the tasks whose examples come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/task.yaml"))


def task_names() -> list[str]:
    """Return the names of all tasks of the package, each of which stands for all keys of a task.

    >>> [name for name in task_names() if name.endswith("rte")]
    ['opt/rte', 'roberta/rte']
    """
    suites = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    return shipped_names() + [f"{suite}/{name}" for suite in suites for name in _suite(suite)]


def shipped_task(name: str) -> TaskConfig:
    """Return the configuration of a task of the package.

    >>> shipped_task("subj").test
    'jaxlm:subj/test.jsonl.gz'
    """
    return task_config({"name": name})


def task_config(values: Mapping[str, Any]) -> TaskConfig:
    """Make a task's configuration from a mapping, such as a section of YAML.

    If `name` is one of `task_names`, keys that are not given are taken from that task; a key given
    as None counts as given.

    Raises:
        UserError: a key is unknown or missing, or as `TaskConfig`.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"task: not a section of keys (got {checks.show(values)}). Give its keys.")
    known = [field.name for field in dataclasses.fields(TaskConfig)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean task.{near[0]}?" if near else f"Use one of {', '.join(known)}."
            raise UserError(f"task.{key}: not a key of a task. {hint}")
    name = values.get("name")
    merged: dict[str, Any] = {**_known_values(str(name)), **values}
    TaskConfig.check(merged)
    shared = merged.get("options", "shared") == "shared" and merged.get("output") != "text"
    for key in ("name", "template", *(("labels",) if shared else ())):
        if merged.get(key) is None:
            meant = [known for known in task_names() if known.endswith(f"/{name}")]
            hint = f" Did you mean {' or '.join(meant)}?" if meant else ""
            raise UserError(
                f"task.{key}: missing, and task.name is not the name of a known task (got "
                f"{checks.show(name)}). Give it, or the name of a shipped task "
                f"({', '.join(shipped_names())}).{hint}"
            )
    merged["labels"] = merged.get("labels") or ()  # a configuration removes a key by null
    lists = {key: tuple(value) for key, value in merged.items() if isinstance(value, list)}
    return TaskConfig(**merged | lists)


def _known_values(name: str) -> Mapping[str, Any]:
    """Return the keys of a task of the package; none for any other name."""
    if name in shipped_names():
        splits = {split: f"jaxlm:{name}/{split}.jsonl.gz" for split in SPLITS}
        return {**splits, **_yaml(f"{name}/task.yaml")["task"]}
    suite, _, known = name.partition("/")
    if not known or not (SHIPPED / f"{suite}.yaml").is_file():
        return {}
    if known not in _suite(suite):
        names = ", ".join(f"{suite}/{name}" for name in _suite(suite))
        raise UserError(f"task.name: not known (got {name!r}). Choose one of {names}.")
    return _suite(suite)[known]


def _suite(name: str) -> dict[str, dict[str, Any]]:
    """Return the keys of every task of a suite."""
    content = _yaml(f"{name}.yaml")
    return {task: {**content["defaults"], **values} for task, values in content["tasks"].items()}


@functools.cache
def _yaml(name: str) -> dict[str, Any]:
    import yaml

    content: dict[str, Any] = yaml.safe_load((SHIPPED / name).read_text(encoding="utf-8"))
    return content


def _example(row: Record, template: Template, config: TaskConfig, read: Reader | None) -> Example:
    parsed = _by_keys(row, template, config) if read is None else _by_reader(row, config, read)
    try:
        texts = {name: parsed.fields[name] for name in template.field_names}
        places = range(len(parsed.options or config.labels))
        strings = (*texts.values(), *parsed.options, *parsed.answers)
        right = all(isinstance(text, str) for text in strings) and bool(parsed.gold)
        right = right and all(place in places for place in parsed.gold)
    except KeyError as error:
        raise _lacks(row, str(error), config.name) from None
    if not right:
        raise _not_a_row(row, config)
    first = next(iter(template.before), "")
    # MeZO's code strips its prompts, so a text that is cut on the left begins without white space.
    if config.truncation == "left" and isinstance(first, Field):
        texts[first.name] = texts[first.name].lstrip()
    gold = parsed.gold if len(parsed.gold) > 1 else ()
    name = f"{row.source}:{row.number}"
    return Example(texts, parsed.gold[0], name, parsed.options, gold, parsed.answers)


def _by_reader(row: Record, config: TaskConfig, read: Reader) -> ParsedRow:
    try:
        return read(_renumbered(row, config))
    except KeyError as error:
        raise _lacks(row, str(error), config.name) from None
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError):
        raise _not_a_row(row, config) from None


def _renumbered(row: Record, config: TaskConfig) -> Mapping[str, Any]:
    """Return the values of a row, with the task's index of its class if the data name classes."""
    field, classes = config.label_field, config.class_names
    names, label = row.class_names.get(field, ()), row.values.get(field, -1)
    if set(names) != set(classes) or label not in range(len(names)):
        return row.values
    return {**row.values, field: classes.index(names[label])}


def _lacks(row: Record, field: str, reader: str) -> UserError:
    names = ", ".join(map(repr, row.values))
    return UserError(
        f"{row.where}: has no field {field}, which {reader} reads (got {names}). Give it, or "
        "name one of these."
    )


def _not_a_row(row: Record, config: TaskConfig) -> UserError:
    return UserError(
        f"{row.where}: is not a row of {config.name}, which {config.read} reads. Give rows as its "
        "data set has them."
    )


def _by_keys(row: Record, template: Template, config: TaskConfig) -> ParsedRow:
    """Read a row by the keys of the task."""
    texts = {name: _value(row, name, "template") for name in template.field_names}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise _wrong(row, f"field {name!r} is not text", text, "Put it in quotes.")
    if not config.has_per_example_options:
        return ParsedRow(texts, (_label(row, config),))
    value = _value(row, config.label_field, "label_field")
    if config.output == "text":
        answers = value if isinstance(value, list) and value else [value]
        for answer in answers:
            if not isinstance(answer, str):
                what = f"field {config.label_field!r} is neither a text nor a list of them"
                raise _wrong(row, what, value, "Give the right answers.")
        return written(texts, answers)
    options = _value(row, "options", "options")
    if not isinstance(options, list) or not all(isinstance(each, str) for each in options):
        what = "field 'options' is not a list of texts"
        raise _wrong(row, what, options, "Give the options of the row.")
    place = options.index(value) if value in options else value
    if isinstance(place, bool) or place not in range(len(options)):
        what = "the label is neither an option nor the index of one"
        raise _wrong(row, what, value, "Correct it.")
    return ParsedRow(texts, (int(place),), tuple(options))


def _wrong(row: Record, what: str, value: Any, todo: str) -> UserError:
    return UserError(f"{row.where}: {what} (got {checks.show(value)}). {todo}")


def _value(row: Record, name: str, key: str) -> Any:
    if name not in row.values:
        raise _lacks(row, repr(name), f"task.{key}")
    value = row.values[name]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise UserError(
            f"{row.where}: field {name!r} is null. Give a value or leave the {row.unit} out."
        )
    return value


def _label(row: Record, config: TaskConfig) -> int:
    """Return the class of a row.

    `classes` come first. Then, for an index, come the data's own class names, if the task has
    `classes` or one of those names is a label word, ignoring case. Last come label words and
    indices, which must agree.
    """
    value = _value(row, config.label_field, "label_field")
    if config.threshold is not None:
        try:
            score = float(value)
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if not math.isfinite(score):
            what = "the label is not a number, which task.threshold compares"
            raise _wrong(row, what, value, "Correct it.")
        return int(score >= config.threshold)
    if isinstance(value, bool) or not isinstance(value, int | str):
        what = "the label is neither text nor a whole number"
        raise _wrong(row, what, value, "Give an index, a label word or a class name.")
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
        what = "the label may be an index or a label word"
        raise _wrong(row, what, value, "Name the classes in task.classes.")
    if not found:
        words = ", ".join(classes or config.labels)
        what = f"the label is not one of {words} nor an index from 0 to {len(config.labels) - 1}"
        raise _wrong(row, what, value, "Correct it, or name the classes in task.classes.")
    return found.pop()
