"""The eleven tasks on which MeZO tunes OPT: templates, options and answers from the hub's rows.

A task's rows are those of GLUE, SuperGLUE, BoolQ, SQuAD and DROP as the hub has them. The prompts
are those of the code of Malladi et al. (arXiv:2305.17333).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """What a row says.

    Attributes:
        fields: text of the template's fields.
        gold: the right options, the first of them the one to train on; indices into `options`, or
            into the task's label words where there are none.
        options: the row's own options.
        answers: right texts, where a text is to be generated.
    """

    fields: Mapping[str, str]
    gold: tuple[int, ...]
    options: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OptTask:
    """A task of the suite.

    Attributes:
        train: data set to train on.
        test: data set to test on.
        template: in braces; `{label}` is the place of the option.
        read: what a row says. A `KeyError` names a field that it lacks.
        labels: the label words; none where every row brings its own options.
        classes: what the hub's data set calls the classes, in its order.
        calibration: template of the prompt without the example, for domain calibration; None where
            a text is generated.
        objective: "classification" trains on the choice among the options, "completion" on the
            tokens of the right one.
        metric: "accuracy", or "f1" of a generated text.
        num_validation: examples of the training set held out beside 1,000 to train on.
    """

    train: str
    test: str
    template: str
    read: Callable[[Values], Reading]
    labels: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    calibration: str | None = "{label}"
    objective: Literal["classification", "completion"] = "classification"
    metric: Literal["accuracy", "f1"] = "accuracy"
    num_validation: int = 500

    @property
    def values(self) -> dict[str, Any]:
        """The keys of a task's configuration."""
        return {
            "train": self.train,
            "validation": "hold_out",
            "test": self.test,
            "template": self.template,
            "labels": self.labels,
            "num_train": 1000,
            "num_validation": self.num_validation,
            "num_test": 1000,
            "truncation": "left",
        }


def _labelled(*names: str) -> Callable[[Values], Reading]:
    """A row whose fields stand as they are, with the class in "label"."""

    def read(row: Values) -> Reading:
        return Reading({name: row[name] for name in names}, (int(row["label"]),))

    return read


def _sst2(row: Values) -> Reading:
    return Reading({"sentence": row["sentence"].strip()}, (int(row["label"]),))


def _boolq(row: Values) -> Reading:
    """The answer is "answer" in BoolQ itself, and "label" in SuperGLUE's copy."""
    question = row["question"]
    question = question if question.endswith("?") else f"{question}?"
    fields = {"passage": row["passage"], "question": question[:1].upper() + question[1:]}
    return Reading(fields, (0 if row["answer" if "answer" in row else "label"] else 1,))


def _wsc(row: Values) -> Reading:
    fields = {"text": row["text"], "noun": row["span1_text"], "pronoun": row["span2_text"].lower()}
    return Reading(fields, (int(row["label"]),))


def _copa(row: Values) -> Reading:
    connective = ("so", "because")[("effect", "cause").index(row["question"])]
    fields = {"premise": row["premise"].rstrip().removesuffix("."), "connective": connective}
    choices = tuple(_continued(row[name]) for name in ("choice1", "choice2"))
    return Reading(fields, (int(row["label"]),), choices)


def _continued(sentence: str) -> str:
    """A sentence as it goes on within another: its first word in lower case, unless it is I."""
    first, space, rest = sentence.rstrip(" ").partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


def _record(row: Values) -> Reading:
    query = row["query"].rstrip(" ")
    entities = list(row["entities"])
    return Reading(
        {"passage": row["passage"].replace("@highlight\n", "- ")},
        tuple(entities.index(answer) for answer in row["answers"]),
        tuple(query.replace("@placeholder", entity) for entity in entities),
    )


def _squad(row: Values) -> Reading:
    fields = {"title": row["title"], "context": row["context"]}
    return _answered({**fields, "question": row["question"].strip()}, row["answers"]["text"])


def _drop(row: Values) -> Reading:
    fields = {"passage": row["passage"], "question": row["question"].strip()}
    return _answered(fields, row["answers_spans"]["spans"])


def _answered(fields: Mapping[str, str], answers: Any) -> Reading:
    """The option to train on is the first answer and the end of its line."""
    if not isinstance(answers, list | tuple):
        raise TypeError
    return Reading(fields, (0,), (f"{answers[0]}\n",), tuple(answers))


_YES_NO, _NO_YES = ("Yes", "No"), ("No", "Yes")
_FALSE_TRUE = ("False", "True")

OPT_TASKS: Mapping[str, OptTask] = {
    "sst2": OptTask(
        train="nyu-mll/glue/sst2:train",
        test="nyu-mll/glue/sst2:validation",
        template="{sentence} It was {label}",
        read=_sst2,
        labels=("terrible", "great"),
        classes=("negative", "positive"),
        calibration="It was {label}",
    ),
    "rte": OptTask(
        train="aps/super_glue/rte:train",
        test="aps/super_glue/rte:validation",
        template='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n{label}',
        read=_labelled("premise", "hypothesis"),
        labels=_YES_NO,
        classes=("entailment", "not_entailment"),
    ),
    "cb": OptTask(
        train="aps/super_glue/cb:train",
        test="aps/super_glue/cb:validation",
        template='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n{label}',
        read=_labelled("premise", "hypothesis"),
        labels=("Yes", "No", "Maybe"),
        classes=("entailment", "contradiction", "neutral"),
        num_validation=100,
    ),
    "boolq": OptTask(
        train="google/boolq:train",
        test="google/boolq:validation",
        template="{passage} {question}\n{label}",
        read=_boolq,
        labels=_YES_NO,
        classes=_FALSE_TRUE,
    ),
    "wsc": OptTask(
        train="aps/super_glue/wsc.fixed:train",
        test="aps/super_glue/wsc.fixed:validation",
        template='{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {noun}? '
        "Yes or No?\n{label}",
        read=_wsc,
        labels=_NO_YES,
        classes=_FALSE_TRUE,
    ),
    "wic": OptTask(
        train="aps/super_glue/wic:train",
        test="aps/super_glue/wic:validation",
        template='Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
        "{sentence1}\n{sentence2}\n{label}",
        read=_labelled("word", "sentence1", "sentence2"),
        labels=_NO_YES,
        classes=_FALSE_TRUE,
    ),
    "multirc": OptTask(
        train="aps/super_glue/multirc:train",
        test="aps/super_glue/multirc:validation",
        template='{paragraph}\nQuestion: {question}\nI found this answer "{answer}". '
        "Is that correct? Yes or No?\n{label}",
        read=_labelled("paragraph", "question", "answer"),
        labels=_NO_YES,
        classes=_FALSE_TRUE,
    ),
    "copa": OptTask(
        train="aps/super_glue/copa:train",
        test="aps/super_glue/copa:validation",
        template="{premise} {connective} {label}",
        read=_copa,
        classes=("choice1", "choice2"),
        calibration="{connective} {label}",
        objective="completion",
        num_validation=100,
    ),
    "record": OptTask(
        train="aps/super_glue/record:train",
        test="aps/super_glue/record:validation",
        template="{passage}\n- {label}",
        read=_record,
        calibration="- {label}",
        objective="completion",
    ),
    "squad": OptTask(
        train="rajpurkar/squad:train",
        test="rajpurkar/squad:validation",
        template="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer: {label}",
        read=_squad,
        calibration=None,
        objective="completion",
        metric="f1",
    ),
    "drop": OptTask(
        train="ucinlp/drop:train",
        test="ucinlp/drop:validation",
        template="Passage: {passage}\nQuestion: {question}\nAnswer: {label}",
        read=_drop,
        calibration=None,
        objective="completion",
        metric="f1",
    ),
}
"""The tasks by name; `opt/NAME` is the name of such a task in a configuration."""


def opt_task(name: str) -> OptTask | None:
    """The task that a configuration's name `opt/NAME` stands for; None for any other name.

    >>> opt_task("opt/rte").labels
    ('Yes', 'No')
    """
    suite, _, known = name.partition("/")
    return OPT_TASKS.get(known) if suite == "opt" else None
